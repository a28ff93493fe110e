"""Two models on the same samples: difference, interval, test, side effects."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError
from corrsteer_pl.files import read_rows
from corrsteer_pl.stats import TOLERANCE, changes, sign_test

Z_95 = 1.959963984540054
# Number of differences up to which the signed-rank test is exact.
MOST_EXACT = 50
MCNEMAR, SIGNED_RANK = "McNemar's exact test", "Wilcoxon's signed-rank test"


@dataclass(frozen=True)
class Outcome:
    """One test sample under both models: its texts and rewards."""

    id: str
    prompt: str
    gold: str
    groups: tuple[str, ...]
    answer_baseline: str
    answer_steered: str
    reward_baseline: float
    reward_steered: float


def outcome_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of outcomes, which are joined with others by their ids.

    Raises:
        UserError: The file cannot be read, or two rows share an id.
    """
    rows = read_rows(path)
    counts = Counter(row["id"] for row in rows)
    if shared := [id for id, count in counts.items() if count > 1]:
        raise UserError(
            f"{path} has {len(shared)} ids that several rows share, such as {shared[0]!r}. Test again, which gives "
            "every row an id of its own."
        )
    return rows


def side_effect_ratio(worse: int, better: int) -> float | None:
    """Share of changed samples that changed for the worse; None when nothing changed.

    Source:
        CorrSteer, arXiv 2508.12535, section 4.

    Example:
        >>> side_effect_ratio(worse=1, better=3), side_effect_ratio(worse=0, better=0)
        (0.25, None)
    """
    return worse / (worse + better) if worse + better else None


