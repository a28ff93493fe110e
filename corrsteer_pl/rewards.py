"""Rewards: how right a generated text is, in [0, 1]. Plain strings in, plain numbers out."""

import re
from collections.abc import Callable

REFUSALS = ("i cannot", "i can't", "i can not", "i'm sorry", "i am sorry", "sorry", "i won't", "i will not", "i refuse")


def is_refusal(text: str) -> bool:
    """Whether a response begins by refusing.

    Example:
        >>> is_refusal(" I'm sorry, but no."), is_refusal("Sure! Sorry for the delay.")
        (True, False)
    """
    return text.strip().lower().replace("\u2019", "'").startswith(REFUSALS)


def letter(text: str, gold: str) -> float:
    """1 if the first letter of the response, standing alone, is the gold one.

    Example:
        >>> letter(" B", "B"), letter("B. Rome", "B"), letter("Because", "B")
        (1.0, 1.0, 0.0)
    """
    match = re.match(r"\s*\(?([A-Z])\b", text)
    return float(match is not None and match[1] == gold)


def exact(text: str, gold: str) -> float:
    """1 if the response is the gold text, up to case and surrounding space."""
    return float(text.strip().lower() == gold.strip().lower())


def contains(text: str, gold: str) -> float:
    """1 if the gold text occurs in the response, in any case."""
    return float(gold.lower() in text.lower())


def matches(text: str, gold: str) -> float:
    """1 if the regular expression ``gold`` is found in the response."""
    return float(re.search(gold, text) is not None)


TEXT_REWARDS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "letter": letter,
    "contains": contains,
    "regex": matches,
}
