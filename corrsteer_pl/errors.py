"""The exception that a user's mistake raises, and kinds of it."""

from collections.abc import Iterable
from difflib import SequenceMatcher


class UserError(Exception):
    """A mistake of the user that one sentence explains: what was given, what is allowed, what to do.

    The command line prints the sentence and exits with status 2, without a traceback.
    """


class NotAnOption(UserError):
    """An argument that is none, or has an impossible value, whatever is run with it."""


class NothingToLearn(UserError):
    """All samples of a fit have the same reward."""


def choices(values: Iterable[object]) -> str:
    """Allowed values, as an error message lists them."""
    return ", ".join(str(value) for value in values) or "(none)"


def nearest(given: str, values: Iterable[str], most: int = 8) -> list[str]:
    """The values that are spelt most like what was given, at most so many, the nearest first; all if they are few.

    Example:
        >>> nearest("biologie", ["physics", "biology", "law"], most=2)
        ['biology', 'law']
    """
    known = list(values)
    if len(known) <= most:
        return known
    return sorted(known, key=lambda value: -SequenceMatcher(None, given, value).ratio())[:most]


def one_line(message: object) -> str:
    """A message of another library in one line."""
    return " ".join(str(message).split())
