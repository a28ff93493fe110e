"""Another method gets everything from the contract: a trained bias, in a dozen lines."""

import json

import pytest
import torch

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.commands.doctor import examine
from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.registry import METHODS, method_class, method_name
from corrsteer_pl.methods.runs.files import RunFiles
from tests.conftest import make_trainer, run_here
from tests.methods.toy import Bias
from tests.processes import forked

DATA = {"train_size": 96, "val_size": 20, "test_size": 40}


def fit(data=None, **trainer):
    method, trainer = Bias("demo"), make_trainer(**trainer)
    trainer.fit(method, datamodule=data or TaskDataModule(**DATA, batch_size=8))
    return method, trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    method, trainer = fit(callbacks=[RunFiles()], enable_checkpointing=True, default_root_dir=folder)
    trainer.test(method, datamodule=TaskDataModule(**DATA), verbose=False)
    return folder, method


def test_the_registry_names_methods():
    assert method_class("corrsteer") is CorrSteer
    assert method_name(CorrSteer) == "corrsteer"
    assert method_name(Bias) == "bias"
    assert METHODS["corrsteer"] == "corrsteer_pl.methods.corrsteer:CorrSteer"
    with pytest.raises(
        UserError,
        match="the method 'corsteer' is not known; choose one of corrsteer, mean_difference, crisp, finetune, "
        "prompting, rosi, vectors, bias",
    ):
        method_class("corsteer")


def test_a_trained_method_is_fitted_and_tested(run):
    folder, method = run
    assert method.bias.abs().sum() > 0
    # Wrong answers in words become letters.
    assert method.metrics["reward_steered"] > method.metrics["reward_baseline"] + 0.05
    assert not any(p.requires_grad for p in method.llm.model.parameters())
    written = json.loads((folder / "test/demo_qa/metrics.json").read_text())
    assert (written["method"], written["scale"], written["n"]) == ("bias", 1.0, 40)
    assert "rule" not in written


def test_its_checkpoint_is_small_loads_and_resumes_exactly(run, tmp_path):
    folder, method = run
    assert (folder / "last.ckpt").stat().st_size < 30_000
    loaded = Bias.load_from_checkpoint(folder / "last.ckpt")
    assert torch.equal(loaded.bias, method.bias)
    data = TaskDataModule(**DATA, batch_size=8)
    half, trainer = Bias("demo"), make_trainer(limit_train_batches=6)
    trainer.fit(half, datamodule=data)
    assert half.counted == 48
    trainer.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    resumed, trainer = Bias("demo"), make_trainer()
    trainer.fit(resumed, datamodule=TaskDataModule(**DATA, batch_size=8), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.counted == 96
    torch.testing.assert_close(resumed.bias, method.bias)


def test_checkpoints_of_other_methods_options_and_samples_are_refused(run, tmp_path):
    folder, _ = run
    data = TaskDataModule(**DATA)
    with pytest.raises(UserError, match="fitted by the method bias, but the method is corrsteer"):
        make_trainer().test(CorrSteer("demo", "demo"), datamodule=data, ckpt_path=folder / "last.ckpt")
    with pytest.raises(UserError, match="model.layer is 2, but the checkpoint was fitted with 3"):
        make_trainer().test(Bias("demo", layer=2), datamodule=data, ckpt_path=folder / "last.ckpt")
    with pytest.raises(UserError, match="data.seed is 1, but the checkpoint was fitted with 0"):
        make_trainer().fit(Bias("demo"), datamodule=TaskDataModule(**DATA, seed=1), ckpt_path=folder / "last.ckpt")
    with pytest.raises(UserError, match="has not been fitted"):
        make_trainer().test(Bias("demo"), datamodule=data, verbose=False)


def test_it_predicts(run):
    _, method = run
    make_trainer().predict(method, datamodule=TaskDataModule(**DATA), return_predictions=False)
    assert len(method.predictions) == 40
    assert any(texts["baseline"] != texts["steered"] for texts in method.predictions)


def test_doctor_shows_it():
    data, method = TaskDataModule(**DATA, batch_size=8), Bias("demo")
    shown = [getattr(item, "title", item) for item in examine(method, data, make_trainer())]
    assert shown[-2:] == ["Memory per process", "Time per process, from the first batch"]
    assert "Answers" in shown


def test_texts_that_are_only_read_need_a_probe(run, tmp_path):
    rows = "".join(json.dumps({"text": f"text {i}", "label": i % 2}) + "\n" for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    data = TaskDataModule("text_classification", str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="Bias compares answers, but text_classification has texts that are not"):
        make_trainer().test(run[1], datamodule=data, verbose=False)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path, capsys):
    fit = ["fit", "--method", "bias", "--model.llm", "demo", "--data.train_size=96", "--data.val_size=20"]
    fit += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    run_here(*fit, "--data.batch_size=16", "--trainer.default_root_dir=one", cwd=tmp_path)
    two = ["--data.batch_size=8", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.default_root_dir=two"]
    forked(*fit, *two, cwd=tmp_path, ranks=2, imports=["tests.methods.toy"])
    one, two = (torch.load(tmp_path / f / "last.ckpt", weights_only=True)["state_dict"]["bias"] for f in ("one", "two"))
    assert one.abs().sum() > 0
    # Gradients are averaged in another order.
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    capsys.readouterr()
    run_here("test", "--ckpt_path=two/last.ckpt", "--model.scale=0.5", "--data.test_size=30", cwd=tmp_path)
    assert "two/test/demo_qa-scale-0.5-test_size-30" in capsys.readouterr().out.replace("\n", "")
