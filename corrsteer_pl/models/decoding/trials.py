"""Tests, run once per model on a few tokens, of whether it supports the ways of decoding used here."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.decoding.branches import BatchRows, Branches
from corrsteer_pl.models.decoding.cache import FullCache, picked
from corrsteer_pl.models.llm import LanguageModel, positions_of

# Raised by models that do not support a kind of cache or mask.
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError)
# Tokens of a trial, and masked places between them.
TOKENS, GAP = 8, 32


def can_branch(llm: LanguageModel) -> bool:
    """Whether branches of a prompt give the logits that their tokens give in a sequence of their own."""
    return _tried("branches", llm, lambda ids: llm.sees_by_mask and _branches_agree(llm, ids))


def can_leave_out(llm: LanguageModel) -> bool:
    """Whether masked tokens in the middle of a sequence leave its logits unchanged."""
    return _tried("gaps", llm, lambda ids: llm.sees_by_mask and _gaps_agree(llm, ids))


def require_rows(llm: LanguageModel) -> None:
    """Check that rows of the model's cache can be repeated and selected.

    Raises:
        UserError: They cannot, so that variants could not be compared.
    """
    if not _tried("rows", llm, lambda ids: _rows_agree(llm, ids)):
        raise UserError(
            f"{llm.name} ({type(llm.model).__name__}) keeps what it has read in a way that cannot be repeated or "
            "selected, so its answers cannot be compared. Choose a model whose cache transformers can reorder."
        )


def overflow(llm: LanguageModel, cause: str | None = None) -> UserError:
    """The error for logits that are not finite, among which no token is the likeliest.

    Args:
        llm: The model.
        cause: What was done to it, as the subject of a sentence; None for nothing.
    """
    dtype = str(llm.model.dtype).removeprefix("torch.")
    if cause is None:
        return UserError(
            f"the activations of {llm.name} overflow in {dtype} without any change to the model, so its answers mean "
            "nothing. Set model.dtype to bfloat16 or float32."
        )
    return UserError(
        f"{cause} makes the activations of {llm.name} overflow in {dtype}, so its answers mean nothing. "
        "Lower model.scale."
    )


def _tried(ability: str, llm: LanguageModel, trial: Callable[[Tensor], bool]) -> bool:
    if ability not in llm.abilities:
        # Distinct tokens from the middle of the vocabulary, which has no special tokens.
        size = llm.config.vocab_size
        ids = (size // 2 + torch.arange(2 * TOKENS, device=llm.device).view(2, TOKENS)) % size
        with torch.no_grad():
            try:
                llm.abilities[ability] = trial(ids)
            except REFUSALS:
                llm.abilities[ability] = False
    return llm.abilities[ability]


def _branches_agree(llm: LanguageModel, ids: Tensor) -> bool:
    cache, mask = FullCache(), torch.ones_like(ids)
    llm.forward(ids[:, :-2], mask[:, :-2], positions_of(mask[:, :-2]), cache)
    branches = Branches(llm, cache, mask[:, :-1], 2)
    branches.forward(ids[:, -2:-1].expand(-1, 2))
    found = branches.forward(ids[:, -1:].expand(-1, 2))
    return all(_close(found[:, k], _at_once(llm, ids)) for k in range(2))


def _gaps_agree(llm: LanguageModel, ids: Tensor) -> bool:
    half = ids.shape[1] // 2
    between = ids[:, :1].expand(-1, GAP)
    wide = torch.cat([ids[:, :half], between, ids[:, half:]], dim=1)
    mask = torch.cat([torch.ones_like(ids[:, :half]), torch.zeros_like(between), torch.ones_like(ids[:, half:])], dim=1)
    return _close(llm.forward(wide, mask, positions_of(mask))[:, -1], _at_once(llm, ids))


def _rows_agree(llm: LanguageModel, ids: Tensor) -> bool:
    cache = DynamicCache(config=llm.config)
    mask, rows = torch.ones_like(ids), torch.arange(len(ids), device=ids.device).flip(0).repeat(2)
    llm.forward(ids[:, :-2], mask[:, :-2], positions_of(mask[:, :-2]), cache)
    if cache.get_seq_length() != ids.shape[1] - 2:
        return False
    run = BatchRows(llm, picked(cache, rows), mask[rows, :-1])
    run.forward(ids[rows, -2:-1])
    return _close(run.forward(ids[rows, -1:])[:, 0], _at_once(llm, ids)[rows])


def _at_once(llm: LanguageModel, ids: Tensor) -> Tensor:
    """Logits ``(batch, vocabulary)`` after tokens that are read in one pass without a cache."""
    mask = torch.ones_like(ids)
    logits = llm.forward(ids, mask, positions_of(mask))[:, -1]
    if not logits.amax(-1).isfinite().all():
        raise overflow(llm)
    return logits


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether logits agree up to rounding; in low precision, up to their standard deviation."""
    if expected.dtype == torch.float32:
        return torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    return bool((found - expected).abs().max() < expected.float().std())
