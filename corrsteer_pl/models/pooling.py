"""Pooling of activations over the decoding steps of a sample, in constant memory."""

import torch
from torch import Tensor

POOLS = ("max", "mean", "all")


class Pool:
    """A running maximum or mean over the tokens of each sample in a batch.

    Args:
        kind: ``max`` or ``mean`` over the generated tokens, or ``all``: the maximum over prompt and
            generated tokens. A sample without a counted token has the value 0.

    Example:
        >>> pool = Pool("mean")
        >>> pool.update(torch.tensor([[2.], [6.]]), torch.tensor([True, True]))
        >>> pool.update(torch.tensor([[4.], [9.]]), torch.tensor([True, False]))
        >>> pool.value.tolist()
        [[3.0], [6.0]]
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._running: Tensor | None = None
        self._tokens = torch.zeros(())

    def update(self, activations: Tensor, counted: Tensor) -> None:
        """Take in one token of every sample.

        Shape:
            - activations: ``(batch, d_sae)``, not negative.
            - counted: ``(batch,)`` bool; False leaves the sample as it is.
        """
        activations = activations * counted.unsqueeze(-1)
        if self._running is None:
            self._running = torch.zeros_like(activations)
            self._tokens = torch.zeros_like(activations[:, :1])
        if self.kind == "mean":
            self._running += activations
            self._tokens += counted.unsqueeze(-1)
        else:
            torch.maximum(self._running, activations, out=self._running)

    @property
    def value(self) -> Tensor:
        """The pooled activations, ``(batch, d_sae)``."""
        if self._running is None:
            raise RuntimeError("the pool has seen no token")
        return self._running / self._tokens.clamp(min=1) if self.kind == "mean" else self._running
