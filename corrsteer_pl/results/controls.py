"""What a selection has to beat: features at random, and fits that cannot learn anything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from corrsteer_pl.data import Batch, TaskDataModule
from corrsteer_pl.data.splits import Split
from corrsteer_pl.interventions.steering import SteeringVectors
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.models.sites import Site
from corrsteer_pl.selection import Feature


class RecordedRewards(CorrSteer):
    """A fit that keeps the reward of each sample, ``(samples,)``, in the order of the split."""

    def begin(self) -> None:
        """Make room for them."""
        super().begin()
        self.recorded = torch.zeros(len(self.datamodule.examples["train"]), dtype=torch.float64)

    def fit_rewards(self, texts: list[str], batch: Batch) -> Tensor:
        """True rewards, ``(batch,)``."""
        rewards = super().fit_rewards(texts, batch)
        self.recorded[batch.rows] = rewards
        return rewards


class ShuffledRewards(CorrSteer):
    """A fit that cannot learn anything: samples get the rewards of others, ``dealt (samples,)``."""

    dealt: Tensor

    def fit_rewards(self, texts: list[str], batch: Batch) -> Tensor:
        """Others' rewards, ``(batch,)``; validation sees true ones."""
        return self.dealt[batch.rows]


def random_vectors(module: CorrSteer, features: Sequence[Feature], seed: int) -> dict[Site, Tensor]:
    """The coefficients of some features on others of the same layers, drawn at random; ``(d_model,)`` at each site."""
    generator = torch.Generator().manual_seed(seed)
    vectors: dict[Site, Tensor] = {}
    for f in features:
        site, sae = Site.parse(f.site), module.saes[f.layer]
        vector = f.coefficient * sae.direction(int(torch.randint(sae.d_sae, (), generator=generator)))
        vectors[site] = vectors[site] + vector if site in vectors else vector
    return vectors


@torch.no_grad()
def answers_under(
    module: CorrSteer, data: TaskDataModule, variants: list[dict[Site, Tensor]], split: Split = "test"
) -> tuple[list[list[str]], Tensor]:
    """Answers to the prompts of a split under each variant, the same samples in the order of the split.

    Args:
        module: One that has just been fitted.
        data: A data module that has been set up for the split, with the trainer of the fit.
        variants: Vectors by site; nothing for the unchanged model.
        split: ``test`` or ``validation``.

    Returns:
        ``texts[variant][sample]``, and rewards ``(variants, samples)`` float64.
    """
    count = len(data.examples[split])
    texts, rewards = [[""] * count for _ in variants], torch.zeros(len(variants), count, dtype=torch.float64)
    answering = module.answering_for(data.task, "evaluation")
    steering = SteeringVectors.stack(variants, answering.schedule or module.schedule)
    for batch in data.test_dataloader() if split == "test" else data.val_dataloader():
        for variant, (some, judged) in enumerate(answering.compare(batch.to(module.device), steering)):
            for i, row in enumerate(batch.rows):
                texts[variant][row], rewards[variant, row] = some[i], judged[i]
    return texts, rewards
