"""Rows of a split, from local files or from the Hugging Face Hub."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import get_dataset_config_names, get_dataset_split_names, load_dataset

from corrsteer_pl.errors import UserError, choices, nearest
from corrsteer_pl.files import READERS, exists, read_rows
from corrsteer_pl.hub import HUB_ERRORS, reason

ALL = "all"


class Rows:
    """The rows of a data set, split by split.

    A local path is a file, which has one split whatever it is called, or a folder with files
    ``[subset.]split[-part].ending``, as the Hub names its own. Anything else is the id of a data set on the Hub.

    Args:
        path: File, folder, or Hub id.
        subsets: Named configurations to read one after the other; none for all local files, or the Hub's only one.
        named: Whether the user named the subsets.
    """

    def __init__(self, path: str, subsets: Sequence[str] = (), named: bool = True) -> None:
        self.path, self.subsets = path, tuple(subsets)
        self.local = Path(path) if exists(path) else None
        if self.local is not None and self.local.is_file() and self.subsets and named:
            raise UserError(f"data.subset is {choices(self.subsets)}, but {path} is one file. Leave it out.")
        if self.local is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            raise UserError(
                f"data.path is {path!r}, which does not exist. Set it to a file, a folder of files, or the id of a "
                "data set on the Hugging Face Hub."
            )

    def has(self, split: str) -> bool:
        """Whether there is such a split.

        Raises:
            UserError: The Hub cannot say so.
        """
        if self.local is not None:
            return bool(self._files(split))
        try:
            subset = self.subsets[0] if self.subsets else None
            return split == ALL or split in get_dataset_split_names(self.path, subset)
        except HUB_ERRORS as error:
            raise self._unavailable(error, self._missing(subset, split)) from error

    def place(self, split: str) -> tuple[str, ...]:
        """What holds a split: two splits in the same place have to share its rows. Empty if nothing is known to."""
        if self.local is None:
            return (self.path, *self.subsets, split)
        return tuple(str(file) for file in self._files(split))

    def read(self, split: str) -> list[tuple[str, dict[str, Any]]]:
        """The rows of a split, each with an id.

        Raises:
            UserError: There is no such split, or it cannot be read.
        """
        if self.local is None:
            return [row for subset in self.subsets or (None,) for row in self._from_hub(subset, split)]
        if not (files := self._files(split)):
            names = sorted({_parts(file)[1] for file in self._all_files()})
            raise UserError(
                f"{self.local} has no file for the split {split!r} (it has {choices(names)}). "
                "Set data.train_split, data.val_split and data.test_split to names of its files."
            )
        return [numbered for file in files for numbered in _numbered(read_rows(file), file.stem)]

    def _all_files(self) -> list[Path]:
        if self.local is None or self.local.is_file():
            return [self.local] if self.local else []
        return sorted(file for file in self.local.iterdir() if file.suffix in READERS)

    def _files(self, split: str) -> list[Path]:
        files = self._all_files()
        if self.local is not None and self.local.is_file():
            return files
        found = [file for file in files if split in (ALL, _parts(file)[1])]
        named = [file for file in found if _parts(file)[0] in self.subsets]
        return named or [file for file in found if not self.subsets or _parts(file)[0] is None]

    def _from_hub(self, subset: str | None, split: str) -> list[tuple[str, dict[str, Any]]]:
        try:
            rows = load_dataset(self.path, subset, split=split).to_list()
        except HUB_ERRORS as error:
            raise self._unavailable(error, self._missing(subset, split)) from error
        return _numbered(rows, f"{subset}:{split}" if subset else split)

    def _unavailable(self, error: Exception, missing: str | None) -> UserError:
        return UserError(
            f"the data set {self.path!r} could not be loaded from the Hugging Face Hub ({missing or reason(error)}). "
            "Set data.path to a local copy, a folder with one file per split in the same columns, or to another "
            "data set."
        )

    def _missing(self, subset: str | None, split: str) -> str | None:
        """That the data set has no such subset or split, if that is so."""
        try:
            subsets = get_dataset_config_names(self.path)
            if subset not in (None, *subsets) or (subset is None and len(subsets) > 1 and "default" not in subsets):
                return f"it has the subsets {choices(nearest(str(subset), subsets))}; set data.subset to one"
            splits = get_dataset_split_names(self.path, subset)
        except HUB_ERRORS:
            return None
        if split in (ALL, *splits):
            return None
        return f"it has the splits {choices(splits)}; set data.train_split, data.val_split and data.test_split"


def _parts(file: Path) -> tuple[str | None, str]:
    """Subset and split in a file's name.

    Example:
        >>> _parts(Path("Age.test.jsonl")), _parts(Path("train-00000-of-00002.parquet"))
        (('Age', 'test'), (None, 'train'))
    """
    subset, _, split = file.stem.rpartition(".")
    return subset or None, re.sub(r"-\d+-of-\d+$", "", split)


def _numbered(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[str, dict[str, Any]]]:
    return [(str(row.get("id", f"{name}:{i}")), row) for i, row in enumerate(rows)]


def keep(rows: Sequence[tuple[str, dict[str, Any]]], wanted: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The rows whose columns have the wanted values, each one value or a list of them.

    Raises:
        UserError: No such column, or a value that no row has.
    """
    for name, value in wanted.items():
        values = [str(v) for v in (value if isinstance(value, list) else [value])]
        if rows and not any(name in row for _, row in rows):
            raise UserError(f"data.filter names the column {name!r}, which is not in the data ({choices(rows[0][1])}).")
        present = {str(row.get(name)) for _, row in rows}
        if absent := [v for v in values if v not in present]:
            raise UserError(
                f"data.filter wants {name} {absent[0]!r}, which no row has. "
                f"Set it to one of {choices(map(repr, nearest(absent[0], sorted(present))))}."
            )
        rows = [(id, row) for id, row in rows if str(row.get(name)) in values]
    return list(rows)
