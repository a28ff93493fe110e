"""What a fit would do, shown on its first batch: prompt, tokens, positions, parts, fit of the SAEs, memory and time."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from corrsteer_pl.data import Batch, TaskDataModule
from corrsteer_pl.evaluation.tables import percent
from corrsteer_pl.interventions.steering import SteeringVectors
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.models.alignment import Alignment, judge_alignments
from corrsteer_pl.models.decoding.branches import Run
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sites import Site

GIB = 2**30
# So many decoding steps show what goes on in all.
STEPS = 4


def examine(module: CorrSteer, datamodule: TaskDataModule, trainer: Trainer) -> Iterator[Table | Text | str]:
    """Load everything, run one batch, and say what users get wrong.

    Yields:
        What is to be shown, piece by piece.

    Raises:
        UserError: A fit would not start, and why.
    """
    batch = _start(module, datamodule, trainer)
    yield from _prompt(module, datamodule, batch)
    began = time.perf_counter()
    watch = _Watch(module.saes, module.pools)
    texts = module.observe(batch, watch)
    fit_seconds = time.perf_counter() - began
    yield from _answers(module, texts, batch)
    if datamodule.fit_task.generates:
        yield _positions(module, batch, watch)
    measured = module.alignments()
    yield _parts(module, measured)
    times = _time(module, datamodule, len(batch.examples), fit_seconds)
    # Only now is known how candidates are decoded.
    yield _memory(module, batch)
    yield times
    judge_alignments(measured.values(), module.hparams["check_alignment"])


def _start(module: CorrSteer, datamodule: TaskDataModule, trainer: Trainer) -> Batch:
    """Set up as a fit does, short of starting other processes, and take this process's first batch."""
    module.trainer = trainer
    datamodule.trainer = trainer
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    trainer.strategy.connect(module)
    trainer.state.fn = TrainerFn.FITTING
    datamodule.setup("fit")
    module.setup("fit")
    return next(iter(datamodule.train_dataloader())).to(trainer.strategy.root_device)


def _prompt(module: CorrSteer, datamodule: TaskDataModule, batch: Batch) -> Iterator[Table | Text | str]:
    llm, example = module.llm, batch.examples[0]
    task = datamodule.fit_task
    ids = datamodule.token_ids(example, task)
    special = set(llm.tokenizer.all_special_ids)
    shown = [
        f"\u27e6{token}\u27e7" if id in special else token for id, token in zip(ids, _tokens(llm, ids), strict=True)
    ]
    yield f"\nThe prompt of {example.id} as the model reads it, special tokens in \u27e6 \u27e7:\n"
    yield Text("".join(shown))
    bos = llm.tokenizer.bos_token_id
    lengths = batch.attention_mask.sum(1)
    facts = {
        "tokens": str(len(ids)),
        "chat template": "used" if task.generates and datamodule.uses_chat(llm) else "not used",
        "BOS": "the tokenizer has none" if bos is None else f"{ids.count(bos)} time(s), {llm.tokenizer.decode([bos])}",
        "ends with": repr(llm.tokenizer.decode(ids[-3:])),
        "padding": f"on the left, up to {int(batch.input_ids.shape[1] - lengths.min())} tokens in the first batch",
        "few-shot examples": str(len(datamodule.shots)),
        "gold answer": repr(example.gold),
    }
    if answers := datamodule.answers(llm, task):
        tokens = zip(answers, llm.single_tokens(answers), strict=True)
        restricted = "the only ones allowed" if datamodule.hparams["restrict"] else "others are allowed too"
        facts["option tokens"] = ", ".join(f"{answer!r} {token}" for answer, token in tokens) + f" ({restricted})"
    yield _facts("Prompt", facts)


def _answers(module: CorrSteer, texts: list[str], batch: Batch) -> Iterator[Table]:
    task = module.datamodule.fit_task
    rewards = module.rewards(texts, batch, task)
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


