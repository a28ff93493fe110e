"""From what a report shows to a page and to Markdown."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from corrsteer_pl.evaluation.tables import percent, permutation_p_value, ratio
from corrsteer_pl.evaluation.words import Piece, shortened

# Characters of a question that is shown in short.
LINE = 110


def render(template: str, context: Mapping[str, Any]) -> str:
    """Fill a template of this package; what ends in ``.html.j2`` escapes all that it shows."""
    environment = Environment(
        loader=PackageLoader("corrsteer_pl.evaluation"),
        undefined=StrictUndefined,
        autoescape=lambda name: name is not None and ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS
    text = environment.get_template(template).render(context)
    return text if ".html" in template else re.sub(r"\n{3,}", "\n\n", text)


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _signed_number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _visible(token: str) -> str:
    """A token whose white space can be seen."""
    shown = token if token.strip() else token.replace(" ", "␣")
    shown = shown.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def _joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _cell(value: Any) -> str:
    """Anything as plain words in Markdown: what would make a table, a tag or a stress does not."""
    return re.sub(r"([|<>*_`\\\[\]])", r"\\\1", " ".join(str(value).split()))


def _md(text: str) -> str:
    """A text of others as code in Markdown, on one line."""
    line = " ".join(text.replace("`", "'").split()) or "(nothing)"
    return f"`{line}`".replace("|", "\\|")


FILTERS = {
    "percent": percent, "signed": _signed, "number": _number, "signed_number": _signed_number, "p_value": _p_value,
    "permutation_p_value": permutation_p_value,
    "ratio": partial(ratio, to=" to "), "shortened": partial(shortened, most=LINE), "visible": _visible,
    "joined": _joined, "md": _md, "cell": _cell,
}  # fmt: skip
