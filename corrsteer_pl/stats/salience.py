"""Which features fire on some texts and not on others, from running sums over tokens."""

import torch
from torch import Tensor

from corrsteer_pl.stats.sums import CHUNK, Sums

# As the public code does: only so many times k of the first features by difference are looked at.
POOL = 10


class Salience(Sums):
    """How often and how strongly each feature fires on the tokens of target and of retain texts.

    One instance serves one layer. Memory is O(n_features), and instances fed disjoint tokens merge by addition.

    Args:
        n_features: Width of the encoder output, ``d_sae``.

    Attributes:
        tokens: ``(2,)``, tokens of retain texts, then of target texts.
        fired: ``(2, n_features)``, on how many of these each feature was active.
        total: ``(2, n_features)``, sums of its activations.

    Shape:
        - activations: ``(tokens, n_features)``.
        - target: ``(tokens,)`` bool: of a target text, or of a retain text.

    Source:
        CRISP, arXiv 2508.13650, section 3.1.

    Example:
        >>> salience = Salience(2)
        >>> salience.update(torch.tensor([[4., 1.], [2., 1.], [0., 1.]]), torch.tensor([True, True, False]))
        >>> salience.difference().tolist(), round(salience.ratio()[1].item(), 6)
        ([1.0, 0.0], 1.0)
    """

    tokens: Tensor
    fired: Tensor
    total: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.n_features = n_features
        self.register_buffer("tokens", torch.zeros(2, dtype=torch.float64))
        for name in ("fired", "total"):
            self.register_buffer(name, torch.zeros(2, n_features, dtype=torch.float64))

    @torch.no_grad()
    def update(self, activations: Tensor, target: Tensor) -> None:
        """Add tokens. One with an activation that is not finite is left out."""
        device = self.tokens.device
        finite = activations.sum(1).isfinite().to(device)
        target = target.to(device)
        classes = torch.stack([finite & ~target, finite & target]).double()  # (2, tokens)
        self.tokens += classes.sum(1)
        for start in range(0, self.n_features, CHUNK):
            part = slice(start, start + CHUNK)
            some = activations[:, part].to(device, torch.float64)
            some = torch.where(finite.unsqueeze(1), some, 0)
            self.fired[:, part] += classes @ (some > 0).double()
            self.total[:, part] += classes @ some

    def rates(self, counts: bool = False) -> tuple[Tensor, Tensor]:
        """How often each feature fires, and how strongly, ``(2, n_features)`` each: per token, or as plain counts."""
        n = torch.ones_like(self.tokens) if counts else self.tokens.clamp(min=1)
        return self.fired / n.unsqueeze(1), self.total / n.unsqueeze(1)

    def difference(self, counts: bool = False) -> Tensor:
        """How much more often a feature fires on target texts, ``(n_features,)``."""
        retain, target = self.rates(counts)[0]
        return target - retain

    def ratio(self, counts: bool = False) -> Tensor:
        """How many times as strong it is there, ``(n_features,)``; very large where it is never active elsewhere."""
        retain, target = self.rates(counts)[1]
        return target / (retain + 1e-9)

    def salient(self, k: int, least_ratio: float, counts: bool = False) -> list[int]:
        """The first ``k`` features by difference whose ratio is large enough, of the first ``10 k`` by difference."""
        difference, ratio = self.difference(counts), self.ratio(counts)
        order = difference.argsort(descending=True, stable=True)[: POOL * k].tolist()
        return [i for i in order if difference[i] > 0 and ratio[i] >= least_ratio][:k]
