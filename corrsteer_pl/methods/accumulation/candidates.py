"""From the running sums of all layers to ranked features."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.errors import NothingToLearn, UserError
from corrsteer_pl.methods.accumulation.sums import Accumulator
from corrsteer_pl.models.sae import Encoder
from corrsteer_pl.selection import Feature, describe, rank
from corrsteer_pl.stats import COEFFICIENTS, Moments, Probe, pearson
from corrsteer_pl.stats.scores import RELATIVE_VARIANCE_FLOOR


def rank_features(
    sums: Accumulator, saes: Mapping[int, Encoder], options: Mapping[str, Any]
) -> tuple[tuple[Feature, ...], tuple[Feature, ...]]:
    """Each layer's ``topk`` features of each sign, and the candidates, which are the first ``topm`` of them.

    Args:
        sums: Merged sums.
        saes: The autoencoders, by layer.
        options: ``pool, coefficient_pool, coefficient, score, topk, topm, sign`` of :class:`~corrsteer_pl.CorrSteer`.
    """
    ranking: list[Feature] = []
    candidates: list[Feature] = []
    for layer, sae in saes.items():
        moments = sums.moments(layer, options["pool"])
        correlations, scores = pearson(moments), sums.scores(layer, options["pool"], options["score"])
        coefficients = _coefficients(sums.moments(layer, options["coefficient_pool"] or options["pool"]), options)
        signed = zip(("positive", "negative"), rank(scores, correlations, options["topk"]), strict=True)
        for indices in (indices for sign, indices in signed if options["sign"] in ("both", sign)):
            site = str(sae.site)
            top = [describe(moments, correlations, scores, coefficients, layer, site, i) for i in indices]
            top = [replace(feature, neuronpedia=sae.page(feature.index)) for feature in top]
            ranking += top
            candidates += top[: options["topm"]]
    return tuple(ranking), tuple(candidates)


def random_features(
    features: Sequence[Feature], sums: Accumulator, saes: Mapping[int, Encoder], pool: str, seed: int
) -> tuple[Feature, ...]:
    """Features of the same layers drawn at random, with the signs and the coefficients of those that they replace."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for f in features:
        index = int(torch.randint(saes[f.layer].d_sae, (), generator=generator))
        moments = sums.moments(f.layer, pool)
        r = pearson(moments)
        drawn = describe(moments, r, r, r, f.layer, f.site, index)
        page = saes[f.layer].page(index)
        found.append(replace(drawn, sign=f.sign, coefficient=f.coefficient, neuronpedia=page))
    return tuple(found)


def _coefficients(moments: Moments, options: Mapping[str, Any]) -> Tensor:
    if options["coefficient"] == "difference" and moments.n > 0 and moments.n == moments.n_right:
        raise UserError(
            f"model.coefficient is difference, but all {round(moments.n.item())} rewards are above 0, so there are no "
            "wrong samples to differ from. Use mean, or a reward that is 0 for a wrong answer."
        )
    return COEFFICIENTS[options["coefficient"]](moments)


def judge_left_out(sums: Accumulator, pool: str, dtypes: str) -> dict[str, int]:
    """By layer, how many samples its sums lack because an activation was not finite, where there are any.

    A warning counts them.

    Raises:
        UserError: A layer lacks more than half of the samples.
    """
    lacking = {layer: sums.left_out(layer, pool) for layer in sums.widths}
    lacking = {layer: count for layer, count in lacking.items() if count}
    for layer, count in lacking.items():
        seen = count + round(sums.moments(layer, pool).n.item())
        sentence = f"{count} of {seen} samples have activations in layer {layer} that are not finite ({dtypes})"
        if 2 * count > seen:
            raise UserError(f"{sentence}. Set model.dtype and model.sae_dtype to bfloat16 or float32.")
        warnings.warn(f"{sentence}; they are left out of its correlations.", stacklevel=2)
    return {str(layer): count for layer, count in lacking.items()}


def leading_features(sums: Accumulator, saes: Mapping[int, Encoder], pool: str) -> list[Feature]:
    """Each layer's top features by this process's sums so far, the largest |r| first, for display."""
    found = []
    for layer, sae in saes.items():
        r = pearson(moments := sums.so_far(layer, pool))
        positive, negative = rank(r, r, 1)
        found += [describe(moments, r, r, r, layer, str(sae.site), i) for i in positive + negative]
    return sorted(found, key=lambda feature: -abs(feature.correlation or 0.0))


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
        NothingToLearn: They are.
    """
    if not rewards_differ(moments):
        raise NothingToLearn(
            f"all {round(moments.n.item())} rewards are {mean_reward(moments):g}, so there is nothing to correlate "
            "with. Choose a task that the model solves sometimes, or more samples."
        )


def fit_probe(moments: Moments, topk: int) -> Probe:
    """A probe on the ``topk`` features of each sign."""
    r = pearson(moments)
    return Probe.fit(moments, [i for some in rank(r, r, topk) for i in some])
