"""Salient features by hand, and by numpy."""

import numpy as np
import pytest
import torch

from corrsteer_pl.stats import Salience


def tokens(n=300, features=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(n, generator=generator) < 0.3
    x = torch.relu(torch.randn(n, features, generator=generator) - 0.5)
    x[:, 0] += 3 * target  # salient
    x[:, 1] += 2.0  # fires everywhere
    x[:, 2] += 3 * ~target  # the other way round
    return x, target


def filled(x, target, size=64, chunk=None):
    salience = Salience(x.shape[1])
    for start in range(0, len(x), size):
        salience.update(x[start : start + size], target[start : start + size])
    return salience


@pytest.mark.parametrize(("chunk", "size"), [(4096, 300), (5, 7)])
def test_differences_and_ratios_equal_numpy(chunk, size, monkeypatch):
    monkeypatch.setattr("corrsteer_pl.stats.salience.CHUNK", chunk)
    x, target = tokens()
    found, a, t = filled(x, target, size), x.numpy().astype(float), target.numpy()
    np.testing.assert_allclose(found.difference(), (a[t] > 0).mean(0) - (a[~t] > 0).mean(0), atol=1e-12)
    np.testing.assert_allclose(found.ratio(), a[t].mean(0) / (a[~t].mean(0) + 1e-9), rtol=1e-9)
    # As the paper has it: plain counts and sums, whatever the numbers of tokens.
    np.testing.assert_allclose(found.difference(counts=True), (a[t] > 0).sum(0) - (a[~t] > 0).sum(0), atol=1e-9)
    np.testing.assert_allclose(found.ratio(counts=True), a[t].sum(0) / (a[~t].sum(0) + 1e-9), rtol=1e-9)


def test_rates_do_not_depend_on_how_many_texts_of_each_kind_there_are():
    x, target = tokens()
    more = torch.cat([x, x[~target], x[~target]]), torch.cat([target, target[~target], target[~target]])
    one, other = filled(x, target), filled(*more)
    torch.testing.assert_close(one.difference(), other.difference())
    torch.testing.assert_close(one.ratio(), other.ratio())
    assert not torch.allclose(one.difference(counts=True), other.difference(counts=True))


def test_the_first_by_difference_with_a_large_enough_ratio_are_salient():
    # Four features on two target and two retain tokens, by hand.
    target = torch.tensor([True, True, False, False])
    x = torch.tensor([[1.0, 6.0, 0.0, 4.0], [1.0, 0.0, 0.0, 4.0], [0.0, 0.0, 5.0, 2.0], [0.9, 0.0, 5.0, 0.0]])
    salience = filled(x, target)
    assert salience.difference().tolist() == [0.5, 0.5, -1.0, 0.5]
    assert [round(r, 3) for r in salience.ratio()[[0, 3]].tolist()] == [2.222, 4.0]
    assert salience.salient(k=5, least_ratio=3.0) == [1, 3]
    assert salience.salient(k=1, least_ratio=3.0) == [1]
    assert salience.salient(k=5, least_ratio=2.0) == [0, 1, 3]
    assert salience.salient(k=5, least_ratio=1e12) == []


def test_parts_add_up_and_what_is_not_finite_is_left_out():
    x, target = tokens()
    first, second = filled(x[:100], target[:100]), filled(x[100:], target[100:])
    first.absorb(second)
    torch.testing.assert_close(first.total, filled(x, target).total)
    spoilt = x.clone()
    spoilt[5, 3] = torch.inf
    kept = torch.arange(len(x)) != 5
    torch.testing.assert_close(filled(spoilt, target).fired, filled(x[kept], target[kept]).fired)
