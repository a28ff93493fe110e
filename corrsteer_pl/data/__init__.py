"""From rows on disk to batches: sources, splits, and the data module that runs with a method."""

from corrsteer_pl.data.batches import Batch, Shard
from corrsteer_pl.data.module import TaskDataModule

__all__ = ["Batch", "Shard", "TaskDataModule"]
