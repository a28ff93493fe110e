"""CorrSteer: correlate SAE features with the model's own success, and steer with those that help."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.evaluation.tables import selection_table
from corrsteer_pl.files import write_atomically, write_json
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.accumulate import Accumulator
from corrsteer_pl.methods.answering import ProbeReading
from corrsteer_pl.methods.base import Method, Settings
from corrsteer_pl.methods.blocks import Block
from corrsteer_pl.methods.calibration import Budget, damage
from corrsteer_pl.methods.candidates import (
    fit_probe,
    judge_left_out,
    leading_features,
    mean_reward,
    random_features,
    rank_features,
    require_different,
    rewards_differ,
)
from corrsteer_pl.methods.cards import Card, make_cards, observed
from corrsteer_pl.methods.checks import check_values
from corrsteer_pl.methods.inspection import SteeringInspection
from corrsteer_pl.methods.provenance import check_directions, check_saes, damaged
from corrsteer_pl.methods.search import Search
from corrsteer_pl.models.alignment import Alignment, alignments, judge_alignments
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.llm import local_name
from corrsteer_pl.models.sae import SparseAutoencoder, saes_identity
from corrsteer_pl.models.sites import Site
from corrsteer_pl.selection import (
    Bar,
    Choice,
    Feature,
    Selection,
    Strength,
    choose,
    measured,
    reselect,
)
from corrsteer_pl.stats import Moments, Probe, null_max_correlation


class CorrSteer(Method):
    """Selects SAE features by their correlation with the reward, and steers with them.

    An epoch of "training" accumulates running sums and changes no weight: memory is O(1) in the number of
    samples. Validation tests each layer's candidates against the unsteered model, ``test_step`` compares
    the steered with the unsteered model. The sums of several processes are merged exactly, so that neither
    their number nor an interruption changes the result.

    Args:
        llm: Path or Hub id of a causal language model, a GGUF file, or ``demo``.
        saes: Folder of SAELens autoencoders, one per layer, a release that SAELens knows, a repository with SAELens
            folders on the Hub, or ``demo``.
        sae_id: Which of them, if a layer has several: the id of one with ``{layer}`` for the layer, such as
            ``layer_{layer}/width_16k/canonical``.
        layers: Blocks to read and steer, from 0; None for all that have an SAE.
        rule: ``foreach``: per layer the better candidate, if it beats the unsteered model. ``global``: the
            best of all. ``all``: the top positive feature of every layer, untested. ``layer``: the better
            candidate of the one layer named in ``layers``. ``greedy``: what helps most beside what was chosen before,
            as long as the whole gets better; it is the only rule that tries features together.
        sign: Which candidates there are: ``both``, ``positive`` or ``negative`` correlations.
        topk: How many features per layer and sign are listed for analysis.
        topm: How many of them are candidates.
        min_improvement: For the rules ``foreach`` and ``greedy``: the mean validation reward has to rise by more than
            this for a feature to be chosen.
        significance_level: For the same rules: the largest p-value of a one-sided exact sign test that more validation
            samples get better than worse; None asks for no test.
        pool: How a feature's activations over a sample become one number: ``max`` or ``mean`` over generated
            tokens, ``all`` for the maximum over prompt and generated tokens.
        coefficient_pool: The same for the coefficient; None for the same as ``pool``.
        coefficient: ``mean`` over right samples, ``active_mean`` over those on which the feature is active, or
            the ``difference`` between right and wrong samples.
        score: What features are ranked by: ``pearson`` correlation, as the paper does, or the ``mean_difference``
            between right and wrong samples. The sign of its correlation makes one a positive or a negative candidate.
        scale: Factor on all coefficients. Of a list, such as ``[0.5, 1, 2]``, validation chooses the one with the best
            reward of the whole selection within the budget; features are tried at 1 before.
        budget: What steering may cost, for a list of scales: ``kl``, the largest mean KL divergence from the unsteered
            model's first new token, in nats; ``loss``, the largest fall of another task's mean reward. Prompts are
            those of the validation, or the validation split of another ``task`` (with ``path``, ``subset``, ``filter``
            and so on as in the data module), at most ``size`` of them, 200 unless given.
        positions: ``generated`` (the last prompt position and every generated one), ``all``, ``prompt_last``,
            or ``first_k`` generated tokens.
        first_k: Number of tokens for ``positions: first_k``.
        decay: Factor on the strength from one generated token to the next.
        site: ``declared`` by the SAE, or ``resid_pre``, ``resid_post``, ``attn_out`` or ``mlp_out`` whatever it
            declares; ``resid_pre`` reproduces the public reference, which reads block inputs.
        check_alignment: What to do if an SAE does not reconstruct what it reads in the first prompts: stop with an
            ``error``, ``warn``, or do not look, ``off`` (which YAML reads as false, unless it is quoted).
        dtype: The model's precision: ``float32``, ``bfloat16`` or ``float16``. The sums are float64 whatever it is.
        sae_dtype: The same for the SAEs.
        sae_offload: Let SAEs rest in main memory and come to the GPU one by one while they are read, if not all fit.
        sae_revision: Branch, tag or commit of the SAEs on the Hub; None for the newest.
        llm_args: Further options for loading the model: ``revision``, ``attn_implementation``, ``device_map``,
            ``quantize`` (4 or 8 bits), ``trust_remote_code``, ``blocks`` (where its decoder blocks are).
        candidate_batch_size: How many candidates of every prompt, one of them unsteered, share a forward pass; ``auto``
            for as many as about a gibibyte, or a sixteenth of a GPU's memory, allows.
        permutations: How often the rewards are permuted, to learn how large a correlation chance finds in a search as
            large as this one, from 19 to 1000 times: the smallest p-value is ``1 / (permutations + 1)``. 0 leaves it
            out.
        control: Deprive the fit of what it should depend on, and see what it finds then. ``shuffled_rewards``: samples
            get the rewards of others, while validation keeps the true ones. ``random_features``: candidates are random
            features of the same layers, with the coefficients of those that would have been. ``none``: neither.
        noise_floor: Let a test answer unsteered once more, in other batches: how many answers rounding alone changes.

    Attributes:
        selection: What the fit chose, after validation; None before.

    Source:
        CorrSteer, arXiv 2508.12535.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from corrsteer_pl import CorrSteer, TaskDataModule
        >>> module = CorrSteer(llm="demo", saes="demo", layers=[1])
        >>> data = TaskDataModule("demo_qa", train_size=64, val_size=16)
        >>> quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(logger=False, **quiet)
        >>> trainer.fit(module, datamodule=data)
        >>> len(module.selection.candidates) <= 2
        True
    """

    inspection = SteeringInspection
    settings = Settings(
        settled=(
            "pool", "coefficient_pool", "coefficient", "score", "site", "min_improvement", "significance_level",
            "control",
        ),
        resumed=("dtype", "sae_dtype", "permutations"),
        tested=("scale", "rule", "sign", "layers", "positions", "first_k", "decay", "dtype", "llm_args"),
    )  # fmt: skip

    def __init__(
        self,
        llm: str,
        saes: str,
        sae_id: str | None = None,
        layers: list[int] | None = None,
        rule: Literal["foreach", "global", "all", "layer", "greedy"] = "foreach",
        sign: Literal["both", "positive", "negative"] = "both",
        topk: int = 10,
        topm: int = 1,
        min_improvement: float = 0.0,
        significance_level: float | None = None,
        pool: Literal["max", "mean", "all"] = "max",
        coefficient_pool: Literal["max", "mean", "all"] | None = None,
        coefficient: Literal["mean", "active_mean", "difference"] = "mean",
        score: Literal["pearson", "mean_difference"] = "pearson",
        scale: float | list[float] = 1.0,
        budget: dict | None = None,
        positions: Literal["generated", "all", "prompt_last", "first_k"] = "generated",
        first_k: int = 1,
        decay: float = 1.0,
        site: Literal["declared", "resid_pre", "resid_post", "attn_out", "mlp_out"] = "declared",
        check_alignment: Literal["error", "warn", "off", False] = "error",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        sae_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        sae_offload: bool = False,
        sae_revision: str | None = None,
        llm_args: dict | None = None,
        candidate_batch_size: int | str = "auto",
        permutations: int = 32,
        control: Literal["none", "shuffled_rewards", "random_features"] = "none",
        noise_floor: bool = False,
    ) -> None:
        super().__init__(llm, dtype, llm_args, candidate_batch_size)
        llm, saes = self.llm_name, local_name(saes)
        self.save_hyperparameters()
        self.hparams["check_alignment"] = check_alignment or "off"
        check_values(self.hparams)
        self.schedule = Schedule(positions, first_k, decay)
        self.saes: dict[int, SparseAutoencoder] = {}
        self.bar, self.budget = Bar(min_improvement, significance_level), Budget.of(budget)
        self._identity: dict[str, Any] | None = None  # of the SAEs
        self._probed: dict[int, SparseAutoencoder] = {}
        self._forget()

    def _forget(self) -> None:
        self.sums, self.search = Accumulator({}, ()), Search({})
        self.cards: list[dict[str, Any]] = []
        self.selection: Selection | None = None
        self.directions: dict[str, Tensor] = {}  # (d_model,) for each candidate
        self.snapshots: list[dict[str, Any]] = []
        self._probe: tuple[int, Probe] | None = None  # with the layer that it looks at

    # ---------------------------------------------------------------- fit: accumulate

    def begin(self) -> None:
        """Load the autoencoders, and set all sums to zero."""
        self._identity = None
        self._require_saes()
        self._forget()
        widths = {layer: sae.d_sae for layer, sae in self.saes.items()}
        self.sums = Accumulator(widths, self.pools)
        permutations, seed = self.hparams["permutations"], self.datamodule.hparams["seed"]
        self.search = Search(widths, self.hparams["pool"], permutations, seed, self._deals)

    @property
    def _deals(self) -> bool:
        """Whether samples get the rewards of others."""
        return self.hparams["control"] == "shuffled_rewards"

    def _require_saes(self) -> None:
        if not self.saes:
            self.saes = self._load_saes()
        if self._identity is None:
            self._identity = saes_identity(self.hparams["saes"], self.saes)

    def _load_saes(self, layers: list[int] | None = None) -> dict[int, SparseAutoencoder]:
        """The autoencoders of some layers, which have to be those of the fit if there has been one."""
        # SAELens is slow to import, and testing a finished fit needs no autoencoder.
        from corrsteer_pl.models.sae_loading import load_saes

        h = self.hparams
        options = h["site"], h["sae_id"], h["sae_dtype"], h["sae_offload"], h["sae_revision"]
        loaded = load_saes(h["saes"], self.llm, layers or h["layers"], *options)
        if self._identity:
            fitted = {str(layer): self._identity["fingerprints"].get(str(layer)) for layer in loaded}
            check_saes({**self._identity, "fingerprints": fitted}, saes_identity(h["saes"], loaded))
        return loaded

    @property
    def pools(self) -> list[str]:
        """Which pools of an activation are summed."""
        return sorted({self.hparams["pool"], self.hparams["coefficient_pool"] or self.hparams["pool"]})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Generate unsteered, score, and update the running sums."""
        reader = PoolReader(self.saes, self.pools)
        texts = self.fit_answering.observe(batch, reader)
        self.accumulate(batch, reader, self.fit_answering.rewards(texts, batch))
        # Lightning counts steps, and writes checkpoints by them, only if there is something to optimise.
        return torch.zeros((), requires_grad=True)

    def accumulate(self, batch: Batch, reader: PoolReader, rewards: Tensor) -> None:
        """Add what a batch's answers activated, and their rewards ``(batch,)``, to the running sums."""
        pools = {(layer, kind): pool.value for layer, some in reader.pools.items() for kind, pool in some.items()}
        if not self._deals:
            for (layer, kind), x in pools.items():
                self.sums.update(layer, kind, x, rewards, batch.weight)
        self._deal(self.search.add(batch, pools, rewards))

    def _deal(self, blocks: Sequence[Block]) -> None:
        """Add the samples of blocks with the rewards that they were dealt, if they were."""
        for block in blocks if self._deals else ():
            for layer, kind in block.x:
                x = block.activations((layer, kind)).to_dense()
                self.sums.update(layer, kind, x, block.y, torch.ones(len(block.y)))

    # ---------------------------------------------------------------- validate: test the candidates

    def tried(self) -> SteeringVectors:
        """Merge the sums, and choose each layer's candidates: the unsteered model, and each candidate alone."""
        if not self.counted:
            raise self.unfitted()
        self._require_saes()
        if self._deals and self.has_seen_all:
            self._deal(self.search.cut(self.counted))
        self.sums.merge()
        self._left_out = judge_left_out(self.sums, self.hparams["pool"], self._precision)
        if self.has_seen_all:
            require_different(self._moments)
        self._ranking, self._candidates = rank_features(self.sums, self.saes, self.hparams)
        if self.has_seen_all:
            is_last = self.counted == len(self.datamodule.examples.get("train", ()))
            # Halves are ranked by correlation, so that they say nothing of candidates that were ranked otherwise.
            stable = self._candidates if self.hparams["score"] == "pearson" else ()
            self.search.judge(self.counted, stable, self.hparams["topk"], self.hparams["topm"], is_last)
        if self.hparams["control"] == "random_features":
            seed = self.datamodule.hparams["seed"]
            self._candidates = random_features(self._candidates, self.sums, self.saes, self.hparams["pool"], seed)
        self._ranking = tuple(map(self.search.evidence.on, self._ranking))
        self._candidates = tuple(map(self.search.evidence.on, self._candidates))
        if not self.task.generates:
            layer = max(self.saes)
            self._probe = layer, fit_probe(self.sums.moments(layer, self.hparams["pool"]), self.hparams["topk"])
        self.directions = {f.name: self.saes[f.layer].direction(f.index) for f in self._candidates}
        tried = () if self.hparams["rule"] == "all" else self._candidates
        return SteeringVectors.stack([{}, *(self.vectors_of([f]) for f in tried)], self._schedule_here)

    def conclude(self, rewards: Tensor) -> None:
        """Select by the rule, try the whole selection, and keep a snapshot of how far the fit has come."""
        baseline, *alone = rewards.mean(1).tolist()
        candidates = measured(self._candidates, rewards) if alone else self._candidates
        choice = choose(self.hparams["rule"], candidates, rewards, self.bar, self._rewards_of)
        self.selection = self._describe_selection(candidates, baseline, choice)
        if isinstance(self.hparams["scale"], list) and choice.features:
            self.selection = self.selection.at(self._strengths(choice.features), self.budget.allows)
        self.selection = self.selection.marked()
        if self.has_seen_all:
            for sentence in self.selection.doubts:
                warnings.warn(sentence, stacklevel=2)
            if self.trainer.state.fn == "fit" and self.search.layers:
                self.cards = [card.as_dict() for card in self.describe(choice.features)]
        best = max(alone, default=baseline)
        logged = {"samples": self.counted, "baseline_reward": baseline, "best_candidate_reward": best}
        logged |= {"joint_reward": self.selection.joint_reward, "scale": self.selection.scale}
        features = [[f.layer, f.index] for f in self.selection.features]
        earlier = [snapshot for snapshot in self.snapshots if snapshot["samples"] != self.counted]
        self.snapshots = [*earlier, {**logged, "features": features}]
        self.log_validation(logged)

    def _rewards_of(self, sets: Sequence[Sequence[Feature]]) -> Tensor:
        """Rewards ``(sets, n)`` on the validation split when the features of a set steer together."""
        return self.try_also(SteeringVectors.stack([self.vectors_of(some) for some in sets], self._schedule_here))

    def _strengths(self, features: Sequence[Feature]) -> list[Strength]:
        """What features together do at each strength, the unsteered model among them as strength 0."""
        scales = sorted({0.0, *self.hparams["scale"]}, key=abs)
        variants = SteeringVectors.stack([self.vectors_of(features, scale) for scale in scales], self._schedule_here)
        columns = {"reward": self.try_also(variants).mean(1).tolist(), **damage(self, self.budget, variants)}
        return [Strength(scale, **{k: v[i] for k, v in columns.items()}) for i, scale in enumerate(scales)]

    def describe(self, features: Sequence[Feature]) -> list[Card]:
        """Cards of some features, after a fit and before a checkpoint of it is read. Every process must call it."""
        strongest = self.search.strongest.of(features)
        rows = sorted({row for some in strongest for _, row in some})
        samples = observed(self, rows, everywhere=self.hparams["pool"] == "all")
        return make_cards(self.llm, self.saes, features, self.counted, strongest, samples)

    def is_worth_saving(self) -> bool:
        """Whether rewards differ so far: equal ones would never lead to a selection."""
        self.sums.merge()
        return rewards_differ(self._moments)

    @property
    def _moments(self) -> Moments:
        """Sums of one layer, for what all layers share."""
        return self.sums.moments(next(iter(self.saes)), self.hparams["pool"])

    @property
    def fit_reward(self) -> float:
        """Mean reward in [0, 1] of the samples of the fit so far."""
        return mean_reward(self._moments)

    @property
    def _precision(self) -> str:
        return f"the model is in {self.hparams['dtype']}, the SAEs are in {self.hparams['sae_dtype']}"

    def _describe_selection(self, candidates: Sequence[Feature], baseline: float, choice: Choice) -> Selection:
        return Selection(
            rule=self.hparams["rule"],
            features=choice.features,
            joint_reward=choice.joint_reward,
            steps=choice.steps,
            scale=self.scale_of_trials,
            candidates=tuple(candidates),
            ranking=self._ranking,
            baseline_reward=baseline,
            samples=self.counted,
            reward=self.fit_reward,
            null_max_correlation=null_max_correlation(self._moments.n_features, self.counted),
            score=self.hparams["score"],
            control=self.hparams["control"],
            null_maxima=self.search.evidence.null_maxima,
            overlap=self.search.evidence.overlap,
            left_out=self._left_out,
            llm=self.llm.identity,
            saes=self._identity or {},
        )

    # ---------------------------------------------------------------- test: steer

    @property
    def is_fitted(self) -> bool:
        """Whether there is a selection, be it empty."""
        return self.selection is not None

    @property
    def scale_of_trials(self) -> float:
        """Factor on all coefficients while features are tried: 1, if one is to be chosen afterwards."""
        scale = self.hparams["scale"]
        return 1.0 if isinstance(scale, list) else scale

    def vectors_of(self, features: Sequence[Feature], scale: float | None = None) -> dict[Site, Tensor]:
        """The sum of ``scale * c_f * W_dec[f]`` at each site, ``(d_model,)`` float32.

        Args:
            features: Candidates, or any features of the autoencoders if those are loaded.
            scale: Factor on all coefficients; None for that of the trials.
        """
        factor = self.scale_of_trials if scale is None else scale
        vectors: dict[Site, Tensor] = {}
        for f in features:
            direction = self.directions[f.name] if f.name in self.directions else self.saes[f.layer].direction(f.index)
            site, vector = Site.parse(f.site), factor * f.coefficient * direction
            vectors[site] = vectors[site] + vector if site in vectors else vector
        return vectors

    def steering_vectors(self) -> dict[Site, Tensor]:
        """What the selection adds at each site, ``(d_model,)`` float32, ``scale`` included.

        Raises:
            UserError: Nothing has been fitted.
        """
        if self.selection is None:
            raise self.unfitted()
        chosen = isinstance(self.hparams["scale"], list)
        return self.vectors_of(self.selection.features, self.selection.scale if chosen else None)

    def comparison(self) -> SteeringVectors:
        """The unsteered model and the steered one."""
        return SteeringVectors.stack([{}, self.steering_vectors()], self._schedule_here)

    @property
    def _schedule_here(self) -> Schedule:
        return self.answering.schedule or self.schedule

    # ---------------------------------------------------------------- texts: a probe instead of an answer

    def probe(self) -> ProbeReading:
        """The probe of the fit, with its autoencoder.

        Raises:
            UserError: The fit was on a task that generates.
        """
        if self._probe is None:
            raise UserError(
                f"the checkpoint has no probe for {self.task.reward_name}: it was not fitted on this task. Fit on it."
            )
        layer, probe = self._probe
        if layer not in self._probed:
            self._probed = self.saes or self._load_saes([layer])
        return ProbeReading(probe, self._probed[layer], self.hparams["pool"])

    # ---------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """The selection, the directions of its candidates, and what rebuilds the sums, which are buffers."""
        self.sums.merge()
        return {
            "search": self.search.state(),
            "cards": self.cards,
            "widths": self.sums.widths,
            "pools": self.pools,
            "selection": self.selection.as_dict() if self.selection else None,
            "directions": self.directions,
            "snapshots": self.snapshots,
            "probe": self._probe and {"layer": self._probe[0], **self._probe[1].as_dict()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over sums and selection, by this module's rule, sign and layers."""
        try:
            # Lightning loads the values of these buffers after this hook.
            widths = {int(layer): d_sae for layer, d_sae in state["widths"].items()}
            self.sums = Accumulator(widths, state["pools"])
            self.search, self.cards = Search.restored(state["search"]), list(state["cards"])
            fitted = None if state["selection"] is None else Selection.from_dict(state["selection"])
            self.directions, self.snapshots = dict(state["directions"]), list(state["snapshots"])
            self._probe = state["probe"] and (state["probe"]["layer"], Probe.from_dict(state["probe"]))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise damaged(f"what its fit found cannot be read ({one_line(error)})") from error
        if fitted is not None:
            check_directions(self.directions, (f.name for f in fitted.candidates))
            rule, sign, layers = (self.hparams[name] for name in ("rule", "sign", "layers"))
            self.selection = reselect(fitted, rule, sign, layers, self.bar)
            if isinstance(self.hparams["scale"], list) and self.selection.features and not self.selection.strengths:
                raise UserError(
                    "model.scale is a list, of which a fit chooses one for what it selects, but the checkpoint has "
                    f"chosen none for these features (rule {rule}). Give one number, or fit again."
                )

    def saes_identity(self) -> dict[str, Any] | None:
        """Name and fingerprints of the autoencoders of the fit."""
        return self._identity

    def check_saes(self, stored: dict[str, Any] | None) -> None:
        """Refuse other autoencoders than those of the fit.

        Raises:
            UserError: They are others.
        """
        h = self.hparams
        if stored is None or "name" not in stored or "fingerprints" not in stored:
            raise damaged("it does not say which SAEs it was fitted with")
        if self.saes and self._identity:
            check_saes(stored, self._identity)
        elif h["saes"] != stored["name"]:
            check_saes(stored, saes_identity(h["saes"], self._load_saes()))
        self._identity = stored

    # ---------------------------------------------------------------- what users see

    def write(self, folder: Path) -> None:
        """``selection.json``, ``features.json`` with the cards of what was selected, and ``steering.safetensors``."""
        if self.selection is None:
            raise self.unfitted()
        write_json(folder / "selection.json", {**self.selection.as_dict(), "snapshots": self.snapshots})
        write_json(folder / "features.json", {"cards": self.cards})
        vectors = SteeringVectors(self.steering_vectors(), self.schedule)
        write_atomically(folder / "steering.safetensors", vectors.save)

    @property
    def mark(self) -> str | None:
        """That of the selection that the fit made, whatever a test makes of it."""
        return self.selection.mark if self.selection else None

    def tables(self) -> list[Table]:
        """The tested candidates."""
        return [selection_table(self.selection)] if self.selection else []

    def headline(self) -> dict[str, str]:
        """The features that lead so far, as ``layer/index r``."""
        leaders = leading_features(self.sums, self.saes, self.hparams["pool"])[:3]
        return {"top": "  ".join(f"{f.layer}/{f.index} {f.correlation:+.2f}" for f in leaders)}

    def alignments(self) -> dict[int, Alignment]:
        """How well each SAE fits the model, by layer, measured on the first prompts of the fit."""
        batch = next(iter(self.datamodule.train_dataloader())).to(self.trainer.strategy.root_device)
        return alignments(self.llm, self.saes, batch)

    def verify(self) -> None:
        """Check on the first prompts that the SAEs fit the model.

        Raises:
            UserError: One does not, and ``check_alignment`` is ``error``.
        """
        if self.hparams["check_alignment"] != "off":
            judge_alignments(self.alignments().values(), self.hparams["check_alignment"])
