"""Where rows are read from, how they are split, and the data module that batches them."""

from corrsteer_pl.data.batches import Batch, Shard
from corrsteer_pl.data.module import TaskDataModule

__all__ = ["Batch", "Shard", "TaskDataModule"]
