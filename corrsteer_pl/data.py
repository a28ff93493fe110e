"""From rows on disk to left-padded batches: splits, shards, and the place where a fit goes on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.files import READERS, read_rows
from corrsteer_pl.tasks import Example, make_task

Split = Literal["train", "validation", "test"]
# How splits that are carved from the same rows divide them.
SHARES: dict[Split, float] = {"train": 0.5, "validation": 0.1, "test": 0.4}
NEEDED: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}


@dataclass
class Batch:
    """Prompts of one process, one step.

    Attributes:
        input_ids: ``(batch, longest)`` int64, padded on the left.
        attention_mask: ``(batch, longest)``, 0 on padding.
        weight: ``(batch,)`` float, 1 for a sample, 0 for a filler that makes all batches equally large.
        examples: The samples, fillers included.
        rows: Position of each sample in its split.
        end: How many samples of the split all processes have taken once this step is done.
    """

    input_ids: Tensor
    attention_mask: Tensor
    weight: Tensor
    examples: list[Example]
    rows: list[int]
    end: int

    def to(self, device: torch.device, **kwargs: Any) -> "Batch":
        """Move the tensors."""
        moved = {name: getattr(self, name).to(device, **kwargs) for name in ("input_ids", "attention_mask", "weight")}
        return replace(self, **moved)


class Shard:
    """The batches of one process, as many as every other process has.

    Step s gives process r the chunk ``s * world_size + r`` of ``batch_size`` consecutive samples, so that the
    chunks, and with them every activation, do not depend on the number of processes. The last chunks are
    filled up with samples of weight 0. There is at least one step, if only of fillers.

    Args:
        examples: All samples of the split, in order.
        collate: Makes tensors of prompts: texts to input ids and attention mask, both ``(batch, longest)``.
        batch_size: Samples per process and step.
        rank: This process.
        world_size: Number of processes.
        start: Samples that an interrupted run has already counted.

    Example:
        >>> examples = [Example(str(i), "", "") for i in range(5)]
        >>> shard = Shard(examples, lambda texts: (torch.zeros(len(texts), 1),) * 2, 2, rank=1, world_size=2)
        >>> [(batch.rows, batch.weight.tolist()) for batch in shard]
        [([2, 3], [1.0, 1.0]), ([4, 4], [0.0, 0.0])]
    """

    def __init__(
        self,
        examples: Sequence[Example],
        collate: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
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
            rows = [min(row, count - 1) for row in wanted]
            examples = [self.examples[row] for row in rows]
            ids, mask = self.collate([example.prompt for example in examples])
            weight = torch.tensor([float(row < count) for row in wanted])
            end = min(self.start + (step + 1) * self.world_size * self.batch_size, count)
            yield Batch(ids, mask, weight, examples, rows, end)


class TaskDataModule(LightningDataModule):
    """A task's rows, split, tokenised with the trained module's tokenizer, and batched.

    Splits are disjoint: each is a file of its own, or a share of the file that several of them name. Which
    rows are taken, and the order in which a fit sees them, depend on the seed alone.

    Args:
        task: Name of a task, or the import path of a :class:`~corrsteer_pl.tasks.Task` of your own.
        path: A JSONL, CSV or parquet file, or a folder with one such file per split. The demo tasks bring
            their own.
        task_args: Options of the task, such as column names.
        train_split: Which file of the folder is fitted on; the same name for several splits divides that file
            between them (half to fit, a tenth to validation, four tenths to test).
        val_split: The same for validation.
        test_split: The same for test.
        train_size: At most so many samples are fitted on.
        val_size: At most so many validation samples.
        test_size: At most so many test samples; None takes all.
        batch_size: Prompts per process and step.
        restrict: Allow only the task's answer tokens when decoding.
        seed: Seed of the splits and their order.
    """

    def __init__(
        self,
        task: str = "demo_qa",
        path: str | None = None,
        task_args: dict[str, Any] | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        train_size: int = 4000,
        val_size: int = 200,
        test_size: int | None = None,
        batch_size: int = 32,
        restrict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.task = make_task(task, task_args or {})
        self.sources: dict[Split, str] = {"train": train_split, "validation": val_split, "test": test_split}
        self.sizes: dict[Split, int | None] = {"train": train_size, "validation": val_size, "test": test_size}
        if path is not None and Path(path).exists():
            self.hparams["path"] = str(Path(path).absolute())
        if negative := [f"data.{n}_size is {s}" for n, s in self.sizes.items() if s is not None and s < 0]:
            raise UserError(f"{negative[0]}; it is a number of samples, at least 0.")
        if batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size}; it is a number of prompts, at least 1.")
        if restrict and not self.task.answers:
            raise UserError(f"data.restrict needs a task with answer letters; {task} has free text. Leave it out.")
        self.examples: dict[Split, list[Example]] = {}

    def setup(self, stage: str) -> None:
        """Read and split the rows.

        Raises:
            UserError: A file, a row or a column is not as needed, a split is empty, or two splits overlap.
        """
        self.examples = {}
        files = {split: self._file(source, required=split in NEEDED[stage]) for split, source in self.sources.items()}
        for file in dict.fromkeys(filter(None, files.values())):
            self.examples |= self._carve(file, [split for split in files if files[split] == file])
        for split in NEEDED[stage]:
            if not self.examples.get(split):
                raise UserError(
                    f"the {split} split of {self.hparams['task']} is empty. "
                    "Give data.path more rows, or the data.*_size options larger numbers."
                )
        self._check_disjoint()

    def _file(self, source: str, required: bool) -> Path | None:
        root = self.hparams["path"] or self.task.default_path
        if root is None:
            raise UserError(f"the task {self.hparams['task']} needs data. Set data.path to a file or a folder.")
        root = Path(root)
        if not root.exists():
            raise UserError(f"data.path is {str(root)!r}, which does not exist. Set it to a file or a folder of files.")
        if root.is_file():
            return root
        files = [file for file in sorted(root.iterdir()) if file.suffix in READERS and file.stem == source]
        if not files and required:
            stems = sorted(file.stem for file in root.iterdir() if file.suffix in READERS)
            raise UserError(
                f"{root} has no file for the split {source!r} (it has {choices(stems)}). "
                "Set data.train_split, data.val_split and data.test_split to names of its files."
            )
        return files[0] if files else None

    def _carve(self, file: Path, splits: Sequence[Split]) -> dict[Split, list[Example]]:
        rows = read_rows(file)
        examples = [self.task.example(row, str(row.get("id", f"{file.stem}:{i}"))) for i, row in enumerate(rows)]
        if len(splits) > 1:
            # Each prompt once, or it could fall into two splits.
            examples = list({example.prompt: example for example in reversed(examples)}.values())[::-1]
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(self.hparams["seed"])).tolist()
        total, start, carved = sum(SHARES[split] for split in splits), 0, {}
        for split in splits:
            end = start + round(len(order) * SHARES[split] / total) if split != splits[-1] else len(order)
            chosen = order[start:end][: self.sizes[split]]
            carved[split] = [examples[i] for i in (chosen if split == "train" else sorted(chosen))]
            start = end
        return carved

    def _check_disjoint(self) -> None:
        for one, other in combinations(self.examples, 2):
            prompts = {example.prompt: example.id for example in self.examples[one]}
            shared = [example for example in self.examples[other] if example.prompt in prompts]
            if shared:
                first = f"{prompts[shared[0].prompt]} and {shared[0].id}"
                raise UserError(
                    f"the splits {one} and {other} overlap in {len(shared)} prompts (first: {first}). "
                    "Remove the duplicates, or let one file be divided between the splits."
                )

    @property
    def allowed_answers(self) -> Sequence[str] | None:
        """The answers that decoding is restricted to, or None."""
        return self.task.answers if self.hparams["restrict"] else None

    def train_dataloader(self) -> Shard:
        """The fit split in seeded order, from where an interrupted fit stopped."""
        return self._loader("train", start=self._module.position)

    def val_dataloader(self) -> Shard:
        """The validation split."""
        return self._loader("validation")

    def test_dataloader(self) -> Shard:
        """The test split."""
        return self._loader("test")

    def predict_dataloader(self) -> Shard:
        """The test split."""
        return self._loader("test")

    @property
    def _running(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("the data module has no trainer yet; loaders are made while one runs")
        return self.trainer

    @property
    def _module(self) -> Any:
        return self._running.lightning_module

    def _loader(self, split: Split, start: int = 0) -> Shard:
        examples, world_size = self.examples[split], self._running.world_size
        if len(examples) < world_size:
            raise UserError(
                f"{world_size} processes share {len(examples)} {split} samples; each needs at least one. "
                "Set trainer.devices and trainer.num_nodes lower, or take more samples."
            )
        self._check_lengths(examples)
        batch_size = min(self.hparams["batch_size"], -(-len(examples) // world_size))
        # No DataLoader: Lightning would put its own DistributedSampler into it, which repeats and shuffles.
        return Shard(examples, self._collate, batch_size, self._running.global_rank, world_size, start)

    def _collate(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        llm = self._module.llm
        return llm.left_pad([llm.token_ids(prompt) for prompt in prompts])

    def _check_lengths(self, examples: Sequence[Example]) -> None:
        llm, new = self._module.llm, self.task.max_new_tokens
        context = getattr(llm.config, "max_position_embeddings", None)
        for example in examples:
            length = len(llm.token_ids(example.prompt))
            if context is not None and length + new - 1 > context:
                raise UserError(
                    f"the prompt of {example.id} has {length} tokens; with {new} new ones that exceeds the context of "
                    f"{llm.name} ({context}). Remove the row or shorten it."
                )
            if length == 0:
                raise UserError(f"the prompt of {example.id} is empty. Remove the row.")
