"""Parsers whose complaints are one sentence."""

import re
from typing import NoReturn

from jsonargparse import ArgumentParser

from corrsteer_pl.errors import NotAnOption, choices, one_line


class OneSentence:
    """Makes a parser's complaint a user's mistake."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong."""
        if missing := re.fullmatch(r"the following arguments are required: (.+)", message):
            # Those of a stage are named after it.
            names = [name.partition(".")[2] or name for name in missing[1].split(", ")]
            raise NotAnOption(
                f"{choices(f'--{name}' for name in names)} is missing. See --help for what it is."
            ) from ex
        raise NotAnOption(f"{one_line(message)} See --help for what is allowed.") from ex


class PlainParser(OneSentence, ArgumentParser):
    """The parser of commands that are plain functions."""
