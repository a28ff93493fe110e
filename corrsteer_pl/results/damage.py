"""What a change to the model does beside the task: harmless answers, and the loss on plain text."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.llm import LanguageModel, positions_of
from corrsteer_pl.models.sae_training.texts import padded
from corrsteer_pl.models.sites import Site

# Tokens read of each text.
TEXT_TOKENS = 256
# Places of a forward pass: each has a logit for every word of the vocabulary.
PLACES = 512


@torch.no_grad()
def text_loss(llm: LanguageModel, texts: list[str], vectors: dict[Site, Tensor]) -> float:
    """Mean loss of the next token of texts in nats, with vectors added at every position."""
    rows = [ids[:TEXT_TOKENS] for ids in llm.tokenizer(texts)["input_ids"]]
    total, count = 0.0, 0
    for batch in padded([row for row in rows if len(row) > 1], PLACES, llm.device):
        steered = SteeringVectors(vectors, Schedule("all")).attached(llm.model) if vectors else nullcontext()
        ids, mask = batch.input_ids, batch.attention_mask
        with steered:
            logits = llm.forward(ids, mask, positions_of(mask), last=ids.shape[1])[:, :-1]
        wanted = mask[:, 1:].bool()
        losses = nn.functional.cross_entropy(logits[wanted].float(), ids[:, 1:][wanted], reduction="sum")
        total, count = total + losses.item(), count + int(wanted.sum())
    return total / count
