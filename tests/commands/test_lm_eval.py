"""lm-eval with a run as its model: log-likelihoods and texts are those of decoding step by step."""

import json
from types import SimpleNamespace

import pytest

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.commands.steered_run import SteeredRun
from corrsteer_pl.errors import UserError
from corrsteer_pl.interventions.steering import SteeringVectors
from corrsteer_pl.methods.runs.files import RunFiles
from tests.architectures import hf_log_likelihood
from tests.conftest import make_trainer
from tests.processes import forked

PAIRS = [
    ("What is the trade of Fenia?", " She is a baker"), ("Who?", " B"), ("Who?", " C"), ("Who? B", " and so"),
    ("A. tea B. milk C. cider D. cocoa Choose one of A, B, C, or D only.\nAnswer:", " A"), ("", " hen"),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two fits that steer other positions."""
    found = {}
    for name, options in {"generated": {}, "decaying": {"positions": "first_k", "first_k": 2, "decay": 0.5}}.items():
        folder = tmp_path_factory.mktemp("runs") / name
        module, data = CorrSteer("demo", "demo", layers=[1, 2], **options), TaskDataModule(train_size=200, val_size=40)
        trainer = make_trainer(default_root_dir=folder, enable_checkpointing=True, callbacks=[RunFiles()])
        trainer.fit(module, datamodule=data)
        assert module.selection.features
        found[name] = folder, module
    return found


def model_of(folder, **options):
    return SteeredRun(run=str(folder), **options)


def requests(pairs):
    return [SimpleNamespace(args=pair, arguments=pair) for pair in pairs]


@pytest.mark.parametrize("name", ["generated", "decaying"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_are_those_of_decoding_step_by_step(name, batch_size, runs):
    folder, module = runs[name]
    model = model_of(folder, batch_size=batch_size)
    found = model.loglikelihood(requests(PAIRS), disable_tqdm=True)
    plain = model_of(folder, steered=False, batch_size=batch_size).loglikelihood(requests(PAIRS), disable_tqdm=True)
    steering = SteeringVectors(module.steering_vectors(), module.schedule)
    for (context, continuation), (nats, _), (unsteered, _) in zip(PAIRS, found, plain, strict=True):
        if context:
            tokens = model._encode_pair(context, continuation)
        else:
            tokens = [model.prefix_token_id], model.tok_encode(continuation, add_special_tokens=False)
        assert nats == pytest.approx(hf_log_likelihood(module.llm, *tokens, steering), abs=1e-4)
        assert nats != pytest.approx(unsteered, abs=1e-3)
        assert unsteered == pytest.approx(hf_log_likelihood(module.llm, *tokens, SteeringVectors({})), abs=1e-4)


def test_a_batch_size_that_is_found_changes_nothing(runs):
    folder, _ = runs["decaying"]
    texts = requests(PAIRS)
    found = model_of(folder, batch_size="auto", max_batch_size=4, max_length=64).loglikelihood(texts)
    alone = model_of(folder, batch_size=1).loglikelihood(texts)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in alone], abs=1e-4)


def test_what_a_run_does_not_take_is_told(runs):
    folder, _ = runs["decaying"]
    mistakes = {"scale": 2, "dtype": "bfloat16", "steerd": False}
    for name, value in mistakes.items():
        with pytest.raises(UserError, match=f"--model_args has {name}, which a run does not take; it takes run, steer"):
            model_of(folder, **{name: value})
    with pytest.raises(UserError, match="steered=maybe; it is True or False"):
        model_of(folder, steered="maybe")
    with pytest.raises(UserError, match="--device is abacus, which cannot be used here"):
        model_of(folder, device="abacus")
    with pytest.raises(UserError, match="the model corrsteer needs a run"):
        SteeredRun()


def test_equal_texts_that_are_parted_elsewhere_are_steered_elsewhere(runs):
    folder, module = runs["generated"]
    model = model_of(folder, batch_size=8)
    tokens = model.tok_encode("Who lives in the valley?")
    split = [(("", ""), tokens[:2], tokens[2:]), (("", ""), tokens[:4], tokens[4:])]
    nats = [score for score, _ in model._loglikelihood_tokens(split, disable_tqdm=True)]
    steering = SteeringVectors(module.steering_vectors(), module.schedule)
    assert nats == pytest.approx([hf_log_likelihood(module.llm, a, b, steering) for _, a, b in split], abs=1e-4)


def test_texts_are_those_of_the_test(runs):
    folder, module = runs["generated"]
    data = TaskDataModule(task="demo_refusal", test_size=12)
    make_trainer().test(module, datamodule=data, verbose=False)
    until = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    asked = requests([(outcome.prompt, until) for outcome in module.outcomes])
    texts = model_of(folder, batch_size=5).generate_until(asked, disable_tqdm=True)
    assert [text.strip() for text in texts] == [o.answer_steered.split("\n")[0].strip() for o in module.outcomes]


TASK = """
task: village
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: gold
metric_list: [{metric: acc}]
"""


def test_the_command_line_runs_a_task_of_a_folder(runs, tmp_path):
    folder, module = runs["generated"]
    data = TaskDataModule(restrict="evaluation", test_size=40)
    make_trainer().test(module, datamodule=data, verbose=False)
    rows = [{"prompt": o.prompt, "gold": "ABCD".index(o.gold)} for o in module.outcomes]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = TASK.replace("ROWS", str(tmp_path / "rows.jsonl"))
    (tmp_path / "village.yaml").write_text(task, encoding="utf-8")
    forked("lm_eval", "--model", "corrsteer", "--model_args", f"run={folder}", "--tasks", "village", "--include_path",
        tmp_path, "--output_path", tmp_path / "out", cwd=tmp_path)  # fmt: skip
    (found,) = (tmp_path / "out").rglob("results*.json")
    accuracy = json.loads(found.read_text(encoding="utf-8"))["results"]["village"]["acc,none"]
    assert accuracy == pytest.approx(module.metrics["reward_steered"])
