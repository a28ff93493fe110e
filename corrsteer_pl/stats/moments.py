"""Running sums of pooled activations and rewards."""

import torch
from torch import Tensor

from corrsteer_pl.stats.sums import CHUNK, Sums

SCALARS = ("n", "y", "yy", "n_right", "n_left_out")
VECTORS = ("x", "xx", "xy", "xxy", "x_right", "active_right", "active_wrong")


class Moments(Sums):
    """Sums from which every moment-based selection score is computed.

    One instance serves one layer. Memory is O(n_features) however many samples are seen, and
    instances fed disjoint samples merge by addition. A sample is *right* where its reward is
    positive, and a feature is *active* on it where its pooled activation is not 0.

    Args:
        n_features: Width of the encoder output, ``d_sae``, or ``d_model`` for raw residuals.

    Attributes:
        n, y, yy, n_right: Scalars: the sum of weights, of rewards, of squared rewards, and the weight of
            the right samples.
        n_left_out: Weight of the samples that none of the other sums has, because an activation was not finite.
        x, xx, xy, xxy, x_right, active_right, active_wrong: ``(n_features,)``: sums of the products that
            the names spell, x over the right samples, and how many right and wrong samples are active.

    Shape:
        - x: ``(batch, n_features)``, pooled activations, any float dtype.
        - y: ``(batch,)``, rewards in [0, 1].
        - weight: ``(batch,)``, 1 for a sample, 0 for padding; all ones when left out.

    Example:
        >>> moments = Moments(n_features=2)
        >>> moments.update(torch.tensor([[1., 5.], [2., 5.], [3., 5.]]), torch.tensor([0., 0., 1.]))
        >>> moments.n.item(), moments.xy.tolist()
        (3.0, [3.0, 5.0])
    """

    n: Tensor
    y: Tensor
    yy: Tensor
    n_right: Tensor
    n_left_out: Tensor
    x: Tensor
    xx: Tensor
    xy: Tensor
    xxy: Tensor
    x_right: Tensor
    active_right: Tensor
    active_wrong: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.n_features = n_features
        for name in SCALARS:
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        for name in VECTORS:
            self.register_buffer(name, torch.zeros(n_features, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add one batch of samples to the sums."""
        device = self.n.device
        y = y.to(device, torch.float64)  # (B,)
        w = torch.ones_like(y) if weight is None else weight.to(device, torch.float64)
        # A row's sum is not finite if any of its values is not. There is no `if`, which would force a GPU sync.
        spoilt = ~x.sum(1).isfinite().to(device)  # (B,)
        left_out, w = (w * spoilt).sum(), w * ~spoilt
        right = w * (y > 0)
        for name, total in zip(SCALARS, (w.sum(), w @ y, w @ (y * y), right.sum(), left_out), strict=True):
            getattr(self, name).add_(total)
        weights = torch.stack([w, w * y, right, w - right])  # (4, B)
        for start in range(0, self.n_features, CHUNK):
            part = slice(start, start + CHUNK)
            # A weight of 0 is not enough: 0 * NaN is NaN.
            some = x[:, part].to(device, torch.float64, copy=True).masked_fill_(spoilt.unsqueeze(1), 0)  # (B, chunk)
            sums, squares = weights[:3] @ some, weights[:2] @ some.square()
            active = weights[2:] @ (some != 0).double()
            vectors = (sums[0], squares[0], sums[1], squares[1], sums[2], *active)
            for name, total in zip(VECTORS, vectors, strict=True):
                getattr(self, name)[part] += total
