"""Imports point down the plan only, and every module can be imported."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import corrsteer_pl

PLAN = [
    "cli", "commands", "methods", "data", "strategy", "evaluation", "interventions", "selection", "stats",
    "models", "tasks", "rewards", "hub", "options", "files", "demo", "errors", "version",
]  # fmt: skip
# Scripts that nothing imports stand above the plan.
ABOVE = {"__init__", "__main__", "demo.build", "demo.results"}
ROOT = Path(corrsteer_pl.__file__).parent
MODULES = [name for _, name, _ in pkgutil.walk_packages([str(ROOT)], "corrsteer_pl.")]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("corrsteer_pl"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def test_imports_point_down():
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        room = name.split(".")[0]
        if name in ABOVE:
            continue
        for other in imported(path):
            assert PLAN.index(other) >= PLAN.index(room), f"{path} imports {other}, which stands above {room}"


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_every_module_can_be_imported(module):
    importlib.import_module(module)


def test_tasks_see_no_tensor_and_models_no_task():
    for room, foreign in (("tasks", "torch"), ("rewards", "torch"), ("models", "corrsteer_pl.tasks")):
        paths = [ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py")
        for path in paths:
            assert f"import {foreign}" not in path.read_text()
            assert f"from {foreign}" not in path.read_text()
