"""A task with its rows, divided into disjoint splits."""

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, Literal

import torch

from corrsteer_pl.data.rows import (
    Row,
    balanced,
    check_known,
    check_missing,
    values_of,
    with_values,
)
from corrsteer_pl.data.sources import ALL, RowSource
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.files import exists
from corrsteer_pl.tasks import Example, make_task, users_own
from corrsteer_pl.tasks.base import MissingValue, NoColumn, is_missing

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
OPTIONS = {"train": "data.train_split", "validation": "data.val_split", "test": "data.test_split"}


class TaskData:
    """A task, where its rows are, and which of them are meant.

    Args:
        task: Name or import path of the task.
        path: File, folder or Hub id; None for the task's own data. For :meth:`whole` also several, which are read one
            after the other; their rows have a column ``source`` with the id, or the name of the file or folder.
        task_args: Options of the task.
        subset: Named configuration, or several; None for the task's own with the task's own data. With several paths
            one for each, or null.
        filter: Columns with the values that are kept.
        train_split: Which split is fitted on; None for the task's own.
        val_split: The same for validation.
        test_split: The same for test.
        revision: Branch, tag or commit of a data set on the Hub; None for its newest.
        balance: Column each of whose values is to have as many rows as the rarest, in every split; None for all rows.
        on_missing: What becomes of rows without a value that the task needs: ``error`` or ``drop``.

    Raises:
        UserError: The task, the options or the path are unknown.
    """

    def __init__(
        self,
        task: str,
        path: str | list[str] | None = None,
        task_args: dict[str, Any] | None = None,
        subset: str | Sequence[str | None] | None = None,
        filter: dict[str, Any] | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        revision: str | None = None,
        balance: str | None = None,
        on_missing: Literal["error", "drop"] = "error",
    ) -> None:
        self.on_missing = on_missing
        self.name, self.task, self.filter = task, make_task(task, task_args or {}), filter or {}
        self.balance = balance
        self.path, self.subset, self.revision = path, subset, revision
        self._positions: dict[int, int] = {}
        self._named: dict[Split, str | None] = {"train": train_split, "validation": val_split, "test": test_split}
        source = self.task.source
        self.names: dict[Split, str] = {
            "train": source.train if train_split is None else train_split,
            "validation": source.validation if val_split is None else val_split,
            "test": source.test if test_split is None else test_split,
        }

    def examples(self, needed: Collection[Split], seed: int) -> dict[Split, list[Example]]:
        """The examples of the splits that are needed, in seeded order.

        Splits in the same place divide its rows by the task's shares, each prompt once. Where the user names no
        split to fit on and a local folder has none, its validation rows are divided between fit and validation.

        Raises:
            UserError: A split that is needed does not exist, or a row cannot be used.
        """
        source = self._source(needed)
        places = {split: source.place(name) for split, name in self.names.items()}
        names = dict(self.names)
        if not places["train"] and places["validation"] and self._named["train"] is None:
            if "train" in needed and (files := source.resembling("train")):
                raise UserError(
                    f"data.path has no split {names['train']!r}, but {choices(files)}. Name its files "
                    "[subset.]train.ENDING, or set data.train_split."
                )
            names["train"], places["train"] = names["validation"], places["validation"]
        rows = {places[split]: source.read(names[split]) for split in dict.fromkeys(needed)}
        self._check_named_values([row for some in rows.values() for row in some])
        found: dict[Split, list[Example]] = {}
        for split in needed:
            if split not in found:
                sharing = [other for other in SPLITS if places[other] == places[split]]
                found |= self._carve(self._made(rows[places[split]]), sharing, seed)
        return {split: found[split] for split in SPLITS if split in needed}

    def has(self, split: Split) -> bool:
        """Whether a split exists at all.

        Raises:
            UserError: The user named it, and it does not.
        """
        source = self._source([split])
        if source.has(self.names[split]):
            return True
        if self._named[split] is not None:
            raise source.without(self.names[split])
        return False

    def _source(self, needed: Collection[Split]) -> RowSource:
        """Where the rows are. Checks that a single file is not asked for splits of other names."""
        path = self.task.source.path if self.path is None else self.path
        if isinstance(path, list):
            raise UserError("several paths serve a fit alone, in data.fit_on. Give data.path one.")
        if path is None:
            raise UserError(
                f"the task {self.name} needs data. Set data.path to a file, a folder, or the id of a data set on the "
                "Hugging Face Hub."
            )
        own = self.task.source.subsets if path == self.task.source.path or exists(path) else ()
        subsets = [self.subset] if isinstance(self.subset, str) else [s for s in self.subset or () if s is not None]
        named = self.subset is not None
        source = RowSource(path, subsets if named else own, named, self.revision)
        for split in needed:
            name = self._named[split]
            name = None if name is None else name.partition("[")[0]
            if source.only_names and name not in (None, *source.only_names):
                raise UserError(
                    f"{OPTIONS[split]} is {name!r}, but {path} is one file, whose rows all splits share. "
                    f"Set it to null, or to one of {choices(source.only_names)}."
                )
        return source

    def whole(self, split: Split, seed: int) -> list[Example]:
        """All examples of a split, undivided, in seeded order.

        Raises:
            UserError: The split does not exist, or a row cannot be used.
        """
        sources = self._sources() if isinstance(self.path, list) else [self._source([split])]
        rows = [row for source in sources for row in source.read(self.names[split])]
        self._check_named_values(rows)
        return self._carve(self._made(rows), [split], seed)[split]

    def _sources(self) -> list[RowSource]:
        """Several data sets."""
        paths = self.path if isinstance(self.path, list) else []
        subset = self.subset
        subsets = [subset] * len(paths) if subset is None or isinstance(subset, str) else list(subset)
        if not paths or len(subsets) != len(paths):
            raise UserError(
                f"data.fit_on.path names {len(paths)} data sets and data.fit_on.subset {len(subsets)}. Give one subset "
                "for each, or null where there is only one."
            )
        sources = [
            RowSource(
                path, () if subset is None else (subset,), subset is not None, self.revision, is_one_of_several=True
            )
            for path, subset in zip(paths, subsets, strict=True)
        ]
        names = [source.name for source in sources]
        split = (self._named["train"] or ALL).partition("[")[0]
        if wrong := [source for source in sources if source.only_names and split not in source.only_names]:
            raise UserError(
                f"data.fit_on.train_split is {split!r}, but {wrong[0].path} is one file. Set it to null, or to one of "
                f"{choices(wrong[0].only_names)}."
            )
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"data.fit_on.path names two data sets called {twice[0]!r}. Rename one of the folders.")
        return sources

    def _check_named_values(self, rows: Sequence[Row]) -> None:
        """Check that the values of columns that the task's options name occur in the data."""
        for option, name, wanted in self.task.named_values() if rows else ():
            # A column that no row has is reported with its row.
            if present := values_of(rows, name):
                check_known(option, name, wanted, present)

    def _made(self, rows: Sequence[Row]) -> list[list[Example]]:
        """The samples of each row that the filter and the balance keep, with unique ids."""
        rows = with_values(rows, self.filter)
        made: dict[str, list[Example]] = {}
        missing: list[tuple[Row, MissingValue]] = []
        for row in rows:
            try:
                if self.balance in row.values and is_missing(row.values[self.balance]):
                    raise MissingValue(row.id, str(self.balance))
                made[row.id] = self._examples(row)
            except NoColumn as error:
                if not values_of(rows, error.column):
                    raise
                missing.append((row, error))
            except MissingValue as error:
                missing.append((row, error))
        check_missing(missing, len(rows), self.on_missing == "drop")
        rows = [row for row in rows if row.id in made]
        rows = rows if self.balance is None else balanced(rows, self.balance)
        return _with_unique_ids([(row, made[row.id]) for row in rows])

    def _examples(self, row: Row) -> list[Example]:
        with users_own(f"the task {self.name} on the row {row.id}"):
            examples = self.task.examples(row.values, row.id)
        for example in examples:
            _check_values(example, row)
        return examples

    def _carve(self, rows: list[list[Example]], splits: Sequence[Split], seed: int) -> dict[Split, list[Example]]:
        if len(splits) > 1:
            rows = _each_prompt_once(rows)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        shares = dict(zip(SPLITS, self.task.source.shares, strict=True))
        carved: dict[Split, list[Example]] = {}
        # The test share is taken first, then validation of the rest, each rounded: so the sizes are the published ones.
        for i, split in reversed(list(enumerate(splits))):
            total = sum(shares[other] for other in splits[: i + 1])
            count = round(len(order) * shares[split] / total)
            chosen, order = order[len(order) - count :], order[: len(order) - count]
            carved[split] = [example for j in chosen for example in rows[j]]
        examples = [example for row in rows for example in row]
        self._positions |= {id(example): i for i, example in enumerate(examples)}
        return carved

    def in_order(self, examples: list[Example]) -> list[Example]:
        """Examples of one split in the order of their rows."""
        return sorted(examples, key=lambda example: self._positions[id(example)])


