"""Running sums of all layers, exact for any number of processes."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn

from corrsteer_pl.stats import Moments
from corrsteer_pl.strategy import all_reduce_sum


class Accumulator(nn.Module):
    """:class:`Moments` per layer and pool: sums merged over all processes, and this process's own since the last merge.

    Only the merged sums are in the state dict, so that a checkpoint counts every sample once, whatever the
    number of processes that write or read it.

    Args:
        widths: ``d_sae`` of each layer.
        pools: Which pools of a layer are summed.
    """

    def __init__(self, widths: Mapping[int, int], pools: Iterable[str]) -> None:
        super().__init__()
        self.widths = dict(widths)
        keys = {self._key(layer, pool): d_sae for layer, d_sae in widths.items() for pool in pools}
        self.merged: Any = nn.ModuleDict({key: Moments(d_sae) for key, d_sae in keys.items()})
        # In a plain dict, so that it is not part of the state dict.
        self.fresh = {key: Moments(d_sae) for key, d_sae in keys.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for moments in self.fresh.values():
            moments._apply(fn)
        return super()._apply(fn, recurse)

    @staticmethod
    def _key(layer: int, pool: str) -> str:
        return f"layer{layer}_{pool}"

    @property
    def size(self) -> int:
        """Bytes of all sums."""
        held = [*self.merged.values(), *self.fresh.values()]
        return sum(buffer.nbytes for moments in held for buffer in moments.buffers())

    def update(self, layer: int, pool: str, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add a batch of pooled activations ``(batch, d_sae)`` and rewards ``(batch,)``."""
        self.fresh[self._key(layer, pool)].update(x, y, weight)

    @torch.no_grad()
    def merge(self) -> None:
        """Add what all processes have seen since the last merge. Every process must call it."""
        for key, fresh in self.fresh.items():
            for buffer in fresh.buffers():
                all_reduce_sum(buffer)
            self.merged[key].absorb(fresh)

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
