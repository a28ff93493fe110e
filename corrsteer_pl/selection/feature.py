"""A feature, and what the running sums say of it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from corrsteer_pl.stats import Moments
from corrsteer_pl.stats.scores import mean_right, mean_wrong

SIGNS = ("both", "positive", "negative")
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Feature:
    """One SAE feature, what the fit saw of it, and how it did on its own in validation.

    Attributes:
        layer: Block index.
        site: Hook name, for example ``blocks.3.hook_resid_post``.
        index: Feature index in the layer's SAE.
        sign: ``positive`` or ``negative``: the sign of the correlation.
        coefficient: What its decoder direction is multiplied with, before ``scale``.
        correlation: Pearson correlation with the reward, in [-1, 1]; None for a vector that is no feature.
        score: What it was ranked by, which is its correlation unless another score was chosen.
        active_right: Share of right samples on which it was active, in [0, 1].
        active_wrong: The same for wrong samples.
        mean_right: Mean pooled activation on right samples.
        mean_wrong: The same on wrong samples.
        validation_reward: Mean reward in [0, 1] when it alone steers the validation split; None if untested.
        validation_better: How many validation samples it alone then changed for the better; None if untested.
        validation_worse: The same for the worse.
        validation_error: Standard error of the mean difference from the unsteered rewards, in pairs; None if untested.
        neuronpedia: Address of its page on Neuronpedia; None if its SAE names none.
        search_p_value: How often chance finds a correlation as large as its own among all features of all layers;
            None if that was not measured.
        stability: In which share of the halves of the samples it would be a candidate again; None if that was not
            measured.
    """

    layer: int
    site: str
    index: int
    sign: str
    coefficient: float
    correlation: float | None
    score: float
    active_right: float
    active_wrong: float
    mean_right: float
    mean_wrong: float
    validation_reward: float | None = None
    validation_better: int | None = None
    validation_worse: int | None = None
    validation_error: float | None = None
    neuronpedia: str | None = None
    search_p_value: float | None = None
    stability: float | None = None

    @property
    def name(self) -> str:
        """Layer and index, which tell it apart."""
        return f"{self.layer}/{self.index}"

    @property
    def like_chance(self) -> bool:
        """Whether its correlation is known to be no larger than what chance finds in one of twenty searches."""
        return self.search_p_value is not None and self.search_p_value > SIGNIFICANT

    def __str__(self) -> str:
        r = "" if self.correlation is None else f"r {self.correlation:+.3f}, "
        return f"{self.site}/{self.index} ({r}coefficient {self.coefficient:+.3f})"


def rank(scores: Tensor, correlations: Tensor, k: int) -> tuple[list[int], list[int]]:
    """The ``k`` features of the largest scores among those that correlate positively, and among the others.

    Ties go to the lower index. A feature that does not correlate, or has no score, is in neither list.

    Shape:
        - scores, correlations: ``(n_features,)``. The size of a score counts, not its sign.

    Example:
        >>> r = torch.tensor([0.1, -0.4, 0.3, 0.3, 0.0])
        >>> rank(r, r, k=2)
        ([2, 3], [1])
        >>> rank(torch.tensor([9., 1., 2., 0., 5.]), r, k=2)
        ([0, 2], [1])
    """

    def best(wanted: Tensor) -> list[int]:
        sizes = torch.where(wanted, scores.abs(), 0)
        order = torch.sort(sizes, descending=True, stable=True).indices[:k]
        return [i for i in order.tolist() if sizes[i] > 0]

    return best(correlations > 0), best(correlations < 0)


def describe(
    moments: Moments, correlations: Tensor, scores: Tensor, coefficients: Tensor, layer: int, site: str, index: int
) -> Feature:
    """Everything the sums say about one feature. Its coefficient has the sign of its correlation."""
    correlation, coefficient = correlations[index].item(), coefficients[index].item()
    n_wrong = (moments.n - moments.n_right).clamp(min=1)
    return Feature(
        layer=layer,
        site=site,
        index=index,
        sign="positive" if correlation > 0 else "negative",
        coefficient=math.copysign(coefficient, correlation),
        correlation=correlation,
        score=scores[index].item(),
        active_right=(moments.active_right[index] / moments.n_right.clamp(min=1)).item(),
        active_wrong=(moments.active_wrong[index] / n_wrong).item(),
        mean_right=mean_right(moments)[index].item(),
        mean_wrong=mean_wrong(moments)[index].item(),
    )
