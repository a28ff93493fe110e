"""What a comparison would show if nothing were changed: the unchanged model against itself in other batches."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.evaluation.paired import paired_metrics
from corrsteer_pl.methods.answers.answering import Answering
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
    lengths = batch.attention_mask.sum(1)
    if len(lengths) == 1:
        # Alone in its batch, a prompt has no other shape than twice; the second is a filler.
        twice = _taken(batch, torch.tensor([0, 0], device=lengths.device), int(lengths))
        return [replace(twice, weight=twice.weight * torch.tensor([1.0, 0.0], device=lengths.device))]
    halves = lengths.argsort(stable=True).tensor_split(2)
    return [_taken(batch, rows, int(lengths[rows].max())) for rows in halves]


def _taken(batch: Batch, rows: Tensor, length: int) -> Batch:
    """Some rows of a batch, which are no longer than ``length``."""
    places = rows.tolist()
    return replace(
        batch,
        input_ids=batch.input_ids[rows, -length:],
        attention_mask=batch.attention_mask[rows, -length:],
        weight=batch.weight[rows],
        examples=[batch.examples[place] for place in places],
        rows=[batch.rows[place] for place in places],
    )
