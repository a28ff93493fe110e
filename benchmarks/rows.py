"""The rows of the table: each measures our way and a plain way on the same inputs, and compares the answers."""

import operator
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.world import BATCH, World, fit, fit_pass, is_even, make_world, no_sums, timed
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.accumulation.search import Search
from corrsteer_pl.methods.accumulation.sums import Accumulator
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.sae_training.activations import ROUND, Activations
from corrsteer_pl.models.sites import Site

# Layer and index of candidates, their coefficients, and the rewards of the unsteered model and of each.
Fitted = tuple[list, list[float], list[float]]


@dataclass(frozen=True)
class Row:
    """One line of the table: medians of the seconds of both ways, and of the ratios of neighbours in time."""

    work: str
    against: str
    ours: float
    plain: float
    ratio: float
    wanted: str
    agree: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    work: str,
    against: str,
    wanted: float,
    repeats: int,
    ours: Callable[[], Any],
    other: Callable[[], Any],
    same: Callable[[Any, Any], bool] = operator.eq,
    faster: bool = True,
) -> Row:
    """Take both in turn; the ratio says how many times faster ours is, or how many times as long it takes.

    It is the median of the pairs' ratios: what slows the machine for a while slows both of a pair.
    """
    pairs = [(timed(ours), timed(other)) for _ in range(repeats)]
    seconds = [(mine, theirs) for (mine, _), (theirs, _) in pairs]
    ratio = statistics.median(theirs / mine if faster else mine / theirs for mine, theirs in seconds)
    mine, theirs = map(statistics.median, zip(*seconds, strict=True))
    agree = all(same(answer, expected) for (_, answer), (_, expected) in pairs)
    limit = f"at {'least' if faster else 'most'} {wanted:g}"
    return Row(work, against, mine, theirs, ratio, limit, agree)


def compare(world: World, prompts: Any, candidates: list, new: int) -> list[list[str]]:
    """Our way of testing candidates, a new decoder each time."""
    return Decoder(world.llm, new).compare(prompts, SteeringVectors.stack(world.vectors(candidates), Schedule()))


