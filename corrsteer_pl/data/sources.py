"""Rows of a split, from local files or from the Hugging Face Hub."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from corrsteer_pl.data.rows import Row, rows_of_file, with_unique_ids
from corrsteer_pl.errors import UserError, choices, nearest
from corrsteer_pl.files import READERS, TABLES, ending, exists, read_located_rows
from corrsteer_pl.hub import HUB_ERRORS, reason

ALL = "all"
# Files of other formats that may hold a split, and files that never do.
SHARD = re.compile(r"-(\d+)-of-(\d+)$")
UNREADABLE = (
    ".arrow", ".feather", ".orc", ".xlsx", ".xls", ".pkl", ".pickle", ".zip", ".gz", ".bz2", ".xz", ".zst", ".lz4",
    ".tar",
)  # fmt: skip
DOCUMENTS = (".md", ".py", ".sh", ".ipynb", ".yaml", ".yml", ".toml", ".cfg", ".log", ".lock", ".html", ".pdf")
# JSON files that describe a data set.
METADATA = ("dataset_info", "dataset_infos", "dataset_dict", "state", "metadata", "croissant", "config", "readme")


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
        return (ALL, *sorted({_stem(self.local), _parts(self.local)[1]}))

    def has(self, split: str) -> bool:
        """Whether there is such a split. A single file has every split, for all share its rows.

        Raises:
            UserError: The Hub cannot say so.
        """
        if self.local is not None:
            self._check_readable(_part_of(split)[0])
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

    def read(self, split: str) -> list[Row]:
        """The rows of a split, each with an id that is unique in the split.

        Raises:
            UserError: There is no such split, or it cannot be read.
        """
        rows = self._rows(split)
        if not self.is_one_of_several:
            return rows
        return [replace(row, id=f"{self.name}:{row.id}", values={"source": self.name, **row.values}) for row in rows]

    @property
    def name(self) -> str:
        """What the data set is called among several: its id on the Hub, or the name of its file or folder."""
        if self.local is None:
            return self.path
        return _stem(self.local) if self.local.is_file() else self.local.resolve().name

    def _rows(self, split: str) -> list[Row]:
        if self.local is None:
            return with_unique_ids([row for subset in self.subsets or (None,) for row in self._from_hub(subset, split)])
        name, part = _part_of(split)
        self._check_readable(name)
        if not (files := self._files(name)):
            raise self.without(name)
        _check_forms(files)
        located: dict[str | None, list[Row]] = {}
        for file in files:
            subset = _parts(file)[0]
            rows = _named(read_located_rows(file), subset)
            located.setdefault(subset, []).extend(rows_of_file(rows, _stem(file), file.name, ending(file) in TABLES))
        # Ids are made unique in the whole split, so that they do not depend on the part.
        unique = iter(with_unique_ids([row for rows in located.values() for row in rows]))
        return [row for rows in located.values() for row in _sliced([next(unique) for _ in rows], part)]

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

    def _entries(self) -> list[Path]:
        """All that lies in the folder, in order."""
        if self.local is None or self.local.is_file():
            return [self.local] if self.local else []
        try:
            return sorted(entry for entry in self.local.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            raise UserError(f"the folder {self.local} cannot be read ({error.strerror}).") from error

    def _all_files(self) -> list[Path]:
        """The files with rows."""
        entries = self._entries()
        if self.local is not None and self.local.is_file():
            return entries
        return [
            entry for entry in entries
            if ending(entry) in READERS and entry.is_file() and _stem(entry).lower() not in METADATA
        ]  # fmt: skip

    def _files(self, split: str) -> list[Path]:
        files = self._all_files()
        if self.local is not None and self.local.is_file():
            return files
        found = [file for file in files if split in (ALL, _parts(file)[1])]
        named = [file for file in found if _parts(file)[0] in self.subsets]
        return named or [file for file in found if not self.subsets or _parts(file)[0] is None]

    def _check_readable(self, split: str) -> None:
        """Reject a split that is there in a form that cannot be read.

        Raises:
            UserError: Its file has an unknown ending, or is a folder.
        """
        if self.local is None or self.local.is_file():
            return
        files = self._all_files()
        has_file = any(_parts(file)[1] == split for file in files)
        for entry in self._entries():
            is_data = ending(entry) in READERS or entry.suffix.lower() in UNREADABLE
            if entry in files or split not in _possible_splits(entry) or (has_file and not is_data):
                continue
            if entry.is_dir():
                raise UserError(f"{entry} is a folder in place of a file of the split {split!r}. Put a file there.")
            if entry.is_file() and entry.suffix.lower() not in DOCUMENTS:
                raise UserError(
                    f"{entry} cannot be read as the split {split!r}; endings are {choices(READERS)}. Convert it, or "
                    "move it elsewhere."
                )

    def resembling(self, split: str) -> list[str]:
        """Names in the folder that may hold a split, in whatever form."""
        if self.local is None or self.local.is_file():
            return []
        pattern = re.compile(rf"(?:^|[^a-z]){split}(?:ing)?(?:[-_. ]?\d+(?:-of-\d+)?)?$")
        return [
            entry.name for entry in self._entries()
            if entry.suffix.lower() not in DOCUMENTS
            and any(pattern.search(name.lower()) for name in _possible_splits(entry))
        ]  # fmt: skip

    def _from_hub(self, subset: str | None, split: str) -> list[Row]:
        try:
            rows = _datasets().load_dataset(self.path, subset, split=split, revision=self.revision).to_list()
        except HUB_ERRORS as error:
            raise self._unavailable(error, self._missing(subset, split)) from error
        name = f"{subset}:{split}" if subset else split
        located = [(f"row {number}", row) for number, row in enumerate(rows, start=1)]
        return rows_of_file(_named(located, subset), name, f"{self.path} {name}")

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


def _stem(file: Path) -> str:
    """A file's name without the ending that tells its format."""
    kind = ending(file)
    return file.name[: len(file.name) - len(kind)] if kind in READERS else file.stem


