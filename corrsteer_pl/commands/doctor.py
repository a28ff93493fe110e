"""What a fit would do, shown on its first batch: prompt, tokens, the method's parts, memory and time."""

import time
from collections.abc import Iterator
from itertools import pairwise

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table
from rich.text import Text

from corrsteer_pl.data import Batch, TaskDataModule
from corrsteer_pl.evaluation.tables import percent
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.base import Method
from corrsteer_pl.methods.inspection import Inspection
from corrsteer_pl.models.decoding.decode import repeated
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sites import Site
from corrsteer_pl.models.special_tokens import special_ids, token_texts

GIB = 2**30


def examine(method: Method, datamodule: TaskDataModule, trainer: Trainer) -> Iterator[Table | Text | str]:
    """Load everything, run one batch, and show what users often get wrong.

    Yields:
        What is to be shown, piece by piece.

    Raises:
        UserError: A fit would not start, and why.
    """
    batch = _start(method, datamodule, trainer)
    yield from _prompt(method, datamodule, batch)
    inspection = method.inspection(method)
    began = time.perf_counter()
    texts = inspection.rehearse(batch)
    fit_seconds = time.perf_counter() - began
    yield from _answers(method, texts, batch)
    yield _model(method.llm)
    yield from inspection.tables(batch)
    times = _time(method, inspection, datamodule, len(batch.examples), fit_seconds)
    # After the first comparison, because it finds out how variants can be decoded.
    yield _memory(method, inspection, batch)
    yield times
    method.verify()


def _start(method: Method, datamodule: TaskDataModule, trainer: Trainer) -> Batch:
    """Set up as a fit does, short of starting other processes, and take this process's first batch."""
    method.trainer = trainer
    datamodule.trainer = trainer
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    trainer.strategy.connect(method)
    trainer.state.fn = TrainerFn.FITTING
    datamodule.setup("fit")
    method.setup("fit")
    return next(iter(datamodule.train_dataloader())).to(trainer.strategy.root_device)


def _prompt(method: Method, datamodule: TaskDataModule, batch: Batch) -> Iterator[Table | Text | str]:
    llm, example = method.llm, batch.examples[0]
    task = datamodule.fit_task
    ids = datamodule.token_ids(example, task)
    special = special_ids(llm.tokenizer)
    marked = [
        f"\u27e6{token}\u27e7" if id in special else token for id, token in zip(ids, _tokens(llm, ids), strict=True)
    ]
    yield f"\nThe prompt of {example.id} as the model reads it, special tokens in \u27e6 \u27e7:\n"
    yield Text("".join(marked))
    bos = llm.tokenizer.bos_token_id
    lengths = batch.attention_mask.sum(1)
    facts = {
        "tokens": str(len(ids)),
        "chat template": "used" if task.generates and datamodule.uses_chat(llm) else "not used",
        "BOS": "the tokenizer has none" if bos is None else f"{ids.count(bos)} time(s), {llm.tokenizer.decode([bos])}",
        "ends with": repr(llm.tokenizer.decode(ids[-3:])),
        "appended by the tokenizer": f"{token_texts(llm.tokenizer, llm.appended)}: removed"
        if llm.appended
        else "nothing",
        "answers end at": token_texts(llm.tokenizer, llm.eos_token_ids) or "the longest answer only",
        "padding": f"on the left, up to {int(batch.input_ids.shape[1] - lengths.min())} tokens in the first batch",
        "few-shot examples": str(len(datamodule.shots)),
        "gold answer": repr(example.gold),
    }
    if answers := datamodule.answers(llm, task):
        tokens = {answer: llm.following_ids(answer) for answer in answers}
        restricted = "the only ones allowed" if datamodule.restricted("fit") else "others are allowed too"
        shown = (f"{answer!r} {' '.join(map(str, ids))}" for answer, ids in tokens.items())
        facts["option tokens"] = f"{', '.join(shown)} ({restricted})"
    yield _facts("Prompt", facts)


