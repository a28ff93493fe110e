"""Running sums of all layers, exact for any number of processes."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn

from corrsteer_pl.stats import Moments, Sums
from corrsteer_pl.strategy import all_reduce_sum


class MergedSums(nn.Module):
    """Sums by name: those merged over all processes, and this process's own since the last merge.

    Only the merged sums are in the state dict, so that a checkpoint counts every sample once, whatever the
    number of processes that write or read it.

    Args:
        sums: Empty sums.
    """

    def __init__(self, sums: Mapping[str, Sums]) -> None:
        super().__init__()
        self.merged: Any = nn.ModuleDict(sums)
        # In a plain dict, so that it is not part of the state dict.
        self.fresh: dict[str, Any] = deepcopy(dict(sums))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for sums in self.fresh.values():
            sums._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def size(self) -> int:
        """Bytes of all sums."""
        held = [*self.merged.values(), *self.fresh.values()]
        return sum(buffer.nbytes for sums in held for buffer in sums.buffers())

    @torch.no_grad()
    def merge(self) -> None:
        """Add what all processes have seen since the last merge. Every process must call it."""
        for key, fresh in self.fresh.items():
            for buffer in fresh.buffers():
                all_reduce_sum(buffer)
            self.merged[key].absorb(fresh)


class Accumulator(MergedSums):
    """:class:`Moments` per layer and pool.

    Args:
        widths: ``d_sae`` of each layer.
        pools: Which pools of a layer are summed.
    """

    def __init__(self, widths: Mapping[int, int], pools: Iterable[str]) -> None:
        pools = list(pools)
        super().__init__({self._key(layer, pool): Moments(n) for layer, n in widths.items() for pool in pools})
        self.widths = dict(widths)

    @staticmethod
    def _key(layer: int, pool: str) -> str:
        return f"layer{layer}_{pool}"

    def update(self, layer: int, pool: str, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add a batch of pooled activations ``(batch, d_sae)`` and rewards ``(batch,)``."""
        self.fresh[self._key(layer, pool)].update(x, y, weight)

    def moments(self, layer: int, pool: str) -> Moments:
        """The merged sums."""
        return self.merged[self._key(layer, pool)]

    def left_out(self, layer: int, pool: str) -> int:
        """How many samples the merged sums of a layer lack, because an activation was not finite."""
        return round(self.moments(layer, pool).n_left_out.item())

    def so_far(self, layer: int, pool: str) -> Moments:
        """A copy of the merged sums with this process's own since then, for display."""
        key = self._key(layer, pool)
        moments = deepcopy(self.merged[key])
        moments.absorb(deepcopy(self.fresh[key]))
        return moments
