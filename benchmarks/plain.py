"""The plain ways: small, readable, and right. What they answer is what ours has to answer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.world import Candidate, World, is_even
from corrsteer_pl.models.sites import decoder_blocks


@contextmanager
def hooked(model: Any, hooks: dict[int, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Change, or look at, the outputs of some blocks."""
    with ExitStack() as stack:
        for layer, change in hooks.items():
            hook = decoder_blocks(model)[layer].register_forward_hook(lambda _m, _a, out, change=change: change(out))
            stack.callback(hook.remove)
        yield


def adds(vector: Tensor) -> Callable[[Tensor], Tensor]:
    """Add a vector at the last position of a chunk."""
    return lambda hidden: torch.cat([hidden[:, :-1], hidden[:, -1:] + vector], dim=1)


def generate(world: World, ids: Tensor, new: int) -> list[str]:
    """Hugging Face ``generate``."""
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new}
    tokens = world.llm.model.generate(ids, **options)
    return world.llm.tokenizer.batch_decode(tokens[:, ids.shape[1] :])


def plain_batched(world: World, prompts: Any, candidates: Sequence[Candidate], new: int, size: int = 8) -> list[list]:
    """Each candidate by itself, in batches, every prompt read again."""
    found = []
    for vectors in world.vectors(candidates):
        with hooked(world.llm.model, {site.layer: adds(vector) for site, vector in vectors.items()}):
            found.append([text for ids in prompts.input_ids.split(size) for text in generate(world, ids, new)])
    return found


def plain_collection(world: World, prompts: Any) -> tuple[dict[int, np.ndarray], list[float]]:
    """Activations ``(samples, d_sae)`` by layer and rewards, one sample at a time, one new token each."""
    activations: dict[int, list] = {layer: [] for layer in world.saes}
    rewards = []

    def reads(layer: int) -> Callable[[Tensor], None]:
        return lambda hidden: activations[layer].append(world.saes[layer].encode(hidden[:, -1])[0].numpy())

    with hooked(world.llm.model, {layer: reads(layer) for layer in world.saes}):
        rewards = [is_even(generate(world, ids, 1)[0]) for ids in prompts.input_ids.split(1)]
    return {layer: np.stack(rows) for layer, rows in activations.items()}, rewards


def plain_candidates(activations: dict[int, np.ndarray], rewards: list[float]) -> list[Candidate]:
    """Each layer's top positive and negative feature by correlation, with the mean activation on right samples."""
    right, found = np.array(rewards) > 0, []
    for layer, x in activations.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            centred, y = x.astype(float) - x.mean(0, dtype=float), np.array(rewards) - np.mean(rewards)
            r = np.nan_to_num(centred.T @ y / np.sqrt((centred**2).sum(0) * (y**2).sum()))
        for index, sign in ((int(r.argmax()), 1), (int(r.argmin()), -1)):
            if sign * r[index] > 0:
                found.append((layer, index, sign * abs(float(x[right, index].mean(dtype=float)))))
    return found


def plain_passes(world: World, prompts: Any, candidates: Sequence[Candidate], passes: Sequence[int]) -> list[list[str]]:
    """One pass over the prompts for each number: 0 unsteered, n candidate n.

    One sample at a time, and the SAE is evaluated within the hook that steers.
    """

    def steers(layer: int, index: int, coefficient: float) -> Callable[[Tensor], Tensor]:
        sae = world.saes[layer]

        def hook(hidden: Tensor) -> Tensor:
            sae.encode(hidden)  # what the feature does by itself is known, and not used
            return adds(coefficient * sae.direction(index))(hidden)

        return hook

    found = []
    for number in passes:
        chosen = [candidates[number - 1]] if number else []
        with hooked(world.llm.model, {layer: steers(layer, index, c) for layer, index, c in chosen}):
            found.append([generate(world, ids, 1)[0] for ids in prompts.input_ids.split(1)])
    return found


def plain_reference(world: World, prompts: Any, candidates: Sequence[Candidate]) -> list[list[str]]:
    """As the public implementation does: unsteered, each candidate, and each layer's better candidate once more."""
    found = plain_passes(world, prompts, candidates, range(len(candidates) + 1))
    better: dict[int, int] = {}
    for number, (layer, _, _) in enumerate(candidates, start=1):
        if layer not in better or sum(map(is_even, found[number])) > sum(map(is_even, found[better[layer]])):
            better[layer] = number
    plain_passes(world, prompts, candidates, list(better.values()))
    return found


def plain_fit_pass(world: World, prompts: Any, size: int) -> tuple[dict[int, Tensor], Tensor]:
    """Generation in batches, and all residuals of a layer encoded in one product.

    Returns:
        Activations ``(samples, d_sae)`` by layer, and rewards ``(samples,)`` float64.
    """
    residuals: dict[int, list[Tensor]] = {layer: [] for layer in world.saes}
    keeps = {layer: (lambda hidden, kept=kept: kept.append(hidden[:, -1])) for layer, kept in residuals.items()}
    with hooked(world.llm.model, keeps):
        texts = [text for ids in prompts.input_ids.split(size) for text in generate(world, ids, 1)]
    rewards = torch.tensor([is_even(text) for text in texts], dtype=torch.float64)
    return {layer: world.saes[layer].encode(torch.cat(kept)) for layer, kept in residuals.items()}, rewards


@torch.no_grad()
def plain_trunk(world: World, texts: Tensor, layer: int, size: int = 16) -> Tensor:
    """The output of a block for texts ``(texts, tokens)``, by passes without the head."""
    found: list[Tensor] = []
    with hooked(world.llm.model, {layer: found.append}):
        for ids in texts.split(size):
            world.llm.model.get_decoder()(ids, use_cache=False)
    return torch.cat(found)
