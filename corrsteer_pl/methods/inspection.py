"""What ``doctor`` shows of a method, and of a steering one: positions read and steered, and its autoencoders."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.data.batches import BUCKET
from corrsteer_pl.evaluation.tables import percent
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.accumulation.blocks import SparseRows
from corrsteer_pl.models.alignment import Alignment
from corrsteer_pl.models.decoding.branches import Run
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae import SparseAutoencoder
from corrsteer_pl.models.sites import Site

# Decoding steps that are shown; the others are like the last of them.
STEPS = 4


class Inspection:
    """What ``doctor`` shows of a method that has been set up for a fit.

    Args:
        method: The method.
    """

    def __init__(self, method: Any) -> None:
        self.method = method

    def rehearse(self, batch: Batch) -> list[str]:
        """Do the work of a fit on one batch, which ``doctor`` times; the unchanged model's answers."""
        return self.method.fit_answering.observe(batch)

    def tables(self, batch: Batch) -> Iterator[Table]:
        """What else there is to show of the batch, after :meth:`rehearse`."""
        yield from ()

    def held(self, batch: Batch) -> dict[str, int]:
        """Bytes that the method's parts take beside the model, by name."""
        return {}

    @property
    def variants(self) -> int:
        """How many variants of the model a validation compares, the unchanged one included."""
        return 2


class SteeringInspection(Inspection):
    """What ``doctor`` shows of a method that steers: which positions are read and steered."""

    def rehearse(self, batch: Batch) -> list[str]:
        """Answers, while activations are read."""
        self.watch = Watch(self.method.encoders, self.method.pools)
        return self.method.fit_answering.observe(batch, self.watch)

    def tables(self, batch: Batch) -> Iterator[Table]:
        """Positions read and steered in the first sample."""
        method = self.method
        if method.datamodule.fit_task.generates:
            site = next(iter(method.encoders.values())).site
            yield positions_table(method.llm, method.fit_answering.decoder, batch, self.watch, site, method.schedule)

    def held(self, batch: Batch) -> dict[str, int]:
        """Bytes of sums and of what is pooled."""
        widths = sum(encoder.d_sae for encoder in self.method.encoders.values())
        pooled = len(batch.examples) * len(self.method.pools) * widths * 4
        return {"running sums": self.method.sums.size, "pooled activations": pooled}

    @property
    def variants(self) -> int:
        """The unsteered model and the candidates of a validation, of which every layer has one for each sign."""
        signs = 2 if self.method.hparams.get("sign") == "both" else 1
        return 1 if self.method.hparams["rule"] == "all" else 1 + signs * len(self.method.encoders)


class SearchInspection(SteeringInspection):
    """What ``doctor`` shows of CorrSteer: also how well the SAEs fit, and what its search takes."""

    def tables(self, batch: Batch) -> Iterator[Table]:
        """Positions, and the autoencoders."""
        yield from super().tables(batch)
        if measured := self.method.alignments():
            yield parts_table(self.method.saes, measured)

    def held(self, batch: Batch) -> dict[str, int]:
        """Bytes of SAEs, sums, pooled activations, and of those that wait in a block."""
        own = [sae.sae for sae in self.method.saes.values() if isinstance(sae, SparseAutoencoder)]
        weights = [p for sae in own for p in sae.parameters() if p.device == sae.device]
        held = super().held(batch)
        held["running sums"] += self.method.search.size
        return {"SAEs": sum(p.nbytes for p in weights), **held, "samples that wait": self._waiting(len(batch.examples))}

    def _waiting(self, samples: int) -> int:
        """Bytes of a full block, if all samples are as active as those of the batch."""
        return sum(SparseRows.of(pool).nbytes for pool in self.watch.values.values()) * BUCKET // samples


class Watch(PoolReader):
    """A reader that notes how many tokens of the first sample it takes in, pass by pass."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.prompt_tokens = 0
        self.steps: list[bool] = []

    def read_prompt(self, counted: Tensor) -> None:
        """Take in the prompt, and note how many of the first sample's tokens count."""
        self.prompt_tokens = int(counted[0].sum())
        super().read_prompt(counted)

    def read_step(self, counted: Tensor, text: Tensor, samples: Tensor) -> None:
        """Take in a decoding step, and note whether it counts for the first sample."""
        self.steps.append(bool(counted[samples == 0].any()))
        super().read_step(counted, text, samples)


def positions_table(
    llm: LanguageModel, decoder: Decoder, batch: Batch, watch: Watch, site: Site, schedule: Schedule
) -> Table:
    """What was read in the first sample, and what steering changes in it, both observed."""
    passes = _steered_positions(llm, decoder.max_new_tokens, batch, site, schedule)
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


def _steered_positions(
    llm: LanguageModel, max_new_tokens: int, batch: Batch, site: Site, schedule: Schedule
) -> list[tuple[int, str]]:
    """Tokens of each forward pass over the first sample, and which of them a vector changes."""
    vector = {site: torch.ones(llm.config.hidden_size)}
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}

    def note(when: str, hidden: Tensor) -> None:
        seen[when].append(hidden[-1].clone())

    first = _first(batch)
    steered = SteeringVectors.stack([{}, vector], schedule)
    with ExitStack() as stack:
        stack.callback(site.hook(llm.model, partial(note, "before")).remove)
        # Hooks run in the order they are added: before steering, steering (by the decoder), after steering.
        decoder = Decoder(llm, min(STEPS, max_new_tokens))
        # Never stop at an end-of-sequence token, so that every step can be shown.
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


def _first(batch: Batch) -> Batch:
    """The first sample alone, without padding."""
    kept = batch.attention_mask[0].bool()
    ids, mask = batch.input_ids[:1, kept], batch.attention_mask[:1, kept]
    return Batch(ids, mask, batch.weight[:1], batch.examples[:1], batch.rows[:1], batch.counted)


def parts_table(saes: Mapping[int, SparseAutoencoder], measured: Mapping[int, Alignment]) -> Table:
    """The autoencoders, and how well they fit the model."""
    table = Table(
        title="SAEs",
        caption="variance explained and L0 on text tokens of the first batch; expected: what the publishers say",
    )
    for heading in ("SAE", "site", "dtype", "size", "explained %", "L0 (expected)", "verdict"):
        table.add_column(heading, overflow="fold")
    for layer, sae in saes.items():
        fit = measured[layer]
        expected = f" ({fit.expected['l0']:.0f})" if "l0" in fit.expected else ""
        table.add_row(
            sae.name, str(sae.site), f"{str(sae.sae.dtype).removeprefix('torch.')} on {sae.sae.device}",
            f"{sae.d_sae} features", percent(fit.explained), f"{fit.l0:.0f}{expected}", fit.verdict,
        )  # fmt: skip
    return table
