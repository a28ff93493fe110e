"""Scores that rank features, and coefficients that steer them, as functions of :class:`Moments`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.stats.histogram import Histogram
from corrsteer_pl.stats.moments import Moments

# Fewest samples on which a feature has to be active for its Fisher score, as a number and as a share of all.
SUPPORT, SUPPORTED_SHARE = 5, 0.01
# What is added to a Fisher score's denominator, as a share of the layer's median mean square.
FISHER_FLOOR = 0.01
# A variance below this share of the mean square is rounding error of a constant feature.
RELATIVE_VARIANCE_FLOOR = 1e-12


def correlation(n: Tensor, x: Tensor, xx: Tensor, y: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """Pearson correlation from the number of samples and the sums that the names spell; 0 where one is constant.

    Shape:
        - n, y, yy: scalars; x, xx, xy: ``(n_features,)``; all float64.
        - returns ``(n_features,)`` float64 in [-1, 1].
    """
    variance_x, variance_y = n * xx - x**2, n * yy - y**2
    defined = (variance_x > RELATIVE_VARIANCE_FLOOR * n * xx) & (variance_y > RELATIVE_VARIANCE_FLOOR * n * yy)
    r = (n * xy - x * y) / torch.sqrt(variance_x.clamp(min=0) * variance_y.clamp(min=0))
    return torch.where(defined, r, torch.zeros_like(r)).clamp(-1, 1)


def pearson(moments: Moments) -> Tensor:
    """Pearson correlation of every feature with the reward; point-biserial for binary rewards.

    Shape:
        - returns ``(n_features,)`` float64 in [-1, 1]; 0 where the feature or the reward is constant.

    Source:
        CorrSteer, arXiv 2508.12535, section 3.

    Example:
        >>> moments = Moments(n_features=2)
        >>> moments.update(torch.tensor([[1., 5.], [2., 5.], [3., 5.]]), torch.tensor([0., 0., 1.]))
        >>> pearson(moments)
        tensor([0.8660, 0.0000], dtype=torch.float64)
    """
    return correlation(moments.n, moments.x, moments.xx, moments.y, moments.yy, moments.xy)


def mean_right(moments: Moments) -> Tensor:
    """Mean pooled activation over the right samples, zeros included: the paper's coefficient."""
    return moments.x_right / moments.n_right.clamp(min=1)


def mean_wrong(moments: Moments) -> Tensor:
    """Mean pooled activation over the wrong samples, zeros included."""
    return (moments.x - moments.x_right) / (moments.n - moments.n_right).clamp(min=1)


def mean_active_right(moments: Moments) -> Tensor:
    """Mean pooled activation over those right samples on which the feature is active."""
    return moments.x_right / moments.active_right.clamp(min=1)


def class_difference(moments: Moments) -> Tensor:
    """Mean on right samples less mean on wrong ones."""
    return mean_right(moments) - mean_wrong(moments)


def fisher(moments: Moments) -> Tensor:
    """Mean square on the samples that a feature goes with, over its mean square on the others.

    ``E[x^2 | y = 1] / (E[x^2 | y = 0] + epsilon)`` where the correlation with the reward is positive, and the same for
    the reward ``1 - y`` where it is negative. ``epsilon`` is a hundredth of the median of ``E[x^2]`` over the features
    with a score: those active on 5 samples at least, and on 1 % of all. Graded rewards weigh samples.

    Shape:
        - returns ``(n_features,)`` float64, 0 for a feature without a score.

    Source:
        DSG, arXiv 2504.08192, with a filter and a floor added.

    Example:
        >>> moments = Moments(n_features=1)
        >>> moments.update(torch.full((10, 1), 2.), torch.tensor([0., 1.]).repeat(5))
        >>> moments.update(torch.full((10, 1), 4.), torch.ones(10))
        >>> fisher(moments)
        tensor([2.9268], dtype=torch.float64)
    """
    wrong = moments.n - moments.y
    of_right = moments.xxy / moments.y.clamp(min=1e-12)
    of_wrong = (moments.xx - moments.xxy).clamp(min=0) / wrong.clamp(min=1e-12)
    supported = moments.active_right + moments.active_wrong >= (SUPPORTED_SHARE * moments.n).clamp(min=SUPPORT)
    if not supported.any():
        return torch.zeros_like(of_right)
    floor = FISHER_FLOOR * (moments.xx / moments.n)[supported].median()
    ratio = torch.where(pearson(moments) >= 0, of_right / (of_wrong + floor), of_wrong / (of_right + floor))
    return torch.where(supported, ratio, 0)


