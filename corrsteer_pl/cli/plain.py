"""Commands that are plain functions, whose options are the functions' arguments."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from jsonargparse import auto_cli

from corrsteer_pl.cli.options import FUNCTIONS
from corrsteer_pl.cli.parser import PlainParser

# The options that arguments without a name are values of, in their order, by command; with + one takes all that follow.
NAMELESS = {
    "report": ["--runs+"],
    "export": ["--run"],
    "chat": ["--run"],
    "page": ["--run"],
    "serve": ["--run"],
    "push": ["--run", "--repository"],
}


def run(args: list[str]) -> int:
    """Run the command that the first argument names."""
    module, _, name = FUNCTIONS[args[0]].partition(":")
    function = getattr(import_module(module), name)
    if "transformers" in sys.modules:
        # What needs a model takes seconds to import, and has more to say than a user wants to read.
        from corrsteer_pl.cli.lightning import quieten_lightning

        quieten_lightning()
    given = list(_named(args[1:], NAMELESS.get(args[0], [])))
    with _unwound():
        auto_cli(function, args=given, as_positional=False, parser_class=PlainParser)
    return 0


@contextmanager
def _unwound() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, take back what is half-written, as Ctrl-C does."""

    def end(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _named(args: Sequence[str], options: Sequence[str]) -> Iterator[str]:
    """The arguments, with a name before those that have none.

    Example:
        >>> list(_named(["a", "--out", "b", "c"], ["--runs+"]))
        ['--runs+=a', '--out', 'b', '--runs+=c']
    """
    is_value, left = False, list(options)
    for argument in args:
        nameless = bool(left) and not is_value and not argument.startswith("-")
        if nameless:
            option = left[0] if left[0].endswith("+") else left.pop(0)
            yield f"{option}={argument}"
        else:
            yield argument
        is_value = not is_value and argument.startswith("--") and "=" not in argument
