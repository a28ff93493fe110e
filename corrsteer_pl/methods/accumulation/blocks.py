"""Samples that wait until the rewards of all their neighbours are known, so that these can be permuted among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.data.batches import BUCKET
from corrsteer_pl.strategy import gather_lists

# A layer and a pool.
Key = tuple[int, str]


@dataclass
class SparseRows:
    """Rows most of whose values are 0.

    Attributes:
        values: What is not 0, row after row, float32.
        columns: Where each value stands in its row, int32.
        counts: ``(rows,)``, how many values each row has.
        width: Length of a row.
    """

    values: Tensor
    columns: Tensor
    counts: Tensor
    width: int

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """The rows of a matrix.

        Example:
            >>> SparseRows.of(torch.tensor([[0., 3.], [0., 0.]])).matrix().to_dense()
            tensor([[0., 3.],
                    [0., 0.]])
        """
        rows, columns = x.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(x))
        return cls(x[rows, columns].float().cpu(), columns.int().cpu(), counts.cpu(), x.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all that."""
        return self.values.nbytes + self.columns.nbytes + self.counts.nbytes

    @classmethod
    def joined(cls, some: Sequence[Self]) -> Self:
        """Rows one below the other."""
        values, columns, counts = (
            torch.cat([getattr(x, name) for x in some]) for name in ("values", "columns", "counts")
        )
        return cls(values, columns, counts, some[0].width)

    def matrix(self) -> Tensor:
        """The matrix, ``(rows, width)`` float32, sparse."""
        rows = torch.arange(len(self.counts)).repeat_interleave(self.counts)
        places, shape = torch.stack([rows, self.columns.long()]), (len(self.counts), self.width)
        return torch.sparse_coo_tensor(places, self.values, shape, is_coalesced=True, check_invariants=False)


@dataclass
class Waiting:
    """This process's samples of a batch.

    Attributes:
        rows: Their positions in the split.
        rewards: ``(batch,)`` float64.
        x: Their pooled activations.
    """

    rows: list[int]
    rewards: Tensor
    x: dict[Key, SparseRows]


@dataclass
class Block:
    """This process's samples of a block, with rewards that other samples of the block may have.

    Attributes:
        rows: Their positions in the split.
        x: Their pooled activations.
        y: Their rewards, or those that they were dealt, ``(samples,)`` float64.
        permuted: Their rewards in each permutation, ``(permutations, samples)``.
    """

    rows: list[int]
    x: dict[Key, list[SparseRows]]
    y: Tensor
    permuted: Tensor

    def activations(self, key: Key) -> Tensor:
        """Pooled activations ``(samples, d_sae)``, sparse."""
        return SparseRows.joined(self.x[key]).matrix()


class Blocks:
    """Deals samples into blocks of consecutive ones, and permutes rewards within each block once all are known.

    A block has the samples of one bucket of the order of a fit, which is random, so that its rewards are exchanged
    whatever the length of a prompt and whatever the number of processes. Permuting within blocks keeps the distribution
    of the rewards exactly. A fit of one block is permuted as a whole.

    Args:
        permutations: How often the rewards are permuted.
        seed: Seed of the permutations.
        deal: Whether samples are dealt rewards of others as their own.
    """

    def __init__(self, permutations: int, seed: int, deal: bool = False) -> None:
        self.permutations, self.seed, self.deal = permutations, seed, deal
        self._waiting: list[Waiting] = []
        self._next = 0  # the first block that is not finished

    def add(self, batch: Batch, pools: Mapping[Key, Tensor], rewards: Tensor) -> None:
        """Take in a batch with its pooled activations ``(batch, d_sae)`` and rewards ``(batch,)``."""
        real = batch.weight.bool().cpu()
        rows = [row for row, taken in zip(batch.rows, real.tolist(), strict=True) if taken]
        if rows:
            x = {key: SparseRows.of(pool[real.to(pool.device)]) for key, pool in pools.items()}
            self._waiting += _by_block(Waiting(rows, rewards.double().cpu()[real], x))

    def finished(self, counted: int) -> list[Block]:
        """The blocks of which all processes together have seen every sample. Every process must call it."""
        numbers = range(self._next, counted // BUCKET)
        self._next = max(self._next, counted // BUCKET)
        found = [self._closed(number) for number in numbers]
        self._waiting = [some for some in self._waiting if _block_of(some.rows[0]) >= self._next]
        return found

    def unfinished(self, counted: int) -> list[Block]:
        """The last block as far as it has been seen, which goes on to wait. Every process must call it."""
        return [self._closed(self._next)] if counted > self._next * BUCKET else []

    def cut(self, counted: int) -> list[Block]:
        """The last block as far as it has been seen, after which another begins. Every process must call it."""
        found = self.unfinished(counted)
        self._waiting = []
        return found

    def _closed(self, number: int) -> Block:
        mine = [some for some in self._waiting if _block_of(some.rows[0]) == number]
        pairs = [pair for some in mine for pair in zip(some.rows, some.rewards.tolist(), strict=True)]
        everyone = sorted(gather_lists(pairs))
        place = {row: i for i, (row, _) in enumerate(everyone)}
        rewards = torch.tensor([reward for _, reward in everyone], dtype=torch.float64)
        # A block has its own generator, so that it does not matter where a fit was interrupted.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        if self.deal:
            rewards = rewards[torch.randperm(len(rewards), generator=generator)]
        orders = [torch.randperm(len(rewards), generator=generator) for _ in range(self.permutations)]
        here = [place[row] for row, _ in pairs]
        permuted = torch.stack([rewards[order][here] for order in orders]) if orders else torch.zeros(0, len(here))
        x = {key: [some.x[key] for some in mine] for key in (mine[0].x if mine else ())}
        return Block([row for row, _ in pairs], x, rewards[here], permuted)

    @property
    def size(self) -> int:
        """Bytes of the samples that wait here."""
        return sum(rows.nbytes for some in self._waiting for rows in some.x.values())

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores: the samples of all processes that wait. Every process must call it."""
        everyone = gather_lists(self._waiting)
        # In one piece, as a file of thousands of small tensors takes long to write.
        waiting = {
            "rows": [row for some in everyone for row in some.rows],
            "rewards": torch.cat([some.rewards for some in everyone]),
            "x": {key: vars(SparseRows.joined([some.x[key] for some in everyone])) for key in everyone[0].x},
        } if everyone else None  # fmt: skip
        return {"next": self._next, "waiting": waiting}

    def restore(self, state: dict[str, Any], rank: int) -> None:
        """Go on from a checkpoint; the samples that wait do so on the first process."""
        self._next, waiting = state["next"], state["waiting"]
        if waiting is not None and rank == 0:
            x = {key: SparseRows(**rows) for key, rows in waiting["x"].items()}
            self._waiting = [Waiting(waiting["rows"], waiting["rewards"], x)]
        else:
            self._waiting = []


def _block_of(row: int) -> int:
    return row // BUCKET


def _by_block(some: Waiting) -> list[Waiting]:
    """The samples of a batch, those of each block apart."""
    numbers = sorted(set(map(_block_of, some.rows)))
    if len(numbers) == 1:
        return [some]
    places = [[i for i, row in enumerate(some.rows) if _block_of(row) == number] for number in numbers]
    return [
        Waiting(
            [some.rows[i] for i in here],
            some.rewards[here],
            {key: SparseRows.of(rows.matrix().to_dense()[here]) for key, rows in some.x.items()},
        )
        for here in places
    ]
