"""What a comparison would show if nothing were changed: the unchanged model against itself in other batches."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.evaluation.paired import paired_metrics
from corrsteer_pl.methods.answering import Answering
from corrsteer_pl.models.decoding.decode import Intervention
from corrsteer_pl.strategy import gather_lists


class NoiseFloor:
    """Answers every batch once more, in halves and so in forward passes of another shape, which round otherwise.

    Args:
        answering: How the task is answered.
        unchanged: One variant, the unchanged model.
    """

    def __init__(self, answering: Answering, unchanged: Intervention) -> None:
        self.answering, self.unchanged = answering, unchanged
        self._pairs: list[tuple[float, float, bool]] = []

    def step(self, batch: Batch, texts: list[str], rewards: Tensor) -> None:
        """Compare with what the unchanged model has answered in the whole batch."""
        for half in _halves(batch):
            ((again, judged),) = self.answering.compare(half, self.unchanged)
            places = [batch.rows.index(row) for row in half.rows]
            for i, place in enumerate(places):
                if half.weight[i]:
                    pair = rewards[place].item(), judged[i].item(), again[i] != texts[place]
                    self._pairs.append(pair)

    def result(self) -> dict[str, Any]:
        """How many texts differ, and the metrics of the second pass against the first. Every process must call it."""
        pairs = gather_lists(self._pairs)
        first, second, differs = (torch.tensor(column) for column in zip(*pairs, strict=True))
        m = paired_metrics(first, second)
        kept = ("n", "better", "worse", "changed", "side_effect_ratio", "ser_low", "ser_high")
        return {"flips": int(differs.sum()), **{name: m[name] for name in kept}}


def _halves(batch: Batch) -> list[Batch]:
    """A batch in two, the shorter prompts apart from the longer ones and without the padding they no longer need."""
    order = batch.attention_mask.sum(1).argsort(stable=True)
    found = []
    for rows in order.tensor_split(2):
        if not len(rows):
            continue
        length = int(batch.attention_mask[rows].sum(1).max())
        # A row that is alone in its batch is read twice, for it has no other shape otherwise.
        rows = rows.repeat(2) if len(batch.rows) == 1 else rows
        weight = batch.weight[rows]
        if len(batch.rows) == 1:
            weight = weight * torch.tensor([1.0, 0.0], device=weight.device)
        places = rows.tolist()
        found.append(
            replace(
                batch,
                input_ids=batch.input_ids[rows, -length:],
                attention_mask=batch.attention_mask[rows, -length:],
                weight=weight,
                examples=[batch.examples[place] for place in places],
                rows=[batch.rows[place] for place in places],
            )
        )
    return found
