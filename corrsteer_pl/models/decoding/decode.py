"""Greedy decoding: every prompt is read once, and all variants decode from its cache."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from corrsteer_pl.models.decoding.branches import BatchRows, Branches, Run
from corrsteer_pl.models.decoding.cache import ROOM, FullCache, joined, picked
from corrsteer_pl.models.decoding.kept import KeptPrompts
from corrsteer_pl.models.decoding.prefix import SharedPrefix
from corrsteer_pl.models.decoding.trials import can_branch, can_leave_out, overflow, require_rows
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.llm import LanguageModel, positions_of

# Memory that the variants of a forward pass may take, beside the model: bytes, or the share of a GPU's memory.
BUDGET, SHARE = 2**30, 1 / 16
# Prompt tokens in one forward pass on a CPU; with more, activations no longer fit its caches and each costs more.
CPU_TOKENS = 1400
# Largest number of generated tokens of all branches of a prompt.
BRANCH_TOKENS = 2048
# Checking which generations have ended forces a GPU sync, so it is done every 8 steps there, and at each on a CPU.
LOOK_EVERY = 8
# Ended generations are dropped when no more than this share of the places is still running.
NEEDED = 0.75


class Prompts(Protocol):
    """Left-padded prompts: ``input_ids`` and ``attention_mask``, both ``(batch, longest)``."""

    input_ids: Tensor
    attention_mask: Tensor


class Intervention(Protocol):
    """Variants of a change to the model, applied to a batch that has, for every sample, one row per variant."""

    @property
    def changes_prompt(self) -> bool:
        """Whether the prompt's keys and values depend on the variant, so that variants cannot share a prefill."""

    @property
    def most_together(self) -> int | None:
        """How many variants can share a forward pass: None for any number, 1 for an edited weight or an adapter."""

    def described(self, variant: int) -> str | None:
        """What a variant does, as the subject of a sentence; None if it leaves the model as it is."""

    def __len__(self) -> int:
        """Number of variants."""

    def attached(self, model: nn.Module, run: Run | None = None) -> AbstractContextManager:
        """Apply variant ``run.variant`` at each place within the context, or to row ``i`` variant ``i % len(self)``."""

    def groups(self, size: int) -> Iterator[Self]:
        """The variants in groups of exactly ``size``, the last padded with variants that change nothing."""


@dataclass
class Tokens:
    """Generated tokens.

    Attributes:
        ids: ``(batch, steps)``.
        lengths: How many of them stand before the end of sequence, ``(batch,)``.
        finite: Whether the logits of every one of them were finite, ``(batch,)`` bool.
    """

    ids: Tensor
    lengths: Tensor
    finite: Tensor


