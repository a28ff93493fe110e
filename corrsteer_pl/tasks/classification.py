"""Texts with a label: features are correlated with the label while the text is read, and nothing is generated."""

from collections.abc import Mapping, Sequence
from typing import Any

from corrsteer_pl.errors import UserError
from corrsteer_pl.tasks.base import Example, MissingValue, Task, column, is_missing, plain_text, present, structured


class TextClassification(Task):
    """Texts, of which some have the label that is looked for.

    Activations are pooled over the text's own tokens. As ``data.fit_on``, beside a task that generates, it yields
    candidates that are validated by that task's reward. As ``data.task`` its candidates are validated by a
    :class:`~corrsteer_pl.stats.Probe` of the label at the last layer read: does steering at every token of a text
    make the label more probable? A probe sees what is written into the residual stream, not what the model says,
    and rates candidates at the probe's own layer too well: prefer a task that generates.

    Args:
        text: Column with the text, or with a list of texts.
        label: Column with the label, or with a list of labels, one for each text.
        positive: Labels that are looked for.
        negative: Labels to tell them from; texts with other labels are left out. None for all others.
        group: Column whose values are reported separately, or None.
        first_words: Read only so many words of each text; None reads all.
    """

    generates = False

    def __init__(
        self,
        text: str = "text",
        label: str = "label",
        positive: Sequence[Any] = (1,),
        negative: Sequence[Any] | None = None,
        group: str | None = None,
        first_words: int | None = None,
    ) -> None:
        if first_words is not None and first_words < 1:
            raise UserError(f"data.task_args.first_words is {first_words}; it is a number of words, at least 1.")
        self.first_words = first_words
        self.text, self.label, self.group = text, label, group
        self.positive = {plain_text(value) for value in positive}
        self.negative = None if negative is None else {plain_text(value) for value in negative}
        self._given = {"positive": list(positive), "negative": list(negative or ())}

    @property
    def reward_name(self) -> str:
        """What the results say of the reward."""
        return f"probability of the label {', '.join(sorted(self.positive))} by a probe"

    def examples(self, row: Mapping[str, Any], id: str) -> list[Example]:
        """The texts of a row whose labels count.

        Raises:
            UserError: Texts and labels are not equally many.
        """
        texts = structured(column(row, self.text, "text", id))
        labels = structured(column(row, self.label, "label", id))
        group = None if self.group is None else column(row, self.group, "group", id, may_be_blank=True)
        if not isinstance(texts, list):
            texts, labels, ids = [texts], [labels], [id]
        else:
            ids = [f"{id}/{i}" for i in range(len(texts))]
        if not isinstance(labels, list) or len(labels) != len(texts):
            raise UserError(f"row {id} has {len(texts)} texts, but not as many labels. Mend or remove the row.")
        found = []
        if any(map(is_missing, [*texts, *labels])):
            raise MissingValue(id, self.text if any(map(is_missing, texts)) else self.label)
        for one, text, label in zip(ids, texts, map(plain_text, labels), strict=True):
            if label in self.positive or self.negative is None or label in self.negative:
                gold = "positive" if label in self.positive else "negative"
                found.append(Example(one, self._beginning(str(text)), gold, present(group, gold)))
        return found

    def named_values(self) -> list[tuple[str, str, Sequence[Any]]]:
        """The labels."""
        return [(f"data.task_args.{option}", self.label, values) for option, values in self._given.items()]

    def _beginning(self, text: str) -> str:
        return text if self.first_words is None else " ".join(text.split()[: self.first_words])

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """The text of a row that has one."""
        return self.examples(row, id)[0]

    def reward(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """1 for the texts that have the label, whatever was said."""
        return [float(example.gold == "positive") for example in examples]