def wilson_interval(count: int, of: int) -> tuple[float, float] | tuple[None, None]:
    """Wilson's 95 % interval of a share ``count / of``; of nothing there is none.

    Source:
        Wilson 1927, Journal of the American Statistical Association 22.

    Example:
        >>> low, high = wilson_interval(1, 4)
        >>> round(low, 3), round(high, 3)
        (0.046, 0.699)
    """
    from scipy.stats import binomtest  # slow to import, and not needed before the end of a test

    if not of:
        return None, None
    interval = binomtest(count, of).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def signed_rank_test(differences: Tensor) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test that differences ``(n,)`` are symmetric around 0.

    Unlike the sign test it takes into account how much graded rewards differ. Differences of 0 are dropped, as Wilcoxon
    does, and tied ones have the mean of their ranks. Up to 50 differences the p-value is exact, with ties too: the
    statistic is compared with all assignments of signs. Above, it is that of the normal approximation with a
    correction for ties. 1 when there is no difference.

    Source:
        Wilcoxon 1945, Biometrics Bulletin 1; the exact distribution with ties after Pratt and Gibbons 1981.

    Example:
        >>> round(signed_rank_test(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, -0.05])), 6)
        0.0625
    """
    from scipy.stats import rankdata, wilcoxon  # slow to import, and not needed before the end of a test

    # In units of the tolerance, so that 0.3 - 0.1 and 0.2 are tied.
    units = (differences / TOLERANCE).round()
    units = units[units != 0]
    if len(units) > MOST_EXACT:
        return float(wilcoxon(units.numpy(), method="asymptotic").pvalue)
    ranks = torch.from_numpy(2 * rankdata(units.abs().numpy())).long()  # twice the ranks, which are integers with ties
    total, statistic = int(ranks.sum()), int(ranks[units > 0].sum())
    # probabilities[s]: share of the assignments of signs in which the positive ranks add up to s.
    probabilities = torch.zeros(total + 1, dtype=torch.float64)
    probabilities[0] = 1
    for rank in ranks.tolist():
        shifted = torch.cat([torch.zeros(rank, dtype=torch.float64), probabilities[:-rank]])
        probabilities = (probabilities + shifted) / 2
    sums = torch.arange(total + 1)
    return min(1.0, probabilities[(2 * sums - total).abs() >= abs(2 * statistic - total)].sum().item())


def paired_metrics(baseline: Tensor, steered: Tensor) -> dict[str, Any]:
    """Compare the rewards of the same samples.

    The interval is the large-sample 95 % interval of the mean paired difference (normal quantile, sample
    variance of the differences); below about 30 changed samples trust the p-value rather than the interval. Rewards
    that differ by no more than 1e-6, which is rounding, count as equal. The test is McNemar's exact one for rewards of
    0 and 1, Wilcoxon's signed-rank test for graded ones. The side-effect ratio has Wilson's 95 % interval.

    Shape:
        - baseline, steered: ``(n,)``, rewards in [0, 1].

    Returns:
        ``n, reward_baseline, reward_steered, difference, ci_low, ci_high, p_value, test, better, worse, changed,
        side_effect_ratio, ser_low, ser_high``; rewards and differences in [-1, 1], not percent.
    """
    baseline, steered = baseline.cpu().double(), steered.cpu().double()
    difference = steered - baseline
    changed = difference[difference.abs() > TOLERANCE]
    n, mean = len(difference), difference.mean().item()
    half = Z_95 * difference.std().item() / math.sqrt(n) if n > 1 else math.nan
    better, worse = changes(baseline, steered)
    ser_low, ser_high = wilson_interval(worse, better + worse)
    graded = bool(((baseline != baseline.round()) | (steered != steered.round())).any())
    return {
        "n": n,
        "reward_baseline": baseline.mean().item(),
        "reward_steered": steered.mean().item(),
        "difference": mean,
        "ci_low": mean - half if n > 1 else None,
        "ci_high": mean + half if n > 1 else None,
        "p_value": signed_rank_test(changed) if graded else sign_test(worse, better),
        "test": SIGNED_RANK if graded else MCNEMAR,
        "better": better,
        "worse": worse,
        "changed": better + worse,
        "side_effect_ratio": side_effect_ratio(worse, better),
        "ser_low": ser_low,
        "ser_high": ser_high,
    }


@dataclass(frozen=True)
class SeedAverage:
    """A paired comparison over several seeds.

    Attributes:
        n: Number of test examples.
        difference: Mean over the test examples of the paired difference, each first averaged over the seeds that
            tested it; in [-1, 1].
        ci_low: Lower bound of its large-sample 95 % interval, from the variance between test examples; None for one.
        ci_high: Upper bound.
        p_value: Of Wilcoxon's signed-rank test of the averaged differences.

    The interval covers the choice of the test examples. It does not cover the choice of the fit's examples, which the
    standard deviation over the seeds describes.
    """

    n: int
    difference: float
    ci_low: float | None
    ci_high: float | None
    p_value: float


def average_over_seeds(differences: Sequence[Mapping[str, float]]) -> SeedAverage:
    """Combine the paired differences of several seeds, given for each seed by the id of the test example.

    Example:
        >>> average = average_over_seeds([{"a": 1.0, "b": 0.0}, {"a": 0.0, "c": 0.0}])
        >>> average.n, round(average.difference, 3)
        (3, 0.167)
    """
    by_id: dict[str, list[float]] = {}
    for seed in differences:
        for id, difference in seed.items():
            by_id.setdefault(id, []).append(difference)
    averaged = [fmean(values) for values in by_id.values()]
    n, mean = len(averaged), fmean(averaged)
    changed = torch.tensor([value for value in averaged if abs(value) > TOLERANCE], dtype=torch.float64)
    p_value = signed_rank_test(changed)
    if n == 1:
        return SeedAverage(n, mean, None, None, p_value)
    half = Z_95 * stdev(averaged) / math.sqrt(n)
    return SeedAverage(n, mean, mean - half, mean + half, p_value)


def compare_outcomes(outcomes: list[Outcome]) -> dict[str, Any]:
    """:func:`paired_metrics` of all outcomes, and of each group under ``groups``.

    Groups have a ``p_value_corrected`` too, by Benjamini and Hochberg over all groups, for with many groups some have a
    small p-value by chance.
    """
    from scipy.stats import false_discovery_control

    def metrics(some: list[Outcome]) -> dict[str, Any]:
        pairs = torch.tensor([(o.reward_baseline, o.reward_steered) for o in some], dtype=torch.float64)
        return paired_metrics(pairs[:, 0], pairs[:, 1])

    names = sorted({group for o in outcomes for group in o.groups})
    groups = {name: metrics([o for o in outcomes if name in o.groups]) for name in names}
    corrected = false_discovery_control([group["p_value"] for group in groups.values()]) if groups else []
    for group, p_value in zip(groups.values(), corrected, strict=True):
        group["p_value_corrected"] = float(p_value)
    return {**metrics(outcomes), "groups": groups}
