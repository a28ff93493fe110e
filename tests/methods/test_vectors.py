"""Vectors from elsewhere under the same evaluation: tested as given, chosen by validation, and handed on."""

import json
from pathlib import Path

import pytest
import torch

from corrsteer_pl import SteeringVectors, TaskDataModule
from corrsteer_pl.cli.program import main
from corrsteer_pl.commands.export import export
from corrsteer_pl.commands.report import report_on
from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.run import Run
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.methods.runs.files import RunFiles
from corrsteer_pl.methods.vectors import Vectors
from corrsteer_pl.models.sites import Site
from tests.architectures import make_tiny, vectors
from tests.conftest import make_trainer, run_here

pytestmark = pytest.mark.filterwarnings("ignore:model.positions is all", "ignore:demo.* sets model")
SMALL = {"train_size": 300, "val_size": 60, "test_size": 60}
QUIET = ["--trainer.enable_progress_bar=false", "--data.test_size=60"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fit of CorrSteer, exported in every format, and its test with every position steered."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    module, data = CorrSteer("demo", "demo", layers=[1, 2, 3], positions="all"), TaskDataModule(**SMALL)
    trainer = make_trainer(default_root_dir=folder, enable_checkpointing=True, callbacks=[RunFiles()])
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    assert module.metrics["changed"] > 10
    for to in ("gguf", "lm_eval", "easysteer"):
        export(folder, to)
    return folder, module


def answered(module, data=None):
    data = data or TaskDataModule(**SMALL)
    make_trainer().test(module, datamodule=data, verbose=False)
    return module


@pytest.mark.parametrize("file", ["export/demo.gguf", "export/demo.lm_eval.pt", "export/easysteer/vectors.gguf",
                                  "steering.safetensors"])  # fmt: skip
def test_a_file_answers_as_the_run_that_it_is_of(file, run):
    folder, module = run
    found = answered(Vectors("demo", str(folder / file)))
    assert found.outcomes == module.outcomes
    assert found.hparams["positions"] == "all"
    assert found.size == module.size


def test_positions_are_the_files_own_unless_others_are_given(run, tmp_path):
    folder, module = run
    vectors = SteeringVectors.load(folder / "steering.safetensors")
    schedule = type(vectors.schedule)("first_k", 2, 0.5)
    SteeringVectors(vectors.vectors, schedule).save(tmp_path / "own.safetensors")
    own = answered(Vectors("demo", str(tmp_path / "own.safetensors")))
    assert own.schedule == schedule
    asked = answered(Vectors("demo", str(tmp_path / "own.safetensors"), positions="all"))
    assert (asked.schedule.positions, asked.outcomes) == ("all", module.outcomes)


@pytest.mark.filterwarnings("ignore:model.scale.*of the list")
def test_validation_chooses_among_vectors_and_strengths(run, tmp_path):
    folder, _ = run
    found = SteeringVectors.load(folder / "steering.safetensors").vectors
    # One that does nothing but harm beside those that help.
    bad = {site: vector for site, vector in found.items()}
    worst = min(bad)
    bad[worst] = -50 * bad[worst]
    SteeringVectors(bad).save(tmp_path / "bad.safetensors")
    module = Vectors("demo", str(tmp_path / "bad.safetensors"), rule="foreach", scale=[0.5, 1.0, 2.0])
    trainer = make_trainer(default_root_dir=tmp_path / "run", enable_checkpointing=True, callbacks=[RunFiles()])
    data = TaskDataModule(**SMALL)
    trainer.fit(module, datamodule=data)
    chosen = module.selection
    assert worst.layer not in [f.layer for f in chosen.features]
    assert chosen.features
    assert chosen.joint_reward > chosen.baseline_reward
    assert (chosen.samples, module.learnt_from) == (0, 0), "of which it has learnt nothing"
    assert chosen.scale == max(chosen.strengths, key=lambda one: one.reward).scale
    assert [f.coefficient for f in chosen.candidates] == pytest.approx([v.norm().item() for v in bad.values()])
    trainer.test(module, datamodule=data, verbose=False)
    # The checkpoint needs the file no longer.
    (tmp_path / "bad.safetensors").unlink()
    again = Vectors("demo", str(tmp_path / "bad.safetensors"), rule="foreach", scale=[0.5, 1.0, 2.0])
    make_trainer().test(again, datamodule=data, ckpt_path=tmp_path / "run/last.ckpt", verbose=False)
    assert again.outcomes == module.outcomes
    report_on([tmp_path / "run"])
    told = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert "given vectors raises the reward" in told
    assert "mean projection" not in told


def test_blocks_are_numbers_from_0():
    with pytest.raises(UserError, match=r"model.vector_layers is \[-1\]. Name blocks, counted from 0"):
        Vectors("demo", "any.pt", vector_layers=[-1])


def test_batches_and_order_change_nothing(run):
    folder, _ = run
    file = str(folder / "export/demo.gguf")
    whole = answered(Vectors("demo", file), TaskDataModule(**SMALL, batch_size=60))
    parts = answered(Vectors("demo", file), TaskDataModule(**SMALL, batch_size=7, sort_by_length=False))
    assert whole.outcomes == parts.outcomes


def test_the_command_line_tests_without_a_fit_and_leaves_a_run(run, tmp_path):
    folder, module = run
    (tmp_path / "demo.gguf").write_bytes((folder / "export/demo.gguf").read_bytes())
    run_here("test", "--method", "vectors", "--model.vectors", "demo.gguf", "--config", "demo.yaml",
             *QUIET, cwd=tmp_path)  # fmt: skip
    own = tmp_path / "checkpoints/demo-demo"
    metrics = json.loads((own / "test/demo_qa-test_size-60/metrics.json").read_text(encoding="utf-8"))
    assert metrics["reward_steered"] == module.metrics["reward_steered"]
    assert (metrics["method"], metrics["positions"]) == ("vectors", "all")
    run_here("report", own, cwd=tmp_path)
    run_here("test", "--ckpt_path", own / "last.ckpt", *QUIET, cwd=folder)
    again = json.loads((own / "test/demo_qa-test_size-60/metrics.json").read_text(encoding="utf-8"))
    assert again["reward_steered"] == metrics["reward_steered"]
    run_here("export", own, "--to", "lm_eval", cwd=tmp_path)
    assert (own / "export/demo-demo.lm_eval.pt").is_file()


def test_a_test_without_a_fit_takes_no_other_runs_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.eye(128)[:3], "some.pt")
    given = ["--method", "vectors", "--config", "demo.yaml", "--model.vector_layers=[1]", *QUIET, "--data.val_size=8"]
    row = [*given, "--model.vectors", "some.pt", "--model.row"]
    assert main(["fit", *row, "1"]) == 0
    (last,) = Path("checkpoints").glob("*/last.ckpt")
    fitted = last.read_bytes()
    assert main(["test", *row, "1"]) == 2
    assert f"{last.parent} has a fit, which this test would replace" in capsys.readouterr().err
    assert last.read_bytes() == fitted
    # Another row is another run; the same one may be tested again, and on other tasks.
    assert main(["test", *row, "2"]) == main(["test", *row, "2"]) == 0
    own = last.parent.with_name("demo-some-row2") / "last.ckpt"
    assert last.parent.name == "demo-some-row1"
    kept = own.read_bytes()
    assert main(["transfer", "--ckpt_path", str(own), "--config", "demo.yaml", "--config", "demo_refusal.yaml"]) == 0
    assert len(json.loads(own.with_name("transfer.json").read_text(encoding="utf-8"))["tasks"]) == 2
    assert own.read_bytes() == kept
    torch.save(torch.eye(128)[2], "other.pt")
    elsewhere = ["--model.vectors", "other.pt", "--trainer.default_root_dir", str(own.parent)]
    assert main(["test", *given, *elsewhere]) == 2
    assert "has another run of the method vectors, which this test would replace" in capsys.readouterr().err
    assert own.read_bytes() == kept


