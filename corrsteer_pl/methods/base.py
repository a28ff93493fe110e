"""The contract of a method: what a Trainer runs, what is asked of it, and what it may leave to this class."""

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal, Self

import torch
from rich.table import Table
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.methods.answers.answering import Answering, ProbeReading, Reading, answered
from corrsteer_pl.methods.answers.evaluation import PairedEvaluation
from corrsteer_pl.methods.answers.trial import Trial
from corrsteer_pl.methods.inspection import Inspection
from corrsteer_pl.methods.registry import method_name
from corrsteer_pl.methods.runs.provenance import (
    KEY,
    Provenance,
    check_counter,
    check_llm,
    check_method,
    check_options,
    check_same_data,
    check_samples,
    damaged,
    read_checkpoint,
    settings_of,
    versions,
)
from corrsteer_pl.methods.runs.requeue import Requeue, is_requeue_checkpoint, unusable
from corrsteer_pl.models.decoding.decode import Decoder, Intervention
from corrsteer_pl.models.llm import LanguageModel, local_name
from corrsteer_pl.options import check_options as check_kinds
from corrsteer_pl.strategy import all_reduce_sum, prepare
from corrsteer_pl.tasks import Task

# Trainer options that leave a stage without a step if they are 0.
STEPS = {
    "fit": ("max_epochs", "max_steps", "limit_train_batches", "limit_val_batches"),
    "validate": ("limit_val_batches",),
    "test": ("limit_test_batches",),
    "predict": ("limit_predict_batches",),
}
# Options that may name a folder or a file of this machine.
PLACES = {"llm", "saes", "vectors"}


@dataclass(frozen=True)
class Settings:
    """When the options of a method may change.

    Attributes:
        settled: A fit settles them: a later stage with other values is refused.
        resumed: A fit can only go on with its own; a test may have others.
        tested: A test may have others; they name its results and stand in its ``metrics.json``.
    """

    settled: tuple[str, ...] = ()
    resumed: tuple[str, ...] = ("dtype",)
    tested: tuple[str, ...] = ("dtype", "llm_args")


