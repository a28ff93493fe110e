"""Imports point down the plan only, and every module can be imported."""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import corrsteer_pl

PLAN = [
    "results", "cli", "commands", "methods", "data", "strategy", "evaluation", "formats", "interventions", "selection",
    "stats", "models", "tasks", "rewards", "hub", "options", "files", "demo", "errors", "version",
]  # fmt: skip
# Scripts that nothing imports stand above the plan.
ABOVE = {"__init__", "__main__", "demo.build", "demo.results", "demo.rules"}
ROOT = Path(corrsteer_pl.__file__).parent
MODULES = [name for _, name, _ in pkgutil.walk_packages([str(ROOT)], "corrsteer_pl.")]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
            assert f"import {foreign}" not in path.read_text(encoding="utf-8")
            assert f"from {foreign}" not in path.read_text(encoding="utf-8")


def opens_text_without_encoding(node):
    """Whether a call reads or writes text in the encoding of the system, which is not UTF-8 on Windows."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    modes = [given.get("mode", "")] + [one.value for one in node.args if isinstance(one, ast.Constant)]
    binary = any(isinstance(mode, str) and re.fullmatch(r"'?[rwax+]*b[rwax+]*'?", mode) for mode in modes)
    shell = name in ("run", "Popen", "check_output") and given.get("text") == "True"
    reads = name == "read_text" and not node.args  # The pool's method of that name takes a mask.
    text = reads or shell or name == "write_text" or (name == "open" and not binary)
    return text and "encoding" not in given


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("path.read_text()", True), ("path.write_text('open')", True), ("open(path)", True), ("path.open('w')", True),
        ("run(x, text=True)", True), ("path.open('rb')", False), ("open(path, mode='wb')", False),
        ("path.read_text(encoding='utf-8')", False), ("safe_open(path, 'pt')", False),
    ],
)  # fmt: skip
def test_the_search_for_encodings_finds_what_it_should(code, found):
    assert any(map(opens_text_without_encoding, ast.walk(ast.parse(code)))) is found


@pytest.mark.parametrize("path", ROOT.rglob("*.py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_read_and_written_as_utf_8(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = [node.lineno for node in ast.walk(tree) if opens_text_without_encoding(node)]
    assert not lines, f"{path}, lines {lines}: give an encoding"