class Decoder:
    """Greedy decoding of a batch, unsteered or in many steered variants from one prefill.

    Steering of generated positions cannot change the prompt's keys and values, so a variant costs its new
    tokens and not its prompt. Equal token for token to Hugging Face ``generate(do_sample=False)`` in float32, if the
    model's generation configuration asks for no penalty or other change of the logits.

    Args:
        llm: The model.
        max_new_tokens: Longest generation.
        allowed: If given, the only tokens that may be chosen.
        candidate_batch_size: How many variants of every sample share a forward pass; ``auto`` for as many as about
            a gibibyte, or a sixteenth of a GPU's memory, allows, and of branches no more than are worth their masks.

    Attributes:
        end: The tokens that end a generation, ``(n,)``.
        look_every: Decoding steps between two looks at which generations have ended.
    """

    def __init__(
        self,
        llm: LanguageModel,
        max_new_tokens: int,
        allowed: Sequence[int] | None = None,
        candidate_batch_size: int | str = "auto",
    ) -> None:
        self.llm = llm
        self.max_new_tokens = max_new_tokens
        self.allowed = None if allowed is None else torch.tensor(sorted(allowed), device=llm.device)
        self.candidate_batch_size = candidate_batch_size
        self._prefix = SharedPrefix(self._read_prefix)
        self.look_every = 1 if llm.device.type == "cpu" else LOOK_EVERY
        self.end = torch.tensor(llm.eos_token_ids, dtype=torch.long, device=llm.device)

    @torch.no_grad()
    def generate(self, prompts: Prompts, reader: PoolReader | None = None) -> list[str]:
        """Generate unsteered text while ``reader`` pools the activations of every counted step.

        Counted are the steps before the one that ends the sequence, and no step that reads BOS.

        Raises:
            UserError: Activations of the model overflow.
        """
        require_rows(self.llm)
        with reader.attached(self.llm.model) if reader else nullcontext():
            tokens = self._decode(*self._prefill(prompts, reader, whole=False), reader)
        self._refuse_overflow(tokens.finite, None)
        return self.llm.decode(tokens.ids, tokens.lengths)

    @torch.no_grad()
    def compare(
        self,
        prompts: Prompts,
        variants: Intervention,
        branches: bool | None = None,
        kept: KeptPrompts | None = None,
    ) -> list[list[str]]:
        """Generate text under each variant.

        In float32 variants are branches of one sequence per prompt, if the model can do that. In lower precision, and
        where a variant changes the prompt, they are rows of the batch: variants share each forward pass or, in several
        groups, have passes of one shape, so that a difference is due to the variant and never to rounding.

        Args:
            prompts: The prompts.
            variants: What is compared.
            branches: Decide for or against branches; None as said above.
            kept: Where prompts are kept for further variants, and found if they were. In lower precision those have
                forward passes of the same shape as the first ones, padded with unchanged variants.

        Returns:
            ``texts[variant][sample]``.

        Raises:
            UserError: Activations of the model overflow under a variant.
        """
        require_rows(self.llm)
        if branches is None:
            branches = self.llm.model.dtype == torch.float32 and can_branch(self.llm)
        return self._compare(prompts, variants, branches and not variants.changes_prompt, kept)

    @torch.no_grad()
    def first_logits(self, prompts: Prompts, variants: Intervention) -> Tensor:
        """Logits of the first new token under each variant, ``(variants, batch, vocabulary)``."""
        require_rows(self.llm)
        laid, cache = (prompts, None) if variants.changes_prompt else self._prefill(prompts)
        found = []
        for group in self.groups(prompts, variants):
            run, tokens = self._in_rows(group, laid, cache)
            with group.attached(self.llm.model, run):
                found.append(run.forward(tokens)[:, 0].unflatten(0, (-1, len(group))))
        return torch.cat(found, dim=1)[:, : len(variants)].transpose(0, 1)

    @torch.no_grad()
    def log_likelihoods(
        self,
        prompts: Prompts,
        options: Sequence[Sequence[Sequence[int]]],
        variants: Intervention,
        kept: KeptPrompts | None = None,
    ) -> list[Tensor]:
        """How likely texts are after their prompts under each variant.

        A text is read token by token, so that a variant acts on it as on one that is generated.

        Args:
            prompts: The prompts.
            options: Tokens of the texts that may follow each prompt, at least one of each.
            variants: What is compared.
            kept: Where prompts are kept for further variants, as in :meth:`compare`.

        Returns:
            Of each prompt the log-likelihoods of its options in nats, ``(variants, options)`` float64.

        Raises:
            UserError: Activations of the model overflow under a variant.
        """
        require_rows(self.llm)
        counts, ids = list(map(len, options)), prompts.input_ids
        sample = torch.arange(len(ids), device=ids.device).repeat_interleave(torch.tensor(counts, device=ids.device))
        wanted = padded_right([option for some in options for option in some]).to(ids.device)  # (N, longest)
        each = Padded(ids[sample], prompts.attention_mask[sample])
        decoder = copy(self)
        decoder.max_new_tokens = wanted.shape[1]
        size = decoder.together(each, len(variants), most_together=variants.most_together)
        size, (laid, cache) = decoder._prepared(prompts, variants, size, False, kept)
        found = []
        for group in variants.groups(size):
            count = len(group)
            run, last = decoder._in_rows(group, laid, cache)
            # Rows are prompts with their variants side by side; of each there is one for every option.
            rows = (sample.unsqueeze(1) * count + torch.arange(count, device=ids.device)).flatten()
            run.pick(rows)
            with group.attached(self.llm.model, run):
                nats = self._forced(run, last[rows], wanted.repeat_interleave(count, dim=0))
            self._refuse_overflow(nats.isfinite(), group)
            found.append(nats.view(-1, count))
        return [nats.T for nats in torch.cat(found, dim=1)[:, : len(variants)].cpu().split(counts)]

    def _forced(self, run: BatchRows, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Log-likelihoods ``(rows,)`` float64 of the tokens ``wanted (rows, longest)``, filled up with -1."""
        # A text that has ended stays where it is, lest it leave the model's context.
        ends = run.next + (wanted >= 0).sum(1, keepdim=True) - 1
        total = torch.zeros(len(wanted), dtype=torch.float64, device=wanted.device)
        for next_ones in wanted.split(1, dim=1):
            log_p = run.forward(tokens)[:, 0].float().log_softmax(-1)
            run.next = torch.minimum(run.next, ends)
            tokens = next_ones.clamp(min=0)
            total += torch.where(next_ones >= 0, log_p.gather(1, tokens), 0.0)[:, 0].double()
        return total

    def _compare(
        self, prompts: Prompts, variants: Intervention, branches: bool, kept: KeptPrompts | None
    ) -> list[list[str]]:
        size = self.together(prompts, len(variants), branches, variants.most_together)
        size, (laid, cache) = self._prepared(prompts, variants, size, branches, kept)
        # In low precision rounding depends on the shape of a forward pass, so all groups have to keep the same shape.
        drop = self._is_exact or (size >= len(variants) and kept is None)
        groups = variants.groups(size)
        texts = [text for group in groups for text in self._continue(group, laid, cache, branches, drop)]
        return texts[: len(variants)]

    @property
    def _is_exact(self) -> bool:
        """Whether the shape of a forward pass hardly changes its results."""
        return self.llm.model.dtype == torch.float32

    def _prepared(
        self, prompts: Prompts, variants: Intervention, size: int, branches: bool, kept: KeptPrompts | None
    ) -> tuple[int, tuple[Prompts, Any]]:
        """How many variants share a forward pass, ``size`` unless they did otherwise before; and what was read.

        Prompts whose keys and values depend on the variant come without a cache.
        """
        before = kept.find(prompts) if kept else None
        if before and not self._is_exact:
            size = before.together
        read = before.read if before else None
        if read is None and not variants.changes_prompt:
            read = self._prefill(prompts, branches=size if branches else 0)
        if kept and before is None:
            kept.keep(prompts, size, read)
        return size, read or (prompts, None)

    def _continue(
        self, group: Intervention, prompts: Prompts, cache: Any, branches: bool, drop: bool
    ) -> list[list[str]]:
        """The texts of each variant of a group, which share every forward pass."""
        count = len(group)
        run, tokens = self._in_branches(prompts, cache, count) if branches else self._in_rows(group, prompts, cache)
        with group.attached(self.llm.model, run):
            found = self._until_the_end(run, tokens, drop=drop)
        if branches and not found.finite.all():
            # Attention gives other branches a weight of 0, but 0 * NaN is NaN. Rows of a batch are independent, so
            # decoding each variant in its own rows shows which of them overflows.
            cache.rewind(prompts.input_ids.shape[1] - 1)
            alone = group.groups(1)
            return [text for variant in alone for text in self._continue(variant, prompts, cache, False, drop)]
        self._refuse_overflow(found.finite, group)
        flat = self.llm.decode(found.ids, found.lengths)
        return [flat[variant::count] for variant in range(count)]

    def _refuse_overflow(self, finite: Tensor, variants: Intervention | None) -> None:
        """Raise if logits were not finite, ``(batch * variants,)`` bool, variants side by side."""
        if not finite.all():
            variant = int((~finite).nonzero()[0]) % (len(variants) if variants is not None else 1)
            raise overflow(self.llm, variants.described(variant) if variants is not None else None)

    def _in_branches(self, prompts: Prompts, cache: Any, count: int) -> tuple[Run, Tensor]:
        return Branches(self.llm, cache, prompts.attention_mask, count), prompts.input_ids[:, -1:].expand(-1, count)

    def _in_rows(self, group: Intervention, prompts: Prompts, cache: Any) -> tuple[BatchRows, Tensor]:
        count, rows = len(group), repeated(prompts, len(group))
        if cache is None:
            with group.attached(self.llm.model):
                _, own = self._prefill(rows, share=False, together=count)
        else:
            samples = torch.arange(len(prompts.input_ids), device=prompts.input_ids.device)
            own = picked(cache, samples.repeat_interleave(count))
        return self._rows(own, rows, variants=count), rows.input_ids[:, -1:]

    def _rows(
        self, cache: DynamicCache, prompts: Prompts, unread: Tensor | None = None, variants: int = 1
    ) -> BatchRows:
        additive = isinstance(cache, FullCache) and self.llm.attention == "sdpa" and can_branch(self.llm)
        return BatchRows(self.llm, cache, prompts.attention_mask, unread, variants, additive)

    def together(self, prompts: Prompts, count: int, branches: bool = False, most_together: int | None = None) -> int:
        """How many of ``count`` variants share a forward pass; passes are as equal in size as possible.

        Args:
            prompts: The prompts.
            count: Number of variants.
            branches: Whether they are branches of one sequence per prompt, or rows.
            most_together: The most that the intervention allows; None for any number.
        """
        size = self.candidate_batch_size
        most = size if isinstance(size, int) else self._affordable(prompts, branches)
        most = min(most, most_together or most)
        return -(-count // -(-count // most))

    def groups(self, prompts: Prompts, variants: Intervention) -> Iterator[Intervention]:
        """The variants in groups that :meth:`read` can read at once; the last is padded with the unchanged model."""
        yield from variants.groups(self.together(prompts, len(variants), most_together=variants.most_together))

    @property
    def budget(self) -> int:
        """Bytes that variants may take beside the model."""
        return budget(self.llm.device)

    @property
    def keeps(self) -> int:
        """Bytes of keys and values that may be kept of prompts for further variants: half of that."""
        return self.budget // 2

    def _affordable(self, prompts: Prompts, branches: bool) -> int:
        """How many variants the memory budget allows."""
        most = self.budget // self.size_of_variant(prompts, branches)
        # Attention is computed between all branches of a prompt before the mask removes it, at quadratic cost.
        return max(1, min(most, BRANCH_TOKENS // self.max_new_tokens) if branches else most)

    def size_of_variant(self, prompts: Prompts, branches: bool) -> int:
        """Bytes that a variant takes: keys and values, logits, and the activations of a block."""
        rows, tokens = prompts.input_ids.shape
        held = self.max_new_tokens if branches else tokens + self.max_new_tokens
        each = held * self.llm.cache_size_per_token + self.llm.config.vocab_size + 8 * self.llm.config.hidden_size
        return rows * each * self.llm.model.dtype.itemsize

    @torch.no_grad()
    def read(self, prompts: Prompts, reader: PoolReader, variants: Intervention | None = None) -> None:
        """Read texts, each under every variant side by side, while ``reader`` pools the activations of their tokens.

        Args:
            prompts: The texts.
            reader: What pools; its samples are the texts, each repeated for every variant.
            variants: One of :meth:`groups`.

        Raises:
            UserError: Activations of the model overflow.
            ValueError: There are more variants than can share a forward pass.
        """
        if variants is not None:
            if len(variants) > (variants.most_together or len(variants)):
                raise ValueError(f"{len(variants)} variants cannot share a forward pass; read the groups of groups()")
            prompts = repeated(prompts, len(variants))
        ids, mask = prompts.input_ids, prompts.attention_mask
        # The reader is attached last, so that it reads what the intervention has changed.
        with variants.attached(self.llm.model) if variants else nullcontext(), reader.attached(self.llm.model):
            logits = self.llm.forward(ids, mask, positions_of(mask))
            reader.read_text(mask.bool() & self.llm.is_text(ids))
        self._refuse_overflow(logits.amax(-1).isfinite().flatten(), variants)

    def _until_the_end(self, run: Run, tokens: Tensor, reader: PoolReader | None = None, drop: bool = True) -> Tokens:
        """Choose tokens until every generation has ended, or is long enough.

        Args:
            run: What reads one more token of every generation.
            tokens: The last of each prompt at every place, ``(rows, places)``.
            reader: Pools every step, in rows.
            drop: Whether generations that have ended may leave the forward passes, which changes their shape.
        """
        place = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)  # which generation stands where
        ids = tokens.new_zeros(tokens.numel(), self.max_new_tokens)
        lengths = tokens.new_zeros(tokens.numel())
        running = torch.ones_like(tokens, dtype=torch.bool)
        finite = torch.ones_like(lengths, dtype=torch.bool)
        for step in range(self.max_new_tokens):
            chosen, is_finite = self._choose(run.forward(tokens))  # (rows, places)
            # Overflow after the end of a generation does not concern its text.
            finite[place] = finite[place] & (is_finite | ~running)
            running = running & ~torch.isin(chosen, self.end)
            if reader:
                text = self.llm.is_text(tokens)
                # The first step reads the last prompt token, which counts as text even if the generation ends there.
                reader.read_step((running & text)[:, 0], (running & text if step else text)[:, 0], place[:, 0])
            ids[place, step] = chosen
            lengths[place] += running
            tokens = chosen
            if (step + 1) % self.look_every == 0:
                left = int(running.sum())
                if left == 0:
                    break
                if drop and left <= NEEDED * running.numel():
                    order = run.drop_ended(running)
                    tokens, place, running = (at.flatten()[order] for at in (tokens, place, running))
        return Tokens(ids[:, : step + 1], lengths, finite)

    def _prefill(
        self,
        prompts: Prompts,
        reader: PoolReader | None = None,
        branches: int = 0,
        share: bool = True,
        whole: bool = True,
        together: int = 1,
    ) -> tuple[Prompts, DynamicCache]:
        """Read every prompt token but the last.

        Args:
            prompts: The prompts.
            reader: Pools the prompt's tokens, if it reads them.
            branches: How many branches of a prompt will share the cache; then it keeps every token.
            share: Whether to reuse the prefix that earlier prompts share.
            whole: Otherwise tokens that fit into one forward pass are left to the first step, which saves a pass.
            together: How many adjacent rows are variants of one prompt, which a change of the model tells by place.

        Returns:
            The prompts, whose padding may have moved behind a shared prefix, and the cache.
        """
        ids, mask = prompts.input_ids, prompts.attention_mask
        cache = self._empty_cache(prompts, branches)
        # Sliding windows also count masked places, so that padding behind the prefix would shorten them.
        share = share and self._fits_window(prompts) and not (reader and reader.reads_prompt)
        if share and isinstance(cache, FullCache) and can_leave_out(self.llm):
            mask = self._prefix.lay(ids, mask, cache)
        start, last = cache.get_seq_length(), ids.shape[1] - 1
        left = not whole and not (reader and reader.reads_prompt) and self._at_once(len(ids), last + 1 - start)
        if start < last and not left:
            cache = self._read(ids[:, start:last], mask[:, :last], cache, reader, together)
        return Padded(ids, mask), cache

    def _read(self, ids: Tensor, mask: Tensor, cache: Any, reader: PoolReader | None, together: int) -> Any:
        """Read prompt tokens ``(batch, new)`` after those in a cache; the cache of all of them.

        On a CPU a few prompts, with all their variants, are read at a time, because the activations of many would not
        fit into its caches.
        """
        new, reads = ids.shape[1], reader is not None and reader.reads_prompt
        if self._at_once(len(ids), new) or reads or not isinstance(cache, FullCache):
            self.llm.forward(ids, mask, positions_of(mask)[:, -new:], cache)
            if reader and reads:
                reader.read_prompt(mask[:, -new:].bool() & self.llm.is_text(ids))
            return cache
        parts = []
        for rows in torch.arange(len(ids)).split(max(1, CPU_TOKENS // (new * together)) * together):
            parts.append(cache.picked(rows))
            self.llm.forward(ids[rows], mask[rows], positions_of(mask[rows])[:, -new:], parts[-1])
        return joined(parts)

    def _at_once(self, rows: int, tokens: int) -> bool:
        """Whether so many rows of so many tokens are read best in one forward pass."""
        return self.llm.device.type != "cpu" or rows == 1 or rows * tokens <= CPU_TOKENS

    def _read_prefix(self, ids: Tensor) -> FullCache:
        cache, mask = FullCache(), torch.ones_like(ids)
        self.llm.forward(ids, mask, positions_of(mask), cache)
        return cache

    def _empty_cache(self, prompts: Prompts, branches: int = 0) -> DynamicCache:
        if branches or (self.llm.sees_by_mask and self._fits_window(prompts)):
            return FullCache(max(1, branches) * min(self.max_new_tokens, ROOM))
        return DynamicCache(config=self.llm.config)

    def _fits_window(self, prompts: Prompts) -> bool:
        window = getattr(self.llm.config, "sliding_window", None)
        return window is None or prompts.input_ids.shape[1] + self.max_new_tokens <= window

    def _decode(self, prompts: Prompts, cache: Any, reader: PoolReader | None = None) -> Tokens:
        unread = prompts.input_ids[:, cache.get_seq_length() :]
        return self._until_the_end(self._rows(cache, prompts, unread), prompts.input_ids[:, -1:], reader)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token, and whether its logit is finite: it is NaN if any is."""
        logits = logits if self.allowed is None else logits[..., self.allowed]
        chosen = logits.argmax(-1, keepdim=True)
        is_finite = logits.gather(-1, chosen).squeeze(-1).isfinite()
        chosen = chosen.squeeze(-1)
        return chosen if self.allowed is None else self.allowed[chosen], is_finite


def budget(device: torch.device) -> int:
    """Bytes that variants may take: independent of how full the device is, so that runs are reproducible."""
    if device.type != "cuda":
        return BUDGET
    return max(BUDGET, int(SHARE * torch.cuda.get_device_properties(device).total_memory))


@dataclass
class Padded:
    """Token rows made equally long: :class:`Prompts` in two tensors."""

    input_ids: Tensor
    attention_mask: Tensor


def padded_right(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token rows as one tensor ``(rows, longest)``, filled up with -1.

    Example:
        >>> padded_right([[1, 2], [3]])
        tensor([[ 1,  2],
                [ 3, -1]])
    """
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-1)


def repeated(prompts: Prompts, copies: int) -> Prompts:
    """A batch with every sample repeated ``copies`` times, in adjacent rows."""
    ids, mask = prompts.input_ids, prompts.attention_mask
    return Padded(ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0))
