"""Multiple-choice questions, answered with one letter."""

import json
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from corrsteer_pl import rewards
from corrsteer_pl.errors import UserError
from corrsteer_pl.tasks.base import Example, Task, column


def _listed(options: Any, id: str) -> list[Any]:
    """The options of a row; CSV has them as a JSON list."""
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError:
            options = None
    if not isinstance(options, list):
        raise UserError(f'row {id} has no list of options. Give a list, in CSV as JSON: ["red", "blue"].')
    return options


class MultipleChoice(Task):
    """A question and its options, one line each; the response is right if it is the gold letter.

    Args:
        question: Column with the question.
        choices: Column with the list of options.
        answer: Column with the index of the right option, from 0, or its letter.
        group: Column whose values are reported separately, or None.
        options: Number of options that every row has.

    Source:
        The select prompt of CorrSteer's public code (seonglae/CorrSteer), restated.
    """

    def __init__(
        self,
        question: str = "question",
        choices: str = "choices",
        answer: str = "answer",
        group: str | None = None,
        options: int = 4,
    ) -> None:
        if not 2 <= options <= len(ascii_uppercase):
            raise UserError(f"data.task_args.options is {options}; a question has 2 to {len(ascii_uppercase)} options.")
        self.columns = {"question": question, "choices": choices, "answer": answer}
        self.group = group
        self.letters = ascii_uppercase[:options]
        self.answers = [f" {letter}" for letter in self.letters]

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """Make the prompt of one question."""
        question, options, answer = (column(row, name, option, id) for option, name in self.columns.items())
        options = _listed(options, id)
        if len(options) != len(self.letters):
            raise UserError(
                f"row {id} has {len(options)} options, but the task has {len(self.letters)}. "
                "Set data.task_args.options to the number that every row has."
            )
        lines = [f"{letter}. {option}" for letter, option in zip(self.letters, options, strict=True)]
        request = f"Choose one of {', '.join(self.letters[:-1])}, or {self.letters[-1]} only."
        group = None if self.group is None else str(column(row, self.group, "group", id))
        return Example(id, "\n".join([str(question), *lines, request, "Answer:"]), self._gold(answer, id), group)

    def _gold(self, answer: int | str, id: str) -> str:
        text = str(answer).strip()
        if text.isdigit() and int(text) < len(self.letters):
            return self.letters[int(text)]
        if len(text) == 1 and text in self.letters:
            return text
        raise UserError(
            f"row {id} has the answer {answer!r}, which is none of its options; an index from 0 to "
            f"{len(self.letters) - 1} or a letter from A to {self.letters[-1]} is needed."
        )

    def reward(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """1 for the gold letter, else 0."""
        return [rewards.letter(text, example.gold) for text, example in zip(texts, examples, strict=True)]
