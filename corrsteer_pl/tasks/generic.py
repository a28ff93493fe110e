"""Any data with named columns: a prompt template and a reward on the response's text."""

import re
from collections.abc import Mapping
from typing import Any

from corrsteer_pl.errors import UserError
from corrsteer_pl.rewards import make_reward
from corrsteer_pl.rewards.numbers import gold_number
from corrsteer_pl.tasks.base import Example, Task, check_new_tokens, column, not_a_number, present
from corrsteer_pl.tasks.template import Template


class Generic(Task):
    r"""Prompts from a template over the columns, rewarded by comparing the response with a gold text.

    Args:
        prompt: Template with columns in braces, ``"Q: {question}\nA:"``.
        answer: Column with the gold text; or give ``gold``.
        gold: One gold text for all rows, for example a regular expression for the reward ``regex``.
        reward: ``exact``, ``match`` (equal after normalisation), ``letter``, ``number``, ``token_f1``, ``contains``,
            ``regex``, or the import path of a :class:`~corrsteer_pl.rewards.Reward` of your own or of a function of
            a response and a gold text.
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
        if (answer is None) == (gold is None):
            raise UserError(
                "give either data.task_args.answer (a column) or data.task_args.gold (one text for all rows)."
            )
        if gold is not None and not gold.strip():
            raise UserError("data.task_args.gold is empty. Give the text that responses are compared with.")
        if reward == "regex" and gold is not None:
            _check_pattern(gold, "data.task_args.gold is")
        if first_words is not None and first_words < 1:
            raise UserError(f"data.task_args.first_words is {first_words}; it is a number of words, at least 1.")
        self.template = Template(prompt, "data.task_args.prompt")
        self.answer, self.gold, self.group = answer, gold, group
        self.scorer = make_reward(reward)
        self.max_new_tokens, self.first_words = check_new_tokens(max_new_tokens), first_words
        self.shows_answer = answer is not None and reward != "regex"

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """Fill the template with one row."""
        text = self.template.fill(row, id)
        if self.first_words is not None:
            text = " ".join(text.split()[: self.first_words])
        gold = str(self.gold if self.answer is None else column(row, self.answer, "answer", id))
        if self.reward_name == "regex":
            _check_pattern(gold, f"row {id} has the gold text")
        if self.reward_name == "number" and gold_number(gold) is None:
            raise not_a_number(id, self.answer or "gold", gold)
        group = None if self.group is None else column(row, self.group, "group", id, may_be_blank=True)
        return Example(id, text, gold, present(group), gold if self.shows_answer else None)


def _check_pattern(pattern: str, given: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{given} {pattern!r}, which is no regular expression ({error}).") from error
