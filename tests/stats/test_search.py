"""What a search finds by chance, against scipy and against naive loops."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats

from corrsteer_pl.stats import PARTS, SearchSums, halves, null_maxima, search_p_value


def sparse(n, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randn(n, features, generator=generator) - 1)


def summed(x, y, permutations, batch_size=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    permuted = torch.stack([y[torch.randperm(len(y), generator=generator)] for _ in range(permutations)])
    part = torch.arange(len(y)) % PARTS
    sums = SearchSums(x.shape[1], permutations)
    for start in range(0, len(y), batch_size):
        some = slice(start, start + batch_size)
        sums.update(x[some].to_sparse(), y[some], permuted[:, some], part[some])
    return sums, permuted, part


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_maxima_and_halves_equal_scipy(monkeypatch, share):
    monkeypatch.setattr("corrsteer_pl.stats.search.SPARSE", share)
    x, y = sparse(240, 30), torch.rand(240, generator=torch.Generator().manual_seed(1))
    sums, permuted, part = summed(x, y, permutations=5)
    expected = [max(abs(stats.pearsonr(column, wrong).statistic) for column in x.T) for wrong in permuted]
    np.testing.assert_allclose(null_maxima(sums), expected, atol=1e-6)
    pairs = list(halves(sums))
    assert len(pairs) == 10
    ways = [some for some in combinations(range(PARTS), PARTS // 2) if 0 in some]
    for way, (first, second) in zip(ways, pairs, strict=True):
        inside = np.isin(part.numpy(), way)
        for found, rows in ((first, inside), (second, ~inside)):
            naive = [stats.pearsonr(column[rows], y.numpy()[rows]).statistic for column in x.T.numpy()]
            np.testing.assert_allclose(found, naive, atol=1e-6)


def test_sums_merge_in_any_order_and_leave_out_what_is_not_finite():
    x, y = sparse(120, 8), (torch.rand(120, generator=torch.Generator().manual_seed(2)) < 0.4).float()
    whole, permuted, part = summed(x, y, permutations=3)
    x = torch.cat([x, torch.full((1, 8), torch.nan)])
    y, permuted, part = (
        torch.cat([y, torch.ones(1)]),
        torch.cat([permuted, torch.ones(3, 1)], 1),
        torch.cat([part, part[:1]]),
    )
    first, second = SearchSums(8, 3), SearchSums(8, 3)
    for sums, rows in ((first, torch.arange(0, 121, 2)), (second, torch.arange(1, 121, 2))):
        sums.update(x[rows], y[rows], permuted[:, rows], part[rows])
    second.absorb(first)
    for name, buffer in second.named_buffers():
        torch.testing.assert_close(buffer, getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert first.n.sum() == 0


def largest(x, y, permutations, seed):
    sums, _, _ = summed(x, y, permutations, batch_size=len(y), seed=seed)
    rows = sums.permutations + torch.arange(PARTS)
    true = SearchSums(x.shape[1], 1)
    true.update(x, y, y.unsqueeze(0), torch.arange(len(y)) % PARTS)
    assert torch.equal(sums.y[rows].sum(), true.y[0])
    return search_p_value(null_maxima(true).item(), null_maxima(sums).tolist())


def test_the_p_value_of_the_best_feature_is_uniform_where_nothing_is_to_be_found():
    found = []
    for seed in range(300):
        x = sparse(80, 60, seed)
        y = (torch.rand(80, generator=torch.Generator().manual_seed(1000 + seed)) < 0.15).float()
        found.append(largest(x, y, 19, seed))
    # 20 values are possible. Their share at or below each level is that level, within three standard errors.
    for level in (0.05, 0.25, 0.5, 0.75):
        share = np.mean([p <= level + 1e-9 for p in found])
        assert share == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) / 300)), level


def test_a_planted_feature_is_told_from_chance():
    x, y = sparse(200, 400), (torch.rand(200, generator=torch.Generator().manual_seed(5)) < 0.3).float()
    x[:, 17] = torch.relu(x[:, 17] + 1.5 * y)
    assert largest(x, y, 32, seed=0) == pytest.approx(1 / 33)


def test_a_p_value_without_permutations_is_none_and_ties_count_against_it():
    assert search_p_value(0.3, []) is None
    assert search_p_value(0.3, [0.3, 0.1]) == pytest.approx(2 / 3)
    assert search_p_value(0.3, [0.3 - 1e-12, 0.1]) == pytest.approx(2 / 3)
