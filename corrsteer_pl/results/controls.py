"""What a selection has to beat: features at random, and fits that cannot learn anything."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from corrsteer_pl.data import Batch, TaskDataModule
from corrsteer_pl.data.splits import Split
from corrsteer_pl.interventions.steering import SteeringVectors
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.sites import Site
from corrsteer_pl.selection import Feature


class RecordedFit(CorrSteer):
    """A fit that keeps what it has seen, so that it can be done again with other rewards and without another answer.

    Attributes:
        recorded: The reward of each sample, ``(samples,)``, in the order of the split.
        seen: Pooled activations by the rows of a batch, and by layer and pool, ``(batch, d_sae)`` sparse.
    """

    def begin(self) -> None:
        """Forget what an earlier fit has seen."""
        super().begin()
        self.seen: dict[tuple[int, ...], dict[tuple[int, str], Tensor]] = {}

    def accumulate(self, batch: Batch, reader: PoolReader, rewards: Tensor) -> None:
        """Keep a batch, too."""
        super().accumulate(batch, reader, rewards)
        if not self.seen:
            # Only now it is known how many prompts the model's context takes.
            self.recorded = torch.zeros(len(self.datamodule.examples["train"]), dtype=torch.float64)
        self.recorded[batch.rows] = rewards
        pools = {(layer, kind): pool for layer, some in reader.pools.items() for kind, pool in some.items()}
        self.seen[tuple(batch.rows)] = {key: pool.value.to_sparse() for key, pool in pools.items()}


class ShuffledRewards(CorrSteer):
    """A fit that cannot learn anything: samples get the rewards of others, and validation sees true ones.

    Attributes:
        seen: What a fit on the same samples has seen.
        dealt: Its rewards in another order, ``(samples,)``.
    """

    seen: dict[tuple[int, ...], dict[tuple[int, str], Tensor]]
    dealt: Tensor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Update the running sums from what has been seen."""
        for (layer, kind), pooled in self.seen[tuple(batch.rows)].items():
            self.sums.update(layer, kind, pooled.to_dense(), self.dealt[batch.rows], batch.weight)
        return torch.zeros((), requires_grad=True)

    @classmethod
    def after(cls, fitted: RecordedFit, seed: int) -> Self:
        """One for the same samples, with the model and the autoencoders of a fit, and its rewards permuted."""
        module = cls(**fitted.hparams)
        module.llm, module.saes, module.seen = fitted.llm, fitted.saes, fitted.seen
        order = torch.randperm(len(fitted.recorded), generator=torch.Generator().manual_seed(seed))
        module.dealt = fitted.recorded[order]
        return module


def random_vectors(module: CorrSteer, features: Sequence[Feature], seed: int) -> dict[Site, Tensor]:
    """The coefficients of some features on others of the same layers, drawn at random; ``(d_model,)`` at each site."""
    generator = torch.Generator().manual_seed(seed)
    vectors: dict[Site, Tensor] = {}
    for f in features:
        site, sae = Site.parse(f.site), module.saes[f.layer]
        vector = (
            module.scale_of_trials
            * f.coefficient
            * sae.direction(int(torch.randint(sae.d_sae, (), generator=generator)))
        )
        vectors[site] = vectors[site] + vector if site in vectors else vector
    return vectors


@torch.no_grad()
def answers_under(
    module: CorrSteer, data: TaskDataModule, variants: list[dict[Site, Tensor]], split: Split = "test"
) -> tuple[list[list[str]], Tensor]:
    """Answers to the prompts of a split under each variant, the same samples in the order of the split.

    Variants that are alike are answered once.

    Args:
        module: One that has just been fitted.
        data: A data module that has been set up for the split, with the trainer of the fit.
        variants: Vectors by site; nothing for the unchanged model.
        split: ``test`` or ``validation``.

    Returns:
        ``texts[variant][sample]``, and rewards ``(variants, samples)`` float64.
    """
    # The loader leaves out prompts that exceed the model's context.
    batches = data.test_dataloader() if split == "test" else data.val_dataloader()
    count, (different, places) = len(data.examples[split]), without_repetitions(variants)
    texts, rewards = [[""] * count for _ in different], torch.zeros(len(different), count, dtype=torch.float64)
    answering = module.answering_for(data.task, "evaluation")
    steering = SteeringVectors.stack(different, answering.schedule or module.schedule)
    for batch in batches:
        for variant, (some, judged) in enumerate(answering.compare(batch.to(module.llm.device), steering)):
            for i, row in enumerate(batch.rows):
                texts[variant][row], rewards[variant, row] = some[i], judged[i]
    return [texts[place] for place in places], rewards[places]


def without_repetitions(variants: list[dict[Site, Tensor]]) -> tuple[list[dict[Site, Tensor]], list[int]]:
    """The variants without repetitions, and where among them each variant is."""
    different: list[dict[Site, Tensor]] = []
    places = []
    for variant in variants:
        same = (i for i, other in enumerate(different) if _equal(variant, other))
        places.append(next(same, len(different)))
        if places[-1] == len(different):
            different.append(variant)
    return different, places


def _equal(some: dict[Site, Tensor], others: dict[Site, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(vector, others[site]) for site, vector in some.items())
