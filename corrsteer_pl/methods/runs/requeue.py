"""SLURM jobs that are requeued: a fit is saved between two batches, and goes on from there.

Lightning saves in the signal handler, in the middle of a step and, with several processes, in a different step of each
(checked with lightning 2.6). Here the handler sets a flag, which all processes compare after each batch.
"""

import os
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.methods.runs.provenance import read_checkpoint
from corrsteer_pl.strategy import all_reduce_sum

# Lightning resumes from the file of this name with the largest number, unless it is given a checkpoint.
PREFIX = "hpc_ckpt_"


class Requeue(Callback):
    """After the signal that SLURM sends before it ends a job, saves a fit and requeues the job.

    The checkpoint is ``hpc_ckpt_N.ckpt`` in the trainer's ``default_root_dir``. It replaces the one that the fit was
    resumed from, and is removed when the fit is finished. Other stages are requeued without a checkpoint.
    """

    def __init__(self) -> None:
        self.is_active = self._is_requested = self._is_requeued = False
        self._checkpoint: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace Lightning's signal handler, before it is registered."""
        environment = trainer._accelerator_connector.cluster_environment
        self.is_active = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        trainer._signal_connector._slurm_sigusr_handler_fn = self._request  # type: ignore[method-assign, assignment]

    def _request(self, *_: Any) -> None:
        self._is_requested = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember which checkpoint the fit was resumed from."""
        path = trainer.ckpt_path
        self._checkpoint = Path(path) if path and is_requeue_checkpoint(path) else None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save and requeue after a step."""
        self.save_if_requested(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save and requeue between two batches of a validation, which a resumed fit repeats."""
        self.save_if_requested(trainer)

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Requeue between two batches of a test, which starts again."""
        self.save_if_requested(trainer)

    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Requeue between two batches of a prediction, which starts again."""
        self.save_if_requested(trainer)

    def save_if_requested(self, trainer: Trainer) -> None:
        """Save and requeue if any process has received the signal. Every process must call it."""
        if not self.is_active or not self._is_requested_anywhere(trainer):
            return
        self._is_requested = False
        fitting = trainer.state.fn == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if fitting:
            for logger in trainer.loggers:
                logger.save()
            self._save(trainer)
        if trainer.is_global_zero:
            error = requeue_job()
            if error is None:
                self._is_requeued = True
            else:
                saved = f"the fit is saved in {self._checkpoint}, but " if fitting else ""
                onwards = "Submit the job again: the same command resumes from there." if fitting else ""
                warnings.warn(f"{saved}SLURM has not requeued the job ({error}). {onwards}".strip(), stacklevel=2)

    def _is_requested_anywhere(self, trainer: Trainer) -> bool:
        requests = torch.tensor(float(self._is_requested), device=trainer.strategy.root_device)
        return all_reduce_sum(requests).item() > 0

    def _save(self, trainer: Trainer) -> None:
        folder = Path(trainer.default_root_dir)
        # Lightning reads the digits of every name that has its prefix, so the temporary file must not have it.
        temporary = folder / f".requeue.{os.getpid()}.tmp"
        try:
            trainer.save_checkpoint(temporary, weights_only=False)
            if trainer.is_global_zero:
                path = folder / f"{PREFIX}{1 + max(_numbers(folder), default=0)}.ckpt"
                temporary.replace(path)
                self._remove()
                self._checkpoint = path
        finally:
            temporary.unlink(missing_ok=True)

    def _remove(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.unlink(missing_ok=True)
            self._checkpoint = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the checkpoint of a finished fit, unless the job will be started again."""
        if trainer.is_global_zero and not self._is_requeued:
            self._remove()


def requeue_job() -> str | None:
    """Let SLURM requeue the job of this process; the reason if it does not."""
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not job or not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
        return f"its number is {job!r}"
    try:
        command = ["scontrol", "requeue", job]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return one_line(error)
    return None if done.returncode == 0 else one_line(done.stderr) or f"scontrol ended with {done.returncode}"


def is_requeue_checkpoint(path: Any) -> bool:
    """Whether a checkpoint has the name of those that Lightning resumes from by itself.

    Example:
        >>> is_requeue_checkpoint("runs/hpc_ckpt_2.ckpt"), is_requeue_checkpoint("runs/last.ckpt")
        (True, False)
    """
    return PREFIX in Path(str(path)).name


def requeue_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that Lightning resumes a SLURM job from if none is given; None if there is none.

    Raises:
        UserError: The file cannot be read.
    """
    if not SLURMEnvironment.detect() or not (numbers := _numbers(folder)):
        return None
    path = folder / f"{PREFIX}{max(numbers)}.ckpt"
    try:
        read_checkpoint(path)
    except UserError as error:
        raise unusable(path, error) from error
    return path


def unusable(path: Any, error: UserError) -> UserError:
    """The error for a checkpoint that Lightning resumes from although nobody has named it."""
    return UserError(
        f"{path} is in the run's folder, so a SLURM job resumes from it, but it cannot be used: {error} "
        "To start from the beginning, delete it, or name another folder with --trainer.default_root_dir."
    )


def _numbers(folder: Path) -> list[int]:
    """The numbers that Lightning reads in the names of such checkpoints; 0 where a name has none."""
    names = [path.name for path in folder.glob(f"*{PREFIX}*")] if folder.is_dir() else []
    return [int(re.sub("[^0-9]", "", name.split(PREFIX)[-1]) or 0) for name in names]
