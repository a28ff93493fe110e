"""Cards of features: what each does, and where it was active."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from corrsteer_pl.evaluation.paired import Z_95
from corrsteer_pl.models.lens import logit_lens
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae import Encoder
from corrsteer_pl.models.sae_training.activations import batches, trunk
from corrsteer_pl.selection import Feature

# Tokens of the logit lens each way, and tokens of a snippet before and after the one that activates the feature.
TOKENS, BEFORE, AFTER = 8, 32, 12


@dataclass(frozen=True)
class Observed:
    """What the model read of a sample while the fit observed it.

    Attributes:
        ids: Tokens of prompt and answer.
        counted: Positions at which activations were pooled.
        reward: What the answer got.
    """

    ids: list[int]
    counted: range
    reward: float


@dataclass(frozen=True)
class Snippet:
    """A place at which a feature was strong.

    Attributes:
        value: Its pooled activation on that sample.
        reward: Reward of that sample, in [0, 1].
        before: Text before the token at which it was strongest.
        token: That token.
        after: Text after it.
        structure: Whether the token is punctuation, white space, or the letter of an option.
    """

    value: float
    reward: float
    before: str
    token: str
    after: str
    structure: bool


@dataclass(frozen=True)
class Card:
    """What is known of a feature beside its :class:`~corrsteer_pl.selection.Feature`.

    Attributes:
        name: Layer and index.
        ci_low, ci_high: 95 % interval of its correlation, by Fisher's transformation.
        likelier: Tokens whose logits its vector raises most, as it steers.
        unlikelier: Tokens whose logits it lowers most.
        cosines: Cosine of its vector to those of the other features, by name.
        snippets: Where it was strongest, the strongest first.
    """

    name: str
    ci_low: float
    ci_high: float
    likelier: list[str]
    unlikelier: list[str]
    cosines: dict[str, float]
    snippets: list[Snippet]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "snippets": [vars(snippet) for snippet in self.snippets]}


def observed(method: Any, rows: Sequence[int], everywhere: bool) -> dict[int, Observed]:
    """What a method's fit read of some samples of its split, which are answered again.

    Args:
        method: A method during or after its fit.
        rows: Their positions.
        everywhere: Whether activations of the prompt were pooled too.
    """
    data, answering, found = method.datamodule, method.fit_answering, {}
    for start in range(0, len(rows), data.hparams["batch_size"]):
        batch = data.batch_of("train", rows[start : start + data.hparams["batch_size"]]).to(method.device)
        texts = answering.observe(batch)
        for row, example, text, reward in zip(
            batch.rows, batch.examples, texts, answering.rewards(texts, batch).tolist(), strict=True
        ):
            prompt = data.token_ids(example, data.fit_task)
            # What is said of likelihoods was not read.
            written = "" if data.fit_task.by_likelihood else text
            answer = method.llm.tokenizer(written, add_special_tokens=False)["input_ids"]
            if data.fit_task.generates and not everywhere:
                # The step that reads the last prompt token counts, the one that reads the last new token does not.
                counted = range(len(prompt) - 1, max(len(prompt), len(prompt) + len(answer) - 1))
            else:
                counted = range(int(method.llm.adds_bos), len(prompt) + len(answer))
            found[row] = Observed(prompt + answer, counted, reward)
    return found


def fisher_interval(r: float, n: float) -> tuple[float, float]:
    """95 % interval of a correlation of ``n`` samples, by Fisher's transformation.

    Example:
        >>> [round(limit, 3) for limit in fisher_interval(0.5, 103)]
        [0.339, 0.632]
    """
    if n <= 3 or abs(r) >= 1:
        return (-1.0, 1.0) if n <= 3 else (r, r)
    z, half = math.atanh(r), Z_95 / math.sqrt(n - 3)
    return math.tanh(z - half), math.tanh(z + half)


def make_cards(
    llm: LanguageModel,
    saes: Mapping[int, Encoder],
    features: Sequence[Feature],
    samples: int,
    strongest: Sequence[Sequence[tuple[float, int]]],
    readings: Mapping[int, Observed],
) -> list[Card]:
    """Cards of some features.

    Args:
        llm: The model.
        saes: The autoencoders, by layer.
        features: The features.
        samples: Number of samples behind their correlations.
        strongest: Of each feature, activation and position of the samples on which it was strongest.
        readings: What was read of these samples, by position.
    """
    vectors = [math.copysign(1, f.coefficient) * saes[f.layer].direction(f.index) for f in features]
    activations = _activations(llm, saes, features, readings)
    cards = []
    for f, vector, seen in zip(features, vectors, strongest, strict=True):
        others = [(g.name, u) for g, u in zip(features, vectors, strict=True) if g is not f]
        cosines = {name: cosine_similarity(vector, other, dim=0).item() for name, other in others}
        snippets = [_snippet(llm, value, readings[row], activations[row][f.name]) for value, row in seen]
        interval, tokens = fisher_interval(f.correlation or 0.0, samples), logit_lens(llm, vector, TOKENS)
        cards.append(Card(f.name, *interval, *tokens, cosines, snippets))
    return cards


@torch.no_grad()
def _activations(
    llm: LanguageModel,
    saes: Mapping[int, Encoder],
    features: Sequence[Feature],
    readings: Mapping[int, Observed],
) -> dict[int, dict[str, Tensor]]:
    """Activations of every feature at each token of the readings, by position in the split and name."""
    # In the order in which texts are put into batches.
    rows = sorted(readings, key=lambda row: len(readings[row].ids))
    found: dict[int, dict[str, Tensor]] = {row: {} for row in rows}
    left = iter(rows)
    for batch in batches(llm, [readings[row].ids for row in rows]):
        residuals: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer in {f.layer for f in features}:
                stack.callback(saes[layer].site.hook(llm.model, partial(residuals.__setitem__, layer)).remove)
            trunk(llm, batch)
        here = [next(left) for _ in batch.input_ids]
        for layer, residual in residuals.items():
            mine = [f for f in features if f.layer == layer]
            values = saes[layer].encode(residual)[..., [f.index for f in mine]].cpu()  # (B, longest, features)
            for row, some in zip(here, values, strict=True):
                found[row] |= {f.name: some[:, i] for i, f in enumerate(mine)}
    return found


def _snippet(llm: LanguageModel, value: float, reading: Observed, activations: Tensor) -> Snippet:
    counted, ids = reading.counted, reading.ids
    at = counted.start + int(activations[counted.start : counted.stop].argmax())
    before, token, after = (
        llm.tokenizer.decode(some) for some in (ids[max(0, at - BEFORE) : at], [ids[at]], ids[at + 1 : at + 1 + AFTER])
    )
    return Snippet(value, reading.reward, before, token, after, is_structure(token))


def is_structure(token: str) -> bool:
    r"""Whether a token is punctuation, white space, or the letter of an option, and says nothing by itself.

    Example:
        >>> [is_structure(token) for token in (":", "\n", " B", " Paris", "7")]
        [True, True, True, False, False]
    """
    return re.fullmatch(r"[A-J]|[\W_]*", token.strip()) is not None
