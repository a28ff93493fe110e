"""ROSI: amplify the direction between harmful and harmless requests in the weights, by a rank-one edit."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from corrsteer_pl.data import Batch, TaskDataModule
from corrsteer_pl.errors import NothingToLearn, UserError, choices, one_line
from corrsteer_pl.interventions.edited import EditedWeights, EditRecord, remove_record
from corrsteer_pl.interventions.rank_one import FORMS, UNITS, Edit, EditedOutputs, warn_of_centred
from corrsteer_pl.interventions.switched import Switched
from corrsteer_pl.methods.accumulation.sums import MergedSums, stored_counts
from corrsteer_pl.methods.answers.answering import answered
from corrsteer_pl.methods.answers.calibration import (
    Budget,
    divergences,
    losses,
    prompts_of,
    warn_of_edge,
    warn_of_open_end,
)
from corrsteer_pl.methods.base import Settings
from corrsteer_pl.methods.directions import (
    COMPLY,
    FIRST_PERCENT,
    MOST_PERCENT,
    REFUSE,
    Tried,
    best_directions,
    best_of_each,
    common_ending,
    curve_of,
    first_strengths,
    preference,
    require_both,
)
from corrsteer_pl.methods.inspection import Inspection
from corrsteer_pl.methods.runs.provenance import damaged
from corrsteer_pl.methods.selecting import Selecting
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.llm import positions_of
from corrsteer_pl.models.sites import Site
from corrsteer_pl.models.writers import writers
from corrsteer_pl.selection import Selection, Strength, measured, search_strengths
from corrsteer_pl.stats import ClassMeans
from corrsteer_pl.tasks import Example

# Later blocks than this share of the depth give no direction: they are about the next token.
EARLY = 0.8
# Prompts that are compared to see which tokens come after the instruction.
COMPARED = 64
# Directions for which a search goes on after the first strengths.
SEARCHED = 2


class RosiInspection(Inspection):
    """What ``doctor`` shows of ROSI."""

    def held(self, batch: Batch) -> dict[str, int]:
        """Bytes of sums, and of the edited matrices beside those that they replace."""
        matrices = [writer.matrix for writer in writers(self.method.llm.model)]
        return {"running sums": self.method.sums.size, "edited matrices": sum(matrix.nbytes for matrix in matrices)}

    @property
    def variants(self) -> int:
        """The unchanged model, and each direction with each of the strengths that are tried first."""
        h = self.method.hparams
        return 1 + h["topm"] * len(h["strengths"] or FIRST_PERCENT)


class Rosi(Selecting):
    """Edits all matrices that write to the residual stream along a direction that tells harmful from harmless requests.

    A fit reads each request of a refusal task once, answers none, and sums the residual after every block at the
    positions between the instruction and the answer. Differences of the class means are the directions. Validation
    tries those that separate best with several strengths, as hooks, and chooses the best reward within a budget on
    harmless requests; a test compares the model with its edited weights. The weights on disk stay as they are:
    ``export`` writes edited ones.

    Args:
        llm: Path or Hub id of a causal language model, or ``demo``.
        form: ``row_mean``: add ``alpha * mean(W x) * s`` along the direction s, as the paper does, which has the sign
            of that mean. ``projection``: ``alpha * (s . W x) * s``, which has the sign of what is there already.
        unit: How strengths are measured. ``percent``: of each matrix's Frobenius norm. ``alpha``: as the one factor
            alpha for all matrices that the paper's eq. 6 has.
        strengths: Strengths that are tried, and no others; a warning tells if the best is at an edge of the list. None
            for a search: 1, 4 and 16 percent (or alphas of about that size), then for the two best directions twice or
            half of the best while that is at an edge and within the budget, then midpoints around the best.
        layers: Blocks after which directions are taken, from 0; None for those in the first four fifths.
        positions: At most how many of the last prompt tokens give directions; fewer if prompts do not share so many.
        topm: How many directions are tried, those that separate the classes best.
        max_kl: Largest mean KL divergence, in nats, of the edited from the unchanged model's first new token after
            harmless requests of the validation; None for any.
        max_loss: Largest fall of the mean reward on these, which is over-refusal; None for any.
        harmless: Options of the data module for harmless requests of another task, of whose validation split these two
            are measured on 200 at most; None for those of the validation.
        extraction_prompt: A system message for both classes while directions are extracted, and only then, for models
            that were not taught to refuse.
        scale: Factor on the chosen strength, in a test.
        dtype: The model's precision: ``float32``, ``bfloat16`` or ``float16``.
        llm_args: Further options for loading the model: ``revision``, ``attn_implementation``, ``device_map``,
            ``trust_remote_code``, ``blocks`` (where its decoder blocks are).
        candidate_batch_size: How many variants of every prompt share a forward pass; ``auto`` for as many as about a
            gibibyte, or a sixteenth of a GPU's memory, allows.
        noise_floor: Let a test answer unsteered once more, in other batches: how many answers rounding alone changes.

    Attributes:
        record: The edit that was chosen, with the model that it belongs to; None if nothing improved on the model.

    Source:
        ROSI, arXiv 2508.20766; candidates of directions as in Arditi et al., arXiv 2406.11717.
    """

    inspection = RosiInspection
    settings = Settings(
        settled=("form", "unit", "extraction_prompt"),
        resumed=("dtype", "layers", "positions"),
        tested=("scale", "dtype", "llm_args"),
    )

    def __init__(
        self,
        llm: str,
        form: Literal["row_mean", "projection"] = "row_mean",
        unit: Literal["percent", "alpha"] = "percent",
        strengths: list[float] | None = None,
        layers: list[int] | None = None,
        positions: int = 5,
        topm: int = 8,
        max_kl: float | None = 0.2,
        max_loss: float | None = 0.02,
        harmless: dict | None = None,
        extraction_prompt: str | None = None,
        scale: float = 1.0,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        llm_args: dict | None = None,
        candidate_batch_size: int | str = "auto",
        noise_floor: bool = False,
    ) -> None:
        super().__init__(llm, dtype, llm_args, candidate_batch_size)
        self.save_hyperparameters()
        _check_values(self.hparams)
        data = prompts_of(harmless, "model.harmless") if harmless else None
        self.budget = Budget(max_kl, max_loss, data)
        self._forget({})

    def _forget(self, sums: Mapping[str, ClassMeans]) -> None:
        self.sums = MergedSums(sums)
        self.selection: Selection | None = None
        self.record: EditRecord | None = None
        self.snapshots: list[dict[str, Any]] = []

    # ---------------------------------------------------------------- fit: sum the residual of both classes

    def begin(self) -> None:
        """See where directions are taken, and set all sums to zero."""
        # Refuses weights that cannot be edited before anything is read.
        writers(self.llm.model)
        self.llm.require_layers(self.hparams["layers"] or ())
        examples = self.datamodule.examples["train"]
        require_both(examples, "fit")
        if not self.budget.data:
            require_both(self.datamodule.examples["validation"], "validation")
        if self.hparams["extraction_prompt"] is not None and not self.datamodule.uses_chat(self.llm):
            raise UserError(
                "model.extraction_prompt is a system message, but prompts are not put into a chat template. Leave it "
                "out, or take an instruction model with its template."
            )
        prompts = [self._prompt(example) for example in examples[:COMPARED]]
        places = len(self.layers), min(self.hparams["positions"], max(1, common_ending(prompts)))
        self._forget({"means": ClassMeans(places, self.llm.config.hidden_size)})

    def verify(self) -> None:
        """Warn if the edit would do nothing."""
        warn_of_centred(self.llm.model, self.hparams["form"])

    @property
    def layers(self) -> list[int]:
        """Blocks after which directions are taken."""
        depth, named = self.llm.config.num_hidden_layers, self.hparams["layers"]
        return sorted(set(named)) if named else [layer for layer in range(depth) if layer < EARLY * depth]

    def _prompt(self, example: Example) -> list[int]:
        data, system = self.datamodule, self.hparams["extraction_prompt"]
        return data.token_ids(example, data.fit_task, system)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Read the requests, and add the residual at each layer and position to the sums of its class."""
        prompts = [self._prompt(example) for example in batch.examples]
        ids, mask = (tensor.to(batch.input_ids.device) for tensor in self.llm.left_pad(prompts))
        harmful = torch.tensor([example.gold == REFUSE for example in batch.examples])
        means = self.sums.fresh["means"]
        residuals = self._residuals(ids, mask, means.places[1])
        with self.counting():
            means.update(residuals, harmful, batch.weight)
        # Lightning counts steps, and writes checkpoints by them, only if there is something to optimise.
        return torch.zeros((), requires_grad=True)

    @torch.no_grad()
    def _residuals(self, ids: Tensor, mask: Tensor, last: int) -> Tensor:
        """The residual after each layer at the last positions, ``(batch, layers, positions, d_model)``."""
        found: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer in self.layers:
                hook = Site(layer, "resid_post").hook(self.llm.model, partial(found.__setitem__, layer))
                stack.callback(hook.remove)
            self.llm.forward(ids, mask, positions_of(mask))
        return torch.stack([found[layer][:, -last:].float().to(ids.device) for layer in self.layers], dim=1)

    # ---------------------------------------------------------------- validate: directions and strengths

    def tried(self) -> EditedOutputs:
        """The unchanged model, and the directions that separate best with each of the first strengths."""
        if not self.counted or not self.sums.merged:
            raise self.unfitted()
        with self.changing():
            self.sums.merge()
        h = self.hparams
        seen_both = bool((self.means.n > 0).all())
        directions = best_directions(self.means, self.layers, h["topm"]) if seen_both else []
        self._directions = {direction.feature.name: direction for direction in directions}
        strengths: list[float] = []
        if directions:
            strengths = h["strengths"] or first_strengths(self.llm.model, directions[0].vector, h["form"], h["unit"])
        pairs = [(name, float(strength)) for name in self._directions for strength in sorted(set(strengths))]
        self._first = self._edits(pairs)
        self._variants = self._outputs(self._first)
        return self._variants

    def _edits(self, pairs: Sequence[tuple[str, float]]) -> list[Tried]:
        """The edits of pairs of a direction's name and a strength."""
        h = self.hparams
        return [self._directions[name].tried(strength, h["form"], h["unit"]) for name, strength in pairs]

    def _outputs(self, tried: Sequence[Tried]) -> EditedOutputs:
        return EditedOutputs(self.llm.model, [None, *(one.edit for one in tried)])

    @property
    def means(self) -> ClassMeans:
        """The merged sums."""
        return self.sums.merged["means"]

    def conclude(self, rewards: Tensor) -> None:
        """Choose the edit with the best reward within the budget; of equal ones the weakest."""
        if not self._first:
            if self.has_seen_all:
                raise NothingToLearn("the fit has seen requests of one kind only. Fit on more, or do not end it early.")
            return
        data = self.budget.prompts(self.datamodule)
        unchanged, tried = self._measured(self._first, self._variants, rewards, data)
        names = list(dict.fromkeys(one.feature.name for one in sorted(tried, key=self._order)))
        if self.hparams["strengths"] is None:
            tried += self._searched(names[:SEARCHED], unchanged, tried, data)
        allowed = [one for one in tried if one.cost and self.budget.allows(one.cost)]
        best = min(allowed, key=lambda one: preference(one.feature), default=None)
        if best is not None and (best.feature.validation_reward or 0.0) <= unchanged.reward:
            best = None
        shown = names[0] if best is None else best.feature.name
        if self.has_seen_all:
            self._warn_of_edges(curve_of(shown, unchanged, tried))
        self.record = None if best is None else EditRecord.of(best.edit, self.llm)
        self.selection = self._described(tried, unchanged, best, shown).marked()
        reached = unchanged.reward if best is None else best.feature.validation_reward or 0.0
        self.take_snapshot(unchanged.reward, reached)
        del self._first, self._variants

    @property
    def _most(self) -> float:
        """The largest strength of an edit."""
        return MOST_PERCENT if self.hparams["unit"] == "percent" else math.inf

    def _warn_of_edges(self, curve: Sequence[Strength]) -> None:
        if self.hparams["strengths"] is None:
            warn_of_open_end("model.strengths", curve, self.budget)
        else:
            warn_of_edge("model.strengths", curve, self.budget, ", or leave it out for a search", self._most)

    def _order(self, tried: Tried) -> tuple[bool, tuple[float, float, float]]:
        """By which directions are searched: those within the budget first, then by preference."""
        return not (tried.cost and self.budget.allows(tried.cost)), preference(tried.feature)

    def _searched(
        self, names: Sequence[str], unchanged: Strength, tried: Sequence[Tried], data: TaskDataModule
    ) -> list[Tried]:
        """Further strengths of some directions."""
        further: list[Tried] = []

        def measure(pairs: list[tuple[str, float]]) -> list[Strength]:
            edits = self._edits(pairs)
            variants = self._outputs(edits)
            _, measured_edits = self._measured(edits, variants, self.try_also(variants), data)
            further.extend(measured_edits)
            return [one.cost for one in measured_edits if one.cost]

        curves = {name: curve_of(name, unchanged, tried) for name in names}
        search_strengths(curves, measure, self.budget.allows, self._most)
        return further

    def _measured(
        self, tried: Sequence[Tried], variants: EditedOutputs, rewards: Tensor, data: TaskDataModule
    ) -> tuple[Strength, list[Tried]]:
        """What the unchanged model reaches, and the edits with what they reach and cost.

        Args:
            tried: The edits.
            variants: The unchanged model and the edits.
            rewards: Of the variants on the validation split, ``(variants, n)``.
            data: Prompts of the budget.
        """
        features = measured([one.feature for one in tried], rewards)
        unchanged, *costs = self._costs([one.edit.strength for one in tried], variants, rewards, data)
        edits = [replace(one, feature=f, cost=c) for one, f, c in zip(tried, features, costs, strict=True)]
        return unchanged, edits

    def _costs(
        self, sizes: Sequence[float], variants: EditedOutputs, rewards: Tensor, data: TaskDataModule
    ) -> list[Strength]:
        """Of each variant what it reaches, and what it costs on harmless requests."""
        decoder = Decoder(self.llm, data.task.max_new_tokens, None, self.candidate_batch_size)
        kl = divergences(decoder, self._harmless(data), variants)
        if data is self.datamodule:
            kept = torch.tensor([example.gold == COMPLY for example in data.examples["validation"]])
            harmless = rewards[:, kept].mean(1)
            loss = (harmless[0] - harmless).tolist()
        else:
            data.task.load(str(self.device))
            loss = losses(answered(decoder, data.task, data), self._harmless(data), variants)
        found = zip([0.0, *sizes], rewards.mean(1).tolist(), kl, loss, strict=True)
        return [Strength(scale, reward, kl=divergence, loss=fall) for scale, reward, divergence, fall in found]

    def _harmless(self, data: TaskDataModule) -> Iterator[Batch]:
        """Validation batches in which only harmless requests count."""
        for batch in data.val_dataloader():
            kept = torch.tensor([float(example.gold == COMPLY) for example in batch.examples])
            yield replace(batch, weight=batch.weight * kept).to(self.device)

    def _described(self, tried: Sequence[Tried], unchanged: Strength, best: Tried | None, shown: str) -> Selection:
        """What was chosen; the best edit of each direction within the budget is a candidate, all are ranked.

        Args:
            tried: The edits.
            unchanged: What the unchanged model reaches.
            best: The chosen edit; None if nothing improved.
            shown: Name of the direction whose strengths are listed.
        """
        features = [one.feature for one in tried]
        allowed = [one.feature for one in tried if one.cost and self.budget.allows(one.cost)]
        curve = sorted(curve_of(shown, unchanged, tried), key=lambda strength: strength.scale)
        return Selection(
            rule="global",
            features=() if best is None else (best.feature,),
            joint_reward=unchanged.reward if best is None else best.feature.validation_reward,
            scale=0.0 if best is None else best.edit.strength,
            strengths=tuple(curve),
            candidates=tuple(best_of_each(features, allowed)),
            ranking=tuple(features),
            baseline_reward=unchanged.reward,
            samples=self.counted,
            reward=0.0,
            null_max_correlation=None,
            score="separation",
            llm=self.llm.identity,
            saes={},
        )

    # ---------------------------------------------------------------- test: edited weights

    def edit(self) -> Edit | None:
        """The chosen edit, at ``scale`` times its strength; None if none was chosen."""
        self.chosen()
        if self.record is None:
            return None
        edit = self.record.edit
        return replace(edit, strength=edit.strength * self.hparams["scale"])

    def comparison(self) -> Switched:
        """The model, and the same with edited weights."""
        edit = self.edit()
        if edit is None:
            return Switched([None, None])
        weights = EditedWeights(self.llm.model, edit)
        return Switched([None, (str(edit), weights.applied)])

    @property
    def size(self) -> int:
        """The direction, and a factor for each matrix."""
        return 0 if self.record is None else self.record.edit.direction.numel() + len(self.record.alphas)

    def merge(self) -> None:
        """Edit the weights of the loaded model for good."""
        edit = self.edit()
        if edit is None or self.record is None:
            raise UserError("no edit was chosen: nothing improved on the model. There is nothing to merge.")
        record = self.record if self.hparams["scale"] == 1 else EditRecord.of(edit, self.llm)
        record.apply(self.llm)

    # ---------------------------------------------------------------- checkpoints and files

    def state(self) -> dict[str, Any]:
        """The selection, the edit, and what rebuilds the sums."""
        self.sums.merge()
        return {
            **super().state(),
            "sums": {name: {"places": sums.places, "width": sums.width} for name, sums in self.sums.merged.items()},
            "record": self.record.as_dict() if self.record else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what was learnt."""
        tensors = checkpoint.get("state_dict") or {}
        if "sums.merged.means.n" in tensors:
            # A checkpoint without this sum has left no sample out.
            tensors.setdefault("sums.merged.means.n_left_out", torch.zeros((), dtype=torch.float64))
        super().on_load_checkpoint(checkpoint)

    def stored_counts(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, float]:
        """Number of samples in the sums of both classes."""
        return stored_counts(tensors, "sums")

    def restore(self, state: dict[str, Any]) -> None:
        """Take over sums, selection and edit."""
        try:
            sums = {name: ClassMeans(tuple(shape["places"]), shape["width"]) for name, shape in state["sums"].items()}
            self._forget(sums)
            self.record = None if state["record"] is None else EditRecord.from_dict(state["record"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise damaged(f"what its fit found cannot be read ({one_line(error)})") from error
        super().restore(state)

    def write(self, folder: Path) -> None:
        """``selection.json``, and the edit as ``edit.json`` with ``edit.safetensors``, which has the direction."""
        super().write(folder)
        if self.record is not None:
            self.record.write(folder)
        else:
            remove_record(folder)


def _check_values(h: Mapping[str, Any]) -> None:
    for name, values in (("form", FORMS), ("unit", UNITS)):
        if h[name] not in values:
            raise UserError(f"model.{name} is {h[name]!r}; choose one of {choices(values)}.")
    for strength in h["strengths"] or ():
        if h["unit"] == "percent" and not 0 < strength <= MOST_PERCENT:
            raise UserError(f"model.strengths has {strength}; strengths are percentages above 0 and at most 100.")
        if not 0 < strength < math.inf:
            raise UserError(f"model.strengths has {strength}; an alpha is a finite number above 0.")
    if h["strengths"] == [] or h["layers"] == []:
        name = "strengths" if h["strengths"] == [] else "layers"
        raise UserError(f"model.{name} is empty. Name some, or leave it out.")
    for name in ("positions", "topm"):
        if h[name] < 1:
            raise UserError(f"model.{name} is {h[name]}; it is a number, at least 1.")
    for name in ("max_kl", "max_loss"):
        if h[name] is not None and h[name] < 0:
            raise UserError(f"model.{name} is {h[name]}; it is a number from 0 on, or null for no limit.")
