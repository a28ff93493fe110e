"""Paired evaluation, the same for every method: unchanged and changed model on the same samples."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule

from corrsteer_pl.data import Batch, TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.paired import Outcome, compare_outcomes
from corrsteer_pl.methods.answers.answering import Answering
from corrsteer_pl.methods.answers.noise import NoiseFloor
from corrsteer_pl.models.decoding.decode import Intervention
from corrsteer_pl.strategy import gather_lists
from corrsteer_pl.tasks import Task


class PairedEvaluation(LightningModule, ABC):
    """``test_step`` and ``predict_step``, which compare a language model with a changed one.

    Attributes:
        answering: How the task is answered, chosen at setup.
        outcomes: After a test, one entry per sample in the order of the split.
        metrics: After a test, what :func:`~corrsteer_pl.evaluation.paired.compare_outcomes` says of them.
        predictions: After a prediction, id, prompt, baseline and steered text of each sample, in order.
    """

    answering: Answering

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: list[Outcome] = []
        self.metrics: dict[str, Any] = {}
        self.predictions: list[dict[str, str]] = []

    @abstractmethod
    def comparison(self) -> Intervention:
        """Two variants: the unchanged model and the changed one."""

    def text_comparison(self) -> Intervention:
        """The same where texts are only read."""
        return self.comparison()

    @property
    @abstractmethod
    def is_fitted(self) -> bool:
        """Whether there is something to compare with the unchanged model."""

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

    def on_test_epoch_start(self) -> None:
        """Forget earlier outcomes."""
        self._numbered: list[tuple[int, Outcome]] = []
        self._compared = self._comparison_if_fitted()
        unchanged = next(iter(self._compared.groups(1)))
        self._noise = NoiseFloor(self.answering, unchanged) if self.hparams.get("noise_floor") else None

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Answer with and without the change, from one prefill, and score both."""
        (baseline, before), (changed, after) = self.answering.compare(batch, self._compared)
        if self._noise:
            self._noise.step(batch, baseline, before)
        rewards = before.tolist(), after.tolist()
        for i, example in enumerate(batch.examples):
            if batch.weight[i]:
                outcome = Outcome(
                    example.id, example.prompt, example.gold, example.groups,
                    baseline[i], changed[i], rewards[0][i], rewards[1][i],
                )  # fmt: skip
                self._numbered.append((batch.rows[i], outcome))

    def answers(self, batch: Batch, changed: bool) -> list[str]:
        """Answers of one of both models alone, after a test has begun."""
        variant = list(self._compared.groups(1))[changed]
        return self.answering.texts(batch, variant)[0]

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
        if self._noise:
            self.metrics["noise_floor"] = self._noise.result()
        numbers = {name: float(value) for name, value in self.metrics.items() if isinstance(value, (int, float))}
        self.log_dict({f"test/{name}": value for name, value in numbers.items()}, sync_dist=True)

    def on_predict_epoch_start(self) -> None:
        """Forget earlier texts."""
        self._numbered_texts: list[tuple[int, dict[str, str]]] = []
        self._compared = self._comparison_if_fitted()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        """Id, prompt, unsteered and steered text of every sample; nothing is judged."""
        baseline, changed = self.answering.texts(batch, self._compared)
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

    def _comparison_if_fitted(self) -> Intervention:
        if not self.is_fitted:
            raise self.unfitted()
        return self.comparison()

    def unfitted(self) -> UserError:
        """What is said where a fit is needed."""
        return UserError(
            "the module has not been fitted: there is no selection. Run fit first, with --ckpt_path last if it was "
            "interrupted, or give the checkpoint of a finished fit with --ckpt_path."
        )
