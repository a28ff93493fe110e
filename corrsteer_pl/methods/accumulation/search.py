"""What a search over all features finds by chance, and whether it finds the same in half of the samples."""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from corrsteer_pl.data import Batch
from corrsteer_pl.methods.accumulation.blocks import Block, Blocks, Key, SparseRows
from corrsteer_pl.methods.accumulation.strongest import Strongest
from corrsteer_pl.methods.accumulation.sums import MergedSums
from corrsteer_pl.selection import Feature, rank
from corrsteer_pl.stats import PARTS, SearchSums, halves, null_maxima, search_p_value
from corrsteer_pl.strategy import all_reduce_sum, this_process


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
        p_value = search_p_value(feature.correlation or 0.0, self.null_maxima)
        return replace(feature, search_p_value=p_value, stability=self.stability.get(feature.name))


class Search(nn.Module):
    """What a fit notes of its search over features, beside the sums that it searches in.

    Sums with permuted rewards and of parts of the samples, and the samples on which each feature was strongest.

    Args:
        widths: ``d_sae`` of each layer.
        pool: Which pool of the activations is searched.
        permutations: How often the rewards are permuted.
        seed: Seed of the permutations.
        deal: Whether samples are dealt the rewards of others.

    Attributes:
        blocks: The samples that wait for the rewards of their neighbours.
        strongest: The samples on which each feature was strongest.
        evidence: How far what was found can be believed.
    """

    def __init__(
        self, widths: Mapping[int, int], pool: str = "max", permutations: int = 0, seed: int = 0, deal: bool = False
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"pool": pool, "permutations": permutations, "seed": seed, "deal": deal}
        self.pool, self.deal = pool, deal
        self.blocks, self.strongest = Blocks(permutations, seed, deal), Strongest(widths)
        self.evidence = Evidence()
        self.sums = MergedSums({_key(layer): SearchSums(d_sae, permutations) for layer, d_sae in widths.items()})

    @property
    def size(self) -> int:
        """Bytes of all sums, and of what is kept of the strongest samples."""
        return self.sums.size + self.strongest.size

    @property
    def is_over(self) -> bool:
        """Whether all samples have been seen and judged, so that the sums are gone."""
        return not self.sums.fresh

    @property
    def layers(self) -> list[int]:
        """The layers that are searched."""
        return list(self.strongest.values)

    def add(self, batch: Batch, pools: Mapping[Key, Tensor], rewards: Tensor) -> list[Block]:
        """Take in a batch with its pooled activations ``(batch, d_sae)`` and rewards ``(batch,)``.

        Every process must call it.

        Returns:
            The blocks of which all samples have been seen now.
        """
        if self.is_over:
            return []
        for layer in self.layers:
            self.strongest.add(layer, pools[layer, self.pool], batch.rows, batch.weight)
        # Only who is dealt other rewards needs the other pools again.
        self.blocks.add(batch, {key: x for key, x in pools.items() if self.deal or key[1] == self.pool}, rewards)
        return self._added(self.blocks.finished(batch.counted))

    def cut(self, counted: int) -> list[Block]:
        """The last block as far as it has been seen, after which another begins. Every process must call it."""
        return [] if self.is_over else self._added(self.blocks.cut(counted))

    def _added(self, blocks: list[Block]) -> list[Block]:
        for block in blocks:
            for layer in self.layers:
                _update(self.sums.fresh[_key(layer)], block, layer, self.pool)
        return blocks

    def judge(self, counted: int, candidates: Sequence[Feature], topk: int, topm: int, is_last: bool) -> None:
        """Judge the correlations of all samples so far. Every process must call it.

        Args:
            counted: How many samples have been seen.
            candidates: The candidates, ranked by correlation.
            topk: How many features of each sign are compared between halves.
            topm: How many of each sign are candidates.
            is_last: Whether there are no more; then the sums are given up, as nothing more will be asked of them.
        """
        if self.is_over:
            return
        maxima: list[Tensor] = []
        overlap: dict[str, float] = {}
        stability: dict[str, float] = {}
        unfinished = self.blocks.unfinished(counted)
        for layer in self.layers:
            sums = self._whole(unfinished, layer)
            maxima.append(null_maxima(sums))
            mine = [f for f in candidates if f.layer == layer]
            overlap[str(layer)], shares = stability_of(sums, mine, topk, topm)
            stability |= {f.name: share for f, share in zip(mine, shares, strict=True)}
        # A permutation is the same in all layers, so that it has one largest |r|.
        self.evidence = Evidence(tuple(torch.stack(maxima).amax(0).tolist()), overlap, stability)
        if is_last:
            self.sums = MergedSums({})

    def _whole(self, unfinished: Sequence[Block], layer: int) -> SearchSums:
        """The sums of all processes, with a block that has not been added."""
        whole = deepcopy(self.sums.fresh[_key(layer)])
        for block in unfinished:
            _update(whole, block, layer, self.pool)
        for buffer in whole.buffers():
            all_reduce_sum(buffer)
        whole.absorb(deepcopy(self.sums.merged[_key(layer)]))
        return whole

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores beside the sums, which are buffers. Every process must call it."""
        self.sums.merge()
        left = None if self.is_over else {"blocks": self.blocks.state(), "strongest": self.strongest.state()}
        widths = {} if self.is_over else {layer: kept.shape[1] for layer, kept in self.strongest.values.items()}
        return {"options": self.options, "widths": widths, "evidence": vars(self.evidence), "left": left}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Self:
        """A search that goes on from a checkpoint, whose sums are still to be loaded."""
        search = cls(state["widths"], **state["options"])
        search.evidence = Evidence.from_dict(state["evidence"])
        if state["left"] is not None:
            search.blocks.restore(state["left"]["blocks"], this_process())
            search.strongest.restore(state["left"]["strongest"], this_process())
        return search


def waiting_counts(state: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """Number of samples that wait for the end of their block, in what :meth:`Search.state` gave.

    Returns:
        All of them, and by layer those that the sums will leave out because an activation is not finite.
    """
    waiting = state["left"] and state["left"]["blocks"]["waiting"]
    if not waiting:
        return 0, {}
    pool = state["options"]["pool"]
    rows = {layer: SparseRows(**x).matrix() for (layer, kind), x in waiting["x"].items() if kind == pool}
    finite = {_key(layer): torch.sparse.sum(x, 1).to_dense().isfinite() for layer, x in rows.items()}
    return len(waiting["rows"]), {key: int((~mask).sum()) for key, mask in finite.items()}


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
        best = [rank(r, r, topk) for r in pair]
        first, second = ({*positive, *negative} for positive, negative in best)
        common.append(len(first & second) / max(1, len(first), len(second)))
        for i, f in enumerate(candidates):
            again[i] += sum(f.index in (high if f.sign == "positive" else low)[:topm] for high, low in best)
    return sum(common) / len(common), [count / (2 * len(common)) for count in again]


def _key(layer: int) -> str:
    return f"layer{layer}"


def _update(sums: SearchSums, block: Block, layer: int, pool: str) -> None:
    if block.rows:
        # Rows are in random order, so that a part of every so many is a random one.
        part = torch.tensor(block.rows) % PARTS
        sums.update(block.activations((layer, pool)), block.y, block.permuted, part)
