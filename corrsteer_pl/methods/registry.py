"""Methods by name. A method is one module and one line here; nothing is imported before it is asked for."""

from importlib import import_module
from typing import Any

from corrsteer_pl.errors import UserError, choices

DEFAULT = "corrsteer"
METHODS: dict[str, str] = {
    DEFAULT: "corrsteer_pl.methods.corrsteer:CorrSteer",
    "mean_difference": "corrsteer_pl.methods.mean_difference:MeanDifference",
    "crisp": "corrsteer_pl.methods.crisp:Crisp",
    "finetune": "corrsteer_pl.methods.finetune:Finetune",
    "prompting": "corrsteer_pl.methods.prompting:Prompting",
    "rosi": "corrsteer_pl.methods.rosi:Rosi",
    "vectors": "corrsteer_pl.methods.vectors:Vectors",
}
# What can be tested without a fit.
READY = ("vectors",)


def method_path(name: str) -> str:
    """Where the method of a name is, as ``module:class``.

    Raises:
        UserError: There is none of that name.
    """
    if name not in METHODS:
        raise UserError(f"the method {name!r} is not known; choose one of {choices(METHODS)}.")
    return METHODS[name]


def method_class(name: str) -> Any:
    """The :class:`~corrsteer_pl.methods.base.Method` of a name.

    Raises:
        UserError: There is none of that name.
    """
    module, _, attribute = method_path(name).partition(":")
    return getattr(import_module(module), attribute)


def method_name(cls: type) -> str:
    """The name under which a class is registered, or else its own."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, registered in METHODS.items() if registered == path), cls.__name__)
