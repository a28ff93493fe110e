"""Multiple-choice questions, answered with one letter."""

from collections.abc import Mapping, Sequence
from random import Random
from string import ascii_uppercase
from typing import Any, ClassVar

from corrsteer_pl.errors import UserError
from corrsteer_pl.rewards import TextReward, text
from corrsteer_pl.tasks.base import (
    Example,
    MissingValue,
    Task,
    check_new_tokens,
    column,
    is_missing,
    likeliest_option,
    plain_text,
    present,
    structured,
    without_trailing_missing,
)
from corrsteer_pl.tasks.template import Template, check_instruction

# Groups of questions, where some are to be unlearnt.
UNLEARN, RETAIN = "unlearn", "retain"
TEMPLATE = "{question}\n{options}\n{instruction}"
# The same where options are weighed and not shown.
PLAIN = "{question}\nAnswer:"


class MultipleChoice(Task):
    """A question and its options, one line each; the response is right if it is the gold letter.

    Args:
        question: Column with the question; ``column.field`` for a field of a column.
        choices: Column with the list of options, in CSV as JSON.
        answer: Column with the right option: its index from 0, its letter, one of ``labels``, or a list with 1 at
            the right option and 0 elsewhere.
        labels: Column with the names that ``answer`` may give the options, or None.
        group: Column whose values are reported separately, or None.
        options: The largest number of options that a row has.
        shuffle: Put the options into another order, the same for a question at every run; for data whose right
            option always comes first.
        chain_of_thought: Ask for reasoning, and judge the last letter that is called the answer.
        max_new_tokens: Longest response; None for one token, or 256 with chain of thought.
        likelihood: Take for the answer the option whose text is the likeliest per byte after the prompt, instead of
            letting the model write a letter, which small models hardly can.
        unlearn: Columns, each with the values at which a question is one to be unlearnt: then every answer but the
            right one is rewarded, and accuracies of both kinds are reported. None for no such question.
        template: The prompt, with the fields ``{question}``, ``{options}`` (a line for each, ``A. red``),
            ``{letters}`` (``A, B, C, or D``), ``{instruction}`` (by default ``Choose one of {letters} only.``
            and a line ``Answer:``; with chain of thought, what asks for reasoning), and any column of the row. None
            for all three, one after the other; with ``likelihood``, for the question and a line ``Answer:``.

    Example:
        >>> task = MultipleChoice()
        >>> example = task.example({"question": "2 + 2?", "choices": [3, 4], "answer": 1}, "row 0")
        >>> print(example.prompt)
        2 + 2?
        A. 3
        B. 4
        Choose one of A or B only.
        Answer:
        >>> task.reward([" B", " A"], [example, example])
        [1.0, 0.0]
    """

    computed: ClassVar[tuple[str, ...]] = ("question", "options", "letters", "instruction")

    def __init__(
        self,
        question: str = "question",
        choices: str = "choices",
        answer: str = "answer",
        labels: str | None = None,
        group: str | None = None,
        options: int = 4,
        shuffle: bool = False,
        chain_of_thought: bool = False,
        max_new_tokens: int | None = None,
        likelihood: bool = False,
        unlearn: Mapping[str, Sequence[Any]] | None = None,
        template: str | None = None,
    ) -> None:
        self.unlearn = {
            name: list(values) if isinstance(values, (list, tuple)) else [values]
            for name, values in (unlearn or {}).items()
        }
        if not 2 <= options <= len(ascii_uppercase):
            raise UserError(f"data.task_args.options is {options}; a question has 2 to {len(ascii_uppercase)} options.")
        self.question, self.choices, self.answer, self.labels, self.group = question, choices, answer, labels, group
        self.letters = ascii_uppercase[:options]
        if likelihood and (chain_of_thought or max_new_tokens is not None):
            name = "chain_of_thought" if chain_of_thought else "max_new_tokens"
            raise UserError(f"data.task_args.likelihood lets the model write nothing, so leave {name} out.")
        self.by_likelihood = likelihood
        usual = PLAIN if likelihood else TEMPLATE
        self.template = Template(usual if template is None else template, "data.task_args.template", self.computed)
        check_instruction(self.template, chain_of_thought)
        self.shuffle, self.chain_of_thought = shuffle, chain_of_thought
        longest = 256 if chain_of_thought else 1
        self.max_new_tokens = check_new_tokens(longest if max_new_tokens is None else max_new_tokens)
        self.answers = None if chain_of_thought or likelihood else [f" {letter}" for letter in self.letters]
        self.scorer = (
            TextReward("final letter", text.final_letter) if chain_of_thought else TextReward("letter", text.letter)
        )

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """Make the prompt of one question."""
        asked, options = self.asked(row, id), self.offered(row, id)
        if not 2 <= len(options) <= len(self.letters):
            raise UserError(
                f"row {id} has {len(options)} options, but the task has 2 to {len(self.letters)}. "
                "Set data.task_args.options to the largest number that a row has."
            )
        order = list(range(len(options)))
        if self.shuffle:
            Random(asked["question"]).shuffle(order)
        letters = self.letters[: len(options)]
        lines = [f"{letter}. {options[i]}" for letter, i in zip(letters, order, strict=True)]
        among = f"{', '.join(letters[:-1])}, or {letters[-1]}" if len(letters) > 2 else " or ".join(letters)
        gold = letters[order.index(self.right(row, len(options), id))]
        fields = {**asked, "options": "\n".join(lines), "letters": among, "instruction": self._instruction(among)}
        prompt = self.template.fill(row, id, fields)
        group = None if self.group is None else column(row, self.group, "group", id, may_be_blank=True)
        groups, shown = present(group, self._part(row, id)), tuple(str(options[i]) for i in order)
        right = shown[letters.index(gold)] if self.by_likelihood else gold
        return Example(
            id, prompt, gold, groups,
            solution=None if self.chain_of_thought else right,
            options=shown if self.by_likelihood else (),
            details=self.details(row, order, id),
        )  # fmt: skip

    def likeliest(self, example: Example, nats: Sequence[float], tokens: Sequence[int]) -> str:
        """The letter of the option that is the likeliest per byte; the right one of several that say the same."""
        chosen = likeliest_option(example, nats)
        return example.gold if example.options[chosen] == example.solution else self.letters[chosen]

    @property
    def reward_name(self) -> str:
        """What the results say of the reward."""
        name = "likeliest option" if self.by_likelihood else super().reward_name
        return name + (", or any other where it is to be unlearnt" if self.unlearn else "")

    def reward(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """1 for the right letter, or, where that is to be unlearnt, for anything else."""
        right = super().reward(texts, examples)
        return [1 - r if UNLEARN in e.groups else r for r, e in zip(right, examples, strict=True)]

    def measures(self, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, float | None]:
        """The accuracies of what is to be unlearnt and of what is to be retained, if there is something to unlearn."""
        if not self.unlearn:
            return {}
        right = super().reward(texts, examples)
        found = {}
        for part in (UNLEARN, RETAIN):
            some = [r for r, e in zip(right, examples, strict=True) if part in e.groups]
            found[f"accuracy_{part}"] = sum(some) / len(some) if some else None
        return found

    def _part(self, row: Mapping[str, Any], id: str) -> str | None:
        """Whether a question is to be unlearnt or retained; None if there is nothing to unlearn."""
        if not self.unlearn:
            return None
        matches = (
            plain_text(column(row, name, "unlearn", id)) in map(plain_text, values)
            for name, values in self.unlearn.items()
        )
        return UNLEARN if all(matches) else RETAIN

    def named_values(self) -> list[tuple[str, str, Sequence[Any]]]:
        """What is to be unlearnt."""
        return [("data.task_args.unlearn", name, values) for name, values in (self.unlearn or {}).items()]

    def asked(self, row: Mapping[str, Any], id: str) -> dict[str, str]:
        """The question of a row, as fields of the template."""
        return {"question": str(column(row, self.question, "question", id))}

    def offered(self, row: Mapping[str, Any], id: str) -> list[Any]:
        """The options of a row, in the order of the data."""
        options = _listed(column(row, self.choices, "choices", id), id)
        return without_trailing_missing(options, self.choices, id)

    def right(self, row: Mapping[str, Any], count: int, id: str) -> int:
        """The index of the right one among ``count`` options.

        Raises:
            UserError: The answer is none of the options.
        """
        answer = structured(column(row, self.answer, "answer", id))
        if isinstance(answer, list):
            while answer and is_missing(answer[-1]):
                answer = answer[:-1]
            if len(answer) == count and answer.count(1) == 1:
                return answer.index(1)
        # An index is a float where pandas has met a missing value.
        name = plain_text(answer).strip()
        name = name.removesuffix(".0") if name.removesuffix(".0").isdecimal() and self.labels is None else name
        if self.labels is not None:
            labels = _listed(column(row, self.labels, "labels", id), id)
            names = [plain_text(label) for label in without_trailing_missing(labels, self.labels, id)]
            if name in names[:count]:
                return names.index(name)
        elif name.isascii() and name.isdigit() and int(name) < count:
            return int(name)
        elif len(name) == 1 and name in self.letters[:count]:
            return self.letters.index(name)
        message = (
            f"row {id} has the answer {answer!r}, which is none of its options; an index from 0 to {count - 1} or a "
            f"letter from A to {self.letters[count - 1]} is needed, or one of data.task_args.labels."
        )
        if isinstance(answer, list) and any(map(is_missing, answer)):
            raise MissingValue(id, self.answer, message)
        raise UserError(message)

    def details(self, row: Mapping[str, Any], order: Sequence[int], id: str) -> dict[str, str]:
        """What the task's own measures need to know of a row whose options are shown in ``order``."""
        return {}

    def _instruction(self, among: str) -> str:
        if self.chain_of_thought:
            return f"Think step by step, then end with 'The answer is X.', X being one of {among}.\nReasoning:"
        return f"Choose one of {among} only.\nAnswer:"


def _listed(options: Any, id: str) -> list[Any]:
    options = structured(options)
    if not isinstance(options, list):
        raise UserError(f'row {id} has no list of options. Give a list, in CSV as JSON: ["red", "blue"].')
    return options
