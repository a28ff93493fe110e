"""Greedy answers under several variants of a model, as they are written."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.decoding.decode import Intervention
from corrsteer_pl.models.llm import LanguageModel, positions_of


@torch.no_grad()
def stream(
    llm: LanguageModel, prompts: Sequence[Sequence[int]], variants: Intervention, max_new_tokens: int
) -> Iterator[list[str]]:
    """The answers so far after each new token, one for each variant; side by side where variants can share a pass.

    Args:
        llm: The language model.
        prompts: Tokens of a prompt for each variant.
        variants: The variants.
        max_new_tokens: How many tokens an answer has at most; fewer if the model's context ends before.

    Raises:
        UserError: A prompt leaves no room for an answer.
    """
    longest = max(map(len, prompts))
    room = llm.context + 1 - longest
    if room < 1:
        raise UserError(
            f"the prompt, with what was said before, has {longest} tokens, but {llm.name} reads at most {llm.context}."
        )
    together = len(variants) if variants.most_together is None else 1
    texts = [""] * len(variants)
    for number, group in enumerate(variants.groups(together)):
        first = number * together
        with group.attached(llm.model):
            for some in _answers(llm, prompts[first : first + together], min(max_new_tokens, room)):
                texts[first : first + together] = some
                yield list(texts)


def _answers(llm: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[str]]:
    """The answers to some prompts after each new token, until all have ended."""
    ids, mask = (tensor.to(llm.device) for tensor in llm.left_pad(prompts))
    positions, cache = positions_of(mask), DynamicCache(config=llm.config)
    end = torch.tensor(llm.eos_token_ids, device=ids.device)
    lengths = torch.zeros(len(ids), dtype=torch.long)
    ended = torch.zeros(len(ids), dtype=torch.bool)
    tokens: list[Tensor] = []
    for _ in range(max_new_tokens):
        chosen = llm.forward(ids, mask, positions, cache)[:, -1].argmax(-1)
        ended |= torch.isin(chosen, end).cpu()
        if ended.all():
            break
        lengths += ~ended
        tokens.append(chosen)
        yield llm.decode(torch.stack(tokens, 1), lengths)
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