class Method(PairedEvaluation):
    """A frozen language model, and a way to change what it answers.

    A subclass needs ``training_step`` and :meth:`comparison`; all else has a default that does nothing more. A
    ``training_step`` that adds to running sums does so within :meth:`counting`. A fit is
    one pass over its samples, whatever the method. The language model is no child module: it stays out of checkpoints,
    and is on the right device and in the right precision once :meth:`setup` has run.

    Args:
        llm: Path or Hub id of the model, a GGUF file, or ``demo``.
        dtype: Its precision: ``float32``, ``bfloat16`` or ``float16``.
        llm_args: Further options of :meth:`~corrsteer_pl.models.llm.LanguageModel.load`.
        candidate_batch_size: How many variants of every prompt share a forward pass; ``auto`` for as many as about a
            gibibyte, or a sixteenth of a GPU's memory, allows.

    Attributes:
        trains: Whether a fit trains parameters of this module. Then DDP averages their gradients; otherwise there are
            none, and what processes have counted is merged by the method itself.
        settings: When the options of ``__init__`` may change.
        inspection: What ``doctor`` shows of it.
        llm: The language model.
        counted: Number of samples of all processes that the fit has learnt from. A step counts once it has changed
            the sums or the weights, so a checkpoint that is written during a step does not count its samples.
        fit_answering: How the task that is fitted on is answered; during a fit.
    """

    trains: ClassVar[bool] = False
    settings: ClassVar[Settings] = Settings()
    inspection: ClassVar[type[Inspection]] = Inspection

    llm: LanguageModel
    fit_answering: Answering

    def __init__(
        self, llm: str, dtype: str = "float32", llm_args: dict | None = None, candidate_batch_size: int | str = "auto"
    ) -> None:
        super().__init__()
        known = [name for name in inspect.signature(LanguageModel.load).parameters if name not in ("name", "dtype")]
        check_kinds(LanguageModel.load, llm_args or {}, "model.llm_args", known)
        size = candidate_batch_size
        if size != "auto" and not (isinstance(size, int) and size >= 1):
            raise UserError(
                f"model.candidate_batch_size is {size!r}; it is a number of candidates, at least 1, or auto."
            )
        self.llm_name, self.dtype_name, self.llm_args = local_name(llm), dtype, llm_args or {}
        self.candidate_batch_size = candidate_batch_size
        self._record: Provenance | None = None
        self._reset_counter()

    def _reset_counter(self) -> None:
        self.counted = self._validated = 0  # samples of the fit: so far, and at the last validation
        self.counted_after_step = 0
        self._is_changing = False
        # Sums of batch weights, apart from `counted`: in the checkpoint that the fit was resumed from, learnt from by
        # this process since then, and read by it since the last update.
        self._resumed_weight = self._learnt_weight = self._pending_weight = 0.0

    def save_hyperparameters(self, *args: Any, frame: FrameType | None = None, **kwargs: Any) -> None:
        """Keep the options, names of folders made absolute, so that a checkpoint finds them from anywhere."""
        here = inspect.currentframe()
        super().save_hyperparameters(*args, frame=frame or (here and here.f_back), **kwargs)
        for name in PLACES & self.hparams.keys():
            if isinstance(self.hparams[name], str):
                self.hparams[name] = local_name(self.hparams[name])

    # ---------------------------------------------------------------- what a method may say of itself

    @property
    def is_fitted(self) -> bool:
        """Whether there is something to compare with the unchanged model."""
        return self.counted > 0

    @property
    def learnt_from(self) -> int:
        """How many samples of its split a fit has learnt from."""
        return self.counted

    def begin(self) -> None:
        """Start a fit from nothing; the model is loaded."""

    def is_worth_saving(self) -> bool:
        """Whether an unfinished fit has something to save. Every process must call it."""
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores beside parameters and buffers: plain values and tensors. On every process."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave; the model need not be loaded."""

    def stored_counts(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, float]:
        """Number of samples in each sum of a checkpoint, by the name of the sum; a method without sums has none.

        Args:
            tensors: Parameters and buffers of the checkpoint.
            state: What :meth:`state` gave.
        """
        return {}

    def saes_identity(self) -> dict[str, Any] | None:
        """Name and fingerprints of the autoencoders; None for a method without."""
        return None

    def check_saes(self, stored: dict[str, Any] | None) -> None:
        """Refuse other autoencoders than those of the fit."""

    def probe(self) -> ProbeReading:
        """The probe by which texts that are only read are judged.

        Raises:
            UserError: There is none.
        """
        raise UserError(
            f"{type(self).__name__} compares answers, but {self.datamodule.hparams['task']} has texts that are not "
            "answered. Set data.task to a task that generates."
        )

    def tried(self) -> Intervention:
        """What a validation compares, the unchanged model first."""
        return self.comparison()

    def conclude(self, rewards: Tensor) -> None:
        """Draw conclusions from a validation; :meth:`try_also` tries more. Every process has the same rewards.

        Args:
            rewards: Of each variant on each sample, ``(variants, n)`` float64; the unchanged model's first.
        """
        baseline, changed = rewards.mean(1)[:2].tolist()
        self.log_validation({"baseline_reward": baseline, "reward": changed})

    @property
    def starts_a_run(self) -> bool:
        """Whether what is tested comes from no fit, nor from a checkpoint."""
        return self.counted == 0 and self._record is None

    @property
    def mark(self) -> str | None:
        """What tells this fit from another in the same folder; stands in the results of its tests."""
        return None

    def write(self, folder: Path) -> None:
        """Write what a fit leaves beside its checkpoint; called on one process."""

    @property
    def size(self) -> int:
        """How many numbers the change consists of, after a fit: what is added, edited by, or trained."""
        return 0

    def merge(self) -> None:
        """Change the weights of the loaded model for good, as the fit would have it.

        Raises:
            UserError: The method changes no weights, or none were chosen.
        """
        raise UserError(
            f"the method {self.name} changes no weights, so there is nothing to merge into a model. Export a fit of "
            "rosi, crisp or finetune."
        )

    def tables(self) -> list[Table]:
        """What is shown at the end of a fit or a validation."""
        return []

    def headline(self) -> dict[str, str]:
        """What the progress bar says of a fit so far, by this process alone."""
        return {}

    def verify(self) -> None:
        """Check on the first prompts of a fit that all parts fit together.

        Raises:
            UserError: They do not.
        """

    # ---------------------------------------------------------------- what all methods share

    @property
    def name(self) -> str:
        """The name under which the method is registered."""
        return method_name(type(self))

    def setup(self, stage: str) -> None:
        """Load the language model onto this process's device, and what the task's reward needs."""
        for option in STEPS.get(stage, ()):
            if getattr(self.trainer, option) == 0:
                raise UserError(
                    f"--trainer.{option} is 0, which leaves nothing to do. Leave it out, or set it above 0."
                )
        prepare(self.trainer, self.trains)
        self._load_llm()
        tasks = {self.datamodule.task, self.datamodule.fit_task} if stage == "fit" else {self.datamodule.task}
        for task in tasks if stage != "predict" else ():
            task.load(str(self.trainer.strategy.root_device))
        self.answering = self.answering_for(self.datamodule.task, "evaluation")
        if stage == "fit":
            self.fit_answering = self.answering_for(self.datamodule.fit_task, "fit")
            # When resuming, Lightning calls on_load_checkpoint after setup, which restores them.
            self._record = None
            self._reset_counter()
            self.begin()
        elif self._record is not None:
            self.check_parts(self._record)

    def _load_llm(self) -> None:
        if not hasattr(self, "llm"):
            self.check_processes(self.trainer.world_size)
            self.llm = LanguageModel.load(self.llm_name, self.dtype_name, **self.llm_args)
            self.datamodule.warn_of_base_model(self.llm)
        # Rejects a chat template that is missing or loses messages before anything else is loaded or written.
        self.datamodule.check_template(self.llm)
        if not self.llm.placed:
            self.llm.model.to(self.trainer.strategy.root_device)
        # Compute the fingerprint now: if a weight cannot be read, fail before the first batch and not when saving.
        _ = self.llm.identity

    def answering_for(self, task: Task, stage: Literal["fit", "evaluation"]) -> Answering:
        """How a task is answered in a fit, or in validation and test."""
        reverse = self.datamodule.hparams["reverse"]
        answers = self.datamodule.answers(self.llm, task) if self.datamodule.restricted(stage) else None
        allowed = self.llm.single_tokens(answers) if answers else None
        decoder = Decoder(self.llm, task.max_new_tokens, allowed, self.candidate_batch_size)
        if task.generates:
            return answered(decoder, task, self.datamodule, reverse)
        return Reading(decoder, task, reverse, self.probe)

    def check_processes(self, count: int) -> None:
        """Check that each of several processes can load the model.

        Raises:
            UserError: The model is spread over devices, and there are several processes.
        """
        if self.llm_args.get("device_map") and count > 1:
            raise UserError(
                f"model.llm_args.device_map is {self.llm_args['device_map']!r}, which spreads one model over all "
                f"devices, but {count} processes would each do so. Leave it out, or set trainer.devices to 1."
            )

    def configure_optimizers(self) -> Any:
        """Nothing is optimised, unless a method says otherwise."""
        return None

    def configure_callbacks(self) -> list[Requeue]:
        """What saves a fit when SLURM ends its job."""
        self._requeue = Requeue()
        return [self._requeue]

    def on_train_start(self) -> None:
        """Check that all parts fit together."""
        self.verify()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Note the samples of the batch, which are counted once the fit has learnt from them."""
        self.counted_after_step = batch.counted
        self._pending_weight += batch.weight.sum().item()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Mark the weights as changing; called after the gradients of a step are complete."""
        self._is_changing = self.trains

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take an optimiser step, and count the samples of its batches; without an optimiser only count."""
        super().optimizer_step(*args, **kwargs)
        self._count()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """A context that changes sums; while it runs, or if it is interrupted, no checkpoint can be written."""
        self._is_changing = True
        yield
        self._is_changing = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A context that adds the batch of a step to sums; at its end the samples of the batch are counted."""
        with self.changing():
            yield
            self._count()

    def _count(self) -> None:
        self._is_changing = True
        self.counted = self.counted_after_step
        self._learnt_weight, self._pending_weight = self._learnt_weight + self._pending_weight, 0.0
        self._is_changing = False

    def on_train_epoch_end(self) -> None:
        """Stop, as a second epoch would count the same samples again; validate what no validation has seen yet."""
        self.trainer.should_stop = True
        # Lightning may have validated before the last batches of the epoch, or not at all.
        if self._validated < self.counted:
            self._validate()

    @torch.no_grad()
    def _validate(self) -> None:
        self.on_validation_epoch_start()
        for batch_idx, batch in enumerate(self.datamodule.val_dataloader()):
            self.validation_step(batch.to(self.device), batch_idx)
            self._requeue.save_if_requested(self.trainer)
        self.on_validation_epoch_end()

    @property
    def has_seen_all(self) -> bool:
        """Whether no sample of the fit, if there is one, is still to come."""
        fitting = self.trainer.state.fn == "fit"
        return not fitting or self.trainer.is_last_batch or self.trainer.should_stop

    def on_validation_epoch_start(self) -> None:
        """Prepare what is tried."""
        if not self.trainer.sanity_checking:
            self._trial = Trial(self.answering, self.tried(), self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Try all variants on a batch."""
        if not self.trainer.sanity_checking:
            self._trial.step(batch)

    def on_validation_epoch_end(self) -> None:
        """Bring the rewards of all processes together."""
        if not self.trainer.sanity_checking:
            self.conclude(self._trial.rewards())
            self._validated = self.counted
            del self._trial  # and with it the prompts that were kept

    def try_also(self, variants: Intervention) -> Tensor:
        """Rewards ``(variants, n)`` of further variants on the validation split, within :meth:`conclude`.

        Every process must call it.
        """
        return self._trial.again(variants)

    def log_validation(self, values: dict[str, float]) -> None:
        """Log numbers that are equal on all processes already, so that their mean is right."""
        self.log_dict({f"val/{name}": float(value) for name, value in values.items()}, sync_dist=True)

    def options(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Values of those of the named options that the method has."""
        return {name: self.hparams[name] for name in names if name in self.hparams}

    # ---------------------------------------------------------------- checkpoints

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Lightning's way to make a module of a checkpoint; options given here replace the stored ones.

        Raises:
            UserError: The checkpoint is damaged, or asks for code of a model's repository, which only a caller may
                allow, by giving ``llm_args`` anew.
        """
        _, stored = settings_of(read_checkpoint(Path(checkpoint_path)))
        if (stored["model"].get("llm_args") or {}).get("trust_remote_code") and "llm_args" not in kwargs:
            raise UserError(
                "the checkpoint sets trust_remote_code, which runs code of the model's repository. If you trust it, "
                "give llm_args={'trust_remote_code': True} anew."
            )
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what was learnt and whose it is; no weight of the language model.

        Raises:
            UserError: An update of the sums or weights was interrupted, or they do not have the samples that are
                counted.
        """
        if self._is_changing or not hasattr(self, "answering"):
            when = (
                f"a step after {self.counted} samples was interrupted" if self._is_changing else "the run had no start"
            )
            # A callback that saves after an error hides the error.
            cause = f" ({one_line(error)})" if (error := sys.exception()) else ""
            raise UserError(f"no checkpoint can be written: {when}{cause}. Go on from an earlier checkpoint.")
        with self.changing():
            state = self.state()
            learnt = all_reduce_sum(torch.tensor(round(self._learnt_weight), device=self.device)).item()
        checkpoint["state_dict"] = self.state_dict()
        checkpoint[KEY] = Provenance(
            method=self.name,
            llm=self.llm.identity,
            saes=self.saes_identity(),
            settled=self.options(self.settings.settled),
            resumed=self.options(self.settings.resumed),
            samples=self.datamodule.fingerprint,
            counted=self.counted,
            versions=versions(),
            state=state,
        ).as_dict()
        counts = {"batches": self._resumed_weight + learnt}
        check_counter(self.counted, counts | self.stored_counts(checkpoint["state_dict"], state))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what was learnt; a fit goes on with the remaining samples.

        Raises:
            UserError: The checkpoint is of another program, method, model, SAE or format, an option that the fit
                settled differs, or it counts other samples than its sums have.
        """
        try:
            self._load(checkpoint)
        except UserError as error:
            path = self._trainer.ckpt_path if self._trainer is not None else None
            if path and is_requeue_checkpoint(path):
                raise unusable(path, error) from error
            raise

    def _load(self, checkpoint: dict[str, Any]) -> None:
        record = Provenance.read(checkpoint)
        check_method(record.method, self.name)
        check_options(record.settled, self.hparams)
        check_counter(record.counted, self._counts_in(checkpoint, record))
        # Lightning's progress counts batches, which depends on the number of processes; `counted` counts samples.
        checkpoint.pop("loops", None)
        self._reset_counter()
        self.counted = self.counted_after_step = record.counted
        self._resumed_weight, self._record = float(record.counted), record
        if self._trainer is not None:
            # With a trainer, setup has been called before this.
            self.check_parts(record)
            if self.trainer.state.fn == "fit":
                check_options(record.resumed, self.hparams)
                check_same_data(checkpoint.get("datamodule_hyper_parameters", {}), self.datamodule.hparams)
                check_samples(record.samples, self.datamodule.fingerprint)
        self.restore(record.state)

    def _counts_in(self, checkpoint: dict[str, Any], record: Provenance) -> dict[str, float]:
        try:
            return self.stored_counts(checkpoint["state_dict"], record.state)
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(f"its sums cannot be read ({one_line(error)})") from error

    def check_parts(self, record: Provenance) -> None:
        """Refuse another language model, or other autoencoders, than those of a fit.

        Raises:
            UserError: They differ.
        """
        check_llm(record.llm, self.llm.identity)
        self.check_saes(record.saes)
