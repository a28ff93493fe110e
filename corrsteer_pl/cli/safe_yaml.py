"""YAML as configurations may hold it: bounded in size and depth, each name once."""

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from corrsteer_pl.errors import UserError, one_line

# Limits far above what a configuration needs, against files that would exhaust the machine.
DEEPEST, MOST_VALUES, LONGEST_NUMBER = 32, 100_000, 400
SURROGATE = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads 1e3 as a number, as jsonargparse does, and refuses what is above."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._merged = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"nested deeper than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Checked before merge keys (<<) are resolved, which repeat a name where a value is overridden.
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in names and name != "<<":
                raise yaml.YAMLError(f"the name {name!r} stands twice, again in line {key.start_mark.line + 1}")
            names.add(name)
        return node

    def flatten_mapping(self, node: Any) -> None:
        # Merge keys copy what they refer to, so nested ones multiply before any value is made.
        super().flatten_mapping(node)
        self._merged += len(node.value)
        if self._merged > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES} values")

    def construct_scalar(self, node: Any) -> Any:
        if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
            raise yaml.YAMLError(f"a number of {len(node.value)} digits in line {node.start_mark.line + 1}")
        return super().construct_scalar(node)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$|^[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: It is no YAML, a name stands twice in a mapping, it refers to itself, or it is larger than a
            configuration can be.

    Example:
        >>> read_yaml("model: {scale: 1e-1}")
        {'model': {'scale': 0.1}}
    """
    if SURROGATE.search(text):
        raise yaml.YAMLError("half of a surrogate pair, which is no character")
    loader = _Loader(text)
    try:
        value = loader.get_single_data()
        _check(value)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(one_line(error)) from error
    finally:
        loader.dispose()
    return value


def _check(whole: Any) -> None:
    """Walk through all values, those that aliases repeat as often as they stand."""
    count, waiting = 0, [(whole, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        # A value that contains itself has no end, and nested aliases multiply.
        if count > MOST_VALUES or depth > DEEPEST:
            raise yaml.YAMLError(f"a part that contains itself, or more than {MOST_VALUES} values")
        if isinstance(value, str) and SURROGATE.search(value):
            raise yaml.YAMLError("half of a surrogate pair, which is no character")
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(one, depth + 1) for one in inner]


def check_finite(options: Mapping[str, Any]) -> None:
    """Refuse numbers that are not finite.

    Args:
        options: Values by dotted name.

    Raises:
        UserError: Naming the first.
    """
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} is {value}; it takes a finite number.")
