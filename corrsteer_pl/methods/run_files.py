"""What a run leaves on disk."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from corrsteer_pl.errors import UserError
from corrsteer_pl.files import check_writable, write_atomically, write_json, write_jsonl
from corrsteer_pl.interventions.steering import SteeringVectors

LAST = "last.ckpt"


class RunFiles(Checkpoint):
    """Writes a run's results below the trainer's ``default_root_dir``, each file whole or not at all.

    ``last.ckpt``, ``selection.json`` and ``steering.safetensors`` by a fit; ``test/<task>[-<tag>]/metrics.json``
    and ``outcomes.jsonl`` by a test; ``predict/<task>[-<tag>].jsonl`` by a prediction. A trial run (``fast_dev_run``)
    writes nothing.

    Args:
        every_n_train_steps: How often an unfinished fit is saved, in steps.
        tag: Suffix that keeps the results of several tests apart.

    Attributes:
        written: Where the last results were written, on the first process; None before.
    """

    def __init__(self, every_n_train_steps: int = 50, tag: str | None = None) -> None:
        super().__init__()
        if every_n_train_steps < 1:
            raise UserError(
                f"results.every_n_train_steps is {every_n_train_steps}; it is a number of steps, at least 1."
            )
        self.every_n_train_steps, self.tag = every_n_train_steps, tag
        self.written: Path | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """See at once whether results can be written."""
        check_writable(self._folder(trainer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Save an unfinished fit now and then."""
        due = trainer.global_step % self.every_n_train_steps == 0
        if due and not pl_module.trainer.fast_dev_run and pl_module.rewards_differ():
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """In a fit, save what has been selected so far."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_selected(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save what was selected in the end."""
        self._save_selected(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the comparison."""
        if trainer.is_global_zero and not pl_module.trainer.fast_dev_run:
            task = pl_module.datamodule.hparams["task"]
            self.written = self._folder(trainer) / "test" / self._tagged(task)
            settings = {"task": task, "split": "test", "model": pl_module.llm.name, "scale": pl_module.hparams["scale"]}
            settings |= {name: pl_module.hparams[name] for name in ("rule", "sign", "positions", "dtype")}
            asked = ("path", "subset", "filter", "task_args", "shots", "restrict", "reverse")
            settings |= {name: pl_module.datamodule.hparams[name] for name in asked}
            settings["chat_template"] = pl_module.datamodule.uses_chat(pl_module.llm)
            settings["reward"] = pl_module.task.reward_name
            write_json(self.written / "metrics.json", {**settings, **pl_module.metrics})
            write_jsonl(self.written / "outcomes.jsonl", map(vars, pl_module.outcomes))

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the texts."""
        if trainer.is_global_zero and not pl_module.trainer.fast_dev_run:
            name = self._tagged(pl_module.datamodule.hparams["task"])
            self.written = self._folder(trainer) / "predict" / f"{name}.jsonl"
            write_jsonl(self.written, pl_module.predictions)

    def _save_selected(self, trainer: Trainer, module: Any) -> None:
        if module.trainer.fast_dev_run:
            return
        self._save(trainer)
        if trainer.is_global_zero:
            self._write_selection(self._folder(trainer), module)

    def _write_selection(self, folder: Path, module: Any) -> None:
        self.written = folder
        write_json(folder / "selection.json", {**module.selection.as_dict(), "snapshots": module.snapshots})
        vectors = SteeringVectors(module.steering_vectors(), module.schedule)
        write_atomically(folder / "steering.safetensors", vectors.save)

    def _save(self, trainer: Trainer) -> None:
        last = self._folder(trainer) / LAST
        # All processes take part, for their sums are merged; the name is the same on all of them.
        unfinished = last.with_name(f".{LAST}.tmp")
        trainer.save_checkpoint(unfinished, weights_only=False)
        if trainer.is_global_zero:
            unfinished.replace(last)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir)

    def _tagged(self, name: str) -> str:
        return f"{Path(name).name}-{self.tag}" if self.tag else Path(name).name
