"""How often pooled activations fall into bins, apart for right and wrong samples."""

import torch
from torch import Tensor

from corrsteer_pl.stats.sums import CHUNK, Sums

# Bins of a size have bounds in equal ratios: three to an octave, from 2**LOWEST to 2**HIGHEST.
LOWEST, HIGHEST, PER_OCTAVE = -8, 12, 3
BOUNDS = torch.cat(
    [torch.zeros(1), 2 ** (torch.arange(LOWEST * PER_OCTAVE, HIGHEST * PER_OCTAVE + 1).double() / PER_OCTAVE)]
).float()
SIZES = len(BOUNDS)  # bins of sizes above 0, the last of them without an upper bound


class Histogram(Sums):
    """Counts of pooled activations in logarithmic bins, with a bin for 0, by class.

    One instance serves one layer. Memory is O(n_features): ``8 * n_bins`` bytes for each, which are 504, or 8 MB for
    16,384 features, and about twice that if values may be negative. Values that round to one bin cannot be told apart:
    its bounds are 26 % apart. Instances fed disjoint samples merge by addition.

    Args:
        n_features: ``d_sae``, or ``d_model`` for raw residuals.
        signed: Whether values may be negative; then each bin of a size has a mirror image.

    Attributes:
        counts: ``(2, n_bins, n_features)`` int32, in ascending order of values: of wrong samples, then of right ones.

    Shape:
        - x: ``(batch, n_features)``, pooled activations, any float dtype.
        - y: ``(batch,)``, rewards; a sample is right where its reward is positive.
        - weight: ``(batch,)``, 1 for a sample, 0 for padding; all ones when left out.

    Example:
        >>> histogram = Histogram(n_features=1)
        >>> histogram.update(torch.tensor([[0.], [0.], [3.], [1000.]]), torch.tensor([0., 1., 1., 1.]))
        >>> histogram.counts.sum(1).tolist(), histogram.counts[:, 0].tolist()
        ([[1], [3]], [[1], [1]])
    """

    counts: Tensor

    def __init__(self, n_features: int, signed: bool = False) -> None:
        super().__init__()
        self.n_features, self.signed = n_features, signed
        self.register_buffer("counts", torch.zeros(2, self.n_bins, n_features, dtype=torch.int32))

    @property
    def n_bins(self) -> int:
        """Number of bins."""
        return 1 + SIZES * (2 if self.signed else 1)

    def bins(self, x: Tensor) -> Tensor:
        """Which bin each value falls into, int64; a value above 0 falls into the bin whose upper bound it reaches."""
        bounds = BOUNDS.to(x.device)
        if not self.signed:
            return torch.bucketize(x.float(), bounds)
        return SIZES + torch.bucketize(x.float().abs(), bounds) * x.sign().long()

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add one batch of samples. One with a value that is not finite is left out."""
        device = self.counts.device
        right = (y > 0).long().to(device).unsqueeze(1)  # (B, 1)
        weight = torch.ones_like(y) if weight is None else weight
        counted = (weight > 0).to(device) & x.sum(1).isfinite().to(device)  # (B,)
        flat = self.counts.view(2 * self.n_bins, self.n_features)
        for start in range(0, self.n_features, CHUNK):
            part = slice(start, start + CHUNK)
            some = x[:, part].to(device).nan_to_num()
            places = right * self.n_bins + self.bins(some)  # (B, chunk)
            flat[:, part].scatter_add_(0, places, counted.int().unsqueeze(1).expand(places.shape))
