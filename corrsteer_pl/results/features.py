"""What selected features do: the tokens that they make likelier, and the snippets that activate them most."""

from dataclasses import asdict, dataclass
from heapq import nlargest
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae_training.activations import batches, is_text, trunk
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
def snippets(module: CorrSteer, feature: Feature, rows: list[list[int]]) -> list[Seen]:
    """The most activating snippets of texts, the strongest of each text."""
    sae, llm = module.saes[feature.layer], module.llm
    best: dict[str, float] = {}
    for batch in batches(llm, rows):
        caught: list[Tensor] = []
        with sae.site.hook(llm.model, caught.append):
            trunk(llm, batch)
        values = sae.encode(caught[0])[..., feature.index].cpu().masked_fill(~is_text(llm, batch).cpu(), 0.0)
        for padded_ids, length, some in zip(batch.input_ids, batch.attention_mask.sum(1), values, strict=True):
            ids, at = padded_ids[:length].tolist(), int(some.argmax())
            text = llm.tokenizer.decode(ids[max(0, at - BEFORE) : at])
            marked = f"{text}«{llm.tokenizer.decode([ids[at]])}»{llm.tokenizer.decode(ids[at + 1 : at + 1 + AFTER])}"
            best[marked] = max(best.get(marked, 0.0), some[at].item())
    top = nlargest(SNIPPETS, best, key=best.__getitem__)
    return [Seen(best[text], text) for text in top if best[text] > 0]


def describe_feature(module: CorrSteer, feature: Feature, rows: list[list[int]]) -> dict[str, Any]:
    """A feature for the page."""
    direction = module.saes[feature.layer].direction(feature.index)
    sign = 1 if feature.coefficient >= 0 else -1
    return {
        "layer": feature.layer,
        "index": feature.index,
        "correlation": feature.correlation,
        "coefficient": feature.coefficient,
        "validation_reward": feature.validation_reward,
        "likelier": likelier_tokens(module.llm, sign * direction),
        "snippets": [asdict(seen) for seen in snippets(module, feature, rows)],
    }
