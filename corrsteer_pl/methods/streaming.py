"""What methods share that sum up what a model reads while it answers, and steer with what the sums propose."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.interventions.steering import SteeringVectors
from corrsteer_pl.methods.accumulation.candidates import judge_left_out, mean_reward, require_different, rewards_differ
from corrsteer_pl.methods.accumulation.sums import Accumulator, stored_counts
from corrsteer_pl.methods.inspection import SteeringInspection
from corrsteer_pl.methods.steering import Steering
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.sae import Encoder
from corrsteer_pl.selection import Choice, Feature, Selection
from corrsteer_pl.stats import Moments


class Streaming(Steering):
    """Accumulates what is read at some sites beside the reward; the sums propose the candidates.

    An epoch of "training" accumulates running sums and changes no weight. The sums of several processes are merged
    exactly, so that neither their number nor an interruption changes the result.

    A subclass says in :meth:`load_encoders` what is read and in :meth:`propose` what the candidates are.

    Attributes:
        encoders: What reads the residual at each site, by layer.
        sums: Running sums.
    """

    inspection = SteeringInspection

    def ready(self) -> None:
        """Take over the options."""
        self.encoders: Mapping[int, Encoder] = {}
        super().ready()

    def forget(self) -> None:
        """Drop what a fit has found."""
        super().forget()
        self.sums = Accumulator({}, ())
        self.left_out: dict[str, int] = {}

    @property
    @abstractmethod
    def pools(self) -> list[str]:
        """Which pools of what is read are summed."""

    @abstractmethod
    def load_encoders(self, layers: list[int] | None = None) -> Mapping[int, Encoder]:
        """What reads each site; of some layers, or of those that the options name."""

    # ---------------------------------------------------------------- fit: accumulate

    def begin(self) -> None:
        """Load what reads the sites, and set all sums to zero."""
        self.require_encoders()
        super().begin()
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
        rewards = self.fit_answering.rewards(texts, batch)
        with self.counting():
            self.accumulate(batch, reader, rewards)
        # Lightning counts steps, and writes checkpoints by them, only if there is something to optimise.
        return torch.zeros((), requires_grad=True)

    def accumulate(self, batch: Batch, reader: PoolReader, rewards: Tensor) -> None:
        """Add what a batch's answers activated, and their rewards ``(batch,)``, to the running sums."""
        for (layer, kind), x in reader.values.items():
            self.sums.update(layer, kind, x, rewards, batch.weight)

    # ---------------------------------------------------------------- validate: what the sums say

    def tried(self) -> SteeringVectors:
        """Merge the sums, and choose the candidates: the unsteered model, and each candidate alone."""
        if not self.counted:
            raise self.unfitted()
        self.require_encoders()
        with self.changing():
            self.sums.merge()
        self.left_out = judge_left_out(self.sums, self.pool, self.precision)
        if self.has_seen_all:
            require_different(self.moments)
        return super().tried()

    def selected(self, candidates: Sequence[Feature], baseline: float | None, choice: Choice) -> Selection:
        """What was chosen, with what the sums say of the samples."""
        return replace(super().selected(candidates, baseline, choice), reward=self.fit_reward, left_out=self.left_out)

    def is_worth_saving(self) -> bool:
        """Whether rewards differ so far: equal ones would never lead to a selection."""
        with self.changing():
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

    def direction_of(self, feature: Feature) -> Tensor:
        """What one unit of the coefficient adds of a candidate, or of any feature if the encoders are loaded."""
        known = feature.name in self.directions
        return self.directions[feature.name] if known else self.encoders[feature.layer].direction(feature.index)

    # ---------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """What every steering method stores, and what rebuilds the sums, which are buffers."""
        self.sums.merge()
        return {**super().state(), "sums": self.sums.shape()}

    def stored_counts(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, float]:
        """Number of samples in the sums of each layer and pool."""
        return stored_counts(tensors, "sums")

    def restore_more(self, state: dict[str, Any]) -> None:
        """Take over the sums.

        Raises:
            UserError: A fit goes on with other layers.
        """
        # Lightning loads the values of these buffers after this hook.
        self.sums = Accumulator.shaped(state["sums"])
        if self.encoders and self.sums.widths and self.encoders.keys() != self.sums.widths.keys():
            raise UserError(
                f"model.layers reads the layers {choices(self.encoders)}, but the checkpoint was fitted with "
                f"{choices(self.sums.widths)}. Leave it out, or fit from the beginning without --ckpt_path."
            )
