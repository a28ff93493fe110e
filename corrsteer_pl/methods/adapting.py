"""What methods share that train weights, as an adapter or as a copy of their own."""

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.evaluation.tables import whole_table
from corrsteer_pl.files import write_folder
from corrsteer_pl.interventions.adapter import Lora, OwnWeights
from corrsteer_pl.interventions.switched import Switched
from corrsteer_pl.methods.runs.provenance import damaged
from corrsteer_pl.methods.selecting import Selecting
from corrsteer_pl.selection import Feature, Selection
from corrsteer_pl.strategy import all_reduce_sum

# Share of the samples over which the learning rate rises.
WARM_UP = 0.03
LARGEST_GRADIENT = 1.0
KINDS = {"lora": Lora, "full": OwnWeights}


class Adapting(Selecting):
    """Trains weights by gradient, and compares the model with and without them.

    AdamW, a learning rate that rises over the first 3 % of the samples and then falls as a cosine, gradients of norm 1
    at most. The rate goes by samples, so that neither an interruption nor the number of processes changes it; losses
    are normalised over all processes.

    A subclass has the hyperparameters ``lr`` and ``weight_decay``, makes the weights in :meth:`new_adapter`, and has
    a ``training_step``.

    Attributes:
        adapter: The weights; None before a fit.
        features: What the training was about, for a method that chooses features.
    """

    trains = True
    amsgrad = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.adapter: Lora | OwnWeights | None = None
        self.selection: Selection | None = None
        self.features: tuple[Feature, ...] = ()
        self.snapshots: list[dict[str, Any]] = []

    @abstractmethod
    def new_adapter(self) -> Lora | OwnWeights:
        """Weights that change nothing yet."""

    def begin(self) -> None:
        """Make the weights a part of the model."""
        self.adapter = self.new_adapter()
        self.adapter.install(self.llm.model)
        self.adapter.to(self.trainer.strategy.root_device)
        self.selection, self.features, self.snapshots = None, (), []

    @property
    def own(self) -> Lora | OwnWeights:
        """The weights, part of the model.

        Raises:
            UserError: Nothing has been fitted.
        """
        if self.adapter is None:
            raise self.unfitted()
        if not self.adapter.installed:
            self.adapter.to(self.llm.device)
            self.adapter.install(self.llm.model)
        return self.adapter

    @property
    def is_fitted(self) -> bool:
        """Whether some samples have been learnt from."""
        return self.adapter is not None and self.counted > 0

    # ---------------------------------------------------------------- fit

    @property
    def learning_rate(self) -> float:
        """The highest learning rate."""
        return self.hparams["lr"]

    @property
    def steps(self) -> int:
        """How many steps a whole fit has."""
        data, processes = self.datamodule, self.trainer.world_size
        return math.ceil(len(data.examples["train"]) / (data.hparams["batch_size"] * processes))

    def configure_optimizers(self) -> Any:
        """AdamW over the trained weights."""
        options = {"lr": self.learning_rate, "weight_decay": self.hparams["weight_decay"]}
        return torch.optim.AdamW(self.own.weights.parameters(), **options, amsgrad=self.amsgrad)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate by the samples that were counted before this batch."""
        super().on_train_batch_start(batch, batch_idx)
        count = len(self.datamodule.examples["train"])
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate * rate(self.counted / count, self.counted_after_step / count)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Shorten long gradients."""
        torch.nn.utils.clip_grad_norm_(self.own.weights.parameters(), LARGEST_GRADIENT)
        super().on_before_optimizer_step(optimizer)

    def mean_over_processes(self, total: Tensor, count: Tensor) -> Tensor:
        """A loss whose gradient, averaged over processes, is that of all totals over all counts."""
        everyone = all_reduce_sum(count.detach().double().clone()).clamp(min=1e-9)
        return total * self.trainer.world_size / everyone.to(total.dtype)

    def log_loss(self, name: str, loss: Tensor) -> None:
        """Log a loss as the mean over processes, which is that of all samples of the step."""
        self.log(f"train/{name}", loss.detach(), sync_dist=True, prog_bar=name == "loss")

    # ---------------------------------------------------------------- validate

    def conclude(self, rewards: Tensor) -> None:
        """Say what the trained weights reach on the validation split."""
        self.select_whole(rewards, "trained", self.features)

    def tables(self) -> list[Table]:
        """What validation said."""
        return [whole_table(self.selection)] if self.selection else []

    # ---------------------------------------------------------------- test

    def comparison(self) -> Switched:
        """The model, and the model with the trained weights."""
        return Switched([None, ("the trained adapter", self.own.active)])

    @property
    def size(self) -> int:
        """Trained numbers."""
        return sum(weight.numel() for weight in self.own.weights.values())

    def merge(self) -> None:
        """Put the trained weights into the loaded model for good."""
        self.own.merge(self.llm.model)
        self.llm.__dict__.pop("identity", None)

    # ---------------------------------------------------------------- checkpoints and files

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the weights, and the optimiser's state as long as it is needed: it is twice their size."""
        super().on_save_checkpoint(checkpoint)
        if self.counted == len(self.datamodule.examples.get("train", ())):
            checkpoint["optimizer_states"] = []

    def state(self) -> dict[str, Any]:
        """The shape of the weights, which are parameters."""
        adapter = self.own
        kind = next(name for name, cls in KINDS.items() if isinstance(adapter, cls))
        return {**super().state(), "adapter": {"kind": kind, **adapter.described()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Make weights of the same shape, whose values Lightning loads after this."""
        try:
            plain = dict(state["adapter"])
            restored = KINDS[plain.pop("kind")](**plain)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise damaged(f"what its fit found cannot be read ({one_line(error)})") from error
        super().restore(state)
        if self.adapter is None:
            self.adapter = restored
        elif restored.described()["shapes"] != self.adapter.described()["shapes"]:
            raise UserError(
                "the adapter of the checkpoint has other weights than the options of this fit would give it. Leave the "
                "options out, or fit from the beginning without --ckpt_path."
            )

    def write(self, folder: Path) -> None:
        """``selection.json``, and the weights in a folder ``adapter``, each whole or not at all."""
        super().write(folder)
        write_folder(folder / "adapter", lambda new: self.own.write(new, self.llm.name))


def rate(before: float, after: float) -> float:
    """Share of the highest learning rate: a rise, then half a cosine.

    Args:
        before: Share of the samples that were counted before a step.
        after: The same after it, by which the rise goes, so that the first step learns.

    Example:
        >>> [round(rate(share, share + 0.01), 2) for share in (0.0, 0.02, 0.5, 0.99)]
        [0.33, 1.0, 0.52, 0.0]
    """
    if before < WARM_UP:
        return min(1.0, after / WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (before - WARM_UP) / (1 - WARM_UP)))
