"""Two texts side by side, with the words in which they differ."""

import re
from difflib import SequenceMatcher
from typing import NamedTuple


def shortened(text: str, most: int) -> str:
    r"""A text on one line, cut after ``most`` characters.

    Example:
        >>> shortened("the red hen\nran", 7)
        'the red…'
    """
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"


class Piece(NamedTuple):
    """A stretch of a text, and whether the other text has another in its place."""

    text: str
    differs: bool


def differing_words(one: str, other: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces.

    Example:
        >>> differing_words("the red hen", "the blue hen")[1]
        [Piece(text='the ', differs=False), Piece(text='blue', differs=True), Piece(text=' hen', differs=False)]
    """
    a, b = (re.findall(r"\s+|\S+", text) for text in (one, other))
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    for kind, a0, a1, b0, b1 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for some, words in zip(pieces, (a[a0:a1], b[b0:b1]), strict=True):
            if words:
                some.append(Piece("".join(words), kind != "equal"))
    return pieces
