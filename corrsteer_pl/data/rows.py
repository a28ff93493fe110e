"""Rows as they enter: located, with unique ids and one notation for missing values, chosen by the values of columns."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from corrsteer_pl.errors import UserError, choices, nearest
from corrsteer_pl.tasks.base import MissingValue, column, is_missing, plain_text, structured

# What libraries write into a table for a missing value. The texts None, NA and null may be meant as such.
EMPTY_CELLS = ("nan", "NaN", "<NA>", "NaT", "#N/A")
# Locations that an error message lists.
MOST_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
        id: Unique within its split.
        values: Its columns. A missing value is None.
        file: Name of the file, or of the split on the Hub.
        location: Where in the file, such as ``line 3``.
    """

    id: str
    values: dict[str, Any]
    file: str
    location: str

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.file}, {self.location}"


def rows_of_file(
    located: Sequence[tuple[str, Mapping[str, Any]]], name: str, file: str, is_table: bool = False
) -> list[Row]:
    """Rows of one file with the ids of their column ``id``, or else with their positions.

    Args:
        located: Rows with their locations.
        name: What positions are counted in, for ids.
        file: What is said of a row's place.
        is_table: Whether cells have no types, so that empty ones are missing values.
    """
    cleaned = [{key: _cleaned(value, is_table) for key, value in row.items()} for _, row in located]
    for key in _integer_columns(cleaned):
        for row in cleaned:
            if row.get(key) is not None:
                row[key] = row[key].removesuffix(".0") if isinstance(row[key], str) else int(row[key])
    ids = [f"{name}:{i}" if is_missing(row.get("id")) else plain_text(row["id"]) for i, row in enumerate(cleaned)]
    return [Row(id, row, file, where) for id, row, (where, _) in zip(ids, cleaned, located, strict=True)]


def _cleaned(value: Any, is_table: bool) -> Any:
    """A value in which NaN, NaT, NA and empty cells are None, also within lists and objects."""
    if isinstance(value, dict):
        return {key: _cleaned(inner, is_table) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner, is_table) for inner in value]
    if isinstance(value, str):
        return None if is_table and (is_missing(value) or value.strip() in EMPTY_CELLS) else value
    return None if is_missing(value) else value


def _integer_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns of integers that a missing value has turned into floats, as pandas does: 1.0, 2.0, NaN."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = []
    for name in names:
        values = [row[name] for row in rows if name in row]
        present = [value for value in values if not is_missing(value)]
        if len(present) < len(values) and present and all(map(_is_integral, present)):
            found.append(name)
    return found


def _is_integral(value: Any) -> bool:
    if isinstance(value, str):
        return value.removeprefix("-").removesuffix(".0").isdecimal() and value.endswith(".0")
    return isinstance(value, float) and value.is_integer()


def with_unique_ids(rows: Sequence[Row]) -> list[Row]:
    """The rows of a split; those that share an id are called by their file and line instead.

    A warning counts them. Runs are compared by these ids, which therefore must not depend on what is done to the rows
    afterwards, such as a filter.
    """
    counts = Counter(row.id for row in rows)
    shared = [row for row in rows if counts[row.id] > 1]
    if not shared:
        return list(rows)
    warnings.warn(
        f"{len(shared)} of {len(rows)} rows share their id with another, such as {shared[0].id!r} ({shared[0].place}). "
        "They are called by file and line instead.",
        stacklevel=2,
    )
    renamed = [replace(row, id=f"{row.file}:{row.location}") if counts[row.id] > 1 else row for row in rows]
    if len({row.id for row in renamed}) < len(renamed):
        # An id that looks like the place of another row.
        renamed = [replace(row, id=f"{row.file}:{row.location}") for row in rows]
    return renamed


def check_missing(missing: Sequence[tuple[Row, MissingValue]], count: int, drop: bool) -> None:
    """Report rows in which a needed value is missing.

    Args:
        missing: The rows, each with its error.
        count: Number of all rows.
        drop: Whether they are removed, with a warning.

    Raises:
        UserError: There are such rows, and they are not to be removed.
    """
    if not missing:
        return
    columns = choices(dict.fromkeys(repr(error.column) for _, error in missing))
    places = choices(row.place for row, _ in missing[:MOST_SHOWN])
    more = ", ..." if len(missing) > MOST_SHOWN else ""
    found = f"{len(missing)} of {count} rows have nothing in the column {columns} ({places}{more})"
    if not drop:
        raise UserError(f"{found}. Fill it in, or set data.on_missing to drop to leave them out.")
    warnings.warn(f"{found}. They are left out.", stacklevel=2)


def values_of(rows: Iterable[Row], name: str) -> set[str]:
    """The values of a column as text; those of a list each by itself."""
    found: set[str] = set()
    for row in rows:
        try:
            value = structured(column(row.values, name, "", row.id))
        except UserError:
            continue
        found.update(plain_text(one) for one in (value if isinstance(value, list) else [value]) if not is_missing(one))
    return found


def check_known(option: str, name: str, wanted: Sequence[Any], present: set[str]) -> None:
    """Check that values that an option wants in a column occur in it.

    Args:
        option: The option.
        name: The column.
        wanted: The values.
        present: The values that occur, as text.

    Raises:
        UserError: One occurs in no row.
    """
    if absent := [value for value in wanted if plain_text(value) not in present]:
        shown = plain_text(absent[0])
        quotes = "" if isinstance(absent[0], str) else f" YAML has read {shown} as no text: put text into quotes."
        raise UserError(
            f"{option} wants {name} {shown!r}, which no row has. "
            f"Set it to one of {choices(map(repr, nearest(shown, sorted(present))))}.{quotes}"
        )


def with_values(rows: Sequence[Row], wanted: Mapping[str, Any]) -> list[Row]:
    """The rows whose columns have the wanted values, each one value or a list of them; None sets no condition.

    Raises:
        UserError: No such column, or a value that no row has.
    """
    for name, value in wanted.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if rows and not any(name in row.values for row in rows):
            raise UserError(
                f"data.filter names the column {name!r}, which is not in the data ({choices(rows[0].values)})."
            )
        check_known("data.filter", name, values, {plain_text(row.values.get(name)) for row in rows})
        kept = set(map(plain_text, values))
        rows = [row for row in rows if plain_text(row.values.get(name)) in kept]
    return list(rows)


def balanced(rows: Sequence[Row], name: str) -> list[Row]:
    """As many rows of each value of a column as its rarest value has, drawn at random, always the same; in order.

    Raises:
        UserError: No such column.

    Example:
        >>> rows = [Row(str(i), {"x": x}, "", "") for i, x in enumerate([1, 2, 2])]
        >>> [row.values["x"] for row in balanced(rows, "x")]
        [1, 2]
    """
    if rows and not any(name in row.values for row in rows):
        raise UserError(
            f"data.balance names the column {name!r}, which is not in the data ({choices(rows[0].values)})."
        )
    positions: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        positions.setdefault(plain_text(row.values.get(name)), []).append(i)
    fewest = min(map(len, positions.values()), default=0)
    kept: list[int] = []
    for indices in positions.values():
        drawn = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:fewest]
        kept += [indices[i] for i in drawn.tolist()]
    return [rows[i] for i in sorted(kept)]
