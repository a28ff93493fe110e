import numpy as np
import pytest
import torch
from scipy import stats

from corrsteer_pl.stats import COEFFICIENTS, SCORES, Histogram, Moments, null_max_correlation, pearson


def filled(x, y, weight=None, batch_size=64):
    moments = Moments(x.shape[1])
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        moments.update(x[part], y[part], None if weight is None else weight[part])
    return moments


@pytest.fixture
def activations():
    generator = torch.Generator().manual_seed(0)
    return torch.relu(torch.randn(500, 40, generator=generator, dtype=torch.float64) + 0.3)


def test_every_sum_equals_numpy_whatever_is_added_at_a_time(activations, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    y, w = torch.rand(500, generator=generator).double() - 0.3, (torch.rand(500, generator=generator) < 0.9).double()
    y = y.clamp(min=0)
    x, rewards, weights = activations.numpy(), y.numpy(), w.numpy()
    right = weights * (rewards > 0)
    expected = {
        "n": weights.sum(), "y": weights @ rewards, "yy": weights @ rewards**2, "n_right": right.sum(),
        "x": weights @ x, "xx": weights @ x**2, "xy": (weights * rewards) @ x, "xxy": (weights * rewards) @ x**2,
        "x_right": right @ x, "active_right": right @ (x > 0), "active_wrong": (weights - right) @ (x > 0),
    }  # fmt: skip
    for chunk, batch_size in ((4096, 64), (7, 13), (40, 500), (1, 100)):
        monkeypatch.setattr("corrsteer_pl.stats.moments.CHUNK", chunk)
        found = filled(activations, y, w, batch_size)
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(found, name), value, rtol=1e-12, err_msg=name)


def test_pearson_equals_scipy(activations):
    y = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = [stats.pearsonr(column, y).statistic for column in activations.T.numpy()]
    np.testing.assert_allclose(pearson(filled(activations, y)), expected, atol=1e-9)


def test_pearson_of_binary_rewards_is_point_biserial(activations):
    y = (torch.rand(500, generator=torch.Generator().manual_seed(2)) < 0.3).double()
    expected = [stats.pointbiserialr(y, column).statistic for column in activations.T.numpy()]
    np.testing.assert_allclose(pearson(filled(activations, y)), expected, atol=1e-9)


def test_pearson_survives_a_large_offset(activations):
    # Sums of squares lose digits where mean >> deviation: 1e3 here, so 1e-16 * 1e6 of relative error.
    y = (activations[:, 0] > 0.5).double()
    expected = [stats.pearsonr(column, y).statistic for column in activations.T.numpy()]
    np.testing.assert_allclose(pearson(filled(activations + 1e3, y)), expected, atol=1e-7)


def test_constant_features_and_constant_rewards_have_correlation_zero(activations):
    y = (activations[:, 0] > 0.5).double()
    constant = torch.full((500, 3), 0.1)
    assert pearson(filled(constant, y)).tolist() == [0, 0, 0]
    assert pearson(filled(activations, torch.full((500,), 0.7))).abs().max() == 0


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_batch_size_and_order_do_not_change_the_sums(activations, batch_size):
    y = (activations[:, 0] > 0.5).double()
    order = torch.randperm(500, generator=torch.Generator().manual_seed(3))
    one, other = filled(activations, y), filled(activations[order], y[order], batch_size=batch_size)
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_weight_zero_adds_nothing(activations):
    y = (activations[:, 0] > 0.5).double()
    weight = (torch.arange(500) % 3 > 0).double()
    kept = filled(activations[weight > 0], y[weight > 0])
    for a, b in zip(kept.buffers(), filled(activations, y, weight).buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_disjoint_parts_merge_by_absorption(activations):
    y = (activations[:, 0] > 0.5).double()
    total, part = filled(activations[:200], y[:200]), filled(activations[200:], y[200:])
    total.absorb(part)
    for a, b in zip(filled(activations, y).buffers(), total.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert all(buffer.abs().sum() == 0 for buffer in part.buffers())


def test_class_statistics_equal_a_naive_loop(activations):
    y = (activations[:, 0] > 0.5).double()
    moments, x, right = filled(activations, y), activations.numpy(), (y > 0).numpy()
    np.testing.assert_allclose(COEFFICIENTS["mean"](moments), x[right].mean(0), rtol=1e-12)
    np.testing.assert_allclose(COEFFICIENTS["difference"](moments), x[right].mean(0) - x[~right].mean(0), rtol=1e-9)
    active = [column[right][column[right] > 0].mean() for column in x.T]
    np.testing.assert_allclose(COEFFICIENTS["active_mean"](moments), active, rtol=1e-12)
    np.testing.assert_array_equal(moments.active_wrong, (x[~right] > 0).sum(0))


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()])
def test_casts_leave_float64(cast, activations):
    moments = filled(activations, torch.ones(500))
    before = moments.x.clone()
    assert all(buffer.dtype == torch.float64 for buffer in cast(moments).buffers())
    assert torch.equal(moments.x, before)


def test_memory_does_not_grow_with_samples(activations):
    moments = filled(activations, torch.ones(500))
    assert sum(buffer.numel() for buffer in moments.buffers()) == 5 + 7 * 40


def test_null_correlation_shrinks_with_samples():
    assert [round(null_max_correlation(16384, n), 2) for n in (108, 400, 4000)] == [0.42, 0.22, 0.07]
    assert null_max_correlation(10, 0) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_samples_that_are_not_finite_are_left_out_and_counted(bad):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(20, 5, generator=generator), torch.rand(20, generator=generator).round()
    spoilt = x.clone()
    spoilt[3, 2] = spoilt[7, 0] = spoilt[9, 4] = bad
    weight = torch.ones(20)
    weight[9] = 0  # a filler, which counts nowhere
    moments, clean = Moments(5), Moments(5)
    for part in (slice(0, 8), slice(8, 20)):
        moments.update(spoilt[part], y[part], weight[part])
    kept = [i for i in range(20) if i not in (3, 7, 9)]
    clean.update(x[kept], y[kept])
    assert moments.n_left_out == 2
    clean.n_left_out += 2
    for mine, theirs in zip(moments.buffers(), clean.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert pearson(moments).abs().max() > 0
    other = Moments(5)
    other.absorb(moments)
    assert other.n_left_out == 2


def test_scores_say_which_statistics_they_need():
    x, y = torch.rand(30, 4), torch.rand(30).round()
    moments = Moments(4)
    moments.update(x, y)
    histogram = Histogram(4)
    histogram.update(x, y)
    held = {"moments": moments, "histogram": histogram}
    for score in SCORES.values():
        assert score.compute({name: held[name] for name in score.needs}).shape == (4,)
    expected = x[y > 0].double().mean(0) - x[y == 0].double().mean(0)
    torch.testing.assert_close(SCORES["mean_difference"].compute({"moments": moments}), expected)
    torch.testing.assert_close(SCORES["pearson"].compute({"moments": moments}), pearson(moments))
