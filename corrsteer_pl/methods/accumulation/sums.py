"""Running sums of all layers, exact for any number of processes."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn

from corrsteer_pl.stats import SCORES, Histogram, Moments, Sums
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


def stored_counts(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, float]:
    """Number of samples in each of the merged sums of a checkpoint, those that were left out included.

    Args:
        tensors: Buffers of the checkpoint.
        prefix: Name of the :class:`MergedSums` in the module.
    """
    start = f"{prefix}.merged."
    names = [name for name in tensors if name.startswith(start) and name.endswith(".n")]
    left_out = {name: tensors.get(f"{name}_left_out", torch.zeros(())) for name in names}
    return {
        name.removeprefix(start).removesuffix(".n"): tensors[name].sum().item() + left_out[name].item()
        for name in names
    }


class Accumulator(MergedSums):
    """:class:`Moments` per layer and pool, and a :class:`Histogram` per layer where a score needs one.

    Args:
        widths: ``d_sae`` of each layer.
        pools: Which pools of a layer are summed.
        binned: The pool of which histograms are kept; None for none.
        signed: Whether what is summed may be negative.
        settled: Scores of each layer, if they are final; then there is no histogram.
    """

    def __init__(
        self,
        widths: Mapping[int, int],
        pools: Iterable[str],
        binned: str | None = None,
        signed: bool = False,
        settled: Mapping[int, Tensor] | None = None,
    ) -> None:
        pools = list(pools)
        sums: dict[str, Sums] = {_key(layer, pool): Moments(n) for layer, n in widths.items() for pool in pools}
        self.has_histograms = binned is not None and not settled
        if self.has_histograms:
            sums |= {_key(layer, "histogram"): Histogram(n, signed) for layer, n in widths.items()}
        super().__init__(sums)
        self.widths, self.binned, self.signed = dict(widths), binned, signed
        self.pools, self.settled = pools, dict(settled or {})

    def shape(self) -> dict[str, Any]:
        """What rebuilds empty sums of the same kind."""
        return {name: getattr(self, name) for name in ("widths", "pools", "binned", "signed", "settled")}

    @classmethod
    def shaped(cls, shape: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`shape`."""
        return cls(**{**shape, "widths": {int(layer): width for layer, width in shape["widths"].items()}})

    def update(self, layer: int, pool: str, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add a batch of pooled activations ``(batch, d_sae)`` and rewards ``(batch,)``."""
        self.fresh[_key(layer, pool)].update(x, y, weight)
        if self.has_histograms and pool == self.binned:
            self.fresh[_key(layer, "histogram")].update(x, y, weight)

    def moments(self, layer: int, pool: str) -> Moments:
        """The merged sums."""
        return self.merged[_key(layer, pool)]

    def scores(self, layer: int, pool: str, score: str) -> Tensor:
        """A score ``(d_sae,)`` by the merged sums."""
        if layer in self.settled:
            return self.settled[layer]
        held = {"moments": self.moments(layer, pool)}
        if self.has_histograms:
            held["histogram"] = self.merged[_key(layer, "histogram")]
        return SCORES[score].compute({name: held[name] for name in SCORES[score].needs})

    def settle(self, score: str) -> None:
        """Keep only the scores where histograms were needed for them: no more samples will come."""
        if self.has_histograms and self.binned is not None:
            self.settled = {layer: self.scores(layer, self.binned, score) for layer in self.widths}
            self.has_histograms = False
            for layer in self.widths:
                del self.fresh[_key(layer, "histogram")], self.merged[_key(layer, "histogram")]

    def left_out(self, layer: int, pool: str) -> int:
        """How many samples the merged sums of a layer lack, because an activation was not finite."""
        return round(self.moments(layer, pool).n_left_out.item())

    def so_far(self, layer: int, pool: str) -> Moments:
        """A copy of the merged sums with this process's own since then, for display."""
        moments = deepcopy(self.moments(layer, pool))
        moments.absorb(deepcopy(self.fresh[_key(layer, pool)]))
        return moments


def _key(layer: int, kind: str) -> str:
    return f"layer{layer}_{kind}"
