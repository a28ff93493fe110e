"""Options by name, and the import paths among them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from traceback import extract_tb
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from corrsteer_pl.errors import UserError, choices, one_line


def check_options(function: Callable, options: Mapping[str, Any], prefix: str, known: Sequence[str] = ()) -> None:
    """Check that a function, or a class, can be called with a user's options.

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
    if not isinstance(options, Mapping):
        raise UserError(f"{prefix} is {options!r}; it takes options by name.")
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
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in get_args(hint))
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if hint is Any or not isinstance(origin, type):
        return True
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if issubclass(origin, Sequence) and origin is not str:
        of = get_args(hint)[0] if get_args(hint) else Any
        return isinstance(value, origin) and not isinstance(value, str) and all(_fits(one, of) for one in value)
    return isinstance(value, origin)


def _named(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_named(one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is NoneType:
        return "nothing"
    names = {"Sequence": "a list", "list": "a list", "dict": "options by name", "bool": "true or false"}
    name = (get_origin(hint) or hint).__name__
    of = [one for one in get_args(hint) if one is not Any]
    return f"a list of {_named(of[0])}" if of and names.get(name) == "a list" else names.get(name, name)


# Options of a data module that may be import paths, by which code of the user's is imported and run.
IMPORT_PATHS = ("task", "task_args.reward", "fit_on.task", "fit_on.task_args.reward")


def is_import_path(value: Any) -> bool:
    """Whether a value has the form ``package.module.name``.

    Example:
        >>> is_import_path("my_package.MyTask"), is_import_path("mmlu"), is_import_path(".x.y")
        (True, False, False)
    """
    parts = value.split(".") if isinstance(value, str) else []
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def import_paths(data: Mapping[str, Any]) -> dict[str, str]:
    """The options of a data module that are import paths, by their dotted names.

    A file from elsewhere, such as a checkpoint, can have the program import what it names; so a caller may want to
    take these options from the user alone.

    Example:
        >>> import_paths({"task": "generic", "task_args": {"reward": "my_package.my_reward"}, "fit_on": None})
        {'data.task_args.reward': 'my_package.my_reward'}
    """
    found = {}
    for option in IMPORT_PATHS:
        value: Any = data
        for name in option.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if is_import_path(value):
            found[f"data.{option}"] = value
    return found


def imported(path: str, unknown: str) -> Any:
    """The object of an import path, ``package.module.name``.

    Args:
        path: Where it is.
        unknown: The sentence for the user if there is no such module or name.

    Raises:
        UserError: There is none, or its module cannot be imported.
    """
    if not is_import_path(path):
        raise UserError(unknown)
    module, _, name = path.rpartition(".")
    try:
        found = import_module(module)
    except (Exception, SystemExit) as error:  # An import runs the user's code, which can fail in any way.
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or module):
            raise UserError(unknown) from error
        raise UserError(f"{path} is in a module that cannot be imported ({described(error)}).") from error
    if not hasattr(found, name):
        raise UserError(unknown)
    return getattr(found, name)


def described(error: BaseException) -> str:
    """Kind, message and place of an error in a user's own code, in one line.

    Example:
        >>> described(KeyError("text"))
        "KeyError: 'text'"
    """
    message = one_line(error)
    said = f"{type(error).__name__}: {message}" if message else type(error).__name__
    frames = extract_tb(error.__traceback__)
    return f"{said}, {frames[-1].filename}:{frames[-1].lineno}" if frames else said
