"""Puts together what MkDocs makes a site of: the pages of the repository where they are, and a generated reference.

``python docs/site.py FOLDER``; the Makefile's target ``docs`` calls it.
"""

import shutil
import sys
from pathlib import Path

from corrsteer_pl.cli.options import command_help
from corrsteer_pl.cli.program import COMMANDS, PROGRAM
from corrsteer_pl.methods.registry import METHODS

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
FOLDERS = ("docs", "results")
# What the pages link to.
ENDINGS = (".md", ".svg", ".json", ".yaml", ".csv", ".ipynb")
# The Python interface, by heading.
MODULES = {
    "Fitting and testing": ["corrsteer_pl.methods.base", "corrsteer_pl.data.module"],
    "Steering": ["corrsteer_pl.interventions.steering", "corrsteer_pl.models.sites", "corrsteer_pl.models.llm"],
    "Selections": ["corrsteer_pl.selection.record", "corrsteer_pl.selection.feature"],
    "Tasks and rewards": ["corrsteer_pl.tasks.base", "corrsteer_pl.rewards.base"],
    "Vectors of other programs": ["corrsteer_pl.formats.reading"],
}


def gather(folder: Path) -> None:
    """Copy pages and what they show, in the places that they have here, so that their links hold."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in PAGES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS:
        for path in sorted((ROOT / name).rglob("*")):
            if path.suffix in ENDINGS:
                place = folder / path.relative_to(ROOT)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)


def commands() -> str:
    """The reference of the command line: what ``--help`` says."""
    parts = ["# Command line\n"]
    for name, command in COMMANDS.items():
        program = " ".join([PROGRAM, name, command.takes]).strip()
        parts.append(f"## {name}\n\n{command.does}\n")
        if not command.passes:
            parts.append(f"```text\n{command_help(program, name, command.does, [name])}```\n")
    parts.append("## Options of the methods\n")
    for method in METHODS:
        args = ["fit", "--method", method]
        text = command_help(f"{PROGRAM} fit --method {method}", "fit", "", args)
        own = text.partition(f"the method {method}")[2].partition("the task and its data")[0]
        parts.append(f"### --method {method}\n\n```text\nthe method {method}{own}```\n")
    return "\n".join(parts)


def interface() -> str:
    """The reference of the Python interface, which mkdocstrings fills in."""
    parts = ["# Python interface\n", "What `from corrsteer_pl import ...` gives, and what stands beside it.\n"]
    for heading, modules in MODULES.items():
        parts.append(f"## {heading}\n")
        parts += [f"::: {module}\n" for module in modules]
    parts.append("## Methods\n")
    parts += [f"::: {path.replace(':', '.')}\n" for path in METHODS.values()]
    return "\n".join(parts)


if __name__ == "__main__":
    site = Path(sys.argv[1])
    gather(site)
    (site / "reference").mkdir()
    (site / "reference/commands.md").write_text(commands(), encoding="utf-8")
    (site / "reference/python.md").write_text(interface(), encoding="utf-8")
