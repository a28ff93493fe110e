"""What the documentation shows has to run."""

import doctest
import re
from pathlib import Path
from runpy import run_path

import pytest

from corrsteer_pl.methods import registry

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "train_size=2000" in code
    small = code.replace("train_size=2000, val_size=300", "train_size=100, val_size=30, test_size=40")
    monkeypatch.chdir(tmp_path)
    exec(small, {})
    assert "hook_resid_post" in capsys.readouterr().out


def test_every_option_named_in_the_documentation_exists():
    import contextlib
    import io

    from corrsteer_pl.cli.program import main
    from corrsteer_pl.methods.registry import METHODS

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for method in METHODS:
            assert main(["fit", "--method", method, "--help"]) == 0
    texts = "".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
    named = set(re.findall(r"--((?:model|data|trainer|results)\.\w+)", texts))
    assert len(named) > 8
    assert {option for option in named if f"--{option}" not in shown.getvalue()} == set()


def test_the_drawing_is_what_its_command_writes():
    drawn = run_path(str(ROOT / "docs/how_it_works.py"))["draw"]()
    assert (ROOT / "docs/how_it_works.svg").read_text(encoding="utf-8") == drawn


def test_links_in_the_documentation_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_configurations_named_in_the_documentation_exist():
    known = {path.name for path in ROOT.glob("configs/*.yaml")}
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        named = set(re.findall(r"--config (\w+\.yaml)|`(\w+\.yaml)`", page.read_text()))
        named = {one or other for one, other in named} - {"trivia.yaml", "config.yaml"}
        assert named <= known, page.name


def test_every_configuration_begins_with_its_command():
    for path in ROOT.glob("configs/*.yaml"):
        first = path.read_text().splitlines()[0]
        assert first.startswith("# python -m corrsteer_pl fit --config ")
        assert f"--config {path.name}" in first


def test_the_examples_of_the_architecture_page_run(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    failed, tried = doctest.testfile(str(ROOT / "docs/architecture.md"), module_relative=False)
    assert tried > 10
    assert failed == 0


def test_the_architecture_page_names_files_that_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)+\w+\.py|\w+\.py)`", text)
    assert len(set(named)) > 30
    for name in set(named):
        assert (ROOT / "corrsteer_pl" / name).is_file(), name
