"""Parsers whose complaints are one sentence."""

from typing import NoReturn

from jsonargparse import ArgumentParser

from corrsteer_pl.errors import NotAnOption, one_line


class OneSentence:
    """Makes a parser's complaint a user's mistake."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong."""
        raise NotAnOption(f"{one_line(message)} See --help for what is allowed.") from ex


class PlainParser(OneSentence, ArgumentParser):
    """The parser of commands that are plain functions."""
