"""Scores that rank features, and coefficients that steer them, as functions of :class:`Moments`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.stats.moments import Moments

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
        needs: The statistics that it is computed from, by name; a fit keeps those that its score needs.
        compute: Makes scores ``(n_features,)`` of statistics by name. Their size ranks; which way a feature steers is
            the sign of its correlation.
    """

    needs: tuple[str, ...]
    compute: Callable[[Mapping[str, Any]], Tensor]


SCORES: dict[str, Score] = {
    "pearson": Score(("moments",), lambda statistics: pearson(statistics["moments"])),
    "mean_difference": Score(("moments",), lambda statistics: class_difference(statistics["moments"])),
}
COEFFICIENTS: dict[str, Callable[[Moments], Tensor]] = {
    "mean": mean_right,
    "active_mean": mean_active_right,
    "difference": class_difference,
}
