"""A stream of residuals of texts, mixed, and the same again after an interruption."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.models.llm import LanguageModel, positions_of
from corrsteer_pl.models.sae_training.texts import Padded, padded
from corrsteer_pl.models.sites import Site

# Batches of a round: its activations are held in memory and mixed, so that a batch has tokens of many texts.
ROUND = 16
# Places of one forward pass. On a CPU, activations of more no longer fit its caches.
PLACES, CPU_PLACES = 16384, 2048


class Activations:
    """Residuals at some sites, for all SAEs from one forward pass of the trunk; the head is left out.

    Padding, BOS and the first token of a text are left out. A round reads texts until it has enough tokens, and deals
    them out in batches, as often as each is to be used, shuffled anew each time. Texts come in a new order whenever all
    have been read.

    Args:
        llm: The model.
        sites: Layer to site.
        rows: Tokens of the texts, at least ``batch_tokens`` in all.
        batch_tokens: Tokens of a batch.
        seed: Seed of all orders.
        reuse: How often a round deals out what it has read.
    """

    def __init__(
        self,
        llm: LanguageModel,
        sites: Mapping[int, Site],
        rows: Sequence[Sequence[int]],
        batch_tokens: int,
        seed: int,
        reuse: int = 1,
    ) -> None:
        self.llm, self.sites, self.rows, self.batch_tokens, self.reuse = llm, sites, rows, batch_tokens, reuse
        self._random = torch.Generator().manual_seed(seed)
        self._order, self._next = torch.empty(0, dtype=torch.long), 0

    def state(self) -> dict[str, Any]:
        """Where the stream is between two rounds, for :meth:`restore`."""
        return {"random": self._random.get_state(), "order": self._order, "next": self._next}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream over the same texts was."""
        self._random.set_state(state["random"])
        self._order, self._next = state["order"], state["next"]

    def round(self) -> Iterator[dict[int, Tensor]]:
        """The next batches, each ``(batch_tokens, d_model)`` float32 by layer; take all of them."""
        parts = [self._read(batch) for batch in padded(self._take(), places(self.llm), self.llm.device)]
        whole = {layer: torch.cat([part[layer] for part in parts]) for layer in self.sites}
        del parts
        for _ in range(self.reuse):
            mixed = torch.randperm(len(next(iter(whole.values()))), generator=self._random)
            for rows in mixed.split(self.batch_tokens):
                if len(rows) == self.batch_tokens:
                    yield {layer: x[rows.to(x.device)].float() for layer, x in whole.items()}

    def _take(self) -> list[Sequence[int]]:
        """Texts of the next round."""
        taken, missing = [], ROUND * self.batch_tokens
        while missing > 0:
            if self._next == len(self._order):
                self._order, self._next = torch.randperm(len(self.rows), generator=self._random), 0
            taken.append(self.rows[int(self._order[self._next])])
            missing -= len(taken[-1])
            self._next += 1
        return taken

    @torch.no_grad()
    def _read(self, batch: Padded) -> dict[int, Tensor]:
        text = is_text(self.llm, batch)
        found: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer, site in self.sites.items():
                stack.callback(site.hook(self.llm.model, partial(_keep, found, layer, text)).remove)
            trunk(self.llm, batch)
        return found


def is_text(llm: LanguageModel, batch: Padded) -> Tensor:
    """Mask of the tokens that count, ``(batch, longest)``: no padding, no BOS, and not the first of a text.

    Attention makes a sink of the first token, BOS or not: its residual is orders of magnitude larger than all others.
    """
    first = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device) == 0
    return batch.attention_mask.bool() & llm.is_text(batch.input_ids) & ~first


def trunk(llm: LanguageModel, batch: Padded) -> None:
    """One forward pass without the head, which would be thrown away."""
    decoder = llm.model.get_decoder() if hasattr(llm.model, "get_decoder") else llm.model
    ids, mask = batch.input_ids, batch.attention_mask
    (decoder or llm.model)(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False)


def places(llm: LanguageModel) -> int:
    """Places of one forward pass."""
    return CPU_PLACES if llm.device.type == "cpu" else PLACES


def batches(llm: LanguageModel, rows: Sequence[Sequence[int]]) -> Iterator[Padded]:
    """Texts in right-padded batches of the size that the device reads best."""
    return padded(rows, places(llm), llm.device)


def _keep(found: dict[int, Tensor], layer: int, text: Tensor, residual: Tensor) -> None:
    found[layer] = residual[text.to(residual.device)]
