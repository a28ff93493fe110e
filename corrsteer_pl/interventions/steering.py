"""Adding constant vectors to the residual stream at chosen token positions."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from corrsteer_pl.errors import UserError, choices, one_line
from corrsteer_pl.models.decoding.branches import Run
from corrsteer_pl.models.llm import CACHE
from corrsteer_pl.models.sites import Site, decoder_blocks

# The file of a fit, and of a repository on the Hub.
FILE = "steering.safetensors"
CARD = """---
library_name: corrsteer_pl
tags: [steering-vectors]
---

Steering vectors in `steering.safetensors`, one for each site of a language model:

```python
from corrsteer_pl import SteeringVectors

with SteeringVectors.from_pretrained("this repository").attached(model):
    model.generate(**inputs)
```
"""
POSITIONS = ("generated", "all", "prompt_last", "first_k")


@dataclass(frozen=True)
class Schedule:
    """Which positions are steered, and how strongly.

    Decoding step 0 reads the last prompt position and gives the first generated token; step t reads the
    t-th generated token.

    Args:
        positions: ``generated``: the last prompt position and every generated one. ``all``: those and the
            prompt before them. ``prompt_last``: step 0 alone. ``first_k``: the steps that give the first
            ``first_k`` tokens.
        first_k: Number of steps for ``first_k``.
        decay: Factor from one decoding step to the next, 1 for none.

    Raises:
        UserError: An unknown name, or a number out of range.
    """

    positions: str = "generated"
    first_k: int = 1
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise UserError(f"model.positions is {self.positions!r}; choose one of {choices(POSITIONS)}.")
        if self.first_k < 1:
            raise UserError(f"model.first_k is {self.first_k}; it is a number of tokens, at least 1.")
        if not 0 < self.decay <= 1:
            raise UserError(f"model.decay is {self.decay}; it is a factor above 0 and at most 1.")

    @property
    def changes_prompt(self) -> bool:
        """Whether the prompt's keys and values depend on the steering, so that variants cannot share a prefill."""
        return self.positions == "all"

    def weight(self, step: int) -> float:
        """Strength at a decoding step, between 0 and 1."""
        steps = {"prompt_last": 1, "first_k": self.first_k}.get(self.positions)
        return self.decay**step if steps is None or step < steps else 0.0


