"""From the running sums of all layers to ranked features."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.accumulate import Accumulator
from corrsteer_pl.models.sae import SparseAutoencoder
from corrsteer_pl.selection import Feature, describe, rank
from corrsteer_pl.stats import COEFFICIENTS, Moments, Probe, pearson
from corrsteer_pl.stats.scores import RELATIVE_VARIANCE_FLOOR


def rank_features(
    sums: Accumulator, saes: Mapping[int, SparseAutoencoder], options: Mapping[str, Any]
) -> tuple[tuple[Feature, ...], tuple[Feature, ...]]:
    """Each layer's ``topk`` features of each sign, and the candidates, which are the first of them.

    Args:
        sums: Merged sums.
        saes: The autoencoders, by layer.
        options: ``pool, coefficient_pool, coefficient, topk, sign`` of :class:`~corrsteer_pl.CorrSteer`.
    """
    ranking: list[Feature] = []
    candidates: list[Feature] = []
    for layer, sae in saes.items():
        moments = sums.moments(layer, options["pool"])
        scores = pearson(moments)
        coefficient_pool = options["coefficient_pool"] or options["pool"]
        coefficients = COEFFICIENTS[options["coefficient"]](sums.moments(layer, coefficient_pool))
        for sign, indices in zip(("positive", "negative"), rank(scores, options["topk"]), strict=True):
            if options["sign"] in ("both", sign):
                top = [describe(moments, scores, coefficients, layer, str(sae.site), i) for i in indices]
                ranking += [replace(feature, neuronpedia=sae.page(feature.index)) for feature in top]
                candidates += ranking[len(ranking) - len(top) :][:1]
    return tuple(ranking), tuple(candidates)


def leading_features(sums: Accumulator, saes: Mapping[int, SparseAutoencoder], pool: str) -> list[Feature]:
    """Each layer's top features by this process's sums so far, the largest |r| first, for display."""
    found = []
    for layer, sae in saes.items():
        scores = pearson(moments := sums.so_far(layer, pool))
        positive, negative = rank(scores, 1)
        found += [describe(moments, scores, scores, layer, str(sae.site), i) for i in positive + negative]
    return sorted(found, key=lambda feature: -abs(feature.correlation))


def rewards_differ(moments: Moments) -> bool:
    """Whether there is anything to correlate with."""
    variance = moments.n * moments.yy - moments.y**2
    return bool(variance > RELATIVE_VARIANCE_FLOOR * moments.n * moments.yy)


def mean_reward(moments: Moments) -> float:
    """Mean reward of the samples of the sums; 0 if there is none."""
    return (moments.y / moments.n.clamp(min=1)).item()


def require_different(moments: Moments) -> None:
    """Refuse rewards that are all equal.

    Raises:
        UserError: They are.
    """
    if not rewards_differ(moments):
        raise UserError(
            f"all {round(moments.n.item())} rewards are {mean_reward(moments):g}, so there is nothing to correlate "
            "with. Choose a task that the model solves sometimes, or more samples."
        )


def fit_probe(moments: Moments, topk: int) -> Probe:
    """A probe on the ``topk`` features of each sign."""
    return Probe.fit(moments, [i for some in rank(pearson(moments), topk) for i in some])
