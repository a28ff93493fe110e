"""What the progress bar says."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """A progress bar that also names the features that lead so far.

    Args:
        top_every_n_steps: How often the leading features are looked up, in steps.
    """

    def __init__(self, top_every_n_steps: int = 10) -> None:
        super().__init__(leave=True)
        self.top_every_n_steps = top_every_n_steps
        self._top = ""

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """The logged metrics and the leading features, as ``layer/index r``."""
        if trainer.training and trainer.global_step % self.top_every_n_steps == 0:
            self._top = "  ".join(f"{f.layer}/{f.index} {f.correlation:+.2f}" for f in pl_module.leaders()[:3])
        metrics = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        return {**metrics, "top": self._top} if trainer.training else metrics
