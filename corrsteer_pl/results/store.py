"""Finished cells on disk, by which an interrupted run goes on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_json
from corrsteer_pl.results.cells import Cell

# Options of a training of SAEs that name files.
PATHS = ("llm", "data", "prompts")
SAES = "saes.json"


class Store:
    """A folder with one file for each cell, and one for the SAEs.

    Args:
        folder: It need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, task: str, seed: int, settings: str) -> Cell | None:
        """A finished cell; None if there is none, or if it has other settings or no rewards of single examples.

        Raises:
            UserError: Its file is damaged.
        """
        path = self._path(task, seed)
        if not path.exists():
            return None
        try:
            cell = Cell(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is no cell of results ({error}). Remove it to measure it again.") from None
        return cell if cell.settings == settings and cell.rewards else None

    def keep(self, cell: Cell) -> None:
        """Write a finished cell."""
        write_json(self._path(cell.task, cell.seed), asdict(cell))

    def saes(self) -> dict[str, Any] | None:
        """How the SAEs of the cells were trained, and how good they are; None if the plan did not train them."""
        path = self.folder / SAES
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def keep_saes(self, record: dict[str, Any] | None) -> None:
        """Write that, without the files that it names, which belong to one machine."""
        if record is not None:
            options = {name: value for name, value in record["options"].items() if name not in PATHS}
            write_json(self.folder / SAES, {**record, "options": options})

    def _path(self, task: str, seed: int) -> Path:
        return self.folder / f"{task}-{seed}.json"
