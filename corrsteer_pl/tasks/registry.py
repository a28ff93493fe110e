"""Tasks by name."""

import inspect
from typing import Any

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.options import check_options, imported
from corrsteer_pl.tasks.base import Task, users_own
from corrsteer_pl.tasks.bbq import BBQ
from corrsteer_pl.tasks.choice import MultipleChoice
from corrsteer_pl.tasks.classification import TextClassification
from corrsteer_pl.tasks.demo import DemoForget, DemoQA, DemoRefusal, DemoTexts
from corrsteer_pl.tasks.generic import Generic
from corrsteer_pl.tasks.gsm8k import GSM8K
from corrsteer_pl.tasks.harmbench import HarmBench
from corrsteer_pl.tasks.ifeval import IFEval
from corrsteer_pl.tasks.mmlu import MMLU
from corrsteer_pl.tasks.mmlu_pro import MMLUPro
from corrsteer_pl.tasks.safety import Refusal
from corrsteer_pl.tasks.simpleqa import SimpleQA
from corrsteer_pl.tasks.text import NextSentence, Text
from corrsteer_pl.tasks.xstest import XSTest

TASKS: dict[str, type[Task]] = {
    "mmlu": MMLU,
    "mmlu_pro": MMLUPro,
    "gsm8k": GSM8K,
    "bbq": BBQ,
    "harmbench": HarmBench,
    "xstest": XSTest,
    "simpleqa": SimpleQA,
    "ifeval": IFEval,
    "choice": MultipleChoice,
    "refusal": Refusal,
    "generic": Generic,
    "text": Text,
    "next_sentence": NextSentence,
    "text_classification": TextClassification,
    "demo_qa": DemoQA,
    "demo_refusal": DemoRefusal,
    "demo_forget": DemoForget,
    "demo_texts": DemoTexts,
}


def make_task(name: str, options: dict[str, Any]) -> Task:
    """Make the task of a name, or of the import path of a :class:`Task` of the user's own.

    Raises:
        UserError: Neither is known, an option is not one of the task's, or it cannot be made with them.
    """
    cls = TASKS.get(name) or _own(name)
    check_options(cls, options, "data.task_args")
    with users_own(f"the task {name}"):
        return cls(**options)


def _own(name: str) -> type[Task]:
    unknown = f"data.task is {name!r}; choose one of {choices(TASKS)}, or give the import path of a Task of your own."
    cls = imported(name, unknown)
    if not (isinstance(cls, type) and issubclass(cls, Task)) or inspect.isabstract(cls):
        raise UserError(
            f"data.task is {name!r}, which is not declared as a task. Derive a class from corrsteer_pl.tasks.Task, "
            "with a method example."
        )
    return cls
