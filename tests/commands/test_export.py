"""The command that hands a run on: what it measures, and what it refuses without leaving anything behind."""

import json
import shlex
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file

from corrsteer_pl import CorrSteer, TaskDataModule, demo
from corrsteer_pl.cli.program import main
from corrsteer_pl.commands.export import export
from corrsteer_pl.errors import UserError
from corrsteer_pl.formats.registry import FORMATS
from corrsteer_pl.methods.runs.files import RunFiles
from tests.conftest import make_trainer
from tests.processes import Command

SMALL = {"train_size": 300, "val_size": 60, "test_size": 20}


class Cut(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            raise RuntimeError("the power went out")


def fitted(folder, llm="demo", callbacks=(), **options):
    module, data = CorrSteer(llm, "demo", layers=[1, 2], **options), TaskDataModule(**SMALL)
    callbacks = [RunFiles(1), *callbacks]
    trainer = make_trainer(default_root_dir=folder, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(module, datamodule=data)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert fitted(folder).selection.features
    return folder


def test_what_was_measured_stands_beside_what_was_written(run, capsys):
    assert main(["export", str(run), "--to", "gguf"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "the greedy text is the same for 3 of 3 prompts" in told
    assert "The run steers at positions: generated; this format steers every position" in told
    measured = json.loads((run / "export/demo.gguf.parity.json").read_text(encoding="utf-8"))
    assert measured["difference"] < 1e-4 < measured["effect"]
    assert (measured["format"], measured["same_text"], measured["prompts"]) == ("gguf", 3, 3)


def test_what_a_format_makes_of_a_decay_is_told_with_a_command_that_works(tmp_path, capsys):
    folder = tmp_path / "mine & yours"
    fitted(folder, decay=0.5)
    (folder / "last.ckpt").rename(folder / "best.ckpt")
    export(folder / "best.ckpt", "gguf")
    *_, sentence, command = capsys.readouterr().out.splitlines()
    assert "steers at positions: generated, with a decay of 0.5; this format steers every position alike" in sentence
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "corrsteer_pl"]
    assert main(words[3:]) == 0
    (told,) = folder.glob("test/*/metrics.json")
    metrics = json.loads(told.read_text(encoding="utf-8"))
    assert (metrics["positions"], metrics["decay"]) == ("all", 1)


def test_a_place_that_is_taken_is_left_alone(run, tmp_path):
    (tmp_path / "taken.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="which exists already. Name a new place"):
        export(run, "gguf", tmp_path / "taken.gguf")
    assert (tmp_path / "taken.gguf").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("to", ["gguf", "easysteer", "lm_eval"])
def test_a_place_may_be_called_anything_that_says_what_it_is(to, run, tmp_path):
    ending = FORMATS[to].ending
    if ending:
        with pytest.raises(UserError, match=f"what {to} writes is a file that ends with {ending}"):
            export(run, to, tmp_path / "other.v2")
        assert list(tmp_path.iterdir()) == []
    export(run, to, tmp_path / f"my.v2{ending}")
    assert (tmp_path / f"my.v2{ending}").exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_export_that_is_ended_leaves_nothing(how, run, tmp_path):
    command = Command("export", run, "--to", "merged", "--out", tmp_path / "out/merged", cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.merged.*")):
        assert command.is_running(), command.stderr
        assert time.monotonic() < deadline
        time.sleep(0.002)
    command.send(how)
    assert command.wait(60) == [128 + how]
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in command.stderr


def test_what_differs_is_refused_and_removed(run, tmp_path, monkeypatch):
    def other(llm, vectors, path, schedule):
        torch.save({}, path)

    monkeypatch.setitem(FORMATS, "lm_eval", replace(FORMATS["lm_eval"], write=other))
    with pytest.raises(UserError, match="does not do the same as the run, so it was removed"):
        export(run, "lm_eval", tmp_path / "other.pt")
    assert list(tmp_path.iterdir()) == []


def test_unfinished_and_empty_runs_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="the power went out"):
        fitted(tmp_path / "cut", callbacks=[Cut()])
    with pytest.raises(UserError, match="has not been fitted: there is no selection. Run fit first"):
        export(tmp_path / "cut", "gguf")
    module = fitted(tmp_path / "empty", min_improvement=0.99)
    assert module.selection.features == ()
    with pytest.raises(UserError, match="selected nothing, so it changes nothing, and there is nothing to export"):
        export(tmp_path / "empty", "gguf")
    assert not (tmp_path / "empty/export").exists()
    with pytest.raises(UserError, match="is no run: it has no last.ckpt"):
        export(tmp_path, "gguf")


def test_a_model_that_is_gone_or_another_is_named(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(demo.MODEL, model)
    fitted(tmp_path / "run", llm=str(model))
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="which has other weights"):
        export(tmp_path / "run", "gguf")
    shutil.rmtree(model)
    with pytest.raises(UserError, match=f"the model '{model}' does not exist"):
        export(tmp_path / "run", "gguf")


def test_an_unknown_format_is_told(run, capsys):
    assert main(["export", str(run), "--to", "onnx"]) == 2
    error = capsys.readouterr().err
    assert "onnx" in error
    assert "Traceback" not in error