def test_a_run_has_the_tests_of_the_vectors_that_it_steers_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(4 * torch.eye(128)[1], "some.pt")
    test = ["test", "--method", "vectors", "--config", "demo.yaml", "--model.vectors", "some.pt", *QUIET]
    test += ["--model.vector_layers=[1]"]
    assert main(test) == main([*test, "--model.scale=0.5"]) == 0
    (folder,) = Path("checkpoints").iterdir()
    (vector,) = SteeringVectors.load(folder / "steering.safetensors").vectors.values()
    assert vector.norm() == pytest.approx(2)
    found = Run.read(folder)
    assert [metrics["scale"] for metrics in found.tests.values()] == [0.5]
    assert len(found.stale) == 1
    assert main([*test, "--model.positions=generated"]) == 0
    assert [metrics["positions"] for metrics in Run.read(folder).tests.values()] == ["generated"]
    assert main([*test, "--model.scale=0"]) == 0
    capsys.readouterr()
    for command in (["push", str(folder), "me/it"], ["export", str(folder), "--to", "gguf"]):
        assert main(command) == 2
        assert "steers with a scale of 0, so it changes nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rule": "foreach"}, "model.rule is foreach, which leaves a choice to the validation split"),
        ({"scale": [1.0, 2.0]}, r"model.scale is \[1.0, 2.0\], which leaves a choice to the validation split"),
        ({"vector_layers": [0]}, "has no vector for block 0"),
    ],
)
def test_what_a_test_cannot_do_is_told(options, sentence, run):
    folder, _ = run
    with pytest.raises(UserError, match=sentence):
        answered(Vectors("demo", str(folder / "export/demo.gguf"), **options))