def _answers(method: Method, texts: list[str], batch: Batch) -> Iterator[Table]:
    task = method.datamodule.fit_task
    rewards = method.fit_answering.rewards(texts, batch)
    facts = {
        "reward": task.reward_name if task.generates else "1 for a text with the label",
        "first answer": f"{texts[0]!r}, reward {rewards[0].item():g}",
        "mean reward": f"{percent(rewards.mean().item())} % of the {len(texts)} samples of the first batch",
    }
    if rewards.min() == rewards.max():
        facts["mean reward"] += " (all equal: if that stays so, there is nothing to correlate with)"
    yield _facts("Answers", facts)


def _tokens(llm: LanguageModel, ids: list[int]) -> list[str]:
    """The text of each token, put together to what all of them say."""
    ends = [llm.tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    return [longer[len(shorter) :] for shorter, longer in pairwise(ends)]


def _model(llm: LanguageModel) -> Table:
    devices = {str(p.device) for p in llm.model.parameters()}
    facts = {
        "name": llm.name,
        "class": type(llm.model).__name__,
        "parameters": f"{sum(p.numel() for p in llm.model.parameters()) / 1e6:.1f} M",
        "precision": f"{str(llm.model.dtype).removeprefix('torch.')} on {', '.join(sorted(devices))}",
    }
    return _facts("Language model", facts)


def _memory(method: Method, inspection: Inspection, batch: Batch) -> Table:
    """Bytes of what stays, and of the largest pass of a validation."""
    llm, decoder = method.llm, method.answering.decoder
    branches = llm.abilities.get("branches", False) and not method.task.by_likelihood
    # Each option of an example that is answered by likelihood has a row of its own.
    rows = repeated(batch, max(1, *(len(example.options) for example in batch.examples)))
    prompts = batch.input_ids.numel() * llm.cache_size_per_token * llm.model.dtype.itemsize
    parts = {
        "language model": sum(p.nbytes for p in llm.model.parameters()),
        **inspection.held(batch),
        f"keys and values of {len(batch.examples)} prompts": prompts,
    }
    if inspection.variants:
        together = decoder.together(rows, inspection.variants, branches)
        parts[f"{together} variants of them at once"] = together * decoder.size_of_variant(rows, branches)
        validation = len(method.datamodule.examples["validation"])
        kept = min(decoder.keeps, prompts * validation // len(batch.examples))
        parts["validation prompts that are kept, about"] = kept
    facts = {name: _size(size) for name, size in parts.items()}
    facts["predicted in all"] = f"{_size(sum(parts.values()))}, and the activations of one block"
    if torch.cuda.is_available():
        facts["measured peak so far"] = _size(torch.cuda.max_memory_allocated())
    return _facts("Memory per process", facts)


def _time(
    method: Method, inspection: Inspection, datamodule: TaskDataModule, batch_size: int, fit_seconds: float
) -> Table:
    """Seconds per batch as measured, and what they add up to; generation may end earlier or later than here."""
    batches = len(datamodule.train_dataloader())
    facts = {"fit": f"{batches} batches of {batch_size}, {fit_seconds:.2f} s each: {_duration(batches * fit_seconds)}"}
    if inspection.variants and method.task.generates:
        facts["validation"] = _validation_time(method, inspection.variants, datamodule)
    return _facts("Time per process, from the first batch", facts)


def _validation_time(method: Method, variants: int, datamodule: TaskDataModule) -> str:
    loader = datamodule.val_dataloader()
    batch = next(iter(loader)).to(method.trainer.strategy.root_device)
    began = time.perf_counter()
    # A vector of zeros at every block costs what other vectors cost.
    config = method.llm.config
    zeros = {Site(i, "resid_post"): torch.zeros(config.hidden_size) for i in range(config.num_hidden_layers)}
    method.answering.texts(batch, SteeringVectors.stack([zeros] * variants, Schedule()))
    seconds = time.perf_counter() - began
    return (
        f"{len(loader)} batches of {len(batch.examples)} under {variants} variants, about {seconds:.2f} s each: "
        f"{_duration(len(loader) * seconds)}"
    )


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name), Text(value))
    return table