def _check_values(example: Example, row: Row) -> None:
    """Check that an example has no missing value of its row, which a task may have made text of.

    Raises:
        MissingValue: Its prompt, gold answer, options or groups have.
    """
    columns = {
        str(value): name for name, value in row.values.items() if is_missing(value) and not isinstance(value, str)
    }
    # A pandas NaN has become None, whose text a row may have elsewhere as a value.
    columns = {text: name for text, name in columns.items() if text not in row.values.values()}
    fields = (example.prompt, example.gold, *example.options, *example.groups)
    for value in fields:
        if (
            value is None
            or (isinstance(value, str) and value in columns)
            or (not isinstance(value, str) and is_missing(value))
        ):
            raise MissingValue(row.id, columns.get(str(value), "of its prompt, gold answer, options or groups"))


def _with_unique_ids(made: Sequence[tuple[Row, list[Example]]]) -> list[list[Example]]:
    """The examples of each row; those that share an id are called by their row, and their number in it."""
    counts = Counter(example.id for _, examples in made for example in examples)
    if all(count == 1 for count in counts.values()):
        return [examples for _, examples in made]
    warnings.warn(
        f"{sum(count for count in counts.values() if count > 1)} of {sum(counts.values())} examples share their id "
        f"with another, such as {counts.most_common(1)[0][0]!r}. They are called by their row instead.",
        stacklevel=2,
    )
    named = [[f"{row.id}/{i}" if len(some) > 1 else row.id for i in range(len(some))] for row, some in made]
    # Unique ids stay, unless one looks like a new one.
    new = {id for ids in named for id in ids}
    renamed = [
        [replace(e, id=id) if counts[e.id] > 1 or e.id in new else e for e, id in zip(some, ids, strict=True)]
        for (_, some), ids in zip(made, named, strict=True)
    ]
    if len({e.id for some in renamed for e in some}) < sum(counts.values()):
        renamed = [[replace(e, id=f"{row.file}:{row.location}/{i}") for i, e in enumerate(some)] for row, some in made]
    return renamed


def _each_prompt_once(rows: list[list[Example]]) -> list[list[Example]]:
    """The rows without repeated prompts, which could fall into two splits, and without rows left empty by that."""
    seen: set[tuple[str, frozenset[str]]] = set()
    kept = []
    for row in rows:
        new = [example for example in row if example.asked not in seen]
        seen |= {example.asked for example in new}
        kept += [new] if new else []
    return kept


def without_overlap(splits: Mapping[Split, list[Example]]) -> dict[Split, list[Example]]:
    """Remove from each split the prompts that a later split has too, so that test keeps all of its own.

    A warning counts them.
    """
    kept = dict(splits)
    for one, other in combinations(kept, 2):
        asked = {example.asked for example in kept[other]}
        disjoint = [example for example in kept[one] if example.asked not in asked]
        if shared := len(kept[one]) - len(disjoint):
            warnings.warn(
                f"{shared} of {len(kept[one])} {one} prompts are {other} prompts too; they are left out of {one}.",
                stacklevel=2,
            )
            kept[one] = disjoint
    return kept
