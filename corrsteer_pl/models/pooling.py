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

    def update(self, activations: Tensor, counted: Tensor, samples: Tensor | None = None) -> None:
        """Pool one token of every sample, or of some.

        Shape:
            - activations: ``(rows, d_sae)``, or ``(rows, d_model)``, which may be negative.
            - counted: ``(rows,)`` bool; False leaves the sample as it is.
            - samples: ``(rows,)``, which samples they are; None for all. At first they are all.
        """
        counted = counted.unsqueeze(-1)
        # float32, because sums of bfloat16 stop growing at 256. torch.where, because inf * 0 would be NaN.
        activations = torch.where(counted, activations, self._neutral).float()
        if self._running is None:
            self._running, self._tokens = activations, counted.float()
            return
        where = slice(None) if samples is None or len(samples) == len(self._running) else samples
        self._tokens[where] += counted
        if self.kind == "mean":
            self._running[where] += activations
        else:
            self._running[where] = torch.maximum(self._running[where], activations)

    @property
    def _neutral(self) -> float:
        """What a token that is not counted has: it is no maximum, not even of negative values."""
        return 0.0 if self.kind == "mean" else -torch.inf

    @property
    def value(self) -> Tensor:
        """The pooled activations, ``(batch, d_sae)`` float32."""
        if self._running is None:
            raise RuntimeError("the pool has seen no token")
        if self.kind == "mean":
            return self._running / self._tokens.clamp(min=1)
        return torch.where(self._tokens > 0, self._running, 0)
