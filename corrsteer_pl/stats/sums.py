"""What all running sums share."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

# Features at a time, so that a batch of them in float64 stays in a processor's caches and memory is read once.
CHUNK = 4096


class Sums(nn.Module):
    """Running sums as float64 buffers; instances fed disjoint samples merge by addition."""

    @torch.no_grad()
    def absorb(self, other: "Sums") -> None:
        """Add the sums of ``other``, which saw other samples, and set ``other`` to zero."""
        for mine, theirs in zip(self.buffers(), other.buffers(), strict=True):
            mine += theirs.to(mine.device)
            theirs.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `precision: bf16-true` and `.half()` cast every buffer; follow the device, keep float64.
        # Apple's MPS has no float64, so there the sums stay where they are.
        for name, buffer in self._buffers.items():
            if buffer is not None and (device := fn(buffer.float()).device).type != "mps":
                self._buffers[name] = buffer.to(device)
        return self
