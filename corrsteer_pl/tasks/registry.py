"""Tasks by name."""

import inspect
from importlib import import_module
from typing import Any

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.tasks.base import Task
from corrsteer_pl.tasks.choice import MultipleChoice
from corrsteer_pl.tasks.demo import DemoQA, DemoRefusal
from corrsteer_pl.tasks.generic import Generic
from corrsteer_pl.tasks.safety import Refusal

TASKS: dict[str, type[Task]] = {
    "demo_qa": DemoQA,
    "demo_refusal": DemoRefusal,
    "choice": MultipleChoice,
    "refusal": Refusal,
    "generic": Generic,
}


def make_task(name: str, options: dict[str, Any]) -> Task:
    """Make the task of a name, or of the import path of a :class:`Task` of the user's own.

    Raises:
        UserError: Neither is known, or an option is not one of the task's.
    """
    cls = TASKS.get(name) or _imported(name)
    known = inspect.signature(cls).parameters
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"the task {name} has no option {unknown[0]!r} (data.task_args takes {choices(known)}).")
    return cls(**options)


def _imported(name: str) -> type[Task]:
    module, _, attribute = name.rpartition(".")
    unknown = UserError(
        f"data.task is {name!r}; choose one of {choices(TASKS)}, or give the import path of a Task of your own."
    )
    if not module:
        raise unknown
    try:
        cls = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if module.startswith(error.name or module):
            raise unknown from error
        raise UserError(f"data.task is {name!r}, whose module cannot be imported ({error}).") from error
    except (ImportError, SyntaxError) as error:
        raise UserError(f"data.task is {name!r}, whose module cannot be imported ({error}).") from error
    if not (isinstance(cls, type) and issubclass(cls, Task)) or inspect.isabstract(cls):
        raise unknown
    return cls
