"""Rows of a split, from local files or from the Hugging Face Hub."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from corrsteer_pl.errors import UserError, choices, nearest
from corrsteer_pl.files import READERS, exists, read_rows
from corrsteer_pl.hub import HUB_ERRORS, reason

ALL = "all"


class RowSource:
    """Where the rows of a data set are read from, split by split.

    A local path is one file, whose rows all splits share, or a folder with files ``[subset.]split[-part].ending``,
    as the Hub names its own. Anything else is the id of a data set on the Hub. A part of a split is named as on the
    Hub: ``train[:80%]``, ``train[100:200]``.

    Args:
        path: File, folder, or Hub id.
        subsets: Named configurations to read one after the other; none for all local files, or the Hub's only one.
        named: Whether the user named the subsets, which then have to exist.
        revision: Branch, tag or commit of a data set on the Hub; None for its newest.
        is_one_of_several: Whether rows are to say in a column ``source`` where they are from.

    Raises:
        UserError: There is nothing at the path, or it has no such subset or no revisions.
    """

    def __init__(
        self,
        path: str,
        subsets: Sequence[str] = (),
        named: bool = True,
        revision: str | None = None,
        is_one_of_several: bool = False,
    ) -> None:
        self.is_one_of_several = is_one_of_several
        self.path, self.subsets, self.revision = path, tuple(subsets), revision
        self.local = Path(path) if exists(path) else None
        if self.local is not None:
            self._check_local(self.local, named)
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            raise UserError(
                f"data.path is {path!r}, which does not exist. Set it to a file, a folder of files, or the id of a "
                "data set on the Hugging Face Hub."
            )

    def _check_local(self, local: Path, named: bool) -> None:
        if not local.is_file() and not local.is_dir():
            raise UserError(f"data.path is {self.path}, which is neither a regular file nor a folder. Set it to one.")
        if self.revision is not None:
            raise UserError(
                f"data.revision is {self.revision!r}, but {self.path} is on this machine and has no revisions. "
                "Leave it out, or set it to null."
            )
        if not named or not self.subsets:
            return
        if local.is_file():
            raise UserError(f"data.subset is {choices(self.subsets)}, but {self.path} is one file. Leave it out.")
        known = sorted({subset for file in self._all_files() if (subset := _parts(file)[0]) is not None})
        if absent := [subset for subset in self.subsets if subset not in known]:
            raise UserError(
                f"data.subset is {absent[0]!r}, but the files of {self.path} have the subsets "
                f"{choices(nearest(str(absent[0]), known))}. Set it to one of them, or to null if there is none."
            )

    @property
    def only_names(self) -> tuple[str, ...]:
        """Names for the only split of a single file; empty for a folder or the Hub."""
        if self.local is None or not self.local.is_file():
            return ()
        return (ALL, *sorted({self.local.stem, _parts(self.local)[1]}))

    def has(self, split: str) -> bool:
        """Whether there is such a split. A single file has every split, for all share its rows.

        Raises:
            UserError: The Hub cannot say so.
        """
        if self.local is not None:
            return bool(self._files(_part_of(split)[0]))
        try:
            subset = self.subsets[0] if self.subsets else None
            known = {ALL, *_datasets().get_dataset_split_names(self.path, subset, revision=self.revision)}
            # The Hub's library takes parts and sums of splits too: train[:80%]+dev.
            return known.issuperset(part.partition("[")[0].strip() for part in split.split("+"))
        except HUB_ERRORS as error:
            raise self._unavailable(error, self._missing(subset, split)) from error

    def place(self, split: str) -> tuple[str, ...]:
        """Where the rows of a split are; splits in the same place divide them. Empty if a folder lacks the split."""
        if self.local is None:
            return (self.path, *self.subsets, split)
        name, part = _part_of(split)
        return tuple(f"{file}{part or ''}" for file in self._files(name))

    def read(self, split: str) -> list[tuple[str, dict[str, Any]]]:
        """The rows of a split, each with an id.

        Raises:
            UserError: There is no such split, or it cannot be read.
        """
        rows = self._rows(split)
        if not self.is_one_of_several:
            return rows
        return [(f"{self.name}:{id}", {"source": self.name, **row}) for id, row in rows]

    @property
    def name(self) -> str:
        """What the data set is called among several: its id on the Hub, or the name of its file or folder."""
        if self.local is None:
            return self.path
        return self.local.stem if self.local.is_file() else self.local.resolve().name

    def _rows(self, split: str) -> list[tuple[str, dict[str, Any]]]:
        if self.local is None:
            return [row for subset in self.subsets or (None,) for row in self._from_hub(subset, split)]
        name, part = _part_of(split)
        if not (files := self._files(name)):
            raise self.without(name)
        found: dict[str | None, list[tuple[str, dict[str, Any]]]] = {}
        for file in files:
            subset = _parts(file)[0]
            found.setdefault(subset, []).extend(_numbered(_named(read_rows(file), subset), file.stem))
        return [row for rows in found.values() for row in _sliced(rows, part)]

    def without(self, split: str) -> UserError:
        """The error for a split that does not exist."""
        if self.local is None:
            subset = self.subsets[0] if self.subsets else None
            return self._unavailable(ValueError(f"it has no split {split!r}"), self._missing(subset, split))
        names = sorted({_parts(file)[1] for file in self._all_files()})
        return UserError(
            f"{self.local} has no file for the split {_part_of(split)[0]!r} (it has {choices(names)}). "
            "Set data.train_split, data.val_split and data.test_split to names of its files."
        )

    def _all_files(self) -> list[Path]:
        if self.local is None or self.local.is_file():
            return [self.local] if self.local else []
        try:
            return sorted(file for file in self.local.iterdir() if file.suffix in READERS and file.is_file())
        except OSError as error:
            raise UserError(f"the folder {self.local} cannot be read ({error.strerror}).") from error

    def _files(self, split: str) -> list[Path]:
        files = self._all_files()
        if self.local is not None and self.local.is_file():
            return files
        found = [file for file in files if split in (ALL, _parts(file)[1])]
        named = [file for file in found if _parts(file)[0] in self.subsets]
        return named or [file for file in found if not self.subsets or _parts(file)[0] is None]

    def _from_hub(self, subset: str | None, split: str) -> list[tuple[str, dict[str, Any]]]:
        try:
            rows = _datasets().load_dataset(self.path, subset, split=split, revision=self.revision).to_list()
        except HUB_ERRORS as error:
            raise self._unavailable(error, self._missing(subset, split)) from error
        return _numbered(_named(rows, subset), f"{subset}:{split}" if subset else split)

    def _unavailable(self, error: Exception, missing: str | None) -> UserError:
        return UserError(
            f"the data set {self.path!r} could not be loaded from the Hugging Face Hub ({missing or reason(error)}). "
            "Set data.path to a local copy, a folder with one file per split in the same columns, or to another "
            "data set."
        )

    def _missing(self, subset: str | None, split: str) -> str | None:
        """The reason if the data set has no such subset or split; else None."""
        try:
            subsets = _datasets().get_dataset_config_names(self.path, revision=self.revision)
            if subset not in (None, *subsets) or (subset is None and len(subsets) > 1 and "default" not in subsets):
                return f"it has the subsets {choices(nearest(str(subset), subsets))}; set data.subset to one"
            splits = _datasets().get_dataset_split_names(self.path, subset, revision=self.revision)
        except HUB_ERRORS:
            return None
        if split in (ALL, *splits):
            return None
        return f"it has the splits {choices(splits)}; set data.train_split, data.val_split and data.test_split"


def _datasets() -> Any:
    """The datasets library, which is slow to import and not needed for local files."""
    import datasets

    return datasets


def _parts(file: Path) -> tuple[str | None, str]:
    """Subset and split in a file's name.

    Example:
        >>> _parts(Path("Age.test.jsonl")), _parts(Path("train-00000-of-00002.parquet"))
        (('Age', 'test'), (None, 'train'))
    """
    subset, _, split = file.stem.rpartition(".")
    return subset or None, re.sub(r"-\d+-of-\d+$", "", split)


def _part_of(split: str) -> tuple[str, str | None]:
    """Name of a split, and which part of it is meant, None for all.

    Raises:
        UserError: The part is none.

    Example:
        >>> _part_of("train[:80%]"), _part_of("train")
        (('train', '[:80%]'), ('train', None))
    """
    name, bracket, rest = split.partition("[")
    if not bracket:
        return split, None
    if not re.fullmatch(r"(-?\d+%?)?:(-?\d+%?)?\]", rest):
        raise UserError(f"the split {split!r} is no part of {name}; parts are such as {name}[:80%] or {name}[100:200].")
    return name, bracket + rest


def _sliced(rows: list[Any], part: str | None) -> list[Any]:
    """A part of some rows, by their places or in percent.

    Example:
        >>> _sliced([0, 1, 2, 3, 4], "[-40%:]"), _sliced([0, 1, 2, 3, 4], "[1:3]"), _sliced([0], None)
        ([3, 4], [1, 2], [0])
    """
    if part is None:
        return rows

    def place(limit: str) -> int | None:
        return None if not limit else round(int(limit[:-1]) * len(rows) / 100) if "%" in limit else int(limit)

    return rows[slice(*map(place, part[1:-1].split(":")))]


def _named(rows: Sequence[dict[str, Any]], subset: str | None) -> list[dict[str, Any]]:
    """Rows that say in a column ``subset`` which one they are of, unless they have such a column."""
    return list(rows) if subset is None else [{"subset": subset, **row} for row in rows]


def _numbered(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[str, dict[str, Any]]]:
    ids = [row.get("id") for row in rows]
    return [(f"{name}:{i}" if id is None else str(id), row) for i, (id, row) in enumerate(zip(ids, rows, strict=True))]


def with_values(
    rows: Sequence[tuple[str, dict[str, Any]]], wanted: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
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


def balanced(rows: Sequence[tuple[str, dict[str, Any]]], column: str) -> list[tuple[str, dict[str, Any]]]:
    """As many rows of each value of a column as its rarest value has, drawn at random, always the same; in order.

    Raises:
        UserError: No such column.

    Example:
        >>> [row["x"] for _, row in balanced([("a", {"x": 1}), ("b", {"x": 2}), ("c", {"x": 2})], "x")]
        [1, 2]
    """
    if rows and not any(column in row for _, row in rows):
        raise UserError(f"data.balance names the column {column!r}, which is not in the data ({choices(rows[0][1])}).")
    places: dict[str, list[int]] = {}
    for i, (_, row) in enumerate(rows):
        places.setdefault(str(row.get(column)), []).append(i)
    fewest = min(map(len, places.values()), default=0)
    kept: list[int] = []
    for some in places.values():
        drawn = torch.randperm(len(some), generator=torch.Generator().manual_seed(0))[:fewest]
        kept += [some[i] for i in drawn.tolist()]
    return [rows[i] for i in sorted(kept)]
