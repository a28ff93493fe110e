"""The samples of a fit on which each feature was strongest."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.selection import Feature
from corrsteer_pl.strategy import gather_lists

# How many are kept for each feature.
KEPT = 4


class Strongest:
    """Activation and position in the split of the samples that activate each feature most, in constant memory.

    Exact whatever the batches and processes are: equal activations are in the order of the split.

    Args:
        widths: ``d_sae`` of each layer.
    """

    def __init__(self, widths: Mapping[int, int]) -> None:
        # (KEPT, d_sae) of each layer, the strongest first; where there is none, an activation of 0 in row -1.
        self.values = {layer: torch.zeros(KEPT, d_sae) for layer, d_sae in widths.items()}
        self.rows = {layer: torch.full((KEPT, d_sae), -1, dtype=torch.int32) for layer, d_sae in widths.items()}

    @property
    def size(self) -> int:
        """Bytes of all that."""
        return sum(kept.nbytes for some in (self.values, self.rows) for kept in some.values())

    def add(self, layer: int, x: Tensor, rows: Sequence[int], weight: Tensor) -> None:
        """Take in pooled activations ``(batch, d_sae)`` of the samples at some positions of the split."""
        values = self.values[layer] = self.values[layer].to(x.device)
        places = self.rows[layer] = self.rows[layer].to(x.device)
        real = weight.to(x.device).bool() & x.sum(1).isfinite()
        x, taken = x[real].float(), torch.tensor(rows, dtype=torch.int32, device=x.device)[real]
        if not len(x):
            return
        # Soon most features have seen stronger samples than any of a batch.
        most = x.amax(0)
        new = ((most > 0) & (most >= values[-1])).nonzero()[:, 0]
        both = torch.cat([values[:, new], x[:, new]])
        where = torch.cat([places[:, new], taken.unsqueeze(1).expand(-1, len(new))])
        values[:, new], places[:, new] = _strongest(both, where)

    def of(self, features: Sequence[Feature]) -> list[list[tuple[float, int]]]:
        """Activation and position of each feature's strongest samples. Every process must call it."""
        mine = [(self.values[f.layer][:, f.index].tolist(), self.rows[f.layer][:, f.index].tolist()) for f in features]
        found = []
        for i in range(len(features)):
            values, rows = zip(*(some[i] for some in gather_lists([mine])), strict=True)
            both = torch.tensor(values).reshape(-1, 1), torch.tensor(rows, dtype=torch.int32).reshape(-1, 1)
            best, where = _strongest(*both)
            pairs = zip(best[:, 0].tolist(), where[:, 0].tolist(), strict=True)
            found.append([(value, row) for value, row in pairs if value > 0])
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores: the strongest of all processes. Every process must call it."""
        mine = {layer: (self.values[layer].cpu(), self.rows[layer].cpu()) for layer in self.values}
        everyone = gather_lists([mine])
        merged = {
            layer: _strongest(*(torch.cat(parts) for parts in zip(*(some[layer] for some in everyone), strict=True)))
            for layer in self.values
        }
        return {
            "values": {layer: values for layer, (values, _) in merged.items()},
            "rows": {layer: rows for layer, (_, rows) in merged.items()},
        }

    def restore(self, state: Mapping[str, Any], rank: int) -> None:
        """Go on from a checkpoint, on the first process."""
        if rank == 0:
            self.values, self.rows = dict(state["values"]), dict(state["rows"])


def _strongest(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The first ``KEPT`` of activations ``(n, features)`` by size, then by position."""
    rows = torch.where(values > 0, rows, -1)
    rows, order = rows.sort(dim=0, stable=True)
    values, by_size = values.gather(0, order).sort(dim=0, descending=True, stable=True)
    return values[:KEPT], rows.gather(0, by_size)[:KEPT]