def _parts(file: Path) -> tuple[str | None, str]:
    """Subset and split in a file's name.

    Example:
        >>> _parts(Path("Age.test.jsonl")), _parts(Path("train-00000-of-00002.parquet"))
        (('Age', 'test'), (None, 'train'))
    """
    subset, _, split = _stem(file).rpartition(".")
    return subset or None, SHARD.sub("", split)


def _possible_splits(entry: Path) -> set[str]:
    """Splits that a file of any ending, or a folder, may be meant to hold.

    Example:
        >>> sorted(_possible_splits(Path("Age.train.jsonl.zst"))), sorted(_possible_splits(Path("train")))
        (['jsonl', 'train', 'zst'], ['train'])
    """
    names = entry.name.split(".")
    known = {suffix[1:] for suffix in UNREADABLE} | {part for kind in READERS for part in kind[1:].split(".")}
    inner = [name for name in names[1:] if name.lower() not in known]
    return {SHARD.sub("", name) for name in [*names[-1:], *names[-2:-1], *(inner[-1:] or names[:1])]}


def _check_forms(files: Sequence[Path]) -> None:
    """Check that the files of each split are either one file or all parts of one.

    Raises:
        UserError: A split is there in two forms, or lacks a part.
    """
    by_split: dict[tuple[str | None, str], list[Path]] = {}
    for file in files:
        by_split.setdefault(_parts(file), []).append(file)
    for (_, split), same in by_split.items():
        shards = [match for file in same if (match := SHARD.search(_stem(file)))]
        forms = {(ending(file), match[2] if (match := SHARD.search(_stem(file))) else None) for file in same}
        if len(forms) > 1 or (len(same) > 1 and not shards):
            raise UserError(
                f"the split {split!r} is there more than once: {choices(file.name for file in same)}. "
                "Remove all but one."
            )
        numbers = {int(match[1]) for match in shards}
        if shards and (absent := sorted(set(range(int(shards[0][2]))) - numbers)):
            raise UserError(
                f"the split {split!r} has {len(numbers)} of {int(shards[0][2])} files, and lacks number {absent[0]}: "
                f"{choices(file.name for file in same)}. Add it."
            )


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


def _named(rows: Sequence[tuple[str, dict[str, Any]]], subset: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Located rows that say in a column ``subset`` which one they are of, unless they have such a column."""
    return list(rows) if subset is None else [(where, {"subset": subset, **row}) for where, row in rows]
