"""A run as a model of lm-eval, which has to be installed."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from corrsteer_pl.errors import UserError, choices, one_line
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.runs.loading import load_fit
from corrsteer_pl.models.llm import LanguageModel

# What lm-eval's model ``hf`` takes, and a run does not settle.
TAKEN = (
    "add_bos_token", "batch_size", "chat_template_args", "device", "enable_thinking", "logits_cache", "max_batch_size",
    "max_length", "mixed_precision_dtype", "prefix_token_id", "softmax_dtype", "think_end_token", "truncation",
)  # fmt: skip


class SteeredRun(HFLM):
    """The model of a run with what was fitted.

    Args:
        run: Folder of the run.
        steered: False for the unchanged model.
        **others: What lm-eval's model ``hf`` takes and a run does not settle: ``batch_size``, ``max_length``, ...

    Raises:
        UserError: There is no run, or an option that a run does not take.
    """

    def __init__(self, run: str | None = None, steered: bool = True, **others: Any) -> None:
        if run is None:
            raise UserError("the model corrsteer needs a run: --model_args run=checkpoints/demo.")
        if unknown := sorted(others.keys() - set(TAKEN)):
            known = choices(("run", "steered", *TAKEN))
            raise UserError(f"--model_args has {unknown[0]}, which a run does not take; it takes {known}.")
        if not isinstance(steered, bool):
            raise UserError(f"--model_args has steered={steered}; it is True or False.")
        fit = load_fit(Path(run))
        self._llm = fit.method.llm
        _move(self._llm, others.pop("device", None))
        super().__init__(pretrained=self._llm.model, tokenizer=self._llm.tokenizer, **others)
        self._variant = list(fit.compared().groups(1))[steered]
        self._starts: dict[tuple[int, ...], int] = {}
        self._is_tried = False

    @property
    def eot_token_id(self) -> int:
        """The token whose text lm-eval adds to the stop sequences; generation ends at the run's other ones, too."""
        return next(iter(self._llm.eos_token_ids), self.tokenizer.eos_token_id)

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """Find a size with texts that nobody asked for, and that nothing steers."""
        self._is_tried = True
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self._is_tried = False

    def _loglikelihood_tokens(self, requests: list, **options: Any) -> list:
        """Score continuations, of which steering needs to know where they begin."""
        groups = _apart(requests, self.max_length)
        found: dict[int, Any] = {}
        for places, self._starts in groups:
            scores = super()._loglikelihood_tokens([requests[i] for i in places], **options)
            found |= dict(zip(places, scores, strict=True))
        return [found[i] for i in range(len(requests))]

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_tried:
            return super()._model_call(inps, *args, **kwargs)
        starts = [self._starts[_key(row)] for row in inps.tolist()]
        with _read_at(self._variant, self.model, starts, inps.shape[1]):
            return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self._variant.attached(self.model):
            return super()._model_generate(context, *args, **kwargs)


def _move(llm: LanguageModel, device: Any) -> None:
    """Put a model onto a device. Without a GPU it stays where it is, as lm-eval asks for one if nobody else does."""
    if device is None or (str(device).startswith("cuda") and not torch.cuda.is_available()):
        return
    try:
        llm.model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device is {device}, which cannot be used here ({one_line(error)}).") from error


def _key(tokens: Sequence[int]) -> tuple[int, ...]:
    """Tokens without the zeros that lm-eval pads with on the right."""
    length = len(tokens)
    while length and tokens[length - 1] == 0:
        length -= 1
    return tuple(tokens[:length])


def _apart(requests: Sequence[Any], longest: int) -> list[tuple[list[int], dict[tuple[int, ...], int]]]:
    """Groups of requests, by their places, in each of which equal inputs have their continuation at the same place.

    Args:
        requests: Of each, a text, and tokens of context and continuation.
        longest: How many tokens the model reads; longer inputs lose their beginning.

    Returns:
        For each group the places of its requests, and by the tokens of the input the last position of the context.

    Example:
        >>> [places for places, _ in _apart([("", [5, 6], [7]), ("", [5], [6, 8]), ("", [5, 6], [9])], 10)]
        [[0, 2], [1]]
    """
    groups: list[tuple[list[int], dict[tuple[int, ...], int]]] = []
    for place, (_, context, continuation) in enumerate(requests):
        tokens = (context + continuation)[-(longest + 1) :][:-1]
        key, start = _key(tokens), len(tokens) - len(continuation)
        group = next((some for some in groups if some[1].get(key, start) == start), None)
        if group is None:
            group = ([], {})
            groups.append(group)
        group[0].append(place)
        group[1][key] = start
    return groups


def weights(schedule: Schedule, starts: Sequence[int], length: int) -> Tensor:
    """Strength at every position of texts whose answers are read with them, ``(texts, length)``.

    Args:
        schedule: The schedule.
        starts: For each text the last position of its prompt, which is decoding step 0.
        length: Number of positions.

    Example:
        >>> weights(Schedule("first_k", first_k=2), [1], 5)
        tensor([[0., 1., 1., 0., 0.]])
    """
    before = schedule.weight(0) if schedule.changes_prompt else 0.0
    rows = [[before if at < start else schedule.weight(at - start) for at in range(length)] for start in starts]
    return torch.tensor(rows)


@contextmanager
def _read_at(variant: Any, model: Any, starts: Sequence[int], length: int) -> Iterator[None]:
    """A change of the model while texts are read in one pass, each with its answer from some position on."""
    if not isinstance(variant, SteeringVectors):
        with variant.attached(model):
            yield
        return
    strength = weights(variant.schedule, starts, length).unsqueeze(-1)
    with ExitStack() as stack:
        for site, vector in variant.vectors.items():
            added = (strength * vector.reshape(1, 1, -1)).to(model.device, model.dtype)
            stack.callback(site.hook(model, partial(torch.add, added)).remove)
        yield