def rows(options: Namespace) -> Iterator[Row]:
    """Measure row after row."""
    n, tokens, repeats = options.prompts, options.tokens, options.repeats
    world = make_world(options.layers, options.width, options.d_sae, min(7, options.layers))
    prompts, fourteen = world.prompts(n, tokens), world.candidates(14)
    title = f"validation: {n} prompts x {tokens} tokens, baseline + 14 candidates, 1 new token"

    def ours() -> list[list[str]]:
        return compare(world, prompts, fourteen, 1)

    compare(world, world.prompts(2, 16), fourteen, 1)  # what is done once per model is not measured
    yield measure(title, "plain_batched", 11, repeats, ours, lambda: plain.plain_batched(world, prompts, fourteen, 1))
    yield measure(title, "plain_reference", 14, repeats, ours, lambda: plain.plain_reference(world, prompts, fourteen))
    few, many = world.prompts(max(2, n // 3), tokens), world.candidates(52)
    yield measure(
        f"validation: {len(few.input_ids)} prompts x {tokens} tokens, baseline + 52 candidates, 1 new token",
        "plain_batched", 32, repeats,
        lambda: compare(world, few, many, 1), lambda: plain.plain_batched(world, few, many, 1),
    )  # fmt: skip
    short = world.prompts(n, max(8, tokens * 100 // 330))
    new = 32 if tokens > 100 else 4
    yield measure(
        f"validation: {n} prompts x {short.input_ids.shape[1]} tokens, baseline + 14 candidates, {new} new tokens",
        "plain_batched", 3.4, repeats,
        lambda: compare(world, short, fourteen, new), lambda: plain.plain_batched(world, short, fourteen, new),
    )  # fmt: skip
    yield _whole_fit(world, options)
    yield measure(
        f"test: baseline + steered, {n} prompts x {tokens} tokens, 1 new token",
        "two passes of plain_batched", 1.8, repeats,
        lambda: compare(world, prompts, fourteen[:1], 1),
        lambda: plain.plain_batched(world, prompts, fourteen[:1], 1),
    )  # fmt: skip
    prefix = tokens * 500 // 330
    shots = world.prompts(n, max(8, tokens * 100 // 330), prefix)
    yield measure(
        f"few-shot: {n} prompts of {shots.input_ids.shape[1] - prefix} tokens after a common prefix of {prefix}",
        "plain_batched, prefix and all", 2, repeats,
        lambda: [Decoder(world.llm, 1).generate(shots)], lambda: plain.plain_batched(world, shots, [], 1),
    )  # fmt: skip
    yield from _fit_passes(world, options)
    yield _permuted_rewards(world, options)
    yield _steered_decoding(world, options)
    yield _sae_training_stream(world, options)


def _whole_fit(world: World, options: Namespace) -> Row:
    fitted, validated = (
        world.prompts(options.fit_prompts, options.tokens),
        world.prompts(options.prompts, options.tokens),
    )

    def ours() -> Fitted:
        with tempfile.TemporaryDirectory() as folder:
            found = fit(world, folder, fitted, validated).selection
        rewards = [found.baseline_reward, *(f.validation_reward for f in found.candidates)]
        return [(f.layer, f.index) for f in found.candidates], [f.coefficient for f in found.candidates], rewards

    def other() -> Fitted:
        candidates = plain.plain_candidates(*plain.plain_collection(world, fitted))
        texts = plain.plain_reference(world, validated, candidates)
        rewards = [sum(map(is_even, some)) / len(some) for some in texts]
        return [candidate[:2] for candidate in candidates], [abs(c[2]) for c in candidates], rewards

    def same(answer: Fitted, expected: Fitted) -> bool:
        return answer[::2] == expected[::2] and np.allclose(np.abs(answer[1]), expected[1], rtol=1e-4)

    candidates = 2 * len(world.saes)
    title = f"whole fit: {options.fit_prompts} + {options.prompts} prompts x {options.tokens} tokens"
    return measure(f"{title}, {candidates} candidates", "plain_reference", 5, options.repeats, ours, other, same)


def _fit_passes(world: World, options: Namespace) -> Iterator[Row]:
    prompts = world.prompts(options.fit_prompts, options.tokens)
    work = f"fit pass: {options.fit_prompts} prompts x {options.tokens} tokens"

    def ours(size: int) -> Accumulator:
        sums = no_sums(world)
        fit_pass(world, Decoder(world.llm, 1), prompts.input_ids.split(size), sums)
        sums.merge()
        return sums

    def same(answer: Accumulator, expected: tuple[dict, Any]) -> bool:
        activations = {layer: torch.as_tensor(x).double() for layer, x in expected[0].items()}
        rewards = torch.as_tensor(expected[1], dtype=torch.float64)
        found = [(answer.moments(layer, "max"), x) for layer, x in activations.items()]
        pairs = [pair for m, x in found for pair in ((m.x, x.sum(0)), (m.xx, (x**2).sum(0)), (m.xy, rewards @ x))]
        return all(torch.allclose(*pair, rtol=1e-4, atol=1e-3) for pair in pairs)

    yield measure(
        work, "generation, and one product per layer", 1.15, options.repeats,
        lambda: ours(BATCH), lambda: plain.plain_fit_pass(world, prompts, BATCH), same, faster=False,
    )  # fmt: skip
    for size in (1, 2, 4, 8, 16, 32):
        yield measure(
            f"{work}, batches of {size}", "plain_reference, one prompt at a time", 1, options.repeats,
            lambda size=size: ours(size), lambda: plain.plain_collection(world, prompts), same,
        )  # fmt: skip


def _permuted_rewards(world: World, options: Namespace) -> Row:
    prompts = world.prompts(options.fit_prompts, options.tokens)
    widths = {layer: sae.d_sae for layer, sae in world.saes.items()}

    def run(permutations: int | None) -> Accumulator:
        sums = no_sums(world)
        search = None if permutations is None else Search(widths, "max", permutations)
        fit_pass(world, Decoder(world.llm, 1), prompts.input_ids.split(BATCH), sums, search)
        sums.merge()
        return sums

    def same(answer: Accumulator, expected: Accumulator) -> bool:
        return all(map(torch.equal, answer.buffers(), expected.buffers()))

    return measure(
        f"fit pass: {options.fit_prompts} prompts x {options.tokens} tokens, 32 permutations, strongest samples",
        "the same without them", 1.1, 2 * options.repeats + 1,
        lambda: run(32), lambda: run(None), same, faster=False,
    )  # fmt: skip


def _steered_decoding(world: World, options: Namespace) -> Row:
    ids, new = world.prompts(8, 16).input_ids, 32 if options.tokens > 100 else 4
    width, layers = world.llm.config.hidden_size, range(options.layers)
    vectors = {layer: torch.randn(width, generator=world.generator) for layer in layers}
    ours = SteeringVectors({Site(layer, "resid_post"): vector for layer, vector in vectors.items()})
    with plain.hooked(world.llm.model, {layer: plain.adds(vector) for layer, vector in vectors.items()}):
        by_hand = plain.generate(world, ids, new)

    def run(steered: bool) -> list[str]:
        with ours.attached(world.llm.model) if steered else nullcontext():
            return [text for _ in range(4) for text in plain.generate(world, ids, new)]

    return measure(
        f"steered decoding, {options.layers} blocks, {new} new tokens",
        "unsteered decoding", 1.03, 4 * options.repeats + 1,
        lambda: run(True), lambda: run(False),
        lambda steered, unsteered: steered == 4 * by_hand != unsteered, faster=False,
    )  # fmt: skip


def _sae_training_stream(world: World, options: Namespace) -> Row:
    count, length = (128, 128) if options.tokens > 100 else (16, 16)
    texts = world.prompts(count, length).input_ids
    sites = {layer: sae.site for layer, sae in world.saes.items()}

    def ours() -> dict[int, Tensor]:
        stream = Activations(world.llm, sites, texts.tolist(), texts.numel() // ROUND, seed=0)
        batches = list(stream.round())
        return {layer: torch.cat([batch[layer] for batch in batches]) for layer in sites}

    def same(found: dict[int, Tensor], states: Tensor) -> bool:
        # A stream mixes tokens, and leaves out the first of each text, and those that fill no batch.
        expected, layer = states[:, 1:].flatten(0, 1), max(sites)
        apart = torch.cdist(found[layer], expected, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
        return bool((apart < 1e-2).all()) and len(found[layer]) > 0.8 * len(expected)

    return measure(
        f"reading {count} texts x {length} tokens for the training of {len(sites)} SAEs",
        "forward passes of the trunk", 1.25, options.repeats,
        ours, lambda: plain.plain_trunk(world, texts, max(sites)), same, faster=False,
    )  # fmt: skip
