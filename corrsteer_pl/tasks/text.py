"""Plain texts: how likely they are, and which of their sentences comes next."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from corrsteer_pl.errors import UserError
from corrsteer_pl.tasks.base import Example, Task, column, present
from corrsteer_pl.tasks.choice import MultipleChoice

# A sentence ends with a full stop or the like, perhaps a quotation mark, before white space and a capital letter.
END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'\u201d\u2019]))\s+(?=[\"'\u201c\u2018]?[A-Z])")


class Text(Task):
    """How likely the rest of a text is after its beginning; the reward is the inverse of the perplexity.

    With ``data.reverse`` the less likely a text the better, for what is to be unlearnt. Plain texts belong into no
    chat template: set ``data.chat_template`` to false.

    Args:
        text: Column with the text.
        beginning: How many words are given.
        words: How many words after these are weighed; None for all.
        group: Column whose values are reported separately, or None.

    Example:
        >>> example = Text(beginning=2, words=2).example({"text": "Once upon a time there was"}, "row 0")
        >>> example.prompt, example.options
        ('Once upon', ('a time',))
    """

    reward_name = "inverse perplexity"
    by_likelihood = True

    def __init__(self, text: str = "text", beginning: int = 1, words: int | None = None, group: str | None = None):
        for name, number in (("beginning", beginning), ("words", 1 if words is None else words)):
            if number < 1:
                raise UserError(f"data.task_args.{name} is {number}; it is a number of words, at least 1.")
        self.text, self.group, self.beginning = text, group, beginning
        self.end = None if words is None else beginning + words

    def examples(self, row: Mapping[str, Any], id: str) -> list[Example]:
        """The text of a row, if it is longer than what is given of it."""
        text = str(column(row, self.text, "text", id, may_be_blank=True))
        starts = [match.start() for match in re.finditer(r"(?<!\S)\S", text)]
        if len(starts) <= self.beginning:
            return []
        begins = starts[self.beginning]
        ends = starts[self.end] if self.end is not None and self.end < len(starts) else len(text)
        groups = present(None if self.group is None else column(row, self.group, "group", id, may_be_blank=True))
        return [Example(id, text[:begins].rstrip(), "", groups, options=(text[begins:ends].rstrip(),))]

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """The text of a row that is long enough."""
        return self.examples(row, id)[0]

    def likeliest(self, example: Example, nats: Sequence[float], tokens: Sequence[int]) -> str:
        """The loss in nats per token."""
        return f"{-nats[0] / tokens[0]:.6f}"

    def reward(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """The geometric mean of the probabilities of a text's tokens."""
        return [math.exp(-float(loss)) for loss in texts]

    def measures(self, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, float | None]:
        """The mean loss of the texts, in nats per token."""
        return {"loss": sum(map(float, texts)) / len(texts) if texts else None}


class NextSentence(MultipleChoice):
    """Which of a text's sentences comes next, by their likelihood: the next one, or one of those after it.

    Texts with too few sentences are left out.

    Args:
        text: Column with the text.
        beginning: How many sentences are given.
        options: How many are to choose among.
        group: Column whose values are reported separately, or None.

    Example:
        >>> task = NextSentence(beginning=1, options=2)
        >>> example = task.examples({"text": "It rained. They got wet. They went home."}, "row 0")[0]
        >>> example.prompt, sorted(example.options)
        ('It rained.', ['They got wet.', 'They went home.'])
    """

    def __init__(self, text: str = "text", beginning: int = 3, options: int = 4, group: str | None = None) -> None:
        super().__init__(text, options=options, shuffle=True, likelihood=True, group=group, template="{question}")
        if beginning < 1:
            raise UserError(f"data.task_args.beginning is {beginning}; it is a number of sentences, at least 1.")
        self.beginning, self.count = beginning, options

    def examples(self, row: Mapping[str, Any], id: str) -> list[Example]:
        """The question that a row makes, if it has enough sentences."""
        enough = len(set(self.offered(row, id))) == self.count
        return [self.example(row, id)] if enough else []

    def asked(self, row: Mapping[str, Any], id: str) -> dict[str, str]:
        """The beginning."""
        return {"question": " ".join(self._sentences(row, id)[: self.beginning])}

    def offered(self, row: Mapping[str, Any], id: str) -> list[Any]:
        """The sentences after it, in their order."""
        return self._sentences(row, id)[self.beginning : self.beginning + self.count]

    def right(self, row: Mapping[str, Any], count: int, id: str) -> int:
        """The first of them."""
        return 0

    def _sentences(self, row: Mapping[str, Any], id: str) -> list[str]:
        return [
            some.strip()
            for some in END.split(str(column(row, self.question, "text", id, may_be_blank=True)))
            if some.strip()
        ]