class SteeringVectors(ModelHubMixin, library_name="corrsteer_pl", model_card_template=CARD):
    """One vector per site, added to the residual there.

    Works on any forward pass of the model, in Hugging Face ``generate`` as well, if it uses a cache: a chunk of several
    tokens is taken for a prompt, whose last position is step 0, and each single-token chunk for the next step.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are those of the Hugging Face Hub.

    Args:
        vectors: Per site ``(d_model,)``, or ``(variants, d_model)`` for a batch in which each sample stands
            once per variant, variants side by side.
        schedule: Positions and decay.
        variants: Number of variants.

    Attributes:
        most_together: How many variants can share a forward pass: any number.

    Raises:
        UserError: A vector is not finite: added to one variant, it would reach the others through attention.

    Example:
        >>> from corrsteer_pl.models.llm import LanguageModel
        >>> llm = LanguageModel.load("demo")
        >>> vectors = SteeringVectors({Site(1, "resid_post"): torch.zeros(llm.config.hidden_size)})
        >>> with vectors.attached(llm.model):
        ...     tokens = llm.model.generate(torch.tensor([llm.token_ids("Answer:")]), max_new_tokens=1)
    """

    most_together: int | None = None

    def __init__(self, vectors: Mapping[Site, Tensor], schedule: Schedule | None = None, variants: int = 1) -> None:
        for site, vector in vectors.items():
            if not vector.isfinite().all():
                raise UserError(f"the steering vector at {site} is not finite. Lower model.scale, or fit again.")
        self.vectors = dict(vectors)
        self.schedule = schedule or Schedule()
        self._variants = variants

    @classmethod
    def load(cls, path: str | Path, schedule: Schedule | None = None) -> "SteeringVectors":
        """Read a ``steering.safetensors`` that a fit wrote, with its schedule unless another is given.

        Raises:
            UserError: The file is missing or is not one.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                stored = file.metadata()
            vectors = {Site.parse(name): _vector(name, tensor) for name, tensor in tensors.items()}
            if len({len(vector) for vector in vectors.values()}) > 1:
                raise ValueError("its vectors have different widths")
            if schedule is None and stored is not None:
                schedule = schedule_of(stored)
            return cls(vectors, schedule)
        except (OSError, SafetensorError, ValueError, UserError) as error:
            raise UserError(
                f"{path} is no steering file ({one_line(error).rstrip('.')}). Give a steering.safetensors of a fit."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write vectors and schedule, for :meth:`load`."""
        tensors = {str(site): vector.contiguous() for site, vector in self.vectors.items()}
        metadata = {name: str(value) for name, value in asdict(self.schedule).items()}
        Path(path).write_bytes(to_bytes(tensors, metadata))

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory / FILE)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **_: Any,
    ) -> "SteeringVectors":
        """Vectors of a folder or of a repository on the Hub, with their own schedule."""
        if Path(model_id).is_dir():
            return cls.load(Path(model_id) / FILE)
        options: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "token": token,
        }
        return cls.load(hf_hub_download(model_id, FILE, local_files_only=local_files_only, **options))

    @classmethod
    def stack(cls, variants: Sequence[Mapping[Site, Tensor]], schedule: Schedule | None = None) -> Self:
        """Several sets of vectors ``(d_model,)`` as variants, zero where a set leaves a site out."""
        like = {site: vector for variant in variants for site, vector in variant.items()}
        stacked = {
            site: torch.stack([variant.get(site, torch.zeros_like(vector)) for variant in variants])
            for site, vector in sorted(like.items())
        }
        return cls(stacked, schedule, len(variants))

    def __len__(self) -> int:
        """Number of variants."""
        return self._variants

    @property
    def changes_prompt(self) -> bool:
        """Whether the prompt's keys and values depend on the vectors."""
        return self.schedule.changes_prompt

    def described(self, variant: int) -> str | None:
        """What a variant does, as the subject of a sentence; None if it adds nothing."""
        each = {str(site): vectors.reshape(-1, vectors.shape[-1])[variant] for site, vectors in self.vectors.items()}
        sites = [site for site, vector in each.items() if vector.any()]
        return f"steering at {choices(sites)}" if sites else None

    def groups(self, size: int) -> Iterator[Self]:
        """The variants in groups of ``size``, the last filled up with zero vectors."""
        for start in range(0, len(self), size):
            chunks = {site: vectors[start : start + size] for site, vectors in self.vectors.items()}
            filled = {site: nn.functional.pad(chunk, (0, 0, 0, size - len(chunk))) for site, chunk in chunks.items()}
            yield type(self)(filled, self.schedule, size)

    @contextmanager
    def attached(self, model: nn.Module, run: Run | None = None) -> Iterator[None]:
        """Steer ``model`` within the context.

        Args:
            model: The language model.
            run: Generations, each under the variant of its place; then every chunk is a decoding step. None if
                variants stand side by side in the rows of a batch.

        Raises:
            UserError: The model has no such block, is of another width, or a vector overflows its dtype.
        """
        self.check(model)
        clock = (_Steps if run else _Clock)(self.schedule)
        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(clock.tick, with_kwargs=True).remove)
            for site, vector in self.vectors.items():
                stack.callback(site.hook(model, partial(self._add, clock, _Placed(vector, run))).remove)
            yield

    def check(self, model: Any) -> None:
        """Refuse a model that the vectors are not for.

        Raises:
            UserError: It has no such block, is of another width, or a vector overflows its dtype.
        """
        name, depth = type(model).__name__, len(decoder_blocks(model))
        width = model.config.get_text_config(decoder=True).hidden_size
        for site, vector in self.vectors.items():
            if site.layer >= depth:
                raise UserError(
                    f"the steering vectors have one at {site}, but {name} has blocks 0..{depth - 1}. "
                    "Use vectors that were fitted on this model."
                )
            if vector.shape[-1] != width:
                raise UserError(
                    f"the steering vector at {site} has width {vector.shape[-1]}, but {name} has width {width}. "
                    "Use vectors that were fitted on this model."
                )
            if not vector.to(model.dtype).isfinite().all():
                raise UserError(
                    f"the steering vector at {site} overflows {str(model.dtype).removeprefix('torch.')}: its largest "
                    f"entry is {vector.abs().max():.3g}. Lower model.scale, or set model.dtype to bfloat16 or float32."
                )

    def _add(self, clock: "_Clock", placed: "_Placed", hidden: Tensor) -> Tensor | None:
        if clock.weight == 0:
            return None
        vector = placed(hidden)
        if hidden.shape[1] == 1 or placed.run or self.schedule.changes_prompt:
            return torch.add(hidden, vector, alpha=clock.weight)
        return torch.cat([hidden[:, :-1], torch.add(hidden[:, -1:], vector, alpha=clock.weight)], dim=1)


