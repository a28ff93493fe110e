"""Left-padded batches, divided among processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.tasks import Example

# Prompts are sorted by length within buckets of so many samples: consecutive ones, in an order that is random. It is
# independent of the batch size, so that a fit can be resumed with another one.
BUCKET = 512


@dataclass
class Batch:
    """The prompts of one process in one step.

    Attributes:
        input_ids: ``(batch, longest)`` int64, padded on the left.
        attention_mask: ``(batch, longest)``, 0 on padding.
        weight: ``(batch,)`` float, 1 for a sample, 0 for a filler that makes all batches equally large.
        examples: The samples, fillers included.
        rows: Position of each sample in its split.
        counted: How many samples of the split all processes together have taken after this step.
    """

    input_ids: Tensor
    attention_mask: Tensor
    weight: Tensor
    examples: list[Example]
    rows: list[int]
    counted: int

    def to(self, device: torch.device, **kwargs: Any) -> "Batch":
        """Move the tensors."""
        moved = {name: getattr(self, name).to(device, **kwargs) for name in ("input_ids", "attention_mask", "weight")}
        return replace(self, **moved)


class Shard:
    """The batches of one process. Every process has the same number of them.

    In step s, process r takes chunk ``s * world_size + r`` of ``batch_size`` consecutive samples. The chunks, and so
    all activations, do not depend on the number of processes. The last chunks are filled up with samples of weight
    0. There is at least one step.

    Args:
        examples: All samples of the split, in order.
        collate: Makes tensors of examples: input ids and attention mask, both ``(batch, longest)``.
        batch_size: Samples per process and step.
        rank: This process.
        world_size: Number of processes.
        start: Samples that an interrupted run has already counted.
        order: Positions of the examples in the order in which they are taken; None for the order of the split.

    Example:
        >>> examples = [Example(str(i), "", "") for i in range(5)]
        >>> shard = Shard(examples, lambda some: (torch.zeros(len(some), 1),) * 2, 2, rank=1, world_size=2)
        >>> [(batch.rows, batch.weight.tolist()) for batch in shard]
        [([2, 3], [1.0, 1.0]), ([4, 4], [0.0, 0.0])]
    """

    def __init__(
        self,
        examples: Sequence[Example],
        collate: Callable[[Sequence[Example]], tuple[Tensor, Tensor]],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        order: Sequence[int] | None = None,
    ) -> None:
        self.order = range(len(examples)) if order is None else order
        self.examples, self.collate, self.batch_size = examples, collate, batch_size
        self.rank, self.world_size, self.start = rank, world_size, start

    def __len__(self) -> int:
        remaining = len(self.examples) - self.start
        return max(1, -(-remaining // (self.batch_size * self.world_size)))

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.examples)
        for step in range(len(self)):
            first = self.start + (step * self.world_size + self.rank) * self.batch_size
            wanted = range(first, first + self.batch_size)
            rows = [self.order[min(place, count - 1)] for place in wanted]
            examples = [self.examples[row] for row in rows]
            ids, mask = self.collate(examples)
            weight = torch.tensor([float(place < count) for place in wanted])
            counted = min(self.start + (step + 1) * self.world_size * self.batch_size, count)
            yield Batch(ids, mask, weight, examples, rows, counted)
