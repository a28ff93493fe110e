import numpy as np
import pytest
import torch
from scipy import stats

from corrsteer_pl.evaluation.paired import Outcome, compare_outcomes, paired_metrics, side_effect_ratio
from corrsteer_pl.stats import sign_test


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (0, 1), (3, 3), (2, 11), (40, 90), (900, 1100)])
def test_sign_test_equals_scipy(worse, better):
    expected = stats.binomtest(worse, worse + better).pvalue if worse + better else 1.0
    assert sign_test(worse, better) == pytest.approx(expected, rel=1e-9)


def test_interval_equals_scipy():
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(2, 300, generator=generator).double()
    m = paired_metrics(before, after)
    difference = (after - before).numpy()
    expected = stats.norm.interval(0.95, difference.mean(), stats.sem(difference))
    np.testing.assert_allclose([m["ci_low"], m["ci_high"]], expected, rtol=1e-9)
    assert m["difference"] == pytest.approx(difference.mean())


def test_counts_and_side_effect_ratio():
    m = paired_metrics(torch.tensor([1.0, 1, 0, 0, 0]), torch.tensor([1.0, 0, 1, 1, 0]))
    assert (m["n"], m["better"], m["worse"], m["changed"]) == (5, 2, 1, 3)
    assert m["side_effect_ratio"] == pytest.approx(1 / 3)
    assert side_effect_ratio(0, 0) is None


def test_the_side_effect_ratio_has_wilsons_interval():
    m = paired_metrics(torch.tensor([1.0] * 3 + [0.0] * 17), torch.tensor([0.0] * 3 + [1.0] * 17))
    p, n, z = 3 / 20, 20, stats.norm.ppf(0.975)
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    expected = [(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)]
    assert [m["ser_low"], m["ser_high"]] == pytest.approx(expected)
    nothing = paired_metrics(torch.zeros(4), torch.zeros(4))
    assert (nothing["ser_low"], nothing["ser_high"]) == (None, None)


def test_p_values_of_groups_are_corrected_for_their_number():
    def outcomes(group, better):
        return [Outcome("i", "p", "g", (group,), "", "", 0.0, float(i < better)) for i in range(10)]

    m = compare_outcomes([o for group, better in enumerate((8, 5, 0, 6)) for o in outcomes(str(group), better)])
    p = np.array([group["p_value"] for group in m["groups"].values()])
    order = np.argsort(p)
    stepped = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
    expected = np.empty_like(p)
    expected[order] = np.minimum(stepped, 1)
    assert [group["p_value_corrected"] for group in m["groups"].values()] == pytest.approx(expected.tolist())
    assert "p_value_corrected" not in m


def test_nothing_changed():
    m = paired_metrics(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert (m["difference"], m["changed"], m["p_value"], m["side_effect_ratio"]) == (0, 0, 1, None)


def test_one_sample_has_no_interval():
    m = paired_metrics(torch.tensor([0.0]), torch.tensor([1.0]))
    assert (m["difference"], m["ci_low"], m["ci_high"]) == (1, None, None)


def test_groups_are_compared_separately():
    def outcome(group, before, after):
        return Outcome("i", "p", "g", tuple(group), "", "", before, after)

    m = compare_outcomes([outcome("a", 0.0, 1.0), outcome("a", 0.0, 0.0), outcome("b", 1.0, 0.0)])
    assert m["groups"]["a"]["difference"] == 0.5
    assert m["groups"]["b"]["difference"] == -1
    assert m["n"] == 3
    assert compare_outcomes([outcome("", 0.0, 1.0)])["groups"] == {}


def test_rounding_of_a_graded_reward_is_no_change():
    before = torch.tensor([0.3, 0.7, 0.5, 0.2], dtype=torch.float64)
    m = paired_metrics(before, before + torch.tensor([1e-12, -1e-9, 1e-7, 0.25]))
    assert (m["better"], m["worse"], m["changed"], m["side_effect_ratio"]) == (1, 0, 1, 0)


def test_graded_rewards_are_tested_by_signed_ranks():
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(40, generator=generator).double()
    after = (before + 0.1 * torch.randn(40, generator=generator).double() + 0.03).clamp(0, 1)
    m = paired_metrics(before, after)
    assert m["test"] == "Wilcoxon's signed-rank test"
    # By hand: ranks of the sizes, summed over gains and over losses.
    d = (after - before).numpy()
    d = d[np.abs(d) > 1e-6]
    ranks = stats.rankdata(np.abs(d))
    smaller = min(ranks[d > 0].sum(), ranks[d < 0].sum())
    counts = np.zeros(len(d) * (len(d) + 1) // 2 + 1)
    counts[0] = 1
    for rank in range(1, len(d) + 1):
        counts[rank:] += counts[:-rank].copy()
    assert m["p_value"] == pytest.approx(min(1, 2 * counts[: int(smaller) + 1].sum() / 2.0 ** len(d)))


def test_rewards_of_zero_and_one_are_tested_exactly():
    m = paired_metrics(torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 1, 1, 1]))
    assert m["test"] == "McNemar's exact test"
    assert m["p_value"] == pytest.approx(0.625)
    same = torch.tensor([0.5, 0.25])
    assert paired_metrics(same, same)["p_value"] == 1


def test_many_changes_are_tested_as_quickly_as_few():
    rewards = torch.randint(0, 2, (2, 40_000), generator=torch.Generator().manual_seed(0)).double()
    m = paired_metrics(*rewards)
    assert m["changed"] > 15_000
    worse, better = m["worse"], m["better"]
    # The normal approximation is good to three digits here.
    z = (abs(better - worse) - 1) / (better + worse) ** 0.5
    assert m["p_value"] == pytest.approx(2 * stats.norm.sf(z), rel=1e-2)
