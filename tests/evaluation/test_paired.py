import numpy as np
import pytest
import torch
from scipy import stats

from corrsteer_pl.evaluation.paired import Outcome, compare_outcomes, paired_metrics, side_effect_ratio, sign_test


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
