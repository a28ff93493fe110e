"""What selected features do: the tokens that they make likelier, and the snippets that activate them most."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from heapq import nlargest
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae_training.activations import batches, is_text, trunk
from corrsteer_pl.models.sae_training.texts import Padded
from corrsteer_pl.selection import Feature

# Tokens and snippets that are shown, and tokens of a snippet before and after the one that activates the feature.
TOKENS, SNIPPETS, BEFORE, AFTER = 8, 3, 10, 4


@dataclass
class Seen:
    """Where a feature was active: the activation, and the text around it."""

    value: float
    text: str


def likelier_tokens(llm: LanguageModel, direction: Tensor) -> list[str]:
    """The tokens whose logits a direction ``(d_model,)`` raises most, read directly by the head (logit lens)."""
    head = llm.model.get_output_embeddings().weight
    logits = head.float() @ direction.to(head.device, torch.float32)
    return [llm.tokenizer.decode([token]) for token in logits.topk(TOKENS).indices.tolist()]


@torch.no_grad()
def snippets(module: CorrSteer, features: Sequence[Feature], rows: list[list[int]]) -> list[list[Seen]]:
    """The most activating snippets of texts for each feature, the strongest of each text; every text is read once."""
    llm = module.llm
    best: list[dict[str, float]] = [{} for _ in features]
    for batch in batches(llm, rows) if features else ():
        found: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer in {feature.layer for feature in features}:
                stack.callback(module.saes[layer].site.hook(llm.model, partial(found.__setitem__, layer)).remove)
            trunk(llm, batch)
        text = is_text(llm, batch)
        for feature, strongest in zip(features, best, strict=True):
            values = module.saes[feature.layer].encode(found[feature.layer])[..., feature.index]
            _keep_strongest(strongest, llm, batch, values.masked_fill(~text.to(values.device), 0.0).cpu())
    return [
        [Seen(some[text], text) for text in nlargest(SNIPPETS, some, key=some.__getitem__) if some[text] > 0]
        for some in best
    ]


def _keep_strongest(best: dict[str, float], llm: LanguageModel, batch: Padded, values: Tensor) -> None:
    """Note the place of each text at which a feature is strongest, by activations ``(texts, longest)``."""
    for padded_ids, length, some in zip(batch.input_ids, batch.attention_mask.sum(1), values, strict=True):
        ids, at = padded_ids[:length].tolist(), int(some.argmax())
        text = llm.tokenizer.decode(ids[max(0, at - BEFORE) : at])
        marked = f"{text}«{llm.tokenizer.decode([ids[at]])}»{llm.tokenizer.decode(ids[at + 1 : at + 1 + AFTER])}"
        best[marked] = max(best.get(marked, 0.0), some[at].item())


def describe_features(module: CorrSteer, features: Sequence[Feature], rows: list[list[int]]) -> list[dict[str, Any]]:
    """Features for the page."""
    found = snippets(module, features, rows)
    return [_described(module, feature, some) for feature, some in zip(features, found, strict=True)]


def _described(module: CorrSteer, feature: Feature, seen: list[Seen]) -> dict[str, Any]:
    direction = module.saes[feature.layer].direction(feature.index)
    sign = 1 if feature.coefficient >= 0 else -1
    return {
        "layer": feature.layer,
        "index": feature.index,
        "correlation": feature.correlation,
        "coefficient": feature.coefficient,
        "validation_reward": feature.validation_reward,
        "likelier": likelier_tokens(module.llm, sign * direction),
        "snippets": [asdict(some) for some in seen],
    }
