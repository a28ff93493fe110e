"""Generations that go on together: as branches of one sequence per prompt, or as rows of a batch.

In a forward pass over branches every prompt stands once, with one new token per branch. A mask lets each branch see
the prompt and its own tokens alone, so a branch costs its new tokens and no memory for its prompt.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from corrsteer_pl.models.decoding.cache import FullCache, picked
from corrsteer_pl.models.llm import LanguageModel, positions_of


class Run(Protocol):
    """Generations that go on together, each at its place in a chunk of tokens.

    Attributes:
        variant: Which variant stands at each place, ``(rows or 1, places of a row)``.
    """

    variant: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        """Read one more token at every place, ``(rows, places)``; the logits ``(..., vocabulary)`` after it."""

    def drop_ended(self, running: Tensor) -> Tensor:
        """Drop generations that have ended and go on with those that are ``running (rows, places)``, in fewer places.

        Returns:
            Where those that stand at the new places stood before, counted along rows and then places.
        """


class Branches:
    """K branches of every prompt; a place is a branch.

    Args:
        llm: The model.
        cache: Keys and values of every prompt token but the last; what other branches added to it is forgotten.
        attention_mask: ``(batch, prompt)``, 0 on padding.
        count: Number of branches K.
    """

    def __init__(self, llm: LanguageModel, cache: FullCache, attention_mask: Tensor, count: int) -> None:
        self.llm, self.cache = llm, cache
        cache.rewind(attention_mask.shape[1] - 1)
        self.visible = attention_mask[:, None, :-1].bool().expand(-1, count, -1)  # of every key, (B, K, P - 1)
        positions = positions_of(attention_mask)
        self.positions = positions[:, :-1]  # of every key, (B, P - 1) and K more at each step
        self.next = positions[:, -1:]  # (B, 1)
        self.variant = torch.arange(count, device=positions.device).unsqueeze(0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Read one more token of every branch, ``(batch, K)``; the logits ``(batch, K, vocabulary)`` after it."""
        batch, count = tokens.shape
        positions = self.next.expand(batch, count)
        own = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        self.visible = torch.cat([self.visible, own], dim=-1)
        self.positions = torch.cat([self.positions, positions], dim=1)
        logits = self.llm.forward(tokens, self._mask(), positions, self.cache, last=count)
        self.next = self.next + 1
        return logits

    def drop_ended(self, running: Tensor) -> Tensor:
        """Drop samples and branches that have ended; a sample with few running branches keeps ended ones as filling."""
        rows = running.any(1).nonzero()[:, 0]
        running, count = running[rows], running.shape[1]
        # Those that run come first, in their order.
        places = running.int().argsort(dim=1, descending=True, stable=True)[:, : int(running.sum(1).max())]
        keys = self.visible.shape[-1]
        self.cache = self.cache.picked(rows)
        self.visible = self.visible[rows].gather(1, places.unsqueeze(-1).expand(-1, -1, keys))
        self.variant = self.variant.expand(len(self.positions), -1)[rows].gather(1, places)
        self.positions, self.next = self.positions[rows], self.next[rows]
        return rows.unsqueeze(1) * count + places

    def _mask(self) -> Any:
        """As the model takes it: one for all layers, or one for each kind of layer."""
        config = self.llm.config
        window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
        full = _additive(self.visible, self.llm)
        if window is None or kinds == {"full_attention"}:
            return full
        near = self.next.unsqueeze(-1) - self.positions.unsqueeze(1) < window  # (B, 1, keys)
        sliding = _additive(self.visible & near, self.llm)
        return {"full_attention": full, "sliding_attention": sliding} if kinds else sliding


class BatchRows:
    """Generations that are rows of a batch; a row has one place.

    Args:
        llm: The model.
        cache: Keys and values of every prompt token but the last, which is written to.
        attention_mask: ``(rows, prompt)``, 0 on padding.
        variants: How many rows there are of each prompt, side by side.
        additive: Whether masks are additive ones, ``(rows, 1, 1, keys)``: transformers looks at the values of others at
            each step, for which a GPU would have to be waited for.
    """

    def __init__(
        self,
        llm: LanguageModel,
        cache: DynamicCache,
        attention_mask: Tensor,
        variants: int = 1,
        additive: bool = False,
    ) -> None:
        self.llm, self.cache, self.mask, self.additive = llm, cache, attention_mask, additive
        self.hides = not bool(attention_mask.all())
        self.next = positions_of(attention_mask)[:, -1:]  # (rows, 1)
        self.variant = (torch.arange(len(attention_mask), device=attention_mask.device) % variants).unsqueeze(1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Read one more token of every row, ``(rows, 1)``; the logits ``(rows, 1, vocabulary)`` after it."""
        logits = self.llm.forward(tokens, self._mask(), self.next, self.cache)
        self.next = self.next + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return logits

    def drop_ended(self, running: Tensor) -> Tensor:
        """Drop the rows that have ended."""
        rows = running[:, 0].nonzero()[:, 0]
        self.cache = picked(self.cache, rows)
        self.mask, self.next, self.variant = self.mask[rows], self.next[rows], self.variant[rows]
        return rows.unsqueeze(1)

    def _mask(self) -> Tensor | None:
        if not self.hides:
            return None
        return _additive(self.mask.bool().unsqueeze(1), self.llm) if self.additive else self.mask


def _additive(visible: Tensor, llm: LanguageModel) -> Tensor:
    """A mask ``(batch, 1, places, keys)`` to add to the scores of attention, of what each place sees: itself, at least.

    Minus infinity gives a weight of exactly 0 whatever the score is; the lowest finite number would not.
    """
    mask = torch.zeros(visible.shape, dtype=llm.model.dtype, device=visible.device)
    return mask.masked_fill(~visible, -torch.inf).unsqueeze(1)
