"""What a selection has to beat: features at random, and fits that cannot learn anything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from corrsteer_pl.data import TaskDataModule
from corrsteer_pl.data.splits import Split
from corrsteer_pl.interventions.steering import SteeringVectors
from corrsteer_pl.methods.accumulation.candidates import random_features
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.models.sites import Site
from corrsteer_pl.selection import Feature


def shuffled_fit(fitted: CorrSteer) -> CorrSteer:
    """A fit that cannot learn anything, with the options, the model and the autoencoders of another."""
    module = CorrSteer(**{**fitted.hparams, "control": "shuffled_rewards"})
    module.llm, module.encoders = fitted.llm, fitted.encoders
    return module


def random_vectors(module: CorrSteer, features: Sequence[Feature], seed: int) -> dict[Site, Tensor]:
    """The coefficients of some features on others of the same layers, drawn at random; ``(d_model,)`` at each site."""
    drawn = random_features(features, module.sums, module.saes, module.hparams["pool"], seed)
    return module.vectors_of(drawn)


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
