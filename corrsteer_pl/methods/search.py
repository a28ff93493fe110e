"""What a search over all features finds by chance, and whether it finds the same in half of the samples."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from corrsteer_pl.methods.accumulate import MergedSums
from corrsteer_pl.methods.blocks import Block
from corrsteer_pl.selection import Feature, rank
from corrsteer_pl.stats import PARTS, SearchSums, halves, null_maxima, search_p_value
from corrsteer_pl.strategy import all_reduce_sum


@dataclass(frozen=True)
class Evidence:
    """How far the correlations of a fit can be believed.

    Attributes:
        null_maxima: The largest |r| of all features of all layers under each permutation of the rewards.
        overlap: By layer, the mean share of the ``topk`` features that two halves of the samples have in common.
        stability: By layer and index, the share of the halves in which a candidate is one again.
    """

    null_maxima: tuple[float, ...] = ()
    overlap: dict[str, float] = field(default_factory=dict)
    stability: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Inverse of ``vars``."""
        lists = {"null_maxima": tuple(plain["null_maxima"])}
        return cls(**{**plain, **lists})

    def on(self, feature: Feature) -> Feature:
        """The feature with what is known of it."""
        p_value = search_p_value(feature.correlation, self.null_maxima)
        return replace(feature, search_p_value=p_value, stability=self.stability.get(feature.name))


class Search(MergedSums):
    """:class:`SearchSums` of every layer, from the blocks of a fit.

    Args:
        widths: ``d_sae`` of each layer.
        permutations: How often the rewards are permuted.
    """

    def __init__(self, widths: Mapping[int, int], permutations: int) -> None:
        super().__init__({f"layer{layer}": SearchSums(d_sae, permutations) for layer, d_sae in widths.items()})
        self.layers, self.permutations = list(widths), permutations

    def add(self, block: Block, pool: str) -> None:
        """Add the samples of a block."""
        for layer in self.layers:
            _update(self.fresh[f"layer{layer}"], block, layer, pool)

    def judge(self, unfinished: Sequence[Block], candidates: Sequence[Feature], options: Mapping[str, Any]) -> Evidence:
        """Judge the correlations of all samples so far, those of an unfinished block included.

        Every process must call it.

        Args:
            unfinished: The block that has not been added, if there is one.
            candidates: The candidates, ranked by correlation.
            options: ``pool, topk, topm`` of :class:`~corrsteer_pl.CorrSteer`.
        """
        maxima: list[Tensor] = []
        overlap: dict[str, float] = {}
        stability: dict[str, float] = {}
        for layer in self.layers:
            sums = self._with(unfinished, layer, options["pool"])
            maxima.append(null_maxima(sums))
            mine = [f for f in candidates if f.layer == layer]
            overlap[str(layer)], shares = stability_of(sums, mine, options["topk"], options["topm"])
            stability |= {f.name: share for f, share in zip(mine, shares, strict=True)}
        # A permutation is the same in all layers, so that it has one largest |r|.
        largest = torch.stack(maxima).max(0).values if maxima else torch.zeros(0)
        return Evidence(tuple(largest.tolist()), overlap, stability)

    def _with(self, blocks: Iterable[Block], layer: int, pool: str) -> SearchSums:
        merged = self.merged[f"layer{layer}"]
        more = deepcopy(self.fresh[f"layer{layer}"])
        for block in blocks:
            _update(more, block, layer, pool)
        for buffer in more.buffers():
            all_reduce_sum(buffer)
        more.absorb(deepcopy(merged))
        return more


def stability_of(sums: SearchSums, candidates: Collection[Feature], topk: int, topm: int) -> tuple[float, list[float]]:
    """Mean share of the ``topk`` features common to two halves, and in which share of the halves each is a candidate.

    Args:
        sums: Sums of a layer.
        candidates: Its candidates, which were ranked by correlation.
        topk: How many features of each sign are compared.
        topm: How many of each sign are candidates.
    """
    common, again = [], [0] * len(candidates)
    for pair in halves(sums):
        ranked = [rank(r, r, topk) for r in pair]
        first, second = ({*positive, *negative} for positive, negative in ranked)
        common.append(len(first & second) / max(1, len(first), len(second)))
        for i, f in enumerate(candidates):
            again[i] += sum(f.index in (best if f.sign == "positive" else worst)[:topm] for best, worst in ranked)
    return sum(common) / len(common), [count / (2 * len(common)) for count in again]


def _update(sums: SearchSums, block: Block, layer: int, pool: str) -> None:
    if block.rows:
        # Rows are in random order, so that a part of every so many is a random one.
        part = torch.tensor(block.rows) % PARTS
        sums.update(block.activations((layer, pool)), block.y, block.permuted, part)
