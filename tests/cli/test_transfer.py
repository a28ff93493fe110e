"""One fit, tested on several tasks."""

import json
from pathlib import Path

import pytest

from corrsteer_pl.cli.program import main
from corrsteer_pl.evaluation.text_loss import text_losses
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.llm import LanguageModel
from tests.conftest import run_here

QUIET = "--trainer.enable_progress_bar=false"
SMALL = ["--data.train_size=96", "--data.val_size=32", QUIET]
TRANSFER = ["transfer", "--ckpt_path=checkpoints/demo/last.ckpt"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    run_here("fit", "--config=demo.yaml", *SMALL, cwd=folder)
    write_jsonl(folder / "texts.jsonl", [{"text": f"Question: Where does number {i} live?"} for i in range(9)])
    return folder


@pytest.fixture
def here(run, monkeypatch):
    monkeypatch.chdir(run)
    return run


def test_every_configuration_is_tested_as_on_its_own(here, llm, capsys):
    tasks = ["--config=demo.yaml", "--config", "demo_refusal.yaml"]
    assert main([*TRANSFER, *tasks, "--text=texts.jsonl", "--text_rows=5", "--data.test_size=40", QUIET]) == 0
    found = json.loads(Path("checkpoints/demo/transfer.json").read_text(encoding="utf-8"))
    assert list(found["tasks"]) == ["demo", "demo_refusal"]
    assert "loss on 5 texts" in capsys.readouterr().out
    for name, metrics in found["tasks"].items():
        args = ["--ckpt_path=checkpoints/demo/last.ckpt", f"--config={name}.yaml", "--data.test_size=40"]
        assert main(["test", *args, "--results.tag=alone", QUIET]) == 0
        task = {"demo": "demo_qa"}.get(name, name)
        alone = json.loads(Path(f"checkpoints/demo/test/{task}-alone/metrics.json").read_text(encoding="utf-8"))
        assert metrics == {key: alone[key] for key in metrics}
    assert found["tasks"]["demo"]["changed"] > 0
    texts = [f"Question: Where does number {i} live?" for i in range(5)]
    vectors = SteeringVectors.load("checkpoints/demo/steering.safetensors").vectors
    unsteered, steered = text_losses(llm, texts, SteeringVectors.stack([{}, vectors], Schedule("all")))
    expected = {"texts": 5, "unsteered": unsteered, "steered": steered}
    assert found["text_loss"] == pytest.approx(expected)


def test_a_model_is_loaded_again_only_with_other_options(here, monkeypatch):
    loaded = []
    load = LanguageModel.load.__func__
    monkeypatch.setattr(
        LanguageModel,
        "load",
        classmethod(lambda cls, name, dtype, **more: loaded.append(dtype) or load(cls, name, dtype, **more)),
    )
    low = "model: {dtype: bfloat16}\ndata: {task: demo_refusal}\n"
    (here / "low.yaml").write_text(low, encoding="utf-8")
    tasks = ["--config=demo.yaml", "--config=demo_refusal.yaml", "--config=low.yaml"]
    assert main([*TRANSFER, *tasks, "--data.test_size=16", QUIET]) == 0
    assert loaded == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["transfer", "--config=demo.yaml"], "transfer needs the checkpoint of a fit"),
        (["transfer", "--ckpt_path=last", "--config=demo.yaml"], "--ckpt_path last is another run for each task"),
        (TRANSFER, "transfer needs tasks to test on"),
        ([*TRANSFER, "--config=demo.yaml", "--config=demo.yaml"], "two configurations are named demo"),
        ([*TRANSFER, "--config=demo.yaml", "--text=nix.jsonl"], "--text names nix.jsonl, which is no file"),
        ([*TRANSFER, "--config=demo.yaml", "--text=none.jsonl"], "none.jsonl has no text in a column text"),
        ([*TRANSFER, "--config=demo.yaml", "--text=texts.jsonl", "--text_rows=x"], "--text_rows is x"),
        ([*TRANSFER, "--config=demo.yaml", "--txt=x"], "there is no option txt; the nearest are text"),
    ],
)
def test_what_cannot_be_transferred_is_one_sentence(here, capsys, args, sentence):
    write_jsonl(here / "none.jsonl", [{"txt": "x"}])
    assert main([*args, QUIET]) == 2
    assert sentence in capsys.readouterr().err
