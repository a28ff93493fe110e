"""CRISP as a method, and fine-tuning beside it: what trains adapters."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from corrsteer_pl import TaskDataModule
from corrsteer_pl.cli.program import main
from corrsteer_pl.commands.export import export
from corrsteer_pl.commands.report import report_on
from corrsteer_pl.errors import NothingToLearn, UserError
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.methods.crisp import Crisp
from corrsteer_pl.methods.finetune import Finetune
from corrsteer_pl.methods.runs.files import RunFiles
from corrsteer_pl.models.llm import positions_of
from corrsteer_pl.models.sae_loading import load_saes
from tests.conftest import make_trainer, random_saes

FORGET = {"restrict": "evaluation", "fit_on": {"task": "demo_texts"}, "val_size": 40, "test_size": 120, "batch_size": 8}
QUICK = {"k": 5, "lr": 1e-2, "dropout": 0.0, "layers": [1, 2], "beta": 0.5}
LEARN = {"train_size": 160, "val_size": 24, "test_size": 40, "batch_size": 16}


def crisp(**options):
    return Crisp("demo", "demo", **{**QUICK, **options})


def fit(module, folder=None, ckpt_path=None, every=50, max_steps=-1, **data):
    saving = {"callbacks": [RunFiles(every)], "enable_checkpointing": True, "default_root_dir": folder}
    data = TaskDataModule("demo_forget", **{**FORGET, "train_size": 320, **data})
    make_trainer(**(saving if folder else {}), max_steps=max_steps).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, data


def learn(module, folder=None, ckpt_path=None, every=50, max_steps=-1, **data):
    saving = {"callbacks": [RunFiles(every)], "enable_checkpointing": True, "default_root_dir": folder}
    data = TaskDataModule(**{**LEARN, **data})
    make_trainer(**(saving if folder else {}), max_steps=max_steps).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crisp")
    module, data = fit(crisp(), folder)
    trainer = make_trainer(callbacks=[RunFiles()], enable_checkpointing=True, default_root_dir=folder)
    tested = TaskDataModule("demo_forget", **FORGET)
    trainer.test(module, datamodule=tested, verbose=False)
    return folder, module, data, tested


def test_every_batch_has_its_share_of_both_kinds(run):
    _, module, data, _ = run
    data.trainer = make_trainer()
    data.trainer.strategy._lightning_module = module
    module.counted = 0
    shares = [
        sum(example.gold == "positive" for example in batch.examples) / len(batch.examples)
        for batch in data.train_dataloader()
    ]
    module.counted = 320
    whole = sum(example.gold == "positive" for example in data.examples["train"]) / 320
    assert len(shares) == 40
    # To within one of eight texts.
    assert all(abs(share - whole) <= 1 / 8 for share in shares)


def test_salience_is_that_of_a_naive_loop_over_the_texts(run):
    _, module, data, _ = run
    sae, fired, n = module.saes[1], torch.zeros(2, 512), torch.zeros(2)
    with module._residuals([1]) as found:
        for example in data.examples["train"]:
            ids = torch.tensor([module.llm.token_ids(example.prompt)])
            mask = torch.ones_like(ids)
            module.llm.forward(ids, mask, positions_of(mask))
            activations = sae.encode(found[sae.site][0, 1:])  # without BOS
            kind = int(example.gold == "positive")
            fired[kind] += (activations > 0).sum(0)
            n[kind] += len(activations)
    expected = fired[1] / n[1] - fired[0] / n[0]
    torch.testing.assert_close(module.salience[1].difference().float(), expected, rtol=1e-4, atol=1e-4)
    assert module.salience[1].tokens.tolist() == n.tolist()


@pytest.mark.parametrize("source", ["demo", "random"])
def test_columns_give_what_the_whole_encoder_gives(source, llm, tmp_path):
    sae = load_saes("demo" if source == "demo" else str(random_saes(tmp_path, [1])), llm, [1])[1]
    residual = 3 * torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    whole, some = sae.encode(residual), [0, 5, 7]
    left, active = sae.columns(some)(residual)
    # A TopK SAE drops features that are not among the top ones; those that it keeps are the same.
    kept = whole[:, some] > 0
    assert kept.any()
    torch.testing.assert_close(active[kept], whole[:, some][kept], rtol=1e-4, atol=1e-5)
    if source == "random":
        torch.testing.assert_close(active, whole[:, some], rtol=1e-4, atol=1e-5)
    assert (left >= active).all()


def test_a_fresh_adapter_has_no_loss_of_retaining_and_training_lowers_the_other(run, monkeypatch):
    losses: dict[str, list[float]] = {"unlearn": [], "retain": [], "coherence": []}
    monkeypatch.setattr(
        Crisp, "log_loss", lambda self, name, loss: losses.setdefault(name, []).append(loss.detach().item())
    )
    fit(crisp())
    assert losses["retain"][0] == losses["coherence"][0] == 0
    assert losses["retain"][-1] > 0
    first, last = sum(losses["unlearn"][:4]), sum(losses["unlearn"][-4:])
    assert last < 0.7 * first


def test_what_is_to_be_unlearnt_gets_worse_and_the_rest_stays(run):
    _, module, *_ = run
    forgotten, retained = (module.metrics["measures"][f"accuracy_{part}"] for part in ("unlearn", "retain"))
    assert forgotten["steered"] < forgotten["baseline"] - 0.1
    assert retained["steered"] > retained["baseline"] - 0.03
    groups = module.metrics["groups"]
    assert groups["unlearn"]["reward_baseline"] == pytest.approx(1 - forgotten["baseline"])


@pytest.mark.parametrize("size", [3, 32])
def test_features_do_not_depend_on_batches(run, size):
    _, module, *_ = run
    assert fit(crisp(), batch_size=size)[0].salient == module.salient


@pytest.mark.parametrize("kind", ["crisp", "lora", "full"])
def test_an_interrupted_fit_ends_with_the_same_weights(kind, tmp_path):
    make = crisp if kind == "crisp" else lambda: Finetune("demo", adapter=kind, lr=1e-3)
    train = fit if kind == "crisp" else learn
    whole, _ = train(make(), tmp_path / "whole")
    train(make(), tmp_path / "parts", every=1, max_steps=5)
    onwards, _ = train(make(), tmp_path / "parts", ckpt_path=tmp_path / "parts/last.ckpt")
    assert whole.adapter.weights.keys() == onwards.adapter.weights.keys()
    for name, weight in whole.adapter.weights.items():
        torch.testing.assert_close(onwards.adapter.weights[name], weight, rtol=1e-4, atol=1e-6)
    stored = torch.load(tmp_path / "parts/last.ckpt", weights_only=True)
    assert stored["optimizer_states"] == []


@pytest.mark.parametrize("kind", ["crisp", "lora", "full"])
def test_a_checkpoint_and_an_exported_model_answer_as_the_fit_did(kind, run, tmp_path):
    if kind == "crisp":
        folder, module, _, tested = run
        again = crisp()
    else:
        folder = tmp_path / "run"
        module, _ = learn(Finetune("demo", adapter=kind, lr=1e-3), folder)
        tested = TaskDataModule(**LEARN)
        make_trainer().test(module, datamodule=tested, verbose=False)
        again = Finetune("demo", adapter=kind, lr=1e-3)
    make_trainer().test(again, datamodule=tested, ckpt_path=folder / "last.ckpt", verbose=False)
    assert again.outcomes == module.outcomes
    assert module.metrics["changed"] > 0
    export(folder, "merged", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][0] for letter in "ABCD"]
    for outcome, example in list(zip(module.outcomes, tested.examples["test"], strict=True))[:20]:
        scores = model(torch.tensor([tokenizer(example.prompt)["input_ids"]])).logits[0, -1]
        best = scores[letters].argmax() if kind == "crisp" else None
        token = letters[best] if kind == "crisp" else scores.argmax()
        assert tokenizer.decode([token]) == outcome.answer_steered


def test_files_tell_what_was_done(run):
    folder, module, *_ = run
    selection = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
    assert [(f["layer"], f["index"]) for f in selection["features"]] == [
        (layer, index) for layer, indices in module.salient.items() for index in indices
    ]
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert (folder / "last.ckpt").stat().st_size < 1_000_000
    report_on([folder])
    assert "nan" not in (folder / "report.html").read_text(encoding="utf-8").lower().replace("nano", "")


def test_other_options_than_those_of_the_fit_are_refused(run, tmp_path):
    folder, _, _, tested = run
    with pytest.raises(UserError, match="model.k is 9, but the checkpoint was fitted with 5"):
        make_trainer().test(crisp(k=9), datamodule=tested, ckpt_path=folder / "last.ckpt")
    with pytest.raises(UserError, match="the checkpoint was fitted by the method crisp, but the method is finetune"):
        make_trainer().test(Finetune("demo"), datamodule=tested, ckpt_path=folder / "last.ckpt")


def test_without_a_salient_feature_the_best_ratios_are_told():
    with pytest.raises(NothingToLearn, match="no feature is 1e.15 times as strong .* in layer 1, .* in layer 2"):
        fit(crisp(least_ratio=1e15))


def test_texts_of_one_kind_or_of_both_are_refused(tmp_path):
    rows = [{"text": f"Tell me about villager {i}", "label": 1} for i in range(40)]
    write_jsonl(tmp_path / "one.jsonl", rows)
    texts = {"task": "text_classification", "path": str(tmp_path / "one.jsonl"), "train_split": "all"}
    with pytest.raises(UserError, match="all 40 texts of the fit are positive"):
        fit(crisp(), fit_on=texts)
    write_jsonl(tmp_path / "both.jsonl", [*rows, *({**row, "label": 0} for row in rows[:3])])
    with pytest.raises(UserError, match="3 texts are both to be unlearnt and to be retained"):
        fit(crisp(), fit_on={**texts, "path": str(tmp_path / "both.jsonl")})
    with pytest.raises(UserError, match="crisp learns from labelled texts, but the task of the fit is answered"):
        fit(crisp(), fit_on=None, restrict=False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beta": 1.5}, "model.beta is 1.5; it is a share of the loss, from 0 to 1"),
        ({"gamma": -1.0}, "model.gamma is -1.0; it is a number from 0 on"),
        ({"lam": -1.0}, "model.lam is -1.0"),
        ({"k": 0}, "model.k is 0; it is a number of features"),
        ({"layers": []}, "model.layers is empty"),
        ({"rank": 0}, "model.rank is 0; it is a rank, at least 1"),
        ({"alpha": 0}, "model.alpha is 0; it is a number above 0"),
        ({"lr": 0.0}, "model.lr is 0.0; it is a number above 0"),
        ({"dropout": 1.0}, "model.dropout is 1.0; it is a share"),
        ({"weight_decay": -0.1}, "model.weight_decay is -0.1"),
        ({"adapter_layers": []}, "model.adapter_layers is empty"),
    ],
)
def test_options_that_cannot_be_are_told(options, sentence):
    with pytest.raises(UserError, match=sentence):
        crisp(**options)


# ---------------------------------------------------------------- fine-tuning


def test_the_loss_is_hugging_faces_on_the_answer_alone(monkeypatch):
    losses = []
    monkeypatch.setattr(Finetune, "log_loss", lambda self, name, loss: losses.append(loss.detach().item()))
    module, data = learn(Finetune("demo", adapter="lora"), sort_by_length=False, batch_size=8, max_steps=1)
    expected = []
    for example in data.examples["train"][:8]:
        prompt = module.llm.token_ids(example.prompt)
        answer = module.llm.tokenizer(f" {example.solution}", add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        expected.append(module.llm.model(torch.tensor([prompt + answer]), labels=labels).loss.item())
    assert losses[0] == pytest.approx(sum(expected) / 8, rel=1e-5)


def test_longer_answers_end_with_the_end_of_the_text():
    data = {"task": "demo_qa", "task_args": {}}
    module, data = learn(Finetune("demo", adapter="lora"), max_steps=1, **data)
    example = data.examples["train"][0]
    assert module.answer_ids(example) == module.llm.single_tokens([f" {example.solution}"])
    data.fit_task.max_new_tokens = 4
    assert module.answer_ids(example)[-1] in module.llm.eos_token_ids


def test_rates_are_the_papers_unless_given():
    assert learn(Finetune("demo"), max_steps=1)[0].learning_rate == 5e-6
    assert learn(Finetune("demo", lr=0.5), max_steps=1)[0].learning_rate == 0.5
    assert learn(Finetune("demo", adapter="lora"), max_steps=1)[0].learning_rate == 1e-4


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fine_tuning_learns_and_leaves_the_model_as_it_was(kind):
    module, _ = learn(Finetune("demo", adapter=kind, lr=3e-3 if kind == "lora" else 3e-4), train_size=480)
    assert module.selection.joint_reward > module.selection.baseline_reward + 0.2
    from corrsteer_pl.models.llm import LanguageModel

    untouched = LanguageModel.load("demo")
    ids = torch.tensor([module.llm.token_ids("Which pet does Bela keep?")])
    own = module.llm.model(ids).logits
    assert torch.equal(own, untouched.model(ids).logits)


def test_a_task_without_gold_answers_cannot_be_learnt():
    data = TaskDataModule("demo_refusal", train_size=20, val_size=4)
    with pytest.raises(UserError, match="finetune learns from gold answers, but .* has none: the task demo_refusal"):
        make_trainer().fit(Finetune("demo", adapter="lora"), datamodule=data)
    with pytest.raises(UserError, match="finetune learns to answer, but data.fit_on has texts|has none"):
        fit(Finetune("demo", adapter="lora"))
    with pytest.raises(UserError, match="model.adapter is 'some'; choose one of full, lora"):
        Finetune("demo", adapter="some")


def test_the_command_line_knows_both(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = "--trainer.enable_progress_bar=false"
    small = ["--data.train_size=64", "--data.val_size=12", "--data.test_size=12", quiet]
    assert main(["doctor", "--config", "demo_crisp.yaml", *small]) == 0
    assert main(["fit", "--config", "demo_crisp.yaml", *small]) == 0
    assert main(["test", "--ckpt_path", "checkpoints/demo_crisp/last.ckpt", quiet]) == 0
    assert "accuracy_unlearn" in capsys.readouterr().out
    tune = ["--method=finetune", "--model.llm=demo", "--model.adapter=lora", "--trainer.default_root_dir=tuned"]
    assert main(["fit", *tune, *small]) == 0
    assert main(["predict", "--ckpt_path", "tuned/last.ckpt", quiet]) == 0
    # A configuration of a task serves all methods.
    with pytest.warns(
        UserWarning, match="demo.yaml sets model.layers, model.saes, which the method finetune does not have"
    ):
        assert main(["transfer", "--ckpt_path", "tuned/last.ckpt", "--config", "demo.yaml", *small]) == 0
