"""Running means of two classes of vectors, and how far apart they are."""

import torch
from torch import Tensor

from corrsteer_pl.stats.sums import Sums


class ClassMeans(Sums):
    """Sums of vectors in two classes, at several places at once, for instance layers and positions.

    Args:
        places: Sizes of the leading dimensions.
        width: ``d_model``.

    Attributes:
        n: ``(2,)``, samples of each class.
        n_left_out: Number of samples that the other sums lack, because a value was not finite.
        x: ``(2, *places, width)``, sums of their vectors.
        xx: ``(2, *places)``, sums of their squared norms.

    Shape:
        - x: ``(batch, *places, width)``.
        - positive: ``(batch,)`` bool, the class.
        - weight: ``(batch,)``, 1 for a sample, 0 for padding.

    Example:
        >>> means = ClassMeans((1,), 2)
        >>> x = torch.tensor([[[0., 1.]], [[0., 3.]], [[4., 2.]]])
        >>> means.update(x, torch.tensor([False, False, True]), torch.ones(3))
        >>> means.difference
        tensor([[4., 0.]], dtype=torch.float64)
    """

    n: Tensor
    n_left_out: Tensor
    x: Tensor
    xx: Tensor

    def __init__(self, places: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.places, self.width = places, width
        for name, shape in {"n": (), "x": (*places, width), "xx": places}.items():
            self.register_buffer(name, torch.zeros(2, *shape, dtype=torch.float64))
        self.register_buffer("n_left_out", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor, positive: Tensor, weight: Tensor) -> None:
        """Add a batch. A sample with a value that is not finite is left out."""
        x, weight = x.to(self.x.device, torch.float64), weight.to(self.x.device, torch.float64)
        finite = x.flatten(1).sum(1).isfinite()
        x = torch.where(finite.view(-1, *[1] * (x.ndim - 1)), x, 0)
        positive = positive.to(self.x.device).double()
        classes = torch.stack([1 - positive, positive]) * weight * finite  # (2, batch)
        self.n_left_out += (weight * ~finite).sum()
        self.n += classes.sum(1)
        self.x += torch.einsum("cb,b...->c...", classes, x)
        self.xx += torch.einsum("cb,b...->c...", classes, x.square().sum(-1))

    @property
    def means(self) -> Tensor:
        """Mean vectors, ``(2, *places, width)``."""
        return self.x / self.n.clamp(min=1).view(2, *[1] * (len(self.places) + 1))

    @property
    def difference(self) -> Tensor:
        """Mean of the positive class less that of the other, ``(*places, width)``."""
        negative, positive = self.means
        return positive - negative

    @property
    def separation(self) -> Tensor:
        """Squared distance of the means, in units of the mean squared distance of samples from their class's mean.

        ``(*places)``, free of scale, so that layers can be compared.
        """
        within = (self.xx.sum(0) - (self.means.square().sum(-1) * self.n.view(2, *[1] * len(self.places))).sum(0)) / (
            self.n.sum().clamp(min=1)
        )
        return self.difference.square().sum(-1) / within.clamp(min=1e-12)
