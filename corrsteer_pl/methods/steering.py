"""What methods share that add vectors to the residual stream, and choose among candidates on the validation split."""

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.files import write_atomically
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.accumulate import Accumulator
from corrsteer_pl.methods.answering import EVERYWHERE
from corrsteer_pl.methods.calibration import Budget, damage
from corrsteer_pl.methods.candidates import judge_left_out, mean_reward, require_different, rewards_differ
from corrsteer_pl.methods.provenance import check_directions, damaged
from corrsteer_pl.methods.selecting import Selecting
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.sae import Encoder
from corrsteer_pl.models.sites import Site
from corrsteer_pl.selection import Bar, Choice, Feature, Selection, Strength, choose, measured, reselect
from corrsteer_pl.stats import Moments


class Steering(Selecting):
    """Accumulates what is read at some sites beside the reward, and steers with those candidates that prove themselves.

    An epoch of "training" accumulates running sums and changes no weight. Validation tests each candidate, which is a
    vector at a site, against the unsteered model; a rule chooses. The sums of several processes are merged exactly, so
    that neither their number nor an interruption changes the result.

    A subclass calls :meth:`ready` once its options are known, and says in :meth:`load_encoders` what is read and in
    :meth:`propose` what the candidates are.

    Attributes:
        encoders: What reads the residual at each site, by layer.
        sums: Running sums.
        selection: What the fit chose, after validation; None before.
        directions: What one unit of each candidate's coefficient adds, ``(d_model,)``, by name.
        schedule: Positions that are steered, and how strongly.
    """

    def ready(self) -> None:
        """Take over the options; call it at the end of ``__init__``."""
        h = self.hparams
        self.schedule = Schedule(h["positions"], h["first_k"], h["decay"])
        self.bar, self.budget = Bar(h["min_improvement"], h["significance_level"]), Budget.of(h["budget"])
        self.encoders: Mapping[int, Encoder] = {}
        self.forget()

    def forget(self) -> None:
        """Drop what a fit has found."""
        self.sums = Accumulator({}, ())
        self.selection: Selection | None = None
        self.directions: dict[str, Tensor] = {}
        self.snapshots: list[dict[str, Any]] = []
        self.candidates: tuple[Feature, ...] = ()
        self.left_out: dict[str, int] = {}

    # ---------------------------------------------------------------- what a subclass says

    @property
    @abstractmethod
    def pools(self) -> list[str]:
        """Which pools of what is read are summed."""

    @abstractmethod
    def load_encoders(self, layers: list[int] | None = None) -> Mapping[int, Encoder]:
        """What reads each site; of some layers, or of those that the options name."""

    @abstractmethod
    def propose(self) -> tuple[Feature, ...]:
        """The candidates by the merged sums, with their :attr:`directions` set."""

    def described(self, selection: Selection) -> Selection:
        """The selection with what else the method knows of it."""
        return selection

    # ---------------------------------------------------------------- fit: accumulate

    def setup(self, stage: str) -> None:
        """Set up, and warn if steering changes the prompt, so that every variant has to read it."""
        super().setup(stage)
        if self.schedule.changes_prompt and self.task.generates:
            warnings.warn(
                "model.positions is all, which changes the prompt itself, so each variant reads every prompt again; "
                "what changes generated positions alone reads it once.",
                stacklevel=2,
            )

    def begin(self) -> None:
        """Load what reads the sites, and set all sums to zero."""
        self.require_encoders()
        self.forget()
        self.sums = self.new_sums({layer: encoder.d_sae for layer, encoder in self.encoders.items()})

    def require_encoders(self) -> None:
        """Load what reads the sites, unless it is there."""
        if not self.encoders:
            self.encoders = self.load_encoders()

    def new_sums(self, widths: Mapping[int, int]) -> Accumulator:
        """Empty sums, given the number of features by layer."""
        return Accumulator(widths, self.pools)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Generate unsteered, score, and update the running sums."""
        reader = PoolReader(self.encoders, self.pools)
        texts = self.fit_answering.observe(batch, reader)
        self.accumulate(batch, reader, self.fit_answering.rewards(texts, batch))
        # Lightning counts steps, and writes checkpoints by them, only if there is something to optimise.
        return torch.zeros((), requires_grad=True)

    def accumulate(self, batch: Batch, reader: PoolReader, rewards: Tensor) -> None:
        """Add what a batch's answers activated, and their rewards ``(batch,)``, to the running sums."""
        for (layer, kind), x in reader.values.items():
            self.sums.update(layer, kind, x, rewards, batch.weight)

    # ---------------------------------------------------------------- validate: test the candidates

    def tried(self) -> SteeringVectors:
        """Merge the sums, and choose the candidates: the unsteered model, and each candidate alone."""
        if not self.counted:
            raise self.unfitted()
        self.require_encoders()
        self.sums.merge()
        self.left_out = judge_left_out(self.sums, self.pool, self.precision)
        if self.has_seen_all:
            require_different(self.moments)
        self.candidates = self.propose()
        tried = () if self.hparams["rule"] == "all" else self.candidates
        return SteeringVectors.stack([{}, *(self.vectors_of([f]) for f in tried)], self.schedule_here)

    def conclude(self, rewards: Tensor) -> None:
        """Select by the rule, try the whole selection, and keep a snapshot of how far the fit has come."""
        baseline, *alone = rewards.mean(1).tolist()
        candidates = measured(self.candidates, rewards) if alone else self.candidates
        choice = choose(self.hparams["rule"], candidates, rewards, self.bar, self._rewards_of)
        self.selection = self._describe_selection(candidates, baseline, choice)
        if isinstance(self.hparams["scale"], list) and choice.features:
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
        scales = sorted({0.0, *self.hparams["scale"]}, key=abs)
        variants = SteeringVectors.stack([self.vectors_of(features, scale) for scale in scales], self.schedule_here)
        columns = {"reward": self.try_also(variants).mean(1).tolist(), **damage(self, self.budget, variants)}
        return [Strength(scale, **{k: v[i] for k, v in columns.items()}) for i, scale in enumerate(scales)]

    def _describe_selection(self, candidates: Sequence[Feature], baseline: float, choice: Choice) -> Selection:
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
                samples=self.counted,
                reward=self.fit_reward,
                null_max_correlation=None,
                left_out=self.left_out,
                llm=self.llm.identity,
                saes=self.saes_identity() or {},
            )
        )

    def is_worth_saving(self) -> bool:
        """Whether rewards differ so far: equal ones would never lead to a selection."""
        self.sums.merge()
        return rewards_differ(self.moments)

    @property
    def pool(self) -> str:
        """The pool that candidates are chosen by."""
        return self.hparams["pool"]

    @property
    def moments(self) -> Moments:
        """Sums of one layer, for what all layers share."""
        return self.sums.moments(next(iter(self.encoders)), self.pool)

    @property
    def fit_reward(self) -> float:
        """Mean reward in [0, 1] of the samples of the fit so far."""
        return mean_reward(self.moments)

    @property
    def precision(self) -> str:
        """In what precision activations are computed, for a sentence."""
        return f"the model is in {self.hparams['dtype']}"

    # ---------------------------------------------------------------- test: steer

    @property
    def scale_of_trials(self) -> float:
        """Factor on all coefficients while candidates are tried: 1, if one is to be chosen afterwards."""
        scale = self.hparams["scale"]
        return 1.0 if isinstance(scale, list) else scale

    def vectors_of(self, features: Sequence[Feature], scale: float | None = None) -> dict[Site, Tensor]:
        """The sum of ``scale * c_f * direction_f`` at each site, ``(d_model,)`` float32.

        Args:
            features: Candidates, or any features of the encoders if those are loaded.
            scale: Factor on all coefficients; None for that of the trials.
        """
        factor = self.scale_of_trials if scale is None else scale
        vectors: dict[Site, Tensor] = {}
        for f in features:
            known = f.name in self.directions
            direction = self.directions[f.name] if known else self.encoders[f.layer].direction(f.index)
            site, vector = Site.parse(f.site), factor * f.coefficient * direction
            vectors[site] = vectors[site] + vector if site in vectors else vector
        return vectors

    def steering_vectors(self) -> dict[Site, Tensor]:
        """What the selection adds at each site, ``(d_model,)`` float32, ``scale`` included.

        Raises:
            UserError: Nothing has been fitted.
        """
        selection, is_list = self.chosen(), isinstance(self.hparams["scale"], list)
        return self.vectors_of(selection.features, selection.scale if is_list else None)

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
        """The selection, the directions of its candidates, and what rebuilds the sums, which are buffers."""
        self.sums.merge()
        return {**super().state(), "sums": self.sums.shape(), "directions": self.directions}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over sums and selection, by this module's rule, sign and layers."""
        try:
            # Lightning loads the values of these buffers after this hook.
            self.sums = Accumulator.shaped(state["sums"])
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
        selection = reselect(fitted, h["rule"], h.get("sign", "both"), h["layers"], self.bar)
        if isinstance(h["scale"], list) and selection.features and not selection.strengths:
            raise UserError(
                "model.scale is a list, of which a fit chooses one for what it selects, but the checkpoint has "
                f"chosen none for these features (rule {h['rule']}). Give one number, or fit again."
            )
        return selection

    # ---------------------------------------------------------------- what users see

    def write(self, folder: Path) -> None:
        """``selection.json`` and ``steering.safetensors``."""
        super().write(folder)
        vectors = SteeringVectors(self.steering_vectors(), self.schedule)
        write_atomically(folder / "steering.safetensors", vectors.save)
