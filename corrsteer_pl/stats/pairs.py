"""Two models on the same samples: how many changed, and whether gains outnumber losses."""

from typing import Literal

from torch import Tensor

# Rewards lie in [0, 1], and are computed in float64 or, by classifiers, in float32 with steps of 6e-8: what differs by
# less than this is the rounding of one and the same reward.
TOLERANCE = 1e-6


def changes(before: Tensor, after: Tensor) -> tuple[int, int]:
    """How many samples got better and how many got worse, by rewards ``(n,)``.

    Example:
        >>> import torch
        >>> changes(torch.tensor([0., 0., 1., 1.]), torch.tensor([1., 0., 0., 1. - 1e-9]))
        (1, 1)
    """
    difference = after - before
    return int((difference > TOLERANCE).sum()), int((difference < -TOLERANCE).sum())


def sign_test(worse: int, better: int, alternative: Literal["two-sided", "greater"] = "two-sided") -> float:
    """Exact p-value that gains and losses are equally likely; ``greater`` counts only an excess of gains against that.

    For rewards of 0 and 1 this is McNemar's exact test. 1 when nothing changed.

    Example:
        >>> round(sign_test(worse=1, better=9), 6), round(sign_test(worse=1, better=9, alternative="greater"), 6)
        (0.021484, 0.010742)
    """
    from scipy.stats import binomtest  # slow to import, and not needed before the end of a validation

    return float(binomtest(better, worse + better, alternative=alternative).pvalue) if worse + better else 1.0
