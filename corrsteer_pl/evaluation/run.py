"""A run's folder, read again: what a fit selected, and what its tests found."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from corrsteer_pl.errors import UserError, choices, one_line
from corrsteer_pl.evaluation.paired import Outcome, outcome_rows
from corrsteer_pl.selection import Selection


@dataclass(frozen=True)
class Test:
    """A finished test.

    Attributes:
        name: Its folder below ``test/``.
        metrics: What its ``metrics.json`` says.
        outcomes: Both answers to every question.
    """

    name: str
    metrics: dict[str, Any]
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Run:
    """What a run has left.

    Attributes:
        folder: Where.
        config: Its ``config.yaml``, as text.
        settings: The same, read.
        selection: What was selected.
        snapshots: What each validation of the fit found.
        cards: Cards of the selected features, by name.
        tests: Metrics of its finished tests, by name, the latest first.
        stale: Names of tests of another fit in the same folder.
        method: Name of the method that was fitted.
    """

    folder: Path
    config: str
    settings: dict[str, Any]
    selection: Selection
    snapshots: list[dict[str, Any]]
    cards: dict[str, dict[str, Any]]
    tests: dict[str, dict[str, Any]]
    stale: tuple[str, ...]
    method: str

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a folder.

        Raises:
            UserError: It is no folder of a finished fit, or one of its files is damaged.
        """
        if not (folder / "selection.json").is_file():
            known = sorted(str(path.parent) for path in Path("checkpoints").glob("*/selection.json"))
            there = f" There is {choices(known)}." if known else ""
            raise UserError(
                f"{folder} has no selection.json, so it is not the folder of a finished fit. Give one, such as "
                f"checkpoints/demo, or fit first.{there}"
            )
        plain = _json(folder / "selection.json")
        snapshots, method = plain.pop("snapshots", []), str(plain.pop("method", "corrsteer"))
        try:
            selection = Selection.from_dict(plain)
        except UserError as error:
            raise UserError(f"{folder / 'selection.json'} is damaged ({one_line(error)}). Fit again.") from error
        cards = _json(folder / "features.json")["cards"] if (folder / "features.json").is_file() else []
        config = folder / "config.yaml"
        text = config.read_text(encoding="utf-8") if config.is_file() else ""
        latest = sorted(folder.glob("test/*/metrics.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        tests = {path.parent.name: _json(path) for path in latest}
        stale = tuple(name for name, metrics in tests.items() if metrics.get("fit") != selection.mark)
        current = {name: metrics for name, metrics in tests.items() if name not in stale}
        named = {card["name"]: card for card in cards}
        return cls(folder, text, yaml.safe_load(text) or {}, selection, snapshots, named, current, stale, method)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def model(self) -> str:
        """The language model's name: on the Hub, or the last part of its path."""
        name = str(self.selection.llm.get("name", "the model"))
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def edit_unit(self) -> str:
        """How the strength of an edit of the weights is measured: ``percent`` or ``alpha``."""
        record = self.folder / "edit.json"
        return str(_json(record)["edit"].get("unit", "percent")) if record.is_file() else "percent"

    @property
    def place(self) -> str:
        """The folder as it can be written into a command, from where the report was asked for."""
        return self.beside("")

    def beside(self, suffix: str) -> str:
        """The same of a folder beside it, whose name ends otherwise."""
        return quote(f"{self.folder if self.folder.name else self.folder.resolve()}{suffix}")

    @property
    def task(self) -> str:
        """The task of the fit."""
        return str(self.option("data", "task") or next((m["task"] for m in self.tests.values()), "?"))

    def options(self, part: str) -> dict[str, Any]:
        """Options of the fit: of its ``model``, or of its ``data``."""
        some = self.settings.get(part)
        return dict(some.get("init_args", some)) if isinstance(some, Mapping) else {}

    def option(self, part: str, name: str) -> Any:
        """An option of the fit."""
        return self.options(part).get(name)

    def test(self, name: str | None = None) -> Test | None:
        """A test by its name, or that of the fit's own task, or the latest; None if there is none.

        Raises:
            UserError: There is none of that name.
        """
        if name is not None and name not in self.tests:
            other = " of this fit" if name in self.stale else ""
            raise UserError(f"{self.folder} has no test {name}{other}; it has {choices(self.tests)}.")
        own = Path(self.task).name
        chosen = name or (own if own in self.tests else next(iter(self.tests), None))
        if chosen is None:
            return None
        rows = outcome_rows(self.folder / "test" / chosen / "outcomes.jsonl")
        outcomes = [Outcome(**{**row, "groups": tuple(row["groups"])}) for row in rows]
        return Test(chosen, self.tests[chosen], outcomes)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}). Run what wrote it again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object. Run what wrote it again.")
    return found
