"""CorrSteer: correlate SAE features with the model's own success, and steer with those that help."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.accumulate import Accumulator
from corrsteer_pl.methods.candidates import leading_features, rank_features
from corrsteer_pl.methods.evaluation import PairedEvaluation
from corrsteer_pl.methods.probing import EVERYWHERE, ProbeReading
from corrsteer_pl.methods.provenance import check_llm, check_saes, check_same_data, check_samples, check_settled
from corrsteer_pl.models.alignment import CHECKS, Alignment, alignments, judge_alignments
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.llm import local_name
from corrsteer_pl.models.pooling import POOLS
from corrsteer_pl.models.sae import SITES, SparseAutoencoder, load_saes, saes_identity
from corrsteer_pl.models.sites import Site
from corrsteer_pl.selection import RULES, SIGNS, Feature, Selection, rank, select, tested
from corrsteer_pl.stats import COEFFICIENTS, Probe, null_max_correlation, pearson
from corrsteer_pl.stats.scores import RELATIVE_VARIANCE_FLOOR
from corrsteer_pl.strategy import all_reduce_sum

# What a fit settles; the rest (rule, sign, layers, scale, positions) may change when testing.
SETTLED_BY_FIT = ("pool", "coefficient_pool", "coefficient", "site")


class CorrSteer(PairedEvaluation):
    """Selects SAE features by their correlation with the reward, and steers with them.

    An epoch of "training" accumulates running sums and changes no weight: memory is O(1) in the number of
    samples. Validation tests each layer's candidates against the unsteered model, ``test_step`` compares
    the steered with the unsteered model. The sums of several processes are merged exactly, so that neither
    their number nor an interruption changes the result.

    Args:
        llm: Path or Hub id of a causal language model, or ``demo``.
        saes: Folder of SAELens autoencoders, one per layer, a release that SAELens knows, a repository with SAELens
            folders on the Hub, or ``demo``.
        sae_id: Which of them, if a layer has several: the id of one with ``{layer}`` for the layer, such as
            ``layer_{layer}/width_16k/canonical``.
        layers: Blocks to read and steer, from 0; None for all that have an SAE.
        rule: ``foreach``: per layer the better candidate, if it beats the unsteered model. ``global``: the
            best of all. ``all``: the top positive feature of every layer, untested. ``layer``: the better
            candidate of the one layer named in ``layers``.
        sign: Which candidates there are: ``both``, ``positive`` or ``negative`` correlations.
        topk: How many features per layer and sign are listed for analysis.
        pool: How a feature's activations over a sample become one number: ``max`` or ``mean`` over generated
            tokens, ``all`` for the maximum over prompt and generated tokens.
        coefficient_pool: The same for the coefficient; None for the same as ``pool``.
        coefficient: ``mean`` over right samples, ``active_mean`` over those on which the feature is active, or
            the ``difference`` between right and wrong samples.
        scale: Factor on all coefficients.
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
        llm_args: Further options for loading the model: ``revision``, ``attn_implementation``, ``device_map``,
            ``quantize`` (4 or 8 bits), ``trust_remote_code``, ``blocks`` (where its decoder blocks are).
        candidate_batch_size: How many candidates of every prompt, one of them unsteered, share a forward pass; ``auto``
            for as many as about a gibibyte, or a sixteenth of a GPU's memory, allows.

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

    def __init__(
        self,
        llm: str,
        saes: str,
        sae_id: str | None = None,
        layers: list[int] | None = None,
        rule: Literal["foreach", "global", "all", "layer"] = "foreach",
        sign: Literal["both", "positive", "negative"] = "both",
        topk: int = 10,
        pool: Literal["max", "mean", "all"] = "max",
        coefficient_pool: Literal["max", "mean", "all"] | None = None,
        coefficient: Literal["mean", "active_mean", "difference"] = "mean",
        scale: float = 1.0,
        positions: Literal["generated", "all", "prompt_last", "first_k"] = "generated",
        first_k: int = 1,
        decay: float = 1.0,
        site: Literal["declared", "resid_pre", "resid_post", "attn_out", "mlp_out"] = "declared",
        check_alignment: Literal["error", "warn", "off", False] = "error",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        sae_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        sae_offload: bool = False,
        llm_args: dict | None = None,
        candidate_batch_size: int | str = "auto",
    ) -> None:
        llm, saes = local_name(llm), local_name(saes)
        super().__init__(llm, dtype, llm_args, candidate_batch_size)
        self.save_hyperparameters()
        self.hparams["check_alignment"] = check_alignment or "off"
        self._check_options()
        self.schedule = Schedule(positions, first_k, decay)
        self.selection: Selection | None = None
        self.directions: dict[str, Tensor] = {}  # (d_model,) for each candidate
        self.snapshots: list[dict[str, Any]] = []
        self.saes: dict[int, SparseAutoencoder] = {}
        self.reading: ProbeReading | None = None
        self._saes_identity: dict[str, Any] = {}
        self.sums = Accumulator({}, (), torch.device("cpu"))
        self._stored_sums: dict[str, Tensor] = {}

    def _check_options(self) -> None:
        h = self.hparams
        allowed = {"rule": RULES, "sign": SIGNS, "pool": POOLS, "coefficient": COEFFICIENTS, "site": SITES}
        allowed["check_alignment"] = CHECKS
        if h["coefficient_pool"] is not None:
            allowed["coefficient_pool"] = POOLS
        for name, values in allowed.items():
            if h[name] not in values:
                raise UserError(f"model.{name} is {h[name]!r}; choose one of {choices(values)}.")
        if h["layers"] == []:
            raise UserError("model.layers is empty. Name layers, or leave it out for all that have an SAE.")
        if h["rule"] == "layer" and (h["layers"] is None or len(h["layers"]) != 1):
            raise UserError(f"model.rule is layer, but model.layers is {h['layers']}. Name one layer, such as [4].")
        if h["topk"] < 1:
            raise UserError(f"model.topk is {h['topk']}; it is a number of features, at least 1.")

    # ---------------------------------------------------------------- fit: accumulate

    def setup(self, stage: str) -> None:
        """Load the model, and for a fit or a validation the autoencoders with their sums."""
        super().setup(stage)
        if stage == "fit":
            self.datamodule.fit_task.load(str(self.trainer.strategy.root_device))
            self.fit_decoder = self.decoder_for(self.datamodule.fit_task, "fit")
        if stage in ("fit", "validate") and not self.saes:
            self.saes = self._load_saes()
            self._saes_identity = saes_identity(self.hparams["saes"], self.saes)
            self.sums = self._no_sums()
            if self._stored_sums:
                self.load_state_dict(self._stored_sums)
        if stage == "fit":
            # A fit starts from nothing; going on with a checkpoint restores it after this.
            self.sums, self.position, self.selection, self.snapshots = self._no_sums(), 0, None, []

    def _load_saes(self, layers: list[int] | None = None) -> dict[int, SparseAutoencoder]:
        h = self.hparams
        options = h["site"], h["sae_id"], h["sae_dtype"], h["sae_offload"]
        return load_saes(h["saes"], self.llm, layers or h["layers"], *options)

    def on_train_start(self) -> None:
        """See on the first prompts whether the SAEs fit the model.

        Raises:
            UserError: One does not, and ``check_alignment`` is ``error``.
        """
        if self.hparams["check_alignment"] != "off":
            judge_alignments(self.alignments().values(), self.hparams["check_alignment"])

    def alignments(self) -> dict[int, Alignment]:
        """How well each SAE fits the model, by layer, measured on the first prompts of the fit."""
        batch = next(iter(self.datamodule.train_dataloader()))
        return alignments(self.llm, self.saes, batch.to(self.trainer.strategy.root_device))

    def _no_sums(self) -> Accumulator:
        widths = {layer: sae.d_sae for layer, sae in self.saes.items()}
        return Accumulator(widths, self.pools, self.llm.device)

    @property
    def pools(self) -> list[str]:
        """Which pools of an activation are summed."""
        return sorted({self.hparams["pool"], self.hparams["coefficient_pool"] or self.hparams["pool"]})

    def configure_optimizers(self) -> None:
        """Nothing is optimised."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Generate unsteered, score, and update the running sums."""
        reader = PoolReader(self.saes, self.pools)
        texts = self.observe(batch, reader)
        rewards = self.rewards(texts, batch, self.datamodule.fit_task)
        for layer, pools in reader.pools.items():
            for kind, pool in pools.items():
                self.sums.update(layer, kind, pool.value, rewards, batch.weight)
        self.position = batch.counted
        # Lightning counts steps, and writes checkpoints by them, only if there is something to optimise.
        return torch.zeros((), requires_grad=True)

    def observe(self, batch: Batch, reader: PoolReader) -> list[str]:
        """Let the model answer, or read, a batch of the fit while its activations are pooled; the answers."""
        if self.datamodule.fit_task.generates:
            return self.fit_decoder.generate(batch, reader)
        self.fit_decoder.read(batch, reader)
        return [""] * len(batch.examples)

    def on_train_epoch_end(self) -> None:
        """Select on all that was counted, and stop: a second epoch would count the same samples again."""
        self.trainer.should_stop = True
        self.sums.merge()
        counted = round(self.sums.moments(next(iter(self.saes)), self.hparams["pool"]).n.item())
        if self.selection is None or self.selection.samples < counted:
            self._validate()

    @torch.no_grad()
    def _validate(self) -> None:
        # Lightning's last validation of the epoch came before its last batches, or not at all.
        self.on_validation_epoch_start()
        for batch_idx, batch in enumerate(self.datamodule.val_dataloader()):
            self.validation_step(batch.to(self.device), batch_idx)
        self.on_validation_epoch_end()

    # ---------------------------------------------------------------- validate: test the candidates

    def on_validation_epoch_start(self) -> None:
        """Merge the sums and choose each layer's candidates."""
        if self.trainer.sanity_checking:
            return
        self.sums.merge()
        if self._is_complete:
            self._refuse_equal_rewards()
        self._ranking, self._candidates = rank_features(self.sums, self.saes, self.hparams)
        if not self.task.generates:
            self.reading = self._probe_reading()
        self.directions = {_name(f): self.saes[f.layer].direction(f.index) for f in self._candidates}
        self._tested = () if self.hparams["rule"] == "all" else self._candidates
        alone = [self._vectors([feature]) for feature in self._tested]
        self._variants = SteeringVectors.stack([{}, *alone], self._schedule_here)
        self._reward_sums = torch.zeros(len(self._variants) + 1, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the rewards of the unsteered model and of each candidate alone."""
        if self.trainer.sanity_checking:
            return
        rewards = [rewards for _, rewards in self.compared(batch, self._variants)]
        weight = batch.weight.double()
        self._reward_sums += torch.stack([r @ weight for r in rewards] + [weight.sum()])

    def on_validation_epoch_end(self) -> None:
        """Select by the rule, and keep a snapshot of how far the fit has come."""
        if self.trainer.sanity_checking:
            return
        *totals, count = all_reduce_sum(self._reward_sums).tolist()
        baseline, *alone = [total / count for total in totals]
        candidates = tested(self._candidates, alone) if self._tested else self._candidates
        self.selection = self._describe_selection(candidates, baseline)
        best = max(alone, default=baseline)
        if self.snapshots and self.snapshots[-1]["samples"] == self.selection.samples:
            self.snapshots.pop()
        self.snapshots.append(
            {
                "samples": self.selection.samples,
                "baseline_reward": baseline,
                "best_candidate_reward": best,
                "features": [[f.layer, f.index] for f in self.selection.features],
            }
        )
        # Equal on all processes already, so their mean is right.
        logged = {"samples": float(self.selection.samples), "baseline_reward": baseline, "best_candidate_reward": best}
        self.log_dict({f"val/{name}": value for name, value in logged.items()}, sync_dist=True)

    def leaders(self) -> list[Feature]:
        """Each layer's top candidates by this process's sums so far, the largest |r| first, for display."""
        return leading_features(self.sums, self.saes, self.hparams["pool"])

    @property
    def _is_complete(self) -> bool:
        fitting = self.trainer.state.fn == "fit"
        return not fitting or self.trainer.is_last_batch or self.trainer.should_stop

    def rewards_differ(self) -> bool:
        """Whether there is anything to correlate with so far. Every process must call it."""
        self.sums.merge()
        moments = self.sums.moments(next(iter(self.saes)), self.hparams["pool"])
        variance = moments.n * moments.yy - moments.y**2
        return bool(variance > RELATIVE_VARIANCE_FLOOR * moments.n * moments.yy)

    def _refuse_equal_rewards(self) -> None:
        if not self.rewards_differ():
            moments = self.sums.moments(next(iter(self.saes)), self.hparams["pool"])
            mean = (moments.y / moments.n.clamp(min=1)).item()
            raise UserError(
                f"all {round(moments.n.item())} rewards are {mean:g}, so there is nothing to correlate with. "
                "Choose a task that the model solves sometimes, or more samples."
            )

    def _describe_selection(self, candidates: Sequence[Feature], baseline: float) -> Selection:
        moments = self.sums.moments(next(iter(self.saes)), self.hparams["pool"])
        samples = round(moments.n.item())
        return Selection(
            rule=self.hparams["rule"],
            features=select(self.hparams["rule"], candidates, baseline),
            candidates=tuple(candidates),
            ranking=self._ranking,
            baseline_reward=baseline,
            samples=samples,
            reward=(moments.y / moments.n.clamp(min=1)).item(),
            null_max_correlation=null_max_correlation(moments.n_features, samples),
            llm=self.llm.identity,
            saes=self._saes_identity,
        )

    # ---------------------------------------------------------------- test: steer

    def _vectors(self, features: Sequence[Feature]) -> dict[Site, Tensor]:
        """The sum of ``scale * c_f * W_dec[f]`` at each site, ``(d_model,)`` float32."""
        vectors: dict[Site, Tensor] = {}
        for f in features:
            site, vector = Site.parse(f.site), self.hparams["scale"] * f.coefficient * self.directions[_name(f)]
            vectors[site] = vectors[site] + vector if site in vectors else vector
        return vectors

    def steering_vectors(self) -> dict[Site, Tensor]:
        """What the selection adds at each site, ``(d_model,)`` float32, ``scale`` included.

        Raises:
            UserError: Nothing has been fitted.
        """
        if self.selection is None:
            raise UserError(
                "the module has not been fitted: there is no selection. Run fit first, with --ckpt_path last if it was "
                "interrupted, or give the checkpoint of a finished fit with --ckpt_path."
            )
        return self._vectors(self.selection.features)

    def comparison(self) -> SteeringVectors:
        """The unsteered model and the steered one."""
        return SteeringVectors.stack([{}, self.steering_vectors()], self._schedule_here)

    @property
    def _schedule_here(self) -> Schedule:
        return self.schedule if self.task.generates else EVERYWHERE

    # ---------------------------------------------------------------- texts: a probe instead of an answer

    def compared(self, batch: Batch, variants: Any) -> list[tuple[list[str], Tensor]]:
        """Texts under each variant with their rewards; where nothing is generated, the probability of the label."""
        if self.task.generates:
            return super().compared(batch, variants)
        if self.reading is None:
            raise UserError(
                f"the checkpoint has no probe for {self.task.reward_name}: it was not fitted on this task. Fit on it."
            )
        found = self.reading.compare(self.decoder, batch, variants)
        reverse = self.datamodule.hparams["reverse"]
        return [([f"{p:.4f}" for p in some.tolist()], 1 - some if reverse else some) for some in found]

    def _probe_reading(self) -> ProbeReading:
        layer, pool = max(self.saes), self.hparams["pool"]
        moments = self.sums.moments(layer, pool)
        indices = [i for some in rank(pearson(moments), self.hparams["topk"]) for i in some]
        return ProbeReading(Probe.fit(moments, indices), self.saes[layer], pool)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the merged sums, the selection, and whose they are; no weights."""
        self.sums.merge()
        checkpoint["state_dict"] = self.state_dict()
        checkpoint["corrsteer_pl"] = {
            "position": self.position,
            "settled": {name: self.hparams[name] for name in SETTLED_BY_FIT},
            "precision": {name: self.hparams[name] for name in ("dtype", "sae_dtype")},
            "samples": self.datamodule.fingerprint,
            "llm": self.llm.identity,
            "saes": self._saes_identity,
            "selection": self.selection.as_dict() if self.selection else None,
            "directions": self.directions,
            "snapshots": self.snapshots,
            "probe": self.reading and {"layer": self.reading.sae.site.layer, **self.reading.probe.as_dict()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over sums and selection, and let Lightning's loops start afresh on the remaining samples.

        Raises:
            UserError: The checkpoint is of another program, model or SAE, or an option that the fit settled differs.
        """
        if "corrsteer_pl" not in checkpoint:
            raise UserError("the checkpoint was not written by corrsteer_pl. Give the last.ckpt of a fit.")
        stored = checkpoint["corrsteer_pl"]
        check_settled(stored["settled"], self.hparams)
        if hasattr(self, "llm"):
            check_llm(stored["llm"], self.llm.identity)
            self._check_saes(stored["saes"])
        if self._trainer is not None and self.trainer.state.fn == "fit":
            check_settled(stored["precision"], self.hparams)
            check_same_data(checkpoint.get("datamodule_hyper_parameters", {}), self.datamodule.hparams)
            check_samples(stored["samples"], self.datamodule.fingerprint)
        self._saes_identity = stored["saes"]
        self.position, self.directions, self.snapshots = stored["position"], stored["directions"], stored["snapshots"]
        if stored["selection"] is not None:
            self.selection = self._reselect(Selection.from_dict(stored["selection"]))
        if stored["probe"]:
            layer = stored["probe"]["layer"]
            sae = (self.saes or self._load_saes([layer]))[layer]
            self.reading = ProbeReading(Probe.from_dict(stored["probe"]), sae, self.hparams["pool"])
        # Lightning's own progress counts batches of one world size; ours counts samples.
        checkpoint.pop("loops", None)
        if not self.saes:
            self._stored_sums, checkpoint["state_dict"] = checkpoint["state_dict"], {}

    def _check_saes(self, stored: dict[str, Any]) -> None:
        h = self.hparams
        if self.saes:
            check_saes(stored, self._saes_identity)
        elif h["saes"] != stored["name"]:
            check_saes(stored, saes_identity(h["saes"], self._load_saes()))

    def _reselect(self, fitted: Selection) -> Selection:
        """Apply this module's rule, sign and layers to the fit's candidates."""
        h = self.hparams
        layers = {f.layer for f in fitted.candidates}
        if missing := sorted(set(h["layers"] or ()) - layers) if layers else []:
            raise UserError(
                f"layer {missing[0]} has no candidate in the checkpoint (layers {choices(sorted(layers))})."
            )
        candidates = [
            f for f in fitted.candidates
            if h["sign"] in ("both", f.sign) and (h["layers"] is None or f.layer in h["layers"])
        ]  # fmt: skip
        if h["rule"] != "all" and any(f.validation_reward is None for f in candidates):
            raise UserError(
                f"model.rule is {h['rule']}, which needs tested candidates, but the checkpoint was fitted with rule "
                "all, which tests none. Fit again with that rule."
            )
        return replace(fitted, rule=h["rule"], features=select(h["rule"], candidates, fitted.baseline_reward))


def _name(feature: Feature) -> str:
    return f"{feature.layer}/{feature.index}"