def require_effect(vectors: Mapping[Site, Tensor], run: Path, purpose: str) -> None:
    """Refuse to hand on what changes nothing.

    Args:
        vectors: What a run adds.
        run: Folder of the run.
        purpose: What is to be done with them, such as ``export``.

    Raises:
        UserError: There is no vector, or each is zero.
    """
    if not any(vector.any() for vector in vectors.values()):
        why = "steers with a scale of 0" if vectors else "selected nothing"
        raise UserError(f"{run} {why}, so it changes nothing, and there is nothing to {purpose}.")


def _vector(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim != 1 or not tensor.is_floating_point():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {dtype} of shape {tuple(tensor.shape)}, not a vector of floating-point numbers")
    return tensor


def schedule_of(metadata: Mapping[str, str]) -> Schedule:
    """The schedule that :meth:`SteeringVectors.save` has written."""
    if missing := [field.name for field in fields(Schedule) if field.name not in metadata]:
        raise ValueError(f"its metadata lack {choices(missing)}")
    return Schedule(metadata["positions"], int(metadata["first_k"]), float(metadata["decay"]))


class _Clock:
    """Counts decoding steps: a chunk of several tokens, or an empty cache, starts at 0."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.step, self.weight = schedule, -1, 0.0

    def tick(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Go on to the step of a forward pass, and to its strength."""
        self.step = 0 if self.starts(args, kwargs) else self.step + 1
        self.weight = self.schedule.weight(self.step)

    def starts(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a forward pass is the first of a generation."""
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        cache = next((kwargs[name] for name in CACHE if name in kwargs), None)
        return tokens.shape[1] > 1 or (cache is not None and cache.get_seq_length() == 0)


class _Steps(_Clock):
    """Counts every chunk as a decoding step."""

    def starts(self, *_: Any) -> bool:
        return False


class _Placed:
    """The vectors of a site, ``(rows or 1, places, d_model)``, gathered again only if places or batch size change."""

    def __init__(self, vectors: Tensor, run: Run | None) -> None:
        self.vectors, self.run = vectors.reshape(-1, vectors.shape[-1]), run  # (K, d_model)
        self._variant: Tensor | None = None
        self._like: tuple = ()
        self._placed = vectors

    def __call__(self, hidden: Tensor) -> Tensor:
        variant, like = self.run.variant if self.run else None, (hidden.shape[0], hidden.dtype, hidden.device)
        if variant is not self._variant or like != self._like:
            self._variant, self._like = variant, like
            self.vectors = self.vectors.to(hidden.device, hidden.dtype)
            if variant is None:
                if hidden.shape[0] % len(self.vectors):
                    raise ValueError(f"{hidden.shape[0]} rows cannot hold {len(self.vectors)} variants side by side")
                variant = (torch.arange(hidden.shape[0]) % len(self.vectors)).unsqueeze(1)
            self._placed = self.vectors[variant.to(hidden.device)]
        return self._placed
