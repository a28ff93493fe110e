"""CorrSteer: correlate SAE features with the model's own success, and steer with those that help."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_json
from corrsteer_pl.interventions.steering import SteeringVectors
from corrsteer_pl.methods.accumulation.blocks import Block
from corrsteer_pl.methods.accumulation.candidates import fit_probe, leading_features, random_features, rank_features
from corrsteer_pl.methods.accumulation.search import Search, waiting_counts
from corrsteer_pl.methods.accumulation.sums import Accumulator, stored_counts
from corrsteer_pl.methods.answers.answering import ProbeReading
from corrsteer_pl.methods.base import Settings
from corrsteer_pl.methods.checks import check_values
from corrsteer_pl.methods.inspection import SearchInspection
from corrsteer_pl.methods.runs.cards import Card, make_cards, observed
from corrsteer_pl.methods.runs.provenance import check_saes, damaged
from corrsteer_pl.methods.streaming import Streaming
from corrsteer_pl.models.alignment import Alignment, alignments, judge_alignments
from corrsteer_pl.models.coordinates import coordinates
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.sae import Encoder, SparseAutoencoder, saes_identity
from corrsteer_pl.selection import Feature, Selection
from corrsteer_pl.stats import SCORES, Probe, null_max_correlation


class CorrSteer(Streaming):
    """Selects SAE features by their correlation with the reward, and steers with them.

    An epoch of "training" accumulates running sums and changes no weight: memory is O(1) in the number of
    samples. Validation tests each layer's candidates against the unsteered model, ``test_step`` compares
    the steered with the unsteered model. The sums of several processes are merged exactly, so that neither
    their number nor an interruption changes the result.

    Args:
        llm: Path or Hub id of a causal language model, a GGUF file, or ``demo``.
        saes: Folder of SAELens autoencoders, one per layer, a release that SAELens knows, a repository with SAELens
            folders on the Hub, or ``demo``. Not needed with ``raw``.
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
        score: What features are ranked by: ``pearson`` correlation, as the paper does; or, as its rivals do,
            ``mutual_information`` with the reward, the ``fisher`` ratio of mean squares, the ``mean_difference``
            between right and wrong samples, or ``auroc``. The sign of its correlation makes a feature a positive or a
            negative candidate, whatever the score.
        raw: Take coordinates of the residual stream instead of SAE features, at ``layers``, or at every block; ``saes``
            is not read. Such a coordinate is steered by its coefficient's size in the direction of its correlation.
        scale: Factor on all coefficients. Of a list, such as ``[0.5, 1, 2]``, validation chooses the one with the best
            reward of the whole selection within the budget; features are tried at 1 before, and a warning tells if
            that is at an edge of the list. ``auto`` searches for it: 0.5, 1 and 2, then twice or half of the best while
            that is at an edge and within the budget, then midpoints around the best.
        budget: What steering may cost, for a list of scales or ``auto``: ``kl``, the largest mean KL divergence from
            the unsteered model's first new token, in nats; ``loss``, the largest fall of another task's mean reward.
            Prompts are those of the validation, or the validation split of another ``task`` (with ``path``,
            ``subset``, ``filter`` and so on as in the data module), at most ``size`` of them, 200 unless given.
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

    inspection = SearchInspection
    settings = Settings(
        settled=(
            "pool", "coefficient_pool", "coefficient", "score", "raw", "site", "min_improvement", "significance_level",
            "control",
        ),
        resumed=("dtype", "sae_dtype", "permutations"),
        tested=("scale", "rule", "sign", "layers", "positions", "first_k", "decay", "dtype", "llm_args"),
    )  # fmt: skip

    def __init__(
        self,
        llm: str,
        saes: str | None = None,
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
        score: Literal["pearson", "mutual_information", "fisher", "mean_difference", "auroc"] = "pearson",
        raw: bool = False,
        scale: float | list[float] | Literal["auto"] = 1.0,
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
        self.save_hyperparameters()
        self.hparams["check_alignment"] = check_alignment or "off"
        check_values(self.hparams)
        self._identity: dict[str, Any] | None = None  # of the SAEs
        self._probed: Mapping[int, Encoder] = {}
        self.ready()

    def forget(self) -> None:
        """Drop what a fit has found."""
        super().forget()
        self.search = Search({})
        self.cards: list[dict[str, Any]] = []
        self._ranking: tuple[Feature, ...] = ()
        self._probe: tuple[int, Probe] | None = None  # with the layer that it looks at

    # ---------------------------------------------------------------- what is read

    @property
    def saes(self) -> Mapping[int, Encoder]:
        """The autoencoders, by layer; or the coordinates in their place."""
        return self.encoders

    def require_encoders(self) -> None:
        """Load the autoencoders, unless they are there."""
        super().require_encoders()
        if self._identity is None and not self.hparams["raw"]:
            self._identity = saes_identity(self.hparams["saes"], self.encoders)

    def load_encoders(self, layers: list[int] | None = None) -> Mapping[int, Encoder]:
        """The autoencoders of some layers, which have to be those of the fit if there has been one."""
        h = self.hparams
        if h["raw"]:
            return coordinates(self.llm, layers or h["layers"], h["site"])
        # SAELens is slow to import, and testing a finished fit needs no autoencoder.
        from corrsteer_pl.models.sae_loading import load_saes

        options = h["site"], h["sae_id"], h["sae_dtype"], h["sae_offload"], h["sae_revision"]
        loaded = load_saes(h["saes"], self.llm, layers or h["layers"], *options)
        if self._identity:
            fitted = {str(layer): self._identity["fingerprints"].get(str(layer)) for layer in loaded}
            check_saes({**self._identity, "fingerprints": fitted}, saes_identity(h["saes"], loaded))
        return loaded

    @property
    def pools(self) -> list[str]:
        """Which pools of an activation are summed."""
        return sorted({self.pool, self.hparams["coefficient_pool"] or self.pool})

    @property
    def precision(self) -> str:
        """In what precision activations are computed, for a sentence."""
        saes = "" if self.hparams["raw"] else f", the SAEs are in {self.hparams['sae_dtype']}"
        return f"{super().precision}{saes}"

    # ---------------------------------------------------------------- fit: accumulate

    def begin(self) -> None:
        """Load the autoencoders, and set all sums to zero."""
        self._identity = None
        super().begin()
        permutations, seed = self.hparams["permutations"], self.datamodule.hparams["seed"]
        self.search = Search(self.sums.widths, self.pool, permutations, seed, self._deals)

    def new_sums(self, widths: Mapping[int, int]) -> Accumulator:
        """Empty sums, with histograms if the score needs them."""
        binned = self.pool if "histogram" in SCORES[self.hparams["score"]].needs else None
        return Accumulator(widths, self.pools, binned, signed=self.hparams["raw"])

    @property
    def _deals(self) -> bool:
        """Whether samples get the rewards of others."""
        return self.hparams["control"] == "shuffled_rewards"

    def accumulate(self, batch: Batch, reader: PoolReader, rewards: Tensor) -> None:
        """Add what a batch's answers activated, and their rewards ``(batch,)``, to the running sums."""
        if not self._deals:
            super().accumulate(batch, reader, rewards)
        self._deal(self.search.add(batch, reader.values, rewards))

    def _deal(self, blocks: Sequence[Block]) -> None:
        """Add the samples of blocks with the rewards that they were dealt, if they were."""
        for block in blocks if self._deals else ():
            for layer, kind in block.x:
                x = block.activations((layer, kind)).to_dense()
                self.sums.update(layer, kind, x, block.y, torch.ones(len(block.y)))

    # ---------------------------------------------------------------- validate: propose candidates

    def tried(self) -> SteeringVectors:
        """Merge the sums, and choose each layer's candidates: the unsteered model, and each candidate alone."""
        if self.counted and self._deals and self.has_seen_all:
            with self.changing():
                self._deal(self.search.cut(self.counted))
        return super().tried()

    def propose(self) -> tuple[Feature, ...]:
        """The features of each layer that go with the reward most, with what the search says of them."""
        h = self.hparams
        self._ranking, candidates = rank_features(self.sums, self.saes, h)
        is_last = self.has_seen_all and self.counted == len(self.datamodule.examples.get("train", ()))
        if self.has_seen_all:
            # Halves are ranked by correlation, so that they say nothing of candidates that were ranked otherwise.
            stable = candidates if h["score"] == "pearson" else ()
            with self.changing():
                self.search.judge(self.counted, stable, h["topk"], h["topm"], is_last)
        if is_last:
            with self.changing():
                self.sums.settle(h["score"])
        if h["control"] == "random_features":
            candidates = random_features(candidates, self.sums, self.saes, self.pool, self.datamodule.hparams["seed"])
        self._ranking = tuple(map(self.search.evidence.on, self._ranking))
        candidates = tuple(map(self.search.evidence.on, candidates))
        if not self.task.generates:
            layer = max(self.saes)
            self._probe = layer, fit_probe(self.sums.moments(layer, self.pool), h["topk"])
        self.directions = {f.name: self.saes[f.layer].direction(f.index) for f in candidates}
        return candidates

    def conclude(self, rewards: Tensor) -> None:
        """Select by the rule, and describe what was selected."""
        super().conclude(rewards)
        if self.has_seen_all and self.trainer.state.fn == "fit" and self.search.layers and self.selection:
            self.cards = [card.as_dict() for card in self.describe(self.selection.features)]

    def described(self, selection: Selection) -> Selection:
        """The selection with its ranking, and with what the search says of it."""
        return replace(
            selection,
            ranking=self._ranking,
            null_max_correlation=null_max_correlation(self.moments.n_features, self.counted),
            score=self.hparams["score"],
            control=self.hparams["control"],
            null_maxima=self.search.evidence.null_maxima,
            overlap=self.search.evidence.overlap,
        )

    def describe(self, features: Sequence[Feature]) -> list[Card]:
        """Cards of some features, after a fit and before a checkpoint of it is read. Every process must call it."""
        strongest = self.search.strongest.of(features)
        rows = sorted({row for some in strongest for _, row in some})
        samples = observed(self, rows, everywhere=self.pool == "all")
        return make_cards(self.llm, self.saes, features, self.counted, strongest, samples)

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
            self._probed = self.saes or self.load_encoders([layer])
        return ProbeReading(probe, self._probed[layer], self.pool)

    # ---------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """What every steering method stores, the search, the cards and the probe."""
        probe = self._probe and {"layer": self._probe[0], **self._probe[1].as_dict()}
        return {**super().state(), "search": self.search.state(), "cards": self.cards, "probe": probe}

    def stored_counts(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, float]:
        """Number of samples in the sums of each layer and pool, and in those of the search with what waits for it."""
        counts = super().stored_counts(tensors, state)
        pool, deals = (state["search"]["options"][name] for name in ("pool", "deal"))
        waiting, left_out_later = waiting_counts(state["search"])
        if deals:
            counts = {name: count + waiting for name, count in counts.items()}
        for layer, count in stored_counts(tensors, "search.sums").items():
            left_out = tensors[f"sums.merged.{layer}_{pool}.n_left_out"].item()
            # Rewards that are dealt to others wait for the end of their block in all sums.
            left_out -= 0 if deals else left_out_later.get(layer, 0)
            counts[f"search {layer}"] = count + waiting + left_out
        return counts

    def restore_more(self, state: dict[str, Any]) -> None:
        """Take over the sums, the search, the cards and the probe."""
        super().restore_more(state)
        self.search, self.cards = Search.restored(state["search"]), list(state["cards"])
        self._probe = state["probe"] and (state["probe"]["layer"], Probe.from_dict(state["probe"]))

    def saes_identity(self) -> dict[str, Any] | None:
        """Name and fingerprints of the autoencoders of the fit."""
        return self._identity

    def check_saes(self, stored: dict[str, Any] | None) -> None:
        """Refuse other autoencoders than those of the fit.

        Raises:
            UserError: They are others.
        """
        h = self.hparams
        if h["raw"]:
            return
        if stored is None or "name" not in stored or "fingerprints" not in stored:
            raise damaged("it does not say which SAEs it was fitted with")
        if self.saes and self._identity:
            check_saes(stored, self._identity)
        elif h["saes"] != stored["name"]:
            check_saes(stored, saes_identity(h["saes"], self.load_encoders()))
        self._identity = stored

    # ---------------------------------------------------------------- what users see

    def write(self, folder: Path) -> None:
        """``selection.json``, ``features.json`` with the cards of what was selected, and ``steering.safetensors``."""
        super().write(folder)
        write_json(folder / "features.json", {"cards": self.cards})

    def headline(self) -> dict[str, str]:
        """The features that lead so far, as ``layer/index r``."""
        leaders = leading_features(self.sums, self.saes, self.pool)[:3]
        return {"top": "  ".join(f"{f.layer}/{f.index} {f.correlation:+.2f}" for f in leaders)}

    def alignments(self) -> dict[int, Alignment]:
        """How well each SAE fits the model, by layer, measured on the first prompts of the fit."""
        if self.hparams["raw"]:
            return {}
        batch = next(iter(self.datamodule.train_dataloader())).to(self.trainer.strategy.root_device)
        saes = {layer: sae for layer, sae in self.saes.items() if isinstance(sae, SparseAutoencoder)}
        return alignments(self.llm, saes, batch)

    def verify(self) -> None:
        """Check on the first prompts that the SAEs fit the model.

        Raises:
            UserError: One does not, and ``check_alignment`` is ``error``.
        """
        if self.hparams["check_alignment"] != "off":
            judge_alignments(self.alignments().values(), self.hparams["check_alignment"])
