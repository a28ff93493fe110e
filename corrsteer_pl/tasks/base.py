"""The seam between data and method: what every task offers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from corrsteer_pl.errors import UserError, choices


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        id: Unique within its split.
        prompt: The text that the model continues.
        gold: What the reward compares with.
        group: A category whose reward is reported beside the whole, or None.
    """

    id: str
    prompt: str
    gold: str
    group: str | None = None


class Task(ABC):
    """Turns rows into prompts and responses into rewards.

    Attributes:
        default_path: Data that belong to the task, or None if ``data.path`` has to name some.
        max_new_tokens: How many tokens are generated at most.
        answers: The only responses that make sense, each one token, or None for free text.
    """

    default_path: ClassVar[Path | None] = None
    max_new_tokens: int = 1
    answers: Sequence[str] | None = None

    @abstractmethod
    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """Make the sample of one row.

        Raises:
            UserError: A column is missing, or its value cannot be used.
        """

    @abstractmethod
    def reward(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Rewards in [0, 1] of the responses to the prompts of ``examples``."""


def column(row: Mapping[str, Any], name: str, option: str, id: str) -> Any:
    """The value of a named column.

    Raises:
        UserError: The row has no such column, or nothing in it.
    """
    if name not in row:
        raise UserError(
            f"column {name!r} is not in the data (columns: {choices(row)}). Set data.task_args.{option} to one of them."
        )
    if row[name] is None:
        raise UserError(f"row {id} has nothing in the column {name!r}. Fill it in or remove the row.")
    return row[name]
