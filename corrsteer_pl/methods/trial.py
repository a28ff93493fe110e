"""The unchanged model and variants of it on the validation split."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from corrsteer_pl.data import Batch
from corrsteer_pl.methods.answering import Answering
from corrsteer_pl.models.decoding.decode import Intervention


class TrialResult(NamedTuple):
    """Mean validation rewards in [0, 1]: of the unchanged model, and of each other variant."""

    baseline: float
    variants: list[float]


class Trial:
    """Tries variants of a model on a split: all variants of a batch are decoded from one reading of its prompts.

    Args:
        variants: What is tried; the first variant is the unchanged model.
        device: Where sums are exchanged between processes.
    """

    def __init__(self, variants: Intervention, device: torch.device) -> None:
        self.variants = variants
        self._rewards = MeanReward(len(variants)).to("cpu" if device.type == "mps" else device)

    def step(self, answering: Answering, batch: Batch) -> None:
        """Answer one batch under every variant, and take in the rewards."""
        rewards = [rewards for _, rewards in answering.compare(batch, self.variants)]
        self._rewards.update(torch.stack(rewards), batch.weight)

    def result(self) -> TrialResult:
        """Mean rewards over the samples of all processes. Every process must call it."""
        # torchmetrics gives a single value without its dimension.
        baseline, *others = self._rewards.compute().reshape(-1).tolist()
        return TrialResult(baseline, others)


class MeanReward(Metric):
    """Mean reward of each variant over the samples of all processes, fillers left out.

    Args:
        variants: Number of variants.

    Shape:
        - rewards: ``(variants, batch)`` float64.
        - weight: ``(batch,)``, 1 for a sample, 0 for a filler.
        - computes ``(variants,)`` float64.

    Example:
        >>> mean = MeanReward(2)
        >>> mean.update(torch.tensor([[0., 1., 1.], [1., 1., 0.]]), torch.tensor([1., 1., 0.]))
        >>> mean.compute()
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, variants: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(variants, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rewards: Tensor, weight: Tensor) -> None:
        """Take in a batch."""
        weight = weight.to(self.total.device, self.total.dtype)
        self.total += rewards.to(self.total.device, self.total.dtype) @ weight
        self.count += weight.sum()

    def compute(self) -> Tensor:
        """The means."""
        return self.total / self.count
