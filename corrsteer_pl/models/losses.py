"""The loss of the next token on texts, while something changes the model."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from corrsteer_pl.models.llm import LanguageModel, positions_of
from corrsteer_pl.models.sae_training.texts import Padded, padded

# Places of a forward pass: each has a logit for every word of the vocabulary.
PLACES = 512


def unchanged(_batch: Padded) -> AbstractContextManager[Any]:
    """Change nothing."""
    return nullcontext()


@torch.no_grad()
def next_token_loss(
    llm: LanguageModel,
    rows: Iterable[Sequence[int]],
    change: Callable[[Padded], AbstractContextManager[Any]] = unchanged,
) -> float:
    """Mean loss of the next token in nats, over all tokens but the first of each text.

    Args:
        llm: The model.
        rows: Tokens of the texts; those of a single token say nothing and are left out.
        change: Gives, for a batch that is about to be read, the context in which the model is another.
    """
    total, count = 0.0, 0
    for batch in padded([row for row in rows if len(row) > 1], PLACES, llm.device):
        ids, mask = batch.input_ids, batch.attention_mask
        with change(batch):
            logits = llm.forward(ids, mask, positions_of(mask), last=ids.shape[1])[:, :-1]
        wanted = mask[:, 1:].bool()
        total += nn.functional.cross_entropy(logits[wanted].float(), ids[:, 1:][wanted], reduction="sum").item()
        count += int(wanted.sum())
    return total / count
