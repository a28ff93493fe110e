"""Paired evaluation, the same for every method: unsteered and changed model on the same samples."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from corrsteer_pl.data import Batch, TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.paired import Outcome, compare_outcomes
from corrsteer_pl.models.decoding.decode import Decoder, Intervention
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.options import check_options
from corrsteer_pl.strategy import gather_lists, prepare
from corrsteer_pl.tasks import Task, rewards_of

# Trainer options without which a stage has no step.
STEPS = {
    "fit": ("max_epochs", "max_steps", "limit_train_batches"),
    "test": ("limit_test_batches",),
    "predict": ("limit_predict_batches",),
}


class PairedEvaluation(LightningModule, ABC):
    """A frozen language model, and ``test_step`` and ``predict_step`` that compare it with a changed one.

    Args:
        llm: Path or Hub id of the model, or ``demo``.
        dtype: Its precision: ``float32``, ``bfloat16`` or ``float16``.
        llm_args: Further options of :meth:`~corrsteer_pl.models.llm.LanguageModel.load`.
        candidate_batch_size: How many variants of every prompt share a forward pass; ``auto`` for as many as about a
            gibibyte, or a sixteenth of a GPU's memory, allows.

    Attributes:
        outcomes: After a test, one entry per sample in the order of the split.
        predictions: After a prediction, id, prompt, baseline and steered text of each sample, in order.
        metrics: After a test, what :func:`~corrsteer_pl.evaluation.paired.compare_outcomes` says of them.
    """

    llm: LanguageModel
    decoder: Decoder

    def __init__(
        self, llm: str, dtype: str = "float32", llm_args: dict | None = None, candidate_batch_size: int | str = "auto"
    ) -> None:
        super().__init__()
        known = [name for name in inspect.signature(LanguageModel.load).parameters if name not in ("name", "dtype")]
        check_options(LanguageModel.load, llm_args or {}, "model.llm_args", known)
        size = candidate_batch_size
        if size != "auto" and not (isinstance(size, int) and size >= 1):
            raise UserError(
                f"model.candidate_batch_size is {size!r}; it is a number of candidates, at least 1, or auto."
            )
        self.llm_name, self.dtype_name, self.llm_args = llm, dtype, llm_args or {}
        self.candidate_batch_size = candidate_batch_size
        self.position = 0
        self.outcomes: list[Outcome] = []
        self.metrics: dict[str, Any] = {}
        self.predictions: list[dict[str, str]] = []

    @abstractmethod
    def comparison(self) -> Intervention:
        """Two variants: the unchanged model and the changed one."""

    @property
    def datamodule(self) -> TaskDataModule:
        """The data module that runs with this module.

        Raises:
            UserError: The trainer was given plain data loaders.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, TaskDataModule):
            raise UserError(f"{type(self).__name__} needs datamodule=TaskDataModule(...), which knows the task.")
        return datamodule

    @property
    def task(self) -> Task:
        """The task at hand."""
        return self.datamodule.task

    def setup(self, stage: str) -> None:
        """Load the language model onto this process's device, and what the task's reward needs."""
        for option in STEPS.get(stage, ()):
            if getattr(self.trainer, option) == 0:
                raise UserError(
                    f"--trainer.{option} is 0, which leaves nothing to do. Leave it out, or set it above 0."
                )
        prepare(self.trainer)
        if not hasattr(self, "llm"):
            self.check_processes(self.trainer.world_size)
            self.llm = LanguageModel.load(self.llm_name, self.dtype_name, **self.llm_args)
            self.datamodule.warn_of_base_model(self.llm)
        device = self.trainer.strategy.root_device
        if not self.llm.placed:
            self.llm.model.to(device)
        self.task.load(str(device))
        self.decoder = self.decoder_for(self.task)

    def decoder_for(self, task: Task, stage: Literal["fit", "evaluation"] = "evaluation") -> Decoder:
        """A decoder with a task's limits, for the fit or for validation and test."""
        answers = self.datamodule.answers(self.llm, task)
        tokens = self.llm.single_tokens(answers) if answers else None
        allowed = tokens if self.datamodule.restricted(stage) else None
        return Decoder(self.llm, task.max_new_tokens, allowed, self.candidate_batch_size)

    def check_processes(self, count: int) -> None:
        """See whether so many processes can each have the model.

        Raises:
            UserError: The model is spread over devices, and there are several processes.
        """
        if self.llm_args.get("device_map") and count > 1:
            raise UserError(
                f"model.llm_args.device_map is {self.llm_args['device_map']!r}, which spreads one model over all "
                f"devices, but {count} processes would each do so. Leave it out, or set trainer.devices to 1."
            )

    def compared(self, batch: Batch, variants: Intervention) -> list[tuple[list[str], Tensor]]:
        """Texts under each variant, and their rewards ``(batch,)`` float64."""
        return [(texts, self.rewards(texts, batch, self.task)) for texts in self.decoder.compare(batch, variants)]

    def rewards(self, texts: list[str], batch: Batch, task: Task) -> Tensor:
        """Rewards of one response per sample, ``(batch,)`` float64."""
        values = torch.tensor(rewards_of(task, texts, batch.examples), dtype=torch.float64, device=batch.weight.device)
        return 1 - values if self.datamodule.hparams["reverse"] else values

    def on_test_epoch_start(self) -> None:
        """Forget earlier outcomes."""
        self._numbered: list[tuple[int, Outcome]] = []
        self._compared = self.comparison()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Generate with and without the change, from one prefill, and score both."""
        (baseline, before), (changed, after) = self.compared(batch, self._compared)
        rewards = before.tolist(), after.tolist()
        for i, example in enumerate(batch.examples):
            if batch.weight[i]:
                outcome = Outcome(
                    example.id, example.prompt, example.gold, example.groups,
                    baseline[i], changed[i], rewards[0][i], rewards[1][i],
                )  # fmt: skip
                self._numbered.append((batch.rows[i], outcome))

    def on_test_epoch_end(self) -> None:
        """Bring the outcomes of all processes together and compare."""
        numbered = sorted(gather_lists(self._numbered), key=lambda pair: pair[0])
        self.outcomes = [outcome for _, outcome in numbered]
        self.metrics = compare_outcomes(self.outcomes)
        examples = [self.datamodule.examples["test"][row] for row, _ in numbered]
        baseline = self.task.measures([o.answer_baseline for o in self.outcomes], examples)
        steered = self.task.measures([o.answer_steered for o in self.outcomes], examples)
        self.metrics["measures"] = {
            name: {"baseline": value, "steered": steered[name]} for name, value in baseline.items()
        }
        numbers = {name: float(value) for name, value in self.metrics.items() if isinstance(value, (int, float))}
        self.log_dict({f"test/{name}": value for name, value in numbers.items()}, sync_dist=True)

    def on_predict_epoch_start(self) -> None:
        """Forget earlier texts."""
        self._numbered_texts: list[tuple[int, dict[str, str]]] = []
        self._compared = self.comparison()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        """Id, prompt, unsteered and steered text of every sample."""
        (baseline, _), (changed, _) = self.compared(batch, self._compared)
        numbered = [
            (batch.rows[i], {"id": e.id, "prompt": e.prompt, "baseline": baseline[i], "steered": changed[i]})
            for i, e in enumerate(batch.examples)
            if batch.weight[i]
        ]
        self._numbered_texts += numbered
        return [texts for _, texts in numbered]

    def on_predict_epoch_end(self) -> None:
        """Bring the texts of all processes together."""
        numbered = sorted(gather_lists(self._numbered_texts), key=lambda pair: pair[0])
        self.predictions = [texts for _, texts in numbered]
