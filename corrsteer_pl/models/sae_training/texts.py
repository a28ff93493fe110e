"""The tokens that a model reads while SAEs learn from it."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.decoding.decode import Decoder, Padded
from corrsteer_pl.models.llm import LanguageModel

# Prompts that are answered together.
ANSWERED_TOGETHER = 128
# Of all texts, the share that no SAE learns from and that tells how good they are; and the most of them.
HELD_OUT, MOST_HELD_OUT = 1 / 20, 64


def token_rows(llm: LanguageModel, texts: Sequence[str], most: int) -> list[list[int]]:
    """The first ``most`` tokens of every text."""
    return [row[:most] for row in llm.token_rows(texts)]


def answered_rows(llm: LanguageModel, prompts: Sequence[str], answers: Sequence[str], most: int) -> list[list[int]]:
    """The first ``most`` tokens of every prompt in the chat template, if there is one, with its answer."""
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = llm.tokenizer(answer, add_special_tokens=False)["input_ids"]
        rows.append((llm.prompt_ids([prompt], chat=llm.has_chat_template) + ids)[:most])
    return rows


def answers(
    llm: LanguageModel, prompts: Sequence[str], new_tokens: int, report: Callable[[int], None] = lambda done: None
) -> list[str]:
    """The model's own greedy answers.

    Args:
        llm: The model.
        prompts: What it is asked, in its chat template if it has one.
        new_tokens: Longest answer.
        report: Called with the number of answers so far.
    """
    rows = [llm.prompt_ids([prompt], chat=llm.has_chat_template) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    decoder, found = Decoder(llm, new_tokens), [""] * len(rows)
    for first in range(0, len(order), ANSWERED_TOGETHER):
        some = order[first : first + ANSWERED_TOGETHER]
        ids, mask = llm.left_pad([rows[i] for i in some])
        for i, text in zip(some, decoder.generate(Padded(ids.to(llm.device), mask.to(llm.device))), strict=True):
            found[i] = text
        report(first + len(some))
    return found


def held_out(rows: list[list[int]], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Divide texts into those that SAEs learn from, and a few that they are judged on.

    Raises:
        UserError: There are fewer than two.
    """
    if len(rows) < 2:
        raise UserError(
            f"there are {len(rows)} texts to train SAEs on. Give at least two: one is held out to judge them."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = max(1, min(MOST_HELD_OUT, int(len(rows) * HELD_OUT)))
    return [rows[i] for i in order[kept:]], [rows[i] for i in order[:kept]]


def padded(rows: Sequence[Sequence[int]], most: int, device: torch.device) -> Iterator[Padded]:
    """Right-padded batches of texts of like length, each of at most ``most`` places unless one text is longer."""
    some: list[Tensor] = []
    for row in sorted(rows, key=len):
        if some and (len(some) + 1) * len(row) > most:
            yield _pad(some, device)
            some = []
        some.append(torch.tensor(row))
    if some:
        yield _pad(some, device)


def _pad(rows: list[Tensor], device: torch.device) -> Padded:
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return Padded(ids.to(device), mask.to(device))


def digest(rows: Sequence[Sequence[int]]) -> str:
    """A hash of all tokens, by which texts are recognised."""
    return hashlib.sha256(repr([list(row) for row in rows]).encode()).hexdigest()
