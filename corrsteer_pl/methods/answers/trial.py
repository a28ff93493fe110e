"""The unchanged model and variants of it on the validation split."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from corrsteer_pl.data import Batch
from corrsteer_pl.methods.answers.answering import Answering
from corrsteer_pl.models.decoding.decode import Intervention
from corrsteer_pl.models.decoding.kept import KeptPrompts


class Trial:
    """Tries variants of a model on a split: all variants of a batch are decoded from one reading of its prompts.

    Args:
        answering: How the task is answered.
        variants: What is tried; the first variant is the unchanged model.
        device: Where rewards are exchanged between processes.
    """

    def __init__(self, answering: Answering, variants: Intervention, device: torch.device) -> None:
        self.answering, self.variants = answering, variants
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._rewards = Rewards().to(self._device)
        self._batches: list[Batch] = []
        self._kept = KeptPrompts(answering.decoder.keeps)

    def step(self, batch: Batch) -> None:
        """Answer one batch under every variant, and keep the rewards."""
        self._batches.append(batch)
        self._answer(self._rewards, batch, self.variants)

    def rewards(self) -> Tensor:
        """Rewards ``(variants, n)`` float64 of all processes' samples, in their order. Every process must call it."""
        return self._rewards.compute().cpu()

    def again(self, variants: Intervention) -> Tensor:
        """Rewards ``(variants, n)`` of further variants on the same samples. Every process must call it.

        Prompts that were read are not read again, as far as memory allows.
        """
        rewards = Rewards().to(self._device)
        for batch in self._batches:
            self._answer(rewards, batch, variants)
        return rewards.compute().cpu()

    def _answer(self, rewards: "Rewards", batch: Batch, variants: Intervention) -> None:
        judged = [judged for _, judged in self.answering.compare(batch, variants, self._kept)]
        rewards.update(torch.stack(judged), batch.rows, batch.weight)


class Rewards(Metric):
    """Rewards of each variant on the samples of all processes, in the order of the split and without fillers.

    Shape:
        - rewards: ``(variants, batch)`` float64.
        - rows: ``batch`` positions in the split.
        - weight: ``(batch,)``, 1 for a sample, 0 for a filler.
        - computes ``(variants, n)`` float64.

    Example:
        >>> rewards = Rewards()
        >>> rewards.update(torch.tensor([[0., 1., 1.], [1., 1., 0.]]), [2, 0, 0], torch.tensor([1., 1., 0.]))
        >>> rewards.compute()
        tensor([[1., 0.],
                [1., 1.]], dtype=torch.float64)
    """

    full_state_update = False
    of_samples: Any
    places: Any

    def __init__(self) -> None:
        super().__init__()
        self.add_state("of_samples", [], dist_reduce_fx="cat")
        self.add_state("places", [], dist_reduce_fx="cat")

    def update(self, rewards: Tensor, rows: Sequence[int], weight: Tensor) -> None:
        """Take in a batch."""
        real = weight.bool().cpu()
        self.of_samples.append(rewards.cpu().double().T[real].to(self.device))
        self.places.append(torch.tensor(rows)[real].to(self.device))

    def compute(self) -> Tensor:
        """All rewards."""
        return dim_zero_cat(self.of_samples)[dim_zero_cat(self.places).argsort()].T