@pytest.mark.parametrize(("part", "kind"), [("self_attn", "attn_out"), ("mlp", "mlp_out")])
def test_a_module_before_a_norm_is_no_site(part, kind, llm, tmp_path):
    (vector,) = vectors((1,)).values()
    torch.save({f"model.layers.1.{part}": vector, "model.layers.2": vector}, tmp_path / "theirs.pt")
    SteeringVectors({Site(1, kind): vector}).save(tmp_path / "ours.safetensors")
    theirs = Vectors("demo", str(tmp_path / "theirs.pt"))
    ours = Vectors("demo", str(tmp_path / "ours.safetensors"))
    theirs.llm = make_tiny("llama", llm.tokenizer)
    assert {feature.site for feature in theirs.propose()} == {f"blocks.1.hook_{kind}", "blocks.2.hook_resid_post"}
    theirs.llm = ours.llm = make_tiny("gemma2", llm.tokenizer)
    with pytest.raises(UserError, match="1's attention or MLP, but in Gemma2ForCausalLM a norm follows"):
        theirs.propose()
    assert [feature.site for feature in ours.propose()] == [f"blocks.1.hook_{kind}"]


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_lengths_whose_squares_overflow_are_lengths(size, tmp_path):
    torch.save({1: size * torch.eye(128)[1]}, tmp_path / "some.pt")
    module = answered(Vectors("demo", str(tmp_path / "some.pt")))
    (vector,) = module.steering_vectors().values()
    assert vector.norm(p=1).item() == pytest.approx(size, rel=1e-6)
    assert (module.metrics["changed"] > 0) == (size > 1)


@pytest.mark.parametrize(("size", "length"), [(3e38, r"3.39e\+39"), (1e-41, "1.13e-40")])
def test_a_length_beyond_float32_is_told(size, length, tmp_path):
    torch.save({1: torch.full((128,), size)}, tmp_path / "some.pt")
    with pytest.raises(UserError, match=f"has a vector at blocks.1.hook_resid_post of length {length}, and lengths"):
        answered(Vectors("demo", str(tmp_path / "some.pt")))


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        ({1: torch.ones(64)}, "has width 64, but LlamaForCausalLM has width 128"),
        ({7: torch.ones(128)}, "one at blocks.7.hook_resid_post, but LlamaForCausalLM has blocks 0..3"),
    ],
)
def test_vectors_for_another_model_are_refused(vectors, sentence, tmp_path, capsys, monkeypatch):
    torch.save(vectors, tmp_path / "other.pt")
    monkeypatch.chdir(tmp_path)
    code = main(["test", "--method", "vectors", "--model.vectors", "other.pt", "--config", "demo.yaml", *QUIET])
    error = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in error
    assert sentence in error
    assert not (tmp_path / "checkpoints").exists()
