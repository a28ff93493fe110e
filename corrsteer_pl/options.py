"""Options by name, and what a user names by an import path."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from corrsteer_pl.errors import UserError, choices


def check_options(function: Callable, options: Mapping[str, Any], prefix: str, known: Sequence[str] = ()) -> None:
    """See whether a function, or a class, can be called with options of a user's.

    Args:
        function: What is to be called.
        options: The options.
        prefix: Where they were given, ``data.task_args`` for example.
        known: The options that may be given; none for all that the function has.

    Raises:
        UserError: It has no such option, or takes other values.

    Example:
        >>> def greet(name: str, times: int | None = None): ...
        >>> check_options(greet, {"name": "Ada", "times": "two"}, "data.greeting")
        Traceback (most recent call last):
        corrsteer_pl.errors.UserError: data.greeting.times is 'two'; it takes int or nothing.
    """
    target = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    hints = get_type_hints(target)
    names = known or list(inspect.signature(function).parameters)
    for name, value in options.items():
        if name not in names:
            raise UserError(f"{prefix} has no option {name!r}; it takes {choices(names)}.")
        if name in hints and not _fits(value, hints[name]):
            raise UserError(f"{prefix}.{name} is {value!r}; it takes {_named(hints[name])}.")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if hint is Any or not isinstance(origin, type):
        return True
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if issubclass(origin, Sequence) and origin is not str:
        return isinstance(value, origin) and not isinstance(value, str)
    return isinstance(value, origin)


def _named(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_named(one) for one in get_args(hint))
    if hint is NoneType:
        return "nothing"
    names = {"Sequence": "a list", "list": "a list", "dict": "options by name", "bool": "true or false"}
    name = (get_origin(hint) or hint).__name__
    return names.get(name, name)


def imported(path: str, unknown: str) -> Any:
    """The object of an import path, ``package.module.name``.

    Args:
        path: Where it is.
        unknown: The sentence for the user if there is no such module or name.

    Raises:
        UserError: There is none, or its module cannot be imported.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise UserError(unknown)
    try:
        return getattr(import_module(module), name)
    except AttributeError as error:
        raise UserError(unknown) from error
    except ModuleNotFoundError as error:
        if module.startswith(error.name or module):
            raise UserError(unknown) from error
        raise UserError(f"{path} is in a module that cannot be imported ({error}).") from error
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{path} is in a module that cannot be imported ({error}).") from error
