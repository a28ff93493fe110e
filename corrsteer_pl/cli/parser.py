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
            names = [name.split(".", 1)[1] if "." in name else name for name in missing[1].split(", ")]
            raise NotAnOption(f"{choices(names)} has to be given. See --help for what that is.") from ex
        raise NotAnOption(f"{one_line(message)} See --help for what is allowed.") from ex


class PlainParser(OneSentence, ArgumentParser):
    """The parser of commands that are plain functions."""
