"""What a run leaves on disk."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from corrsteer_pl.errors import UserError
from corrsteer_pl.files import LAST, check_writable, write_atomically, write_json, write_jsonl
from corrsteer_pl.methods.runs.provenance import Provenance, read_checkpoint


class RunFiles(Checkpoint):
    """Writes a run's results below the trainer's ``default_root_dir``, each file whole or not at all.

    ``last.ckpt`` and what the method writes by a fit; ``test/<task>[-<tag>]/metrics.json``
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
        if due and not pl_module.trainer.fast_dev_run and pl_module.is_worth_saving():
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """In a fit, save what has been selected so far."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_selected(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save what was selected in the end."""
        self._save_selected(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse to put what needs no fit in the place of another run.

        Raises:
            UserError: The folder has a fit, or a test of something else.
        """
        last = self._folder(trainer) / LAST
        if not pl_module.starts_a_run or pl_module.trainer.fast_dev_run or not last.is_file():
            return
        record = Provenance.read(read_checkpoint(last))
        ours = (pl_module.name, pl_module.options(pl_module.settings.settled), pl_module.llm.identity)
        if record.counted or (record.method, record.settled, record.llm) != ours:
            what = "a fit" if record.counted else f"another run of the method {record.method}"
            raise UserError(
                f"{last.parent} has {what}, which this test would replace. Test that one with --ckpt_path {last}, or "
                "name another folder with --trainer.default_root_dir."
            )

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the comparison."""
        if trainer.is_global_zero and not pl_module.trainer.fast_dev_run:
            self.written = self._folder(trainer) / "test" / self._tagged(pl_module.datamodule.hparams["task"])
            write_json(self.written / "metrics.json", {**_described(pl_module), **pl_module.metrics})
            write_jsonl(self.written / "outcomes.jsonl", map(vars, pl_module.outcomes))
        if pl_module.starts_a_run and not pl_module.trainer.fast_dev_run:
            # What was tested without a fit is a run of its own, for what comes after.
            written = self.written
            self._save_selected(trainer, pl_module)
            self.written = written

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
            self.written = self._folder(trainer)
            module.write(self.written)

    def _save(self, trainer: Trainer) -> None:
        # All processes must call save_checkpoint, which merges their sums; only the first one writes.
        last = self._folder(trainer) / LAST
        if trainer.is_global_zero:
            write_atomically(last, lambda file: trainer.save_checkpoint(file, weights_only=False))
        else:
            trainer.save_checkpoint(last, weights_only=False)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir)

    def _tagged(self, name: str) -> str:
        return f"{Path(name).name}-{self.tag}" if self.tag else Path(name).name


def _described(method: Any) -> dict[str, Any]:
    """What a test was made with: what its fit settled, and every option that may differ from its fit's."""
    data = method.datamodule
    return {
        "method": method.name,
        "fit": method.mark,
        "task": data.hparams["task"],
        "split": "test",
        "model": method.llm.name,
        **method.options((*method.settings.settled, *method.settings.tested)),
        **{name: data.hparams[name] for name in data.TESTED},
        "chat_template": data.uses_chat(method.llm),
        "reward": method.task.reward_name,
    }
