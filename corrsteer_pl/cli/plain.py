"""Commands that are plain functions, whose options are the functions' arguments."""

from collections.abc import Callable

from jsonargparse import auto_cli

from corrsteer_pl.cli.lightning import Parser, quieten_lightning
from corrsteer_pl.commands.train_saes import train_saes_on

FUNCTIONS: dict[str, Callable] = {"train_saes": train_saes_on}


def run(args: list[str]) -> int:
    """Run the command that the first argument names."""
    quieten_lightning()
    auto_cli(FUNCTIONS[args[0]], args=args[1:], as_positional=False, parser_class=Parser)
    return 0
