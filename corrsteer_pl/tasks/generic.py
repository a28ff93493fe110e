"""Any data with named columns: a prompt template and a reward on the response's text."""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.rewards import TEXT_REWARDS
from corrsteer_pl.tasks.base import Example, Task, column


class Generic(Task):
    r"""Prompts from a template over the columns, rewarded by comparing the response with a gold text.

    Args:
        prompt: Template with columns in braces, ``"Q: {question}\nA:"``.
        answer: Column with the gold text; or give ``gold``.
        gold: One gold text for all rows, for example a regular expression for the reward ``regex``.
        reward: ``exact``, ``letter``, ``contains`` or ``regex``.
        max_new_tokens: Longest response.
        first_words: Keep only so many words of the finished prompt, for continuing a text; None keeps all.
        group: Column whose values are reported separately, or None.
    """

    def __init__(
        self,
        prompt: str = "{prompt}",
        answer: str | None = None,
        gold: str | None = None,
        reward: str = "exact",
        max_new_tokens: int = 16,
        first_words: int | None = None,
        group: str | None = None,
    ) -> None:
        if reward not in TEXT_REWARDS:
            raise UserError(f"data.task_args.reward is {reward!r}; choose one of {choices(TEXT_REWARDS)}.")
        if (answer is None) == (gold is None):
            raise UserError(
                "give either data.task_args.answer (a column) or data.task_args.gold (one text for all rows)."
            )
        self.prompt, self.answer, self.gold, self.group = prompt, answer, gold, group
        self.score = TEXT_REWARDS[reward]
        self.max_new_tokens, self.first_words = max_new_tokens, first_words

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """Fill the template with one row."""
        fields = [name for _, name, _, _ in Formatter().parse(self.prompt) if name]
        text = self.prompt.format(**{name: column(row, name, "prompt") for name in fields})
        if self.first_words is not None:
            text = " ".join(text.split()[: self.first_words])
        gold = str(self.gold if self.answer is None else column(row, self.answer, "answer"))
        group = None if self.group is None else str(column(row, self.group, "group"))
        return Example(id, text, gold, group)

    def reward(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """The chosen reward of each response."""
        return [self.score(text, example.gold) for text, example in zip(texts, examples, strict=True)]
