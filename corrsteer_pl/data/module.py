"""The Lightning data module: a task's rows, split, tokenised, batched, and resumed where a fit stopped."""

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from corrsteer_pl.data.batches import BUCKET, Batch, Shard
from corrsteer_pl.data.splits import SPLITS, Split, TaskData, without_overlap
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import absolute
from corrsteer_pl.options import check_options
from corrsteer_pl.tasks import Example, Task

NEEDED: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}


class TaskDataModule(LightningDataModule):
    """Splits a task's rows, makes prompts of them, tokenises them with the model's tokenizer, and batches them.

    Splits are disjoint: each is a split of the data, or a share of a split that several of them name, and prompts
    in two splits are removed from the earlier one. Which rows are taken, and their order in a fit, depend on the
    seed alone. Fit, validation and test have the same prompt settings.

    Args:
        task: Name of a task, or the import path of a :class:`~corrsteer_pl.tasks.Task` of your own.
        path: A JSONL, CSV or parquet file, a folder with one such file per split, or the id of a data set on the
            Hugging Face Hub; None for the task's own data.
        task_args: Options of the task, such as column names.
        subset: Named configuration of the data set, or a list of several that are read one after the other.
        filter: Columns with the value, or the list of values, that are kept: ``{context_condition: ambig}``; null sets
            no condition.
        balance: Column each of whose values is to have as many rows as the rarest, in every split, ``harmful`` for
            example; None keeps all rows.
        train_split: Which split is fitted on, ``all`` for all together; the same name for several splits divides
            it between them (by default half to fit, a tenth to validation, four tenths to test).
        val_split: The same for validation.
        test_split: The same for test.
        fit_on: Another task to fit on, all of its ``train_split``, with its own ``task``, ``path``, ``subset``,
            ``revision``, ``task_args``, ``filter``, ``balance`` and ``on_missing``; validation and test stay with
            ``task``.
        train_size: Largest number of samples to fit on.
        val_size: Largest number of validation samples.
        test_size: Largest number of test samples; None takes all.
        batch_size: Prompts per process and step.
        chat_template: Whether prompts are put into the tokenizer's chat template; None does so if it has one.
        system_prompt: What stands before every prompt as the chat's system message; None leaves it to the template,
            which may have a default of its own. Only with a chat template.
        shots: Number of solved examples before each prompt. They are removed from the fit split.
        restrict: Allow only the task's answer tokens when decoding: ``true`` always, ``evaluation`` in validation and
            test but not while fitting, as the method's public reference does.
        reverse: Reward one minus the reward, for steering away from what the task rewards.
        sort_by_length: Batch prompts of similar length together, for less padding, but not where a method trains.
            Results keep the order of the rows and change only by rounding.
        seed: Seed of the splits and their order.
        revision: Branch, tag or commit of the data set on the Hub; None for its newest.
        on_missing: What becomes of rows without a value that the task needs, in the question, the gold answer, the
            options, the group or the label: ``error`` names them, ``drop`` leaves them out and counts them.

    Raises:
        UserError: An option has a value of another type, or out of range.

    Attributes:
        TESTED: Options that a test may have otherwise than its fit; they name its results.
    """

    TESTED = (
        "path", "revision", "subset", "task_args", "filter", "balance", "train_split", "val_split", "test_split",
        "test_size", "on_missing", "chat_template", "system_prompt", "shots", "restrict", "reverse", "seed",
    )  # fmt: skip

    def __init__(
        self,
        task: str = "demo_qa",
        path: str | None = None,
        task_args: dict | None = None,
        subset: str | list[str] | None = None,
        filter: dict | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        fit_on: dict | None = None,
        train_size: int = 4000,
        val_size: int = 200,
        test_size: int | None = None,
        batch_size: int = 32,
        chat_template: bool | None = None,
        shots: int = 0,
        restrict: bool | Literal["evaluation"] = False,
        reverse: bool = False,
        sort_by_length: bool = True,
        seed: int = 0,
        revision: str | None = None,
        balance: str | None = None,
        system_prompt: str | None = None,
        on_missing: Literal["error", "drop"] = "error",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        given = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        check_options(TaskDataModule, given, "data")
        # A checkpoint may be tested from another folder.
        self.hparams["path"] = path = None if path is None else absolute(path)
        if fit_on and isinstance(fit_on.get("path"), (str, list)):
            named = fit_on["path"]
            paths = absolute(named) if isinstance(named, str) else [absolute(str(path)) for path in named]
            self.hparams["fit_on"] = fit_on = {**fit_on, "path": paths}
        self.rows = TaskData(
            task, path, task_args, subset, filter, train_split, val_split, test_split, revision, balance, on_missing
        )
        self.fit_rows = _fit_rows({"on_missing": on_missing, **fit_on}) if fit_on else self.rows
        self.sizes: dict[Split, int | None] = {"train": train_size, "validation": val_size, "test": test_size}
        if negative := [f"data.{n}_size is {s}" for n, s in self.sizes.items() if s is not None and s < 0]:
            raise UserError(f"{negative[0]}; it is a number of samples, at least 0.")
        if batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size}; it is a number of prompts, at least 1.")
        if shots < 0:
            raise UserError(f"data.shots is {shots}; it is a number of examples, at least 0.")
        decoded = [self.task] + ([self.fit_task] if restrict is True else [])
        if restrict and not all(some.answers for some in decoded):
            raise UserError(f"data.restrict needs a task with answer letters; {task} has free text. Leave it out.")
        if self.fit_task.generates < self.task.generates and shots:
            raise UserError(
                "data.shots takes its examples from the fit split, but data.fit_on has texts. Leave it out."
            )
        if not 0 <= seed < 2**63:
            raise UserError(f"data.seed is {seed}; it is a whole number from 0 to 2**63 - 1.")
        self.examples: dict[Split, list[Example]] = {}
        self.fingerprint = ""  # of the samples of a fit
        self.shots: list[Example] = []
        self._lengths: dict[Split, list[int]] = {}  # in tokens, of the splits whose prompts were read already

    @property
    def task(self) -> Task:
        """The task of validation and test."""
        return self.rows.task

    @property
    def fit_task(self) -> Task:
        """The task that is fitted on."""
        return self.fit_rows.task

    def restricted(self, stage: Literal["fit", "evaluation"]) -> bool:
        """Whether only the task's answer tokens may be decoded, in the fit or in validation and test."""
        restrict = self.hparams["restrict"]
        return stage == "evaluation" if restrict == "evaluation" else bool(restrict)

    def setup(self, stage: str) -> None:
        """Read and split the rows.

        Raises:
            UserError: The data cannot be loaded, a row or a column cannot be used, or a split is empty.
        """
        found = without_overlap(self._read(self._wanted(stage)))
        self.shots = self._take_shots(found.get("train", []))
        chosen = {split: examples[: self.sizes[split]] for split, examples in found.items()}
        self.examples = {s: some if s == "train" else self.rows.in_order(some) for s, some in chosen.items()}
        if stage == "fit":
            self.fingerprint = _fingerprint(self.examples["train"])
        self._lengths = {}
        for split in NEEDED[stage]:
            if not self.examples.get(split):
                raise UserError(
                    f"the {split} split of {self.hparams['task']} is empty. "
                    "Give data.path more rows, each with another prompt, or the data.*_size options larger numbers."
                )
        if stage == "fit" and not self.fit_task.generates and len({e.gold for e in self.examples["train"]}) < 2:
            raise UserError(
                f"all {len(self.examples['train'])} texts of the fit are {self.examples['train'][0].gold}: "
                "task_args.positive and task_args.negative do not tell their labels apart."
            )

    def _wanted(self, stage: str) -> list[Split]:
        # Shots are taken from the fit split after overlaps with the other splits were removed. So that they are the
        # same at every stage, all splits of a fit are read.
        needed = NEEDED["fit"] + NEEDED[stage] if self.hparams["shots"] else NEEDED[stage]
        # Prompts that are in test too are removed from fit and validation.
        loses = "validation" in needed and self.rows.has("test")
        return [split for split in SPLITS if split in needed or (split == "test" and loses)]

    def _read(self, wanted: Sequence[Split]) -> dict[Split, list[Example]]:
        seed = self.hparams["seed"]
        if self.fit_rows is self.rows or "train" not in wanted:
            return self.rows.examples(wanted, seed)
        rest = [split for split in wanted if split != "train"]
        return {"train": self.fit_rows.whole("train", seed), **self.rows.examples(rest, seed)}

    def _take_shots(self, examples: list[Example]) -> list[Example]:
        count = self.hparams["shots"]
        if 0 < len(examples) <= count:
            raise UserError(
                f"data.shots is {count}, but the fit split has {len(examples)} examples, and loses its shots."
            )
        shots, examples[:] = examples[:count], examples[count:]
        if unsolved := [shot for shot in shots if shot.solution is None]:
            raise UserError(
                f"data.shots is {count}, but {unsolved[0].id} has no solution to show: "
                f"the task {self.fit_rows.name} judges responses without one. Leave it out."
            )
        return shots

    def turns(self, example: Example) -> list[str]:
        """The prompt of an example with the shots before it: prompt and response in turn, the prompt last."""
        return [turn for shot in self.shots for turn in (shot.prompt, str(shot.solution))] + [example.prompt]

    def uses_chat(self, llm: Any) -> bool:
        """Whether prompts are put into the chat template of this model's tokenizer.

        Raises:
            UserError: ``chat_template`` is true, but the tokenizer has none, or there is a system prompt without one.
        """
        wanted = self.hparams["chat_template"]
        if wanted and not llm.has_chat_template:
            raise UserError(
                f"data.chat_template is true, but the tokenizer of {llm.name} has no chat template: it is no "
                "instruction model. Set it to false, or model.llm to an instruction model."
            )
        uses = llm.has_chat_template if wanted is None else wanted
        if self.hparams["system_prompt"] is not None and not uses:
            why = "data.chat_template is false" if llm.has_chat_template else f"{llm.name} has no chat template"
            raise UserError(
                f"data.system_prompt is set, but {why}, so there is no system message. Write it into "
                "data.task_args.template, or take an instruction model with its template."
            )
        return uses

    def check_template(self, llm: Any) -> None:
        """Check that the chat template, if it is used, renders the system message, the shots and a prompt.

        Raises:
            UserError: There is none, it fails, or it loses one of them.
        """
        if self.uses_chat(llm) and (self.task.generates or self.fit_task.generates):
            shots = [turn for shot in self.shots for turn in (shot.prompt, str(shot.solution))]
            llm.prompt_text([*shots, "Hello"], chat=True, system=self.hparams["system_prompt"])

    def answers(self, llm: Any, task: Task | None = None) -> list[str] | None:
        """A task's answers as they follow its prompt: with a leading space, but not after a chat template."""
        answers = (task or self.task).answers
        return [answer.strip() if self.uses_chat(llm) else answer for answer in answers] if answers else None

    def warn_of_base_model(self, llm: Any) -> None:
        """Warn if the prompts are instructions and the model is probably not trained to follow them."""
        if self.task.instructs and not llm.has_chat_template:
            warnings.warn(
                f"the prompts of {self.hparams['task']} are instructions, but {llm.name} has no chat template, so "
                "it is probably a base model, which was not trained to follow them.",
                stacklevel=2,
            )

    def train_dataloader(self) -> Shard:
        """The fit split in seeded order, from where an interrupted fit stopped."""
        return self._loader("train", start=self._module.counted)

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
        task, world_size = self.fit_task if split == "train" else self.task, self._running.world_size
        self._check_shares(split)
        if split not in self._lengths:
            self.examples[split], self._lengths[split] = self._fitting(split, task)
            self._check_shares(split)
        examples, lengths = self.examples[split], self._lengths[split]
        batch_size = min(self.hparams["batch_size"], -(-len(examples) // world_size))
        # No DataLoader: Lightning would put its own DistributedSampler into it, which repeats and shuffles.
        collate = partial(self.collate, task=task)
        # A method that trains needs batches that are alike but for chance.
        sorts = self.hparams["sort_by_length"] and not (split == "train" and self._module.trains)
        order = _by_length(lengths, BUCKET) if sorts else None
        return Shard(examples, collate, batch_size, self._running.global_rank, world_size, start, order)

    def _check_shares(self, split: Split) -> None:
        if (count := len(self.examples[split])) < self._running.world_size:
            raise UserError(
                f"{self._running.world_size} processes share {count} {split} samples; each needs at least one. "
                "Set trainer.devices and trainer.num_nodes lower, or take more samples."
            )

    def batch_of(self, split: Split, rows: Sequence[int]) -> Batch:
        """Some samples of a split by their positions, outside of any loader."""
        examples = [self.examples[split][row] for row in rows]
        ids, mask = self.collate(examples, self.fit_task if split == "train" else self.task)
        return Batch(ids, mask, torch.ones(len(rows)), examples, list(rows), 0)

    def token_ids(self, example: Example, task: Task, system: str | None = None) -> list[int]:
        """Tokens of an example's prompt; a text that is only read has neither shots nor chat template.

        Args:
            example: The example.
            task: Its task.
            system: A system message in place of ``system_prompt``.
        """
        llm = self._module.llm
        if not task.generates:
            return llm.token_ids(example.prompt)
        system = self.hparams["system_prompt"] if system is None else system
        return llm.prompt_ids(self.turns(example), self.uses_chat(llm), system)

    def option_ids(self, example: Example) -> list[list[int]]:
        """Tokens of an example's options as they follow its prompt.

        Raises:
            UserError: There are none, or one is empty.
        """
        llm = self._module.llm
        if not example.options or not all(option.strip() for option in example.options):
            lack = "an empty option" if example.options else "no options"
            raise UserError(f"{example.id} has {lack}, so its likelihood cannot be told. Mend or remove the row.")
        space = "" if self.uses_chat(llm) else " "
        return [llm.following_ids(space + option) for option in example.options]

    def collate(self, examples: Sequence[Example], task: Task) -> tuple[Tensor, Tensor]:
        """Input ids and attention mask of examples, both ``(batch, longest)``, padded on the left."""
        return self._module.llm.left_pad([self.token_ids(example, task) for example in examples])

    def _fitting(self, split: Split, task: Task) -> tuple[list[Example], list[int]]:
        """The examples that the model can read and answer, and how many tokens their prompts have.

        A warning counts the others.

        Raises:
            UserError: It can answer none, a prompt is empty, or two different prompts have the same tokens.
        """
        llm = self._module.llm
        prompts = [(example, self.token_ids(example, task)) for example in self.examples[split]]
        _check_distinct(prompts, llm.name)
        pairs = [(example, len(ids)) for example, ids in prompts]
        if empty := [example for example, length in pairs if length == 0]:
            raise UserError(f"the prompt of {empty[0].id} is empty. Remove the row.")
        news = [self._new_tokens(example, task) for example, _ in pairs]
        fits = [pair for pair, new in zip(pairs, news, strict=True) if pair[1] + new - 1 <= llm.context]
        too_long = [(*pair, new) for pair, new in zip(pairs, news, strict=True) if pair[1] + new - 1 > llm.context]
        if too_long:
            example, length, new = too_long[0]
            sentence = (
                f"the prompt of {example.id} has {length} tokens; with {new} new ones that exceeds the context of "
                f"{llm.name} ({llm.context})"
            )
            if not fits:
                raise UserError(f"{sentence}, and so do all {split} prompts. Shorten them, or take another model.")
            warnings.warn(f"{sentence}: {len(too_long)} of {len(pairs)} {split} prompts are left out.", stacklevel=2)
        return [example for example, _ in fits], [length for _, length in fits]

    def _new_tokens(self, example: Example, task: Task) -> int:
        """How many tokens may follow a prompt: the longest option's, where options are weighed."""
        return max(map(len, self.option_ids(example))) if task.by_likelihood else task.max_new_tokens


def _check_distinct(prompts: Iterable[tuple[Example, Sequence[int]]], model: str) -> None:
    """Check that different prompts have different tokens.

    Prompts that differ in case, accents or white space only may be equal to a tokenizer that normalises them.

    Raises:
        UserError: Naming the first two that do not.
    """
    by_tokens: dict[int, Example] = {}
    for example, ids in prompts:
        other = by_tokens.setdefault(hash(tuple(ids)), example)
        if other.prompt != example.prompt and _normalized(other.prompt) != _normalized(example.prompt):
            raise UserError(
                f"the prompts of {other.id} and {example.id} differ, but are the same {len(ids)} tokens for the "
                f"tokenizer of {model}: it has no tokens for the difference. Remove one of the rows, or set model.llm "
                "to a model that can read them."
            )


def _normalized(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in letters if not unicodedata.combining(c) and not c.isspace())


def _fingerprint(examples: Sequence[Example]) -> str:
    """A short hash of prompts, gold answers and options in their order."""
    text = "\0".join(part for example in examples for part in (example.prompt, example.gold, *example.options))
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _by_length(lengths: Sequence[int], bucket: int) -> list[int]:
    """Positions in their order, but within each bucket the longest first.

    Example:
        >>> _by_length([3, 9, 5, 1, 7], bucket=3)
        [1, 2, 0, 4, 3]
    """
    starts = range(0, len(lengths), bucket)
    buckets = [range(start, min(start + bucket, len(lengths))) for start in starts]
    return [i for some in buckets for i in sorted(some, key=lambda i: (-lengths[i], i))]


def _fit_rows(options: dict[str, Any]) -> TaskData:
    known = ("task", "path", "revision", "subset", "task_args", "filter", "balance", "train_split", "on_missing")
    check_options(TaskData, options, "data.fit_on", known)
    if "task" not in options:
        raise UserError("data.fit_on names no task. Give it one, as in {task: mmlu}.")
    return TaskData(**options)