class _Watch(PoolReader):
    """A reader that notes how many tokens of the first sample it takes in, pass by pass."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.prompt_tokens = 0
        self.steps: list[bool] = []

    def read_prompt(self, counted: Tensor) -> None:
        self.prompt_tokens = int(counted[0].sum())
        super().read_prompt(counted)

    def read_step(self, counted: Tensor, text: Tensor, samples: Tensor) -> None:
        self.steps.append(bool(counted[samples == 0].any()))
        super().read_step(counted, text, samples)


def _positions(module: CorrSteer, batch: Batch, watch: _Watch) -> Table:
    """What was read in the first sample, and what steering changes in it, both observed."""
    passes = _steered_positions(module, batch)
    has_prefill = batch.attention_mask[0].sum() > 1
    steps = passes[1:] if has_prefill else passes
    table = Table(title="Positions read and steered in the first sample")
    for heading in ("pass", "tokens", "read", "steered"):
        table.add_column(heading)
    if has_prefill:
        tokens, steered = passes[0]
        table.add_row("prefill", f"{tokens} of the prompt", str(watch.prompt_tokens or "none"), steered)
    for step, ((_, steered), read) in enumerate(zip(steps, watch.steps, strict=False)):
        what = "last of the prompt" if step == 0 else f"generated token {step}"
        table.add_row(f"decoding step {step}", what, "yes" if read else "no (the answer ends here)", steered)
    if len(watch.steps) > len(steps):
        table.add_row(f"... to step {len(watch.steps) - 1}", "", "", "")
    return table


def _steered_positions(module: CorrSteer, batch: Batch) -> list[tuple[int, str]]:
    """Tokens of each forward pass over the first sample, and which of them a vector changes."""
    site = next(iter(module.saes.values())).site
    vector = {site: torch.ones(module.llm.config.hidden_size)}
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}

    def note(when: str, hidden: Tensor) -> None:
        seen[when].append(hidden[-1].clone())

    first = _first(module, batch)
    steered = SteeringVectors.stack([{}, vector], module.schedule)
    with ExitStack() as stack:
        stack.callback(site.hook(module.llm.model, partial(note, "before")).remove)
        # The decoder adds its own hooks last; those that look at the result come after them.
        decoder = Decoder(module.llm, min(STEPS, module.datamodule.fit_task.max_new_tokens))
        # Whatever is said, go on to say something.
        decoder.end = decoder.end[:0]
        decoder.compare(first, _Observed(steered, site, partial(note, "after")), branches=False)
    found = []
    after = iter(seen["after"])
    unsteered = len(seen["before"]) - len(seen["after"])
    for i, before in enumerate(seen["before"]):
        changed = torch.zeros(len(before), dtype=torch.bool)
        if i >= unsteered:
            changed = (next(after) != before).any(-1)
        names = ("yes", "no") if len(before) == 1 else ("all", "none")
        found.append((len(before), names[0] if changed.all() else "the last" if changed.any() else names[1]))
    return found


class _Observed:
    """Steering variants whose effect at a site is shown to a function."""

    def __init__(self, variants: SteeringVectors, site: Site, note: Any) -> None:
        self.variants, self.site, self.note = variants, site, note

    def __len__(self) -> int:
        return len(self.variants)

    @property
    def most_together(self) -> int | None:
        return self.variants.most_together

    def described(self, variant: int) -> str | None:
        return self.variants.described(variant)

    @property
    def changes_prompt(self) -> bool:
        return self.variants.changes_prompt

    def groups(self, size: int) -> Iterator["_Observed"]:
        for group in self.variants.groups(size):
            yield _Observed(group, self.site, self.note)

    def attached(self, model: Any, run: Run | None = None) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self.variants.attached(model, run))
        stack.callback(self.site.hook(model, self.note).remove)
        return stack


def _first(module: CorrSteer, batch: Batch) -> Batch:
    ids, mask = module.datamodule.collate(batch.examples[:1], module.datamodule.fit_task)
    one = Batch(ids, mask, batch.weight[:1], batch.examples[:1], batch.rows[:1], batch.end)
    return one.to(batch.input_ids.device)


def _parts(module: CorrSteer, measured: dict[int, Alignment]) -> Table:
    model = module.llm.model
    table = Table(
        title="Parts",
        caption="variance explained and L0 on text tokens of the first batch; expected: what the publishers say",
    )
    for heading in ("part", "site", "dtype", "size", "explained %", "L0 (expected)", "verdict"):
        table.add_column(heading, overflow="fold")
    parameters = sum(p.numel() for p in model.parameters())
    devices = {str(p.device) for p in model.parameters()}
    dtype = str(model.dtype).removeprefix("torch.")
    table.add_row(module.llm.name, "", f"{dtype} on {', '.join(sorted(devices))}", f"{parameters / 1e6:.1f} M")
    for layer, sae in module.saes.items():
        fit = measured[layer]
        expected = f" ({fit.expected['l0']:.0f})" if "l0" in fit.expected else ""
        table.add_row(
            sae.name, str(sae.site), f"{str(sae.sae.dtype).removeprefix('torch.')} on {sae.sae.device}",
            f"{sae.d_sae} features", percent(fit.explained), f"{fit.l0:.0f}{expected}", fit.verdict,
        )  # fmt: skip
    return table


def _memory(module: CorrSteer, batch: Batch) -> Table:
    """Bytes of what stays, and of the largest pass of a validation."""
    model, decoder, branches = module.llm.model, module.decoder, module.llm.abilities.get("branches", False)
    variants = decoder.together(batch, _variants(module), branches)
    prompts = batch.input_ids.numel() * module.llm.cache_size_per_token * model.dtype.itemsize
    weights = [p for sae in module.saes.values() for p in sae.sae.parameters() if p.device == sae.sae.device]
    pooled = len(batch.examples) * len(module.pools) * sum(sae.d_sae for sae in module.saes.values()) * 4
    parts = {
        "language model": sum(p.nbytes for p in model.parameters()),
        "SAEs": sum(p.nbytes for p in weights),
        "running sums": module.sums.size,
        "pooled activations": pooled,
        f"keys and values of {len(batch.examples)} prompts": prompts,
        f"{variants} variants of them at once": variants * decoder.size_of_variant(batch, branches),
    }
    facts = {name: _size(size) for name, size in parts.items()}
    facts["predicted in all"] = f"{_size(sum(parts.values()))}, and the activations of one block"
    if torch.cuda.is_available():
        facts["measured peak so far"] = _size(torch.cuda.max_memory_allocated())
    return _facts("Memory per process", facts)


def _variants(module: CorrSteer) -> int:
    """The unsteered model and the candidates of a validation."""
    signs = 2 if module.hparams["sign"] == "both" else 1
    return 1 if module.hparams["rule"] == "all" else 1 + signs * len(module.saes)


def _time(module: CorrSteer, datamodule: TaskDataModule, batch_size: int, fit_seconds: float) -> Table:
    """Seconds per batch as measured, and what they add up to; generation may end earlier or later than here."""
    batches = len(datamodule.train_dataloader())
    facts = {"fit": f"{batches} batches of {batch_size}, {fit_seconds:.2f} s each: {_duration(batches * fit_seconds)}"}
    if module.task.generates:
        facts["validation"] = _validation_time(module, datamodule)
    return _facts("Time per process, from the first batch", facts)


def _validation_time(module: CorrSteer, datamodule: TaskDataModule) -> str:
    loader = datamodule.val_dataloader()
    batch = next(iter(loader)).to(module.trainer.strategy.root_device)
    variants = _variants(module)
    began = time.perf_counter()
    # Vectors of zero cost what others do.
    vectors = {sae.site: torch.zeros(module.llm.config.hidden_size) for sae in module.saes.values()}
    module.decoder.compare(batch, SteeringVectors.stack([vectors] * variants, module.schedule))
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
