"""The name of a test's results: what the test has otherwise than its fit."""

import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from corrsteer_pl.cli.arguments import flatten
from corrsteer_pl.files import absolute

# A file's name has 255 bytes at most, and the task and an ending belong to it too.
LONGEST = 160


def tag(config: Mapping[str, Any], stored: Mapping[str, Any], options: Iterable[str]) -> str | None:
    """The options that differ, with their values, as part of a file's name; None if none does.

    Args:
        config: Options of the test by part, ``{"model": {"scale": 2.0}}``.
        stored: The same of its fit, or the defaults where the fit says nothing.
        options: Dotted names of the options that count.

    Example:
        >>> tag({"model": {"scale": 2.0}}, {"model": {"scale": 1.0}}, ["model.scale"])
        'scale-2'
    """
    differing = []
    for option in options:
        part, _, name = option.partition(".")
        ours, theirs = (_by_name(name, settings.get(part, {}).get(name)) for settings in (config, stored))
        differing += [
            f"{key}-{_short(ours.get(key))}" for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)
        ]
    found = "-".join(differing)
    if len(found.encode()) > LONGEST:
        found = f"{found.encode()[: LONGEST - 9].decode(errors='ignore')}-{_digest(found)}"
    return found or None


def _by_name(name: str, value: Any) -> dict[str, Any]:
    value = absolute(value) if name == "path" and isinstance(value, str) else value
    return flatten({name: value})


def _short(value: Any) -> str:
    """A value as part of a file name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    plain = re.sub(r"[^\w.,\[\] -]", "_", Path(text).name if "/" in text else text)[-40:]
    return plain if plain == text else f"{plain}-{_digest(text)}"


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