def mutual_information(histogram: Histogram) -> Tensor:
    """Mutual information of a feature's bin with whether the sample is right, in nats, by Miller and Madow's estimate.

    The plain estimate grows with the number of bins that a feature happens to reach, which would prefer features that
    are active everywhere on few samples; it is corrected for that, and 0 at least.

    Shape:
        - returns ``(n_features,)`` float64.

    Source:
        SPARE, arXiv 2410.15999; Miller 1955, Note on the bias of information estimates.

    Example:
        >>> histogram = Histogram(n_features=2)
        >>> x, y = torch.tensor([[0., 0.], [9., 0.]]).repeat(50, 1), torch.tensor([0., 1.]).repeat(50)
        >>> histogram.update(x, y)
        >>> mutual_information(histogram)
        tensor([0.6981, 0.0000], dtype=torch.float64)
    """
    joint = histogram.counts.double()  # (2, bins, n_features)
    n, classes, bins = joint.sum((0, 1)).clamp(min=1), joint.sum(1), joint.sum(0)

    def entropy(counts: Tensor, dims: Any) -> Tensor:
        p = counts / n
        return -torch.special.xlogy(p, p).sum(dims) + ((counts > 0).sum(dims) - 1) / (2 * n)

    return (entropy(classes, 0) + entropy(bins, 0) - entropy(joint, (0, 1))).clamp(min=0)


def auroc(histogram: Histogram) -> Tensor:
    """Probability that a right sample has a larger activation than a wrong one, a tie counting half.

    Shape:
        - returns ``(n_features,)`` float64 in [0, 1]; 0.5 if all samples are right, or none.

    Example:
        >>> histogram = Histogram(n_features=2)
        >>> histogram.update(torch.tensor([[0., 1.], [5., 0.], [9., 0.]]), torch.tensor([0., 1., 1.]))
        >>> auroc(histogram)
        tensor([1., 0.], dtype=torch.float64)
    """
    wrong, right = histogram.counts.double()
    pairs = wrong.sum(0) * right.sum(0)
    below = wrong.cumsum(0) - wrong / 2  # wrong samples below each bin, and half of those in it
    return torch.where(pairs > 0, (right * below).sum(0) / pairs.clamp(min=1), 0.5)


def oriented_auroc(moments: Moments, histogram: Histogram) -> Tensor:
    """AUROC of each feature for the samples that it goes with: right ones where it correlates positively."""
    area = auroc(histogram)
    return torch.where(pearson(moments) >= 0, area, 1 - area)


def null_max_correlation(n_features: int, n_samples: float) -> float:
    """About the largest |r| of a layer whose features have nothing to do with the reward.

    ``sqrt(2 ln(n_features) / n_samples)``, at most 1: a selected correlation below it is no evidence.

    Example:
        >>> round(null_max_correlation(16384, 4000), 2)
        0.07
    """
    return min(1.0, math.sqrt(2 * math.log(max(n_features, 1)) / n_samples)) if n_samples else 1.0


@dataclass(frozen=True)
class Score:
    """A score that ranks features.

    Attributes:
        needs: The statistics that it is computed from, ``moments`` or ``histogram``; a fit keeps a histogram only if
            its score needs one.
        compute: Makes scores ``(n_features,)`` of statistics by name. Their size ranks; which way a feature steers is
            the sign of its correlation.
    """

    needs: tuple[str, ...]
    compute: Callable[[Mapping[str, Any]], Tensor]


SCORES: dict[str, Score] = {
    "pearson": Score(("moments",), lambda statistics: pearson(statistics["moments"])),
    "mutual_information": Score(("histogram",), lambda statistics: mutual_information(statistics["histogram"])),
    "fisher": Score(("moments",), lambda statistics: fisher(statistics["moments"])),
    "mean_difference": Score(("moments",), lambda statistics: class_difference(statistics["moments"])),
    "auroc": Score(("moments", "histogram"), lambda statistics: oriented_auroc(**statistics)),
}
COEFFICIENTS: dict[str, Callable[[Moments], Tensor]] = {
    "mean": mean_right,
    "active_mean": mean_active_right,
    "difference": class_difference,
}
