"""Rewards that a classifier from the Hugging Face Hub gives."""

import re
from collections.abc import Sequence
from typing import Any

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.hub import HUB_ERRORS, reason
from corrsteer_pl.rewards.base import Reward
from corrsteer_pl.rewards.text import first_line, is_refusal, match

REJECTION = "ProtectAI/distilroberta-base-rejection-v1"
SIMILARITY = "dleemiller/ModernCE-base-sts"
PREFIXES = "prefixes"


class Classifier:
    """A text-classification model by its Hub id or path.

    Args:
        model: Id or path.
        option: The option that names it, for error messages.
        instead: What to set when the model cannot be had.
    """

    def __init__(self, model: str, option: str, instead: str) -> None:
        self.model, self.option, self.instead = model, option, instead
        self._run: Any = None

    def load(self, device: str) -> None:
        """Load the model.

        Raises:
            UserError: It cannot be loaded.
        """
        if self._run is not None:
            return
        from transformers import pipeline  # slow to import, and most rewards need no model

        try:
            self._run = pipeline("text-classification", model=self.model, device=device)
        except HUB_ERRORS as error:
            raise UserError(
                f"the reward model {self.model!r} could not be loaded ({reason(error)}). Set {self.option} to a "
                f"text-classification model, or to {self.instead!r}."
            ) from error

    @property
    def labels(self) -> list[str]:
        """Its labels, in order."""
        labels = self._run.model.config.id2label
        return [labels[i] for i in sorted(labels)]

    def scores(self, inputs: Sequence[Any]) -> list[dict[str, float]]:
        """Probability of every label for each text, or pair of texts."""
        found = self._run(list(inputs), top_k=None, truncation=True, batch_size=32)
        return [{entry["label"]: entry["score"] for entry in entries} for entries in found]


class RefusalReward(Reward):
    """1 where a response refuses exactly if its gold text is ``refuse``.

    Args:
        judge: Id or path of a classifier of refusals, the paper's being
            ``ProtectAI/distilroberta-base-rejection-v1``, or ``prefixes``: a response refuses if it begins with
            one of a few phrases such as "I cannot".
    """

    def __init__(self, judge: str = PREFIXES) -> None:
        self.name = f"refusal by {judge}"
        self.classifier = None if judge == PREFIXES else Classifier(judge, "data.task_args.judge", PREFIXES)

    def load(self, device: str) -> None:
        """Load the classifier, if there is one."""
        if self.classifier:
            self.classifier.load(device)
            self._refused = _refusing_label(self.classifier.model, self.classifier.labels)
            self.name = f"refusal by {self.classifier.model}, label {self._refused}"

    def refused(self, texts: Sequence[str]) -> list[bool]:
        """Whether each response refuses. An empty one does not."""
        if self.classifier is None:
            return [is_refusal(text) for text in texts]
        return [
            bool(text.strip()) and max(scores, key=scores.__getitem__) == self._refused
            for text, scores in zip(texts, self.classifier.scores(texts), strict=True)
        ]

    def __call__(self, texts: Sequence[str], golds: Sequence[str]) -> list[float]:
        """1 where refusal and gold text agree."""
        return [float(refused == (gold == "refuse")) for refused, gold in zip(self.refused(texts), golds, strict=True)]


def _refusing_label(model: str, labels: list[str]) -> str:
    """The label of a refusal, REJECTION with the paper's classifier; the second of two that have no names."""
    if len(labels) == 2 and all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        return labels[1]
    named = [label for label in labels if re.search(r"reject|refus", label, re.IGNORECASE)]
    plain = [label for label in named if not re.match(r"(non|not|no)(?![a-z])|un", label, re.IGNORECASE)]
    if len(labels) < 2 or len(plain) != 1:
        raise UserError(
            f"the reward model {model!r} has the labels {choices(labels)}, of which it is not clear which one is a "
            f"refusal. Set data.task_args.judge to a classifier that names one, or to {PREFIXES!r}."
        )
    return plain[0]


class SimilarityReward(Reward):
    """1 where the first line of a response means the same as the gold text.

    It does if they are equal after normalisation, or if a cross-encoder finds them similar enough.

    Args:
        judge: Id or path of a cross-encoder with one output, whose sigmoid is the similarity, or ``match`` for
            normalised equality alone.
        threshold: Similarity in [0, 1] from which on the meaning is the same.
    """

    def __init__(self, judge: str = SIMILARITY, threshold: float = 0.6) -> None:
        if not 0 <= threshold <= 1:
            raise UserError(f"data.task_args.threshold is {threshold}; it is a similarity between 0 and 1.")
        self.name = "match" if judge == "match" else f"similarity by {judge} of at least {threshold:g}, or match"
        self.threshold = threshold
        self.classifier = None if judge == "match" else Classifier(judge, "data.task_args.judge", "match")

    def load(self, device: str) -> None:
        """Load the cross-encoder, if there is one."""
        if self.classifier:
            self.classifier.load(device)
            if len(labels := self.classifier.labels) != 1:
                raise UserError(
                    f"the reward model {self.classifier.model!r} has {len(labels)} outputs, but a cross-encoder of "
                    "similarity has one. Set data.task_args.judge to one, or to 'match'."
                )

    def __call__(self, texts: Sequence[str], golds: Sequence[str]) -> list[float]:
        """1 where the meaning is the same."""
        equal = [match(text, gold) for text, gold in zip(texts, golds, strict=True)]
        if self.classifier is None:
            return equal
        pairs = [{"text": first_line(text), "text_pair": gold} for text, gold in zip(texts, golds, strict=True)]
        similarities = [next(iter(scores.values())) for scores in self.classifier.scores(pairs)]
        return [max(same, float(s >= self.threshold)) for same, s in zip(equal, similarities, strict=True)]
