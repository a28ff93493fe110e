"""The notebooks run from top to bottom, and show what they say."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "docs/notebooks"
pytestmark = [
    pytest.mark.slow,
    # What a user of a notebook sees beside the results.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def run(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"cell {number} of {name} has stored outputs"
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
    return names


def test_a_first_selection_helps_and_harms_nothing_elsewhere(tmp_path, monkeypatch, capsys):
    found = run("a_first_selection", tmp_path, monkeypatch)
    assert found["m"]["ci_low"] > 0.1
    assert abs(found["elsewhere"]["difference"]) < 0.05
    assert "->" in capsys.readouterr().out


def test_a_vector_from_elsewhere_is_told_from_a_random_one(tmp_path, monkeypatch):
    found = run("a_vector_from_elsewhere", tmp_path, monkeypatch)["found"]
    assert found["letters"]["ci_low"] > found["random"]["ci_high"]
