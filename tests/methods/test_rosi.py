"""ROSI as a method: directions, a grid within a budget, an edit record, and a merged model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from corrsteer_pl import TaskDataModule
from corrsteer_pl.cli.program import main
from corrsteer_pl.commands.export import export
from corrsteer_pl.commands.report import report_on
from corrsteer_pl.errors import NothingToLearn, UserError
from corrsteer_pl.evaluation.text_loss import text_losses
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.methods.directions import common_ending
from corrsteer_pl.methods.rosi import Rosi
from corrsteer_pl.methods.runs.files import RunFiles
from corrsteer_pl.models.writers import writers
from corrsteer_pl.stats import ClassMeans
from tests.conftest import make_trainer

# Short lists keep these fits fast; the best strength may be at an edge of them.
pytestmark = pytest.mark.filterwarnings("ignore:model.strengths.*of the list")

SMALL = {"train_size": 96, "val_size": 48, "test_size": 60}
QUICK = {"form": "projection", "strengths": [2.0, 4.0], "topm": 2, "layers": [2, 3]}


def fit(module=None, ckpt_path=None, folder=None, every=50, max_steps=-1, **data):
    module = module or Rosi("demo", **QUICK)
    saving = (
        {"callbacks": [RunFiles(every)], "enable_checkpointing": True, "default_root_dir": folder} if folder else {}
    )
    data = TaskDataModule("demo_refusal", **{**SMALL, **data})
    make_trainer(**saving, max_steps=max_steps).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rosi")
    module, data = fit(folder=folder)
    trainer = make_trainer(callbacks=[RunFiles()], enable_checkpointing=True, default_root_dir=folder)
    tested = TaskDataModule("demo_refusal", **SMALL)
    trainer.test(module, datamodule=tested, verbose=False)
    return folder, module, data, tested


def test_class_means_are_those_of_numpy_and_parts_add_up():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, 2, 7, generator=generator)
    harmful, weight = torch.arange(50) % 3 == 0, (torch.arange(50) % 5 > 0).double()
    x[9, 0, 0, 0] = torch.nan  # left out
    kept = (weight > 0) & (torch.arange(50) != 9)
    parts = [ClassMeans((3, 2), 7) for _ in range(2)]
    for part, some in zip(parts, (slice(0, 20), slice(20, 50)), strict=True):
        part.update(x[some], harmful[some], weight[some])
    parts[0].absorb(parts[1])
    expected = x[kept & harmful].double().mean(0) - x[kept & ~harmful].double().mean(0)
    torch.testing.assert_close(parts[0].difference, expected)
    within = sum(((some - some.mean(0)) ** 2).sum((0, -1)) for some in (x[kept & harmful], x[kept & ~harmful]))
    separation = expected.square().sum(-1) / (within.double() / kept.sum())
    torch.testing.assert_close(parts[0].separation, separation, rtol=1e-5, atol=1e-8)


def test_a_planted_direction_is_recovered():
    generator = torch.Generator().manual_seed(1)
    planted = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    harmful = torch.arange(400) % 2 == 0
    x = torch.randn(400, 1, 2, 64, generator=generator)
    x[:, 0, 1] += 12 * harmful.unsqueeze(1) * planted
    means = ClassMeans((1, 2), 64)
    means.update(x, harmful, torch.ones(400))
    assert torch.nn.functional.cosine_similarity(means.difference[0, 1], planted.double(), dim=0) > 0.99
    assert means.separation[0, 1] > 20 * means.separation[0, 0]


def test_directions_are_hugging_faces_residuals_after_the_instruction(run):
    _, module, data, _ = run
    found: dict[bool, list] = {True: [], False: []}
    for example in data.examples["train"]:
        ids = torch.tensor([module.llm.token_ids(example.prompt)])
        hidden = module.llm.model(ids, output_hidden_states=True).hidden_states
        # hidden_states[block + 1] is what the block gives; one prompt at a time, without padding.
        found[example.gold == "refuse"].append(hidden[2 + 1][0, -1])
    expected = torch.stack(found[True]).mean(0) - torch.stack(found[False]).mean(0)
    difference = module.means.difference[module.layers.index(2), -1].float()
    torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-3)


def test_positions_are_the_tokens_that_all_prompts_end_with(run):
    _, module, data, _ = run
    prompts = [module.llm.token_ids(example.prompt) for example in data.examples["train"][:64]]
    shared = common_ending(prompts)
    assert module.llm.tokenizer.decode(prompts[0][-shared:]).endswith("Response:")
    assert module.means.places == (2, min(shared, 5))
    narrow, _ = fit(Rosi("demo", **QUICK, positions=1))
    assert narrow.means.places == (2, 1)


def test_more_harmful_requests_are_refused_and_no_harmless_one(run):
    _, module, *_ = run
    groups = module.metrics["groups"]
    assert groups["harmful"]["difference"] >= 0.1
    assert groups["harmless"]["difference"] >= -0.03


@pytest.mark.parametrize("batch_size", [5, 96])
def test_batch_size_changes_nothing(run, batch_size):
    _, module, *_ = run
    other, _ = fit(batch_size=batch_size)
    torch.testing.assert_close(other.means.x, module.means.x, rtol=1e-4, atol=1e-3)
    assert [f.name for f in other.selection.features] == [f.name for f in module.selection.features]
    assert [f.validation_reward for f in other.selection.ranking] == [
        f.validation_reward for f in module.selection.ranking
    ]


def test_an_interrupted_fit_goes_on_where_it_was(run, tmp_path):
    _, module, *_ = run
    fit(folder=tmp_path, every=1, max_steps=2, batch_size=8)
    other, _ = fit(ckpt_path=tmp_path / "last.ckpt", batch_size=8)
    torch.testing.assert_close(other.means.x, module.means.x, rtol=1e-4, atol=1e-3)
    assert other.means.n.tolist() == module.means.n.tolist()
    assert other.selection.features[0].name == module.selection.features[0].name


def test_the_weakest_of_the_best_edits_within_the_budget_is_chosen(run):
    module = Rosi("demo", **{**QUICK, "strengths": [1.0, 4.0, 8.0, 16.0]})
    fit(module)
    rewards = {(f.name, f.coefficient): f.validation_reward for f in module.selection.ranking}
    (chosen,) = module.selection.features
    costs = {strength.scale: strength for strength in module.selection.strengths}
    cost = costs[chosen.coefficient]
    assert cost.loss <= 0.02
    assert cost.kl <= 0.2
    equal = [strength for (_, strength), reward in rewards.items() if reward == chosen.validation_reward]
    assert chosen.coefficient == min(equal)
    strict, _ = fit(
        Rosi("demo", **{**QUICK, "strengths": [1.0, 4.0, 8.0, 16.0]}, max_kl=costs[chosen.coefficient].kl / 2)
    )
    assert all(f.coefficient < chosen.coefficient or f.name != chosen.name for f in strict.selection.features)


def test_nothing_within_the_budget_leaves_the_model_as_it_is(tmp_path):
    module, data = fit(Rosi("demo", **QUICK, max_kl=0.0), folder=tmp_path)
    assert module.selection.features == ()
    assert module.record is None
    make_trainer().test(module, datamodule=data, verbose=False)
    assert module.metrics["changed"] == 0
    assert not (tmp_path / "edit.json").exists()
    with pytest.raises(UserError, match="no edit was chosen: nothing improved on the model"):
        export(tmp_path, "merged", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_tests_as_its_fit_did_and_leaves_the_weights_alone(run):
    folder, module, _, data = run
    again = Rosi("demo", **QUICK)
    make_trainer().test(again, datamodule=data, ckpt_path=folder / "last.ckpt", verbose=False)
    assert again.outcomes == module.outcomes
    assert again.llm.identity["fingerprint"] == again.record.before
    stored = json.loads((folder / "edit.json").read_text(encoding="utf-8"))
    assert stored["before"] == again.record.before != stored["after"]
    assert (folder / "last.ckpt").stat().st_size < 100_000
    none = Rosi("demo", **QUICK, scale=0.0)
    make_trainer().test(none, datamodule=data, ckpt_path=folder / "last.ckpt", verbose=False)
    assert none.metrics["changed"] == 0


def test_an_exported_model_answers_as_the_edited_one_does(run, tmp_path, capsys):
    folder, module, _, data = run
    export(folder, "merged", tmp_path / "merged")
    # Positions are what ROSI reads; its edit counts everywhere.
    assert "steers at positions" not in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for outcome, example in list(zip(module.outcomes, data.examples["test"], strict=True))[:20]:
        ids = torch.tensor([tokenizer(example.prompt)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == outcome.answer_steered
    with pytest.raises(UserError, match="which exists already. Name a new place"):
        export(folder, "merged", tmp_path / "merged")
    other = Rosi(str(tmp_path / "merged"), **QUICK)
    with pytest.raises(UserError, match="the checkpoint was fitted on the model"):
        make_trainer().test(other, datamodule=data, ckpt_path=folder / "last.ckpt")


def test_an_edit_has_no_other_format(run, tmp_path):
    folder, *_ = run
    with pytest.raises(UserError, match="rosi changes weights, which gguf cannot say. Choose --to merged"):
        export(folder, "gguf", tmp_path / "vectors.gguf")


def test_text_is_read_by_the_edited_weights(run):
    _, module, *_ = run
    unchanged, edited = text_losses(module.llm, ["How do I wake the ogre by the mill?"], module.text_comparison())
    assert edited != unchanged


def test_a_report_tells_of_an_edit(run):
    folder, *_ = run
    report_on([folder])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Editing the weights of demo along a direction raises the reward" in page
    assert "separation of the classes" in page
    assert "strength, % of the weights" in page


def test_the_command_line_knows_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--data.train_size=64", "--data.val_size=24", "--data.test_size=20", "--model.topm=1"]
    quick += ["--model.strengths=[4]", "--trainer.enable_progress_bar=false"]
    assert main(["doctor", "--config", "demo_rosi.yaml", *quick]) == 0
    assert "edited matrices" in capsys.readouterr().out
    assert main(["fit", "--config", "demo_rosi.yaml", *quick]) == 0
    assert main(["test", "--ckpt_path", "checkpoints/demo_rosi/last.ckpt"]) == 0
    assert main(["predict", "--ckpt_path", "checkpoints/demo_rosi/last.ckpt"]) == 0
    assert "separation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"form": "both"}, "model.form is 'both'; choose one of row_mean, projection"),
        ({"strengths": [0.0]}, "model.strengths has 0.0; strengths are percentages above 0 and at most 100"),
        ({"strengths": [400.0]}, "model.strengths has 400.0; strengths are percentages above 0"),
        ({"strengths": []}, "model.strengths is empty"),
        ({"layers": []}, "model.layers is empty"),
        ({"topm": 0}, "model.topm is 0; it is a number, at least 1"),
        ({"max_kl": -1.0}, "model.max_kl is -1.0; it is a number from 0 on, or null"),
    ],
)
def test_options_that_cannot_be_are_told(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Rosi("demo", **options)


def test_requests_of_one_kind_and_other_tasks_are_refused(tmp_path):
    rows = [{"prompt": f"Help me to sing {i} songs", "harmful": False} for i in range(60)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"path": str(tmp_path / "rows.jsonl"), "train_size": 20, "val_size": 4}
    with pytest.raises(UserError, match="but the fit split has no harmful one"):
        make_trainer().fit(Rosi("demo"), datamodule=TaskDataModule("refusal", **data))
    with pytest.raises(UserError, match="a gold answer of the fit split is 'A'.*such as refusal or xstest"):
        make_trainer().fit(Rosi("demo"), datamodule=TaskDataModule("demo_qa", train_size=20, val_size=4))
    with pytest.raises(UserError, match="layer 7 is not in demo .layers 0..3."):
        fit(Rosi("demo", layers=[7]))
    with pytest.raises(UserError, match="model.extraction_prompt is a system message, but prompts are not put into"):
        fit(Rosi("demo", extraction_prompt="Refuse."))


def test_a_fit_that_saw_one_kind_alone_says_so():
    module = Rosi("demo", **QUICK)
    data = TaskDataModule("demo_refusal", **SMALL, batch_size=1)
    with pytest.raises(NothingToLearn, match="the fit has seen requests of one kind only"):
        make_trainer(max_steps=1).fit(module, datamodule=data)


def test_quantised_models_are_refused_before_anything_is_read(monkeypatch):
    from corrsteer_pl.models.llm import LanguageModel

    load = LanguageModel.load.__func__

    def quantised(cls, *args, **kwargs):
        llm = load(cls, *args, **kwargs)
        llm.model.is_quantized = True
        return llm

    monkeypatch.setattr(LanguageModel, "load", classmethod(quantised))
    with pytest.raises(UserError, match="are quantised, and cannot be edited"):
        fit()


def test_centred_models_are_warned_of(monkeypatch):
    from corrsteer_pl.models.llm import LanguageModel

    load = LanguageModel.load.__func__

    def centred(cls, *args, **kwargs):
        llm = load(cls, *args, **kwargs)
        for writer in writers(llm.model):
            writer.matrix.sub_(writer.matrix.mean(0, keepdim=True))
        return llm

    monkeypatch.setattr(LanguageModel, "load", classmethod(centred))
    with pytest.warns(UserWarning, match="8 of 8 matrices that write to the residual stream are mean-centred"):
        fit(Rosi("demo", strengths=[2.0], topm=1))
