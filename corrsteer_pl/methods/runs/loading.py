"""A finished fit, loaded with its language model, for what uses it outside of a Trainer."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.evaluation.run import Run, Test
from corrsteer_pl.files import LAST
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.base import Method
from corrsteer_pl.methods.prompting import Prompting
from corrsteer_pl.methods.registry import method_class
from corrsteer_pl.methods.runs.provenance import read_checkpoint, settings_of
from corrsteer_pl.methods.steering import Steering
from corrsteer_pl.models.decoding.decode import Intervention
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.options import import_paths
from corrsteer_pl.selection import Feature
from corrsteer_pl.tasks import Task
from corrsteer_pl.tasks.registry import make_task
from corrsteer_pl.tasks.template import Template

# Asked where a run has no test to take questions from.
SENTENCES = ("The capital of France is", "Once upon a time, there was", "In short, the answer to your question is")


@dataclass(frozen=True)
class Fit:
    """A finished fit.

    Attributes:
        checkpoint: Where it lies, in the folder of its run.
        method: What was fitted, with its language model loaded.
        data: Options of its data.
    """

    checkpoint: Path
    method: Method
    data: dict[str, Any]

    @property
    def folder(self) -> Path:
        """That of its run."""
        return self.checkpoint.parent

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def uses_chat(self) -> bool:
        """Whether its prompts are put into the chat template."""
        wanted = self.data.get("chat_template")
        return self.method.llm.has_chat_template if wanted is None else bool(wanted)

    @cached_property
    def task(self) -> Task | None:
        """The task; None if it is code of the user's own, which is not run, or needs what is not installed."""
        if import_paths(self.data):
            return None
        with suppress(UserError):
            return make_task(str(self.data.get("task")), self.data.get("task_args") or {})
        return None

    def asked(self, text: str) -> str:
        """The prompt of a question that someone types, as the task asks it."""
        template: Template | None = getattr(self.task, "template", None)
        return template.around(text) if template else text

    def prompt_ids(self, turns: Sequence[str]) -> list[int]:
        """Tokens of questions and answers in turn, in the chat template with its system message if the fit's were."""
        chat = self.uses_chat
        return self.method.llm.prompt_ids(turns, chat, self.data.get("system_prompt") if chat else None)

    def compared(self, schedule: Schedule | None = None) -> Intervention:
        """The unchanged model and the changed one, at the positions of the fit or, of vectors, at others."""
        method: Any = self.method
        if isinstance(method, Steering):
            return SteeringVectors.stack([{}, method.steering_vectors()], schedule or method.schedule)
        return method.comparison()

    @cached_property
    def features(self) -> list[Feature]:
        """What steers; nothing where weights are changed."""
        method: Any = self.method
        return list(method.chosen().features) if isinstance(method, Steering) else []

    def scaled(self, strength: float, each: Sequence[float]) -> Intervention:
        """The unchanged model and the changed one, with a factor on all that steers, and one on each feature."""
        method: Any = self.method
        if not isinstance(method, Steering):
            return self.compared()
        pairs = zip(self.features, each, strict=True)
        scaled = [replace(feature, coefficient=feature.coefficient * factor) for feature, factor in pairs]
        vectors = method.vectors_of(scaled, strength * method.chosen_scale)
        return SteeringVectors.stack([{}, vectors], method.schedule)

    def asked_alike(self) -> Test | None:
        """A test that asked and changed the model as one does who tries the run; None if there is none.

        That is a test of the run's own task, at its own strength and positions, without solved examples before a
        question, in which an answer could be any text.
        """
        found, method = self._run(), self.method
        if found is None:
            return None
        here = {
            **method.options((*method.settings.settled, *method.settings.tested)),
            **{name: self.data.get(name) for name in ("task", "task_args", "system_prompt")},
            **{"chat_template": self.uses_chat, "shots": 0, "restrict": False, "reverse": False},
        }
        tests = {
            name: metrics for name, metrics in found.tests.items()
            if all(metrics.get(option, value) == value for option, value in here.items())
        }  # fmt: skip
        return replace(found, tests=tests).test()

    def questions(self, count: int) -> list[str]:
        """Prompts of its test; a few sentences if there was none."""
        found = self._run()
        test = found.test() if found else None
        return [outcome.prompt for outcome in test.outcomes[:count]] if test else list(SENTENCES[:count])

    def _run(self) -> Run | None:
        """The folder; None if a checkpoint lies there alone."""
        return Run.read(self.folder) if (self.folder / "selection.json").is_file() else None


def load_fit(run: Path) -> Fit:
    """Load a run's checkpoint and its language model, onto the GPU if there is one.

    Args:
        run: Folder of a run, or a checkpoint.

    Raises:
        UserError: There is no checkpoint, it is damaged or unfinished, its method changes prompts and no model, or its
            model is gone or has other weights.
    """
    path = run if run.is_file() else run / LAST
    if not path.is_file():
        known = sorted(str(found.parent) for found in Path("checkpoints").glob(f"*/{LAST}"))
        there = f" There is {choices(known)}." if known else ""
        raise UserError(
            f"{run} is no run: it has no {LAST}. Give the folder of a fit, such as checkpoints/demo.{there}"
        )
    record, settings = settings_of(read_checkpoint(path))
    method = method_class(record.method).load_from_checkpoint(path)
    if isinstance(method, Prompting):
        raise UserError(
            f"{path.parent} is a fit of prompting, which changes prompts and leaves the model alone. Give a run that "
            "changes the model."
        )
    if not method.is_fitted:
        raise method.unfitted()
    method.llm = LanguageModel.load(method.llm_name, method.dtype_name, **method.llm_args)
    if not method.llm.placed and torch.cuda.is_available():
        method.llm.model.to("cuda")
    method.check_parts(record)
    return Fit(path, method, settings["data"])
