"""What the progress bar says."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """A progress bar that also says how a fit goes, in the method's own words.

    Args:
        headline_every_n_steps: How often the method is asked, in steps.
    """

    def __init__(self, headline_every_n_steps: int = 10) -> None:
        super().__init__(leave=True)
        self.headline_every_n_steps = headline_every_n_steps
        self._headline: dict[str, str] = {}

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """The logged metrics, and the method's headline."""
        if trainer.training and trainer.global_step % self.headline_every_n_steps == 0:
            self._headline = pl_module.headline()
        metrics = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        return {**metrics, **self._headline} if trainer.training else metrics
