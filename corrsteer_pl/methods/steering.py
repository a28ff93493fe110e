"""What methods share that add vectors to the residual stream, and choose among candidates on the validation split."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.files import write_atomically
from corrsteer_pl.interventions.steering import FILE, Schedule, SteeringVectors
from corrsteer_pl.methods.answers.answering import EVERYWHERE
from corrsteer_pl.methods.answers.calibration import Budget, damage, warn_of_edge, warn_of_open_end
from corrsteer_pl.methods.checks import leaves_scale_open
from corrsteer_pl.methods.runs.provenance import check_directions, damaged
from corrsteer_pl.methods.selecting import Selecting
from corrsteer_pl.models.sites import Site
from corrsteer_pl.selection import (
    Bar,
    Choice,
    Feature,
    Selection,
    Strength,
    best_strength,
    choose,
    is_asked_for,
    measured,
    reselect,
    search_strengths,
)

# Scales from which a search starts.
FIRST_SCALES = (0.5, 1.0, 2.0)


class Steering(Selecting):
    """Steers with those candidates that prove themselves.

    Validation tests each candidate, which is a vector at a site, against the unsteered model; a rule chooses.

    A subclass calls :meth:`ready` once its options are known, and says in :meth:`propose` what the candidates are.

    Attributes:
        selection: What the fit chose, after validation; None before.
        directions: What one unit of each candidate's coefficient adds, ``(d_model,)``, by name.
        schedule: Positions that are steered, and how strongly.
    """

    def ready(self) -> None:
        """Take over the options; call it at the end of ``__init__``."""
        h = self.hparams
        self.schedule = Schedule(h["positions"] or EVERYWHERE.positions, h["first_k"], h["decay"])
        self.bar, self.budget = Bar(h["min_improvement"], h["significance_level"]), Budget.of(h["budget"])
        self.forget()

    def forget(self) -> None:
        """Drop what a fit has found."""
        self.selection: Selection | None = None
        self.directions: dict[str, Tensor] = {}
        self.snapshots: list[dict[str, Any]] = []
        self.candidates: tuple[Feature, ...] = ()

    @abstractmethod
    def propose(self) -> tuple[Feature, ...]:
        """The candidates, with their :attr:`directions` set."""

    def described(self, selection: Selection) -> Selection:
        """The selection with what else the method knows of it."""
        return selection

    def begin(self) -> None:
        """Start from nothing."""
        self.forget()

    def setup(self, stage: str) -> None:
        """Set up, and warn if a fit's steering changes the prompt, so that every variant has to read it."""
        super().setup(stage)
        if stage == "fit" and self.schedule.changes_prompt and self.task.generates:
            warnings.warn(
                "model.positions is all, which changes the prompt itself, so each variant reads every prompt again; "
                "what changes generated positions alone reads it once.",
                stacklevel=2,
            )

    # ---------------------------------------------------------------- validate: test the candidates

    def tried(self) -> SteeringVectors:
        """The unsteered model, and each candidate alone."""
        if not self.counted:
            raise self.unfitted()
        self.candidates = self.propose()
        tried = () if self.hparams["rule"] == "all" else self.candidates
        return SteeringVectors.stack([{}, *(self.vectors_of([f]) for f in tried)], self.schedule_here)

    def conclude(self, rewards: Tensor) -> None:
        """Select by the rule, try the whole selection, and keep a snapshot of how far the fit has come."""
        baseline, *alone = rewards.mean(1).tolist()
        candidates = measured(self.candidates, rewards) if alone else self.candidates
        choice = choose(self.hparams["rule"], candidates, rewards, self.bar, self._rewards_of)
        self.selection = self.selected(candidates, baseline, choice)
        if leaves_scale_open(self.hparams["scale"]) and choice.features:
            self.selection = self.selection.at(self._strengths(choice.features), self.budget.allows)
        self.selection = self.selection.marked()
        for sentence in self.selection.doubts if self.has_seen_all else ():
            warnings.warn(sentence, stacklevel=2)
        self.take_snapshot(baseline, max(alone, default=baseline))

    def _rewards_of(self, sets: Sequence[Sequence[Feature]]) -> Tensor:
        """Rewards ``(sets, n)`` on the validation split when the features of a set steer together."""
        return self.try_also(SteeringVectors.stack([self.vectors_of(some) for some in sets], self.schedule_here))

    def _strengths(self, features: Sequence[Feature]) -> list[Strength]:
        """What features together do at each strength, the unsteered model among them as strength 0."""
        data = self.budget.prompts(self.datamodule)

        def measure(scales: Sequence[float]) -> list[Strength]:
            """The unsteered model, which the damage is measured against, and each scale."""
            everything = [0.0, *scales]
            vectors = [self.vectors_of(features, scale) for scale in everything]
            variants = SteeringVectors.stack(vectors, self.schedule_here)
            columns = {"reward": self.try_also(variants).mean(1).tolist(), **damage(self, self.budget, variants, data)}
            return [Strength(scale, **{k: v[i] for k, v in columns.items()}) for i, scale in enumerate(everything)]

        scale = self.hparams["scale"]
        if scale == "auto":
            # Vectors that overflow the model's dtype cannot be tried.
            largest = max(vector.abs().max().item() for vector in self.vectors_of(features, 1.0).values())
            most = torch.finfo(self.llm.model.dtype).max / largest if largest else math.inf
            curves = {"": measure(FIRST_SCALES)}
            further = search_strengths(
                curves, lambda pairs: measure([factor for _, factor in pairs])[1:], self.budget.allows, most
            )
            if self.has_seen_all:
                warn_of_open_end("model.scale", further[""], self.budget)
            return further[""]
        curve = measure(sorted({*scale} - {0}, key=abs))
        if self.has_seen_all and best_strength(curve, self.budget.allows).scale != 0:
            warn_of_edge("model.scale", curve, self.budget, ", or set model.scale to auto")
        return curve

    def selected(self, candidates: Sequence[Feature], baseline: float | None, choice: Choice) -> Selection:
        """What was chosen, and among what."""
        return self.described(
            Selection(
                rule=self.hparams["rule"],
                features=choice.features,
                joint_reward=choice.joint_reward,
                steps=choice.steps,
                scale=self.scale_of_trials,
                candidates=tuple(candidates),
                ranking=(),
                baseline_reward=baseline,
                samples=self.learnt_from,
                reward=0.0,
                null_max_correlation=None,
                llm=self.llm.identity,
                saes=self.saes_identity() or {},
            )
        )

    # ---------------------------------------------------------------- test: steer

    @property
    def scale_of_trials(self) -> float:
        """Factor on all coefficients while candidates are tried: 1, if one is to be chosen afterwards."""
        scale = self.hparams["scale"]
        return 1.0 if leaves_scale_open(scale) else scale

    def vectors_of(self, features: Sequence[Feature], scale: float | None = None) -> dict[Site, Tensor]:
        """The sum of ``scale * c_f * direction_f`` at each site, ``(d_model,)`` float32.

        Args:
            features: Candidates, or whatever else :meth:`direction_of` knows.
            scale: Factor on all coefficients; None for that of the trials.
        """
        factor = self.scale_of_trials if scale is None else scale
        vectors: dict[Site, Tensor] = {}
        for f in features:
            site, vector = Site.parse(f.site), factor * f.coefficient * self.direction_of(f)
            vectors[site] = vectors[site] + vector if site in vectors else vector
        return vectors

    def direction_of(self, feature: Feature) -> Tensor:
        """What one unit of a candidate's coefficient adds, ``(d_model,)``."""
        return self.directions[feature.name]

    def steering_vectors(self) -> dict[Site, Tensor]:
        """What the selection adds at each site, ``(d_model,)`` float32, ``scale`` included.

        Raises:
            UserError: Nothing has been fitted.
        """
        return self.vectors_of(self.chosen().features, self.chosen_scale)

    @property
    def chosen_scale(self) -> float:
        """Factor on the coefficients of what was selected: the one that validation chose, where it had a choice.

        Raises:
            UserError: Nothing has been fitted.
        """
        return self.chosen().scale if leaves_scale_open(self.hparams["scale"]) else self.hparams["scale"]

    def comparison(self) -> SteeringVectors:
        """The unsteered model and the steered one."""
        return SteeringVectors.stack([{}, self.steering_vectors()], self.schedule_here)

    @property
    def size(self) -> int:
        """Numbers of all vectors that are added."""
        return sum(vector.numel() for vector in self.steering_vectors().values())

    def text_comparison(self) -> SteeringVectors:
        """The same where texts are only read: every position is steered."""
        return SteeringVectors.stack([{}, self.steering_vectors()], EVERYWHERE)

    @property
    def schedule_here(self) -> Schedule:
        """How the task at hand is steered."""
        return self.answering.schedule or self.schedule

    # ---------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """The selection, and the directions of its candidates."""
        return {**super().state(), "directions": self.directions}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what was found, and the selection by this module's rule, sign and layers."""
        try:
            self.directions = dict(state["directions"])
            self.restore_more(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise damaged(f"what its fit found cannot be read ({one_line(error)})") from error
        super().restore(state)
        if self.selection is not None:
            check_directions(self.directions, (f.name for f in self.selection.candidates))
            self.selection = self._reselected(self.selection)

    def restore_more(self, state: dict[str, Any]) -> None:
        """Take over what else a subclass stores."""

    def _reselected(self, fitted: Selection) -> Selection:
        h = self.hparams
        sign, layers = h.get("sign", "both"), h.get("layers")
        selection = reselect(fitted, h["rule"], sign, layers, self.bar)
        if leaves_scale_open(h["scale"]) and selection.features and not selection.strengths:
            given = "auto" if h["scale"] == "auto" else "a list"
            raise UserError(
                f"model.scale is {given}, of which a fit chooses one for what it selects, but the checkpoint has "
                f"chosen none for these features (rule {h['rule']}). Give one number, or fit again."
            )
        left_out = [f.name for f in fitted.features if not is_asked_for(f, sign, layers)]
        if left_out:
            warnings.warn(
                f"{len(left_out)} of the {len(fitted.features)} features that the fit selected steer nothing here "
                f"({', '.join(left_out)}), by model.layers or model.sign. Leave these out to steer as the fit did.",
                stacklevel=2,
            )
        return selection

    # ---------------------------------------------------------------- what users see

    def write(self, folder: Path) -> None:
        """``selection.json`` and ``steering.safetensors``."""
        super().write(folder)
        vectors = SteeringVectors(self.steering_vectors(), self.schedule)
        write_atomically(folder / FILE, vectors.save)
