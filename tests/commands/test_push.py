"""A run on the Hub: what is there loads again and says what was measured, and no secret is told."""

import json
import re

import pytest
import torch
import yaml

from corrsteer_pl import SteeringVectors
from corrsteer_pl.cli.program import main
from corrsteer_pl.interventions.steering import Schedule
from corrsteer_pl.models.sites import Site
from tests.evaluation.runs import OUTCOMES, selection, write_run

TOKEN = "hf_secret"
VECTORS = {Site(1, "resid_post"): torch.arange(4.0), Site(2, "mlp_out"): torch.ones(4)}


@pytest.fixture
def run(tmp_path):
    chosen = selection(llm={"name": "owner/base-model", "fingerprint": "abc"}, saes={"name": "/home/me/saes"})
    write_run(tmp_path / "run", OUTCOMES, chosen)
    SteeringVectors(VECTORS, Schedule("first_k", 3, 0.5)).save(tmp_path / "run/steering.safetensors")
    return tmp_path / "run"


@pytest.fixture
def writable(hub, monkeypatch):
    monkeypatch.setattr(hub, "writers", {TOKEN: {"me"}})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def test_what_was_pushed_loads_again_and_says_what_was_measured(run, writable, capsys):
    assert main(["push", str(run), "me/happy"]) == 0
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    again = SteeringVectors.from_pretrained("me/happy")
    assert again.schedule == Schedule("first_k", 3, 0.5)
    assert all(torch.equal(again.vectors[site], vector) for site, vector in VECTORS.items())
    there = writable.root / "models/me/happy"
    card = (there / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["library_name"]) == ("owner/base-model", "corrsteer_pl")
    assert "license" not in head
    metrics = json.loads((run / "test/demo_qa/metrics.json").read_text(encoding="utf-8"))
    assert (
        f"{100 * metrics['difference']:+.1f} [{100 * metrics['ci_low']:+.1f}, {100 * metrics['ci_high']:+.1f}]" in card
    )
    for said in (
        "first_k (3), with decay 0.5",
        'SteeringVectors.from_pretrained("me/happy")',
        "permutations of the rewards",
        "They steer with 1.5 times these coefficients.",
        "fitted on 300 samples",
    ):
        assert said in card
    everything = b"".join(path.read_bytes() for path in there.rglob("*") if path.is_file())
    assert b"/home/me" not in everything
    assert TOKEN.encode() not in everything
    stored = json.loads((there / "selection.json").read_text(encoding="utf-8"))
    assert stored["saes"]["name"] == "saes"


@pytest.mark.parametrize("tested", [{"scale": -3.0}, {"positions": "all"}])
def test_the_verdict_is_of_a_test_with_these_vectors_alone(run, writable, tested):
    metrics = run / "test/demo_qa/metrics.json"
    said = json.loads(metrics.read_text(encoding="utf-8"))
    metrics.write_text(json.dumps({**said, **tested}), encoding="utf-8")
    assert main(["push", str(run), "me/happy"]) == 0
    card = (writable.root / "models/me/happy/README.md").read_text(encoding="utf-8")
    assert "it has not been tested yet" in card
    metrics.write_text(json.dumps({**said, "scale": [0.5, 1.0], "positions": "first_k"}), encoding="utf-8")
    assert main(["push", str(run), "me/happy"]) == 0
    card = (writable.root / "models/me/happy/README.md").read_text(encoding="utf-8")
    assert "it has not been tested yet" not in card


def test_vectors_are_saved_and_loaded_as_models_of_the_hub_are(tmp_path, writable):
    vectors = SteeringVectors(VECTORS, Schedule("all"))
    vectors.save_pretrained(tmp_path / "here")
    assert SteeringVectors.from_pretrained(tmp_path / "here").schedule == Schedule("all")
    assert "steering.safetensors" in (tmp_path / "here/README.md").read_text(encoding="utf-8")
    vectors.push_to_hub("me/own")
    assert SteeringVectors.from_pretrained("me/own").vectors.keys() == VECTORS.keys()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("happy", "'happy' is no name of a repository .* Give it as owner/name"),
        ("me/ha ppy", "'me/ha ppy' is no name of a repository"),
        ("you/happy", "did not take you/happy: you may not write there: choose an owner that is yours in place of you"),
    ],
)
def test_names_that_cannot_be_are_told(name, sentence, run, writable, capsys):
    assert main(["push", str(run), name]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error)
    assert TOKEN not in error
    assert "Traceback" not in error
    assert not (writable.root / "models/you").exists()


def test_a_token_that_is_not_known_is_told_and_not_shown(run, hub, monkeypatch, capsys):
    monkeypatch.setattr(hub, "writers", {})
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(run), "me/happy"]) == 2
    error = capsys.readouterr().err
    assert "log in with 'hf auth login', or set HF_TOKEN" in error
    assert "hf_wrong" not in error


def test_a_card_that_the_hub_does_not_take_is_told(run, writable, capsys):
    assert main(["push", str(run), "me/happy", "--license", "My Own"]) == 2
    assert (
        'the Hub did not take the model card: Invalid metadata in README.md. - "license" must'
        in capsys.readouterr().err
    )


def test_an_empty_selection_and_weights_are_not_pushed(run, writable, tmp_path, capsys):
    SteeringVectors({}).save(run / "steering.safetensors")
    assert main(["push", str(run), "me/nothing"]) == 2
    assert "selected nothing, so it changes nothing, and there is nothing to push" in capsys.readouterr().err
    (run / "steering.safetensors").unlink()
    assert main(["push", str(run), "me/nothing"]) == 2
    assert "which has no vectors. Export it with --to merged instead" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "none"), "me/nothing"]) == 2
    assert "has no selection.json" in capsys.readouterr().err


def test_a_local_model_is_named_without_its_place(run, writable):
    plain = json.loads((run / "selection.json").read_text(encoding="utf-8"))
    plain["llm"]["name"] = "/home/me/models/base"
    (run / "selection.json").write_text(json.dumps(plain), encoding="utf-8")
    assert main(["push", str(run), "me/local", "--license", "apache-2.0"]) == 0
    card = (writable.root / "models/me/local/README.md").read_text(encoding="utf-8")
    assert "base_model" not in card
    assert "steering vectors for base" in card
    assert "/home/me" not in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
