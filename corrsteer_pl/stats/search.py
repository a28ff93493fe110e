"""How large a correlation a search finds by chance, and how often it would find the same in half of the samples."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from corrsteer_pl.stats.scores import correlation
from corrsteer_pl.stats.sums import Sums

# Samples are dealt to so many parts; each half of the parts is a half of the samples, in 20 ways.
PARTS = 6
# Share of values that are not 0 up to which a sparse product is the faster one.
SPARSE = 0.03


class SearchSums(Sums):
    """Sums for correlations with permuted rewards, and for correlations in parts of the samples.

    One instance serves one layer. Memory is O(``n_features``): ``permutations + 3 * PARTS`` float64 numbers for each.

    Args:
        n_features: Width of the encoder output, ``d_sae``.
        permutations: How many times the rewards are permuted.

    Attributes:
        n: ``(PARTS,)``, samples of each part.
        y, yy: ``(permutations + PARTS,)``, sums of the permuted rewards and of their squares, then of the true rewards
            of each part.
        x, xx: ``(PARTS, n_features)``, sums of activations and of their squares.
        xy: ``(permutations + PARTS, n_features)``, sums of activations times the rewards that ``y`` sums.

    Shape:
        - x: ``(batch, n_features)``, pooled activations, any float dtype, sparse or dense.
        - y: ``(batch,)``, rewards in [0, 1].
        - permuted: ``(permutations, batch)``, the rewards that the samples have in each permutation.
        - part: ``(batch,)`` int64, the part to which each sample belongs, from 0.

    Example:
        >>> sums = SearchSums(n_features=1, permutations=1)
        >>> x, y = torch.tensor([[1.], [2.], [3.]]), torch.tensor([0., 0., 1.])
        >>> sums.update(x, y, permuted=torch.tensor([[1., 0., 0.]]), part=torch.tensor([0, 1, 2]))
        >>> null_maxima(sums)
        tensor([0.8660], dtype=torch.float64)
    """

    n: Tensor
    y: Tensor
    yy: Tensor
    x: Tensor
    xx: Tensor
    xy: Tensor

    def __init__(self, n_features: int, permutations: int) -> None:
        super().__init__()
        self.n_features, self.permutations = n_features, permutations
        rows = permutations + PARTS
        shapes = {"n": (PARTS,), "y": (rows,), "yy": (rows,), "x": (PARTS, n_features), "xx": (PARTS, n_features)}
        for name, shape in (shapes | {"xy": (rows, n_features)}).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, permuted: Tensor, part: Tensor) -> None:
        """Add samples to the sums. Those with an activation that is not finite are left out."""
        device = self.n.device
        fine = torch.sparse.sum(x, 1).to_dense().isfinite() if x.is_sparse else x.sum(1).isfinite()
        if not fine.all():
            x, y, permuted, part = x.index_select(0, fine.nonzero()[:, 0]), y[fine], permuted[:, fine], part[fine]
        belongs = one_hot(part, PARTS).T.to(device, torch.float64)  # (PARTS, B)
        rewards = torch.cat([permuted.to(device, torch.float64), belongs * y.to(device, torch.float64)])
        self.n += belongs.sum(1)
        self.y += rewards.sum(1)
        self.yy += rewards.square().sum(1)
        if not x.is_sparse or x._nnz() > SPARSE * x.numel():
            x = x.to_dense().to(device, torch.float64)
            squares = x.square()
        else:
            x = x.to(device, torch.float64).coalesce()
            squares = torch.sparse_coo_tensor(
                x.indices(), x.values().square(), x.shape, is_coalesced=True, check_invariants=False
            )
        self.x += _product(belongs, x)
        self.xx += _product(belongs, squares)
        self.xy += _product(rewards, x)


def _product(weights: Tensor, x: Tensor) -> Tensor:
    """``weights @ x``, ``(rows, batch)`` by ``(batch, n_features)``."""
    return torch.sparse.mm(x.t(), weights.T).T if x.is_sparse else weights @ x


def null_maxima(sums: SearchSums) -> Tensor:
    """The largest |r| of a layer under each permutation of the rewards, ``(permutations,)`` float64 on the CPU."""
    n, x, xx = sums.n.sum(), sums.x.sum(0), sums.xx.sum(0)
    maxima = torch.zeros(sums.permutations, dtype=torch.float64)
    for k in range(sums.permutations):  # one at a time, as all together would be many times the size of the sums
        maxima[k] = correlation(n, x, xx, sums.y[k], sums.yy[k], sums.xy[k]).abs().max()
    return maxima


def search_p_value(r: float, maxima: Sequence[float]) -> float | None:
    """How often chance finds a correlation as large as ``r`` somewhere, given the largest |r| under permutations.

    The p-value of a max-statistic permutation test: it holds for all features of all layers that were searched at once.
    None without a permutation.

    Source:
        Westfall and Young 1993, Resampling-Based Multiple Testing; the +1 after Phipson and Smyth 2010.

    Example:
        >>> search_p_value(-0.5, maxima=[0.2, 0.6, 0.3])
        0.5
    """
    # Permutations that give the samples their own rewards give the same r but for rounding.
    reached = sum(largest >= abs(r) - 1e-9 for largest in maxima)
    return (1 + reached) / (len(maxima) + 1) if maxima else None


def halves(sums: SearchSums) -> Iterator[tuple[Tensor, Tensor]]:
    """Correlations ``(n_features,)`` in two halves of the samples, for each way to divide the parts in two."""
    for chosen in combinations(range(PARTS), PARTS // 2):
        if 0 in chosen:  # the others are the same pairs the other way round
            rest = [part for part in range(PARTS) if part not in chosen]
            yield _correlation_in(sums, chosen), _correlation_in(sums, rest)


def _correlation_in(sums: SearchSums, parts: Sequence[int]) -> Tensor:
    of = list(parts)
    rows = [sums.permutations + part for part in of]
    x, xx, xy = sums.x[of].sum(0), sums.xx[of].sum(0), sums.xy[rows].sum(0)
    return correlation(sums.n[of].sum(), x, xx, sums.y[rows].sum(), sums.yy[rows].sum(), xy)
