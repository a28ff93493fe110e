"""The one exception that a user's mistake raises."""

from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user that one sentence explains: what was given, what is allowed, what to do.

    The command line prints the sentence and exits with status 2, without a traceback.
    """


def choices(values: Iterable[object]) -> str:
    """Allowed values, as an error message lists them."""
    return ", ".join(str(value) for value in values) or "(none)"
