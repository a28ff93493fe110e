"""Scores from running sums, against scikit-learn, scipy and numpy on all samples at once."""

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score, roc_auc_score

from corrsteer_pl.stats import SCORES, Histogram, Moments
from corrsteer_pl.stats.histogram import BOUNDS
from corrsteer_pl.stats.scores import auroc, fisher, mutual_information, oriented_auroc


def samples(n=400, features=30, signed=False, seed=0):
    """Activations, of which some go along with the reward, and rewards."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=generator) < 0.4).double()
    slope = torch.linspace(-2, 2, features)
    x = torch.randn(n, features, generator=generator) + slope * y.unsqueeze(1).float()
    x = 10 * x.sign() * x.abs() ** 3
    return (x if signed else torch.relu(x)), y


def filled(cls, x, y, batch_size=64, weight=None, **options):
    sums = cls(x.shape[1], **options)
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        sums.update(x[part], y[part], None if weight is None else weight[part])
    return sums


def discretised(x, signed):
    sizes = np.searchsorted(BOUNDS.numpy(), np.abs(x.numpy()), side="left")
    return np.sign(x.numpy()).astype(int) * sizes + (len(BOUNDS) if signed else 0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("chunk", "batch_size"), [(4096, 64), (7, 13), (30, 400)])
def test_counts_equal_numpys_whatever_is_added_at_a_time(signed, chunk, batch_size, monkeypatch):
    monkeypatch.setattr("corrsteer_pl.stats.histogram.CHUNK", chunk)
    x, y = samples(signed=signed)
    x[:3, 0], x[3, 1] = torch.tensor([1e9, 1e-9, BOUNDS[5].item()]), 0
    counts = filled(Histogram, x, y, batch_size, signed=signed).counts
    bins = discretised(x, signed)
    for label in (0, 1):
        for feature in range(x.shape[1]):
            expected = np.bincount(bins[(y == label).numpy(), feature], minlength=counts.shape[1])
            np.testing.assert_array_equal(counts[label, :, feature], expected)


def test_fillers_and_samples_that_are_not_finite_are_left_out_and_parts_add_up():
    x, y = samples()
    weight = (torch.arange(len(y)) % 3 > 0).double()
    spoilt = x.clone()
    spoilt[7, 2] = torch.nan  # weight 1
    kept = (weight > 0) & (torch.arange(len(y)) != 7)
    whole = filled(Histogram, spoilt, y, weight=weight)
    assert torch.equal(whole.counts, filled(Histogram, x[kept], y[kept]).counts)
    first, second = filled(Histogram, x[:150], y[:150]), filled(Histogram, x[150:], y[150:])
    first.absorb(second)
    assert torch.equal(first.counts, filled(Histogram, x, y).counts)
    assert second.counts.sum() == 0


def test_lower_precision_of_the_trainer_leaves_counts_alone():
    histogram = filled(Histogram, *samples())
    before = histogram.counts.clone()
    assert torch.equal(histogram.half().counts, before)
    assert histogram.counts.dtype == torch.int32


@pytest.mark.parametrize("signed", [False, True])
def test_mutual_information_is_scikit_learns_with_the_correction_of_miller_and_madow(signed):
    x, y = samples(signed=signed)
    found, bins, n = mutual_information(filled(Histogram, x, y, signed=signed)), discretised(x, signed), len(y)
    for feature in range(x.shape[1]):
        column = bins[:, feature]
        joint = len(set(zip(column.tolist(), y.tolist(), strict=True)))
        bias = (len(set(column.tolist())) + 2 - joint - 1) / (2 * n)
        assert found[feature].item() == pytest.approx(max(0, mutual_info_score(column, y) + bias), abs=1e-12)


def test_the_correction_keeps_features_that_know_nothing_low():
    generator = torch.Generator().manual_seed(0)
    x, y = 1000 * torch.rand(108, 2000, generator=generator), (torch.rand(108, generator=generator) < 0.5).double()
    plain = np.mean([mutual_info_score(column, y) for column in discretised(x, False).T[:200]])
    assert mutual_information(filled(Histogram, x, y)).mean() < 0.6 * plain


@pytest.mark.parametrize("signed", [False, True])
def test_auroc_is_scikit_learns_on_the_bins_and_nearly_that_without(signed):
    x, y = samples(signed=signed)
    found, bins = auroc(filled(Histogram, x, y, signed=signed)), discretised(x, signed)
    for feature in range(x.shape[1]):
        assert found[feature].item() == pytest.approx(roc_auc_score(y, bins[:, feature]), abs=1e-12)
        # Two values of one bin, whose bounds are 26 % apart, count as a tie.
        assert found[feature].item() == pytest.approx(roc_auc_score(y, x[:, feature]), abs=0.01)


def test_auroc_of_one_class_is_undecided():
    x, _ = samples()
    assert auroc(filled(Histogram, x, torch.ones(len(x)))).tolist() == [0.5] * x.shape[1]


def test_features_that_go_with_wrong_answers_are_ranked_by_how_well_they_tell_those():
    x, y = samples()
    statistics = {"moments": filled(Moments, x, y), "histogram": filled(Histogram, x, y)}
    found = oriented_auroc(**statistics)
    assert found[0] == pytest.approx(roc_auc_score(1 - y, discretised(x, False)[:, 0]))
    assert found[-1] == pytest.approx(roc_auc_score(y, discretised(x, False)[:, -1]))
    assert torch.equal(SCORES["auroc"].compute(statistics), found)


def test_fisher_is_the_ratio_of_mean_squares_by_numpy():
    x, y = samples()
    x[:, 3] = 0  # never active: no score
    x[:, 4], x[:2, 4] = 0, 5.0  # active on two samples of 400: no score
    found, square = fisher(filled(Moments, x, y)).numpy(), x.double().numpy() ** 2
    supported = (x > 0).sum(0).numpy() >= 5
    floor = 0.01 * np.sort(square.mean(0)[supported])[(supported.sum() - 1) // 2]  # torch's median is the lower one
    right, wrong = square[y.numpy() == 1].mean(0), square[y.numpy() == 0].mean(0)
    rises = np.array([np.corrcoef(x[:, i], y)[0, 1] > 0 if x[:, i].any() else True for i in range(30)])
    expected = np.where(rises, right / (wrong + floor), wrong / (right + floor)) * supported
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found[3] == found[4] == 0


def test_fisher_of_too_few_samples_scores_nothing():
    x, y = samples(n=4)
    assert fisher(filled(Moments, x, y)).abs().max() == 0
