"""Generations that share forward passes: as branches of one sequence per prompt, or as rows of a batch.

With branches, a forward pass has one row per prompt and one new token per branch. The attention mask lets each branch
attend to the prompt and to its own tokens only, so that a branch costs its new tokens and no memory for its prompt.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from corrsteer_pl.models.decoding.cache import FullCache, picked
from corrsteer_pl.models.llm import LanguageModel, positions_of


class Run(Protocol):
    """Generations that share forward passes, each at its place ``(row, column)`` of the new tokens.

    Attributes:
        variant: Which variant stands at each place, ``(rows or 1, places of a row)``.
    """

    variant: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        """Read one more token at every place, ``(rows, places)``; the logits ``(..., vocabulary)`` after it."""

    def drop_ended(self, running: Tensor) -> Tensor:
        """Drop generations that have ended and go on with those that are ``running (rows, places)``, in fewer places.

        Returns:
            The old place of each new one, as an index into the flattened old places.
        """


class Branches:
    """K branches of every prompt; the columns are the branches.

    Args:
        llm: The model.
        cache: Keys and values of every prompt token but the last; tokens that earlier branches appended are removed.
        attention_mask: ``(batch, prompt)``, 0 on padding.
        count: Number of branches K.
    """

    def __init__(self, llm: LanguageModel, cache: FullCache, attention_mask: Tensor, count: int) -> None:
        self.llm, self.cache = llm, cache
        cache.rewind(attention_mask.shape[1] - 1)
        self.visible = attention_mask[:, None, :-1].bool().expand(-1, count, -1)  # per key, (B, K, P - 1)
        positions = positions_of(attention_mask)
        self.positions = positions[:, :-1]  # per key, (B, P - 1) and K more at each step
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
        # Running branches first, in their order.
        places = running.int().argsort(dim=1, descending=True, stable=True)[:, : int(running.sum(1).max())]
        keys = self.visible.shape[-1]
        self.cache = self.cache.picked(rows)
        self.visible = self.visible[rows].gather(1, places.unsqueeze(-1).expand(-1, -1, keys))
        self.variant = self.variant.expand(len(self.positions), -1)[rows].gather(1, places)
        self.positions, self.next = self.positions[rows], self.next[rows]
        return rows.unsqueeze(1) * count + places

    def _mask(self) -> Any:
        """The mask that the model takes: one for all layers, or one for each kind of layer."""
        config = self.llm.config
        window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
        full = _additive(self.visible, self.llm)
        if window is None or kinds == {"full_attention"}:
            return full
        near = self.next.unsqueeze(-1) - self.positions.unsqueeze(1) < window  # (B, 1, keys)
        sliding = _additive(self.visible & near, self.llm)
        return {"full_attention": full, "sliding_attention": sliding} if kinds else sliding


class BatchRows:
    """Generations that are rows of a batch, with one column.

    Args:
        llm: The model.
        cache: Keys and values of prompt tokens, which is written to.
        attention_mask: ``(rows, prompt)``, 0 on padding.
        unread: Prompt tokens ``(rows, n)`` that are not in the cache, read by the first step; None for the last alone.
        variants: How many rows there are of each prompt, side by side.
        additive: Whether masks are additive ones, ``(rows, 1, 1, keys)``: with others, transformers checks their values
            at each step, which forces a GPU sync.
    """

    def __init__(
        self,
        llm: LanguageModel,
        cache: DynamicCache,
        attention_mask: Tensor,
        unread: Tensor | None = None,
        variants: int = 1,
        additive: bool = False,
    ) -> None:
        self.llm, self.cache, self.mask, self.additive, self.unread = llm, cache, attention_mask, additive, unread
        self.hides = not bool(attention_mask.all())
        self.next = positions_of(attention_mask)[:, -1:]  # (rows, 1)
        self.variant = (torch.arange(len(attention_mask), device=attention_mask.device) % variants).unsqueeze(1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Read one more token of every row, ``(rows, 1)``; the logits ``(rows, 1, vocabulary)`` after it."""
        if self.unread is None:
            logits = self.llm.forward(tokens, self._mask(), self.next, self.cache)
        else:
            positions = positions_of(self.mask)[:, -self.unread.shape[1] :]
            logits = self.llm.forward(self.unread, self.mask if self.hides else None, positions, self.cache)
            self.unread = None
        self.next = self.next + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return logits

    def drop_ended(self, running: Tensor) -> Tensor:
        """Drop the rows that have ended."""
        rows = running[:, 0].nonzero()[:, 0]
        self.pick(rows)
        return rows.unsqueeze(1)

    def pick(self, rows: Tensor) -> None:
        """Go on with the given rows, in any number and order."""
        self.cache = picked(self.cache, rows)
        self.mask, self.next, self.variant = self.mask[rows], self.next[rows], self.variant[rows]

    def _mask(self) -> Tensor | None:
        if not self.hides:
            return None
        return _additive(self.mask.bool().unsqueeze(1), self.llm) if self.additive else self.mask


def _additive(visible: Tensor, llm: LanguageModel) -> Tensor:
    """A mask ``(batch, 1, places, keys)`` that is added to attention scores: 0 where visible, else minus infinity.

    Minus infinity gives a weight of exactly 0 whatever the finite score; the lowest finite number would not. Every
    place sees itself, so that no row is masked entirely.
    """
    mask = torch.zeros(visible.shape, dtype=llm.model.dtype, device=visible.device)
    return mask.masked_fill(~visible, -torch.inf).unsqueeze(1)
