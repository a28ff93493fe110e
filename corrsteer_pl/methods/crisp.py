"""CRISP: unlearn a concept by training an adapter that quietens the SAE features which are salient in its texts."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from corrsteer_pl.data import Batch
from corrsteer_pl.errors import NothingToLearn, UserError, choices
from corrsteer_pl.evaluation.tables import percent
from corrsteer_pl.interventions.adapter import Lora
from corrsteer_pl.methods.accumulation.sums import MergedSums
from corrsteer_pl.methods.adapting import Adapting
from corrsteer_pl.methods.base import Settings
from corrsteer_pl.methods.checks import check_adapter
from corrsteer_pl.methods.crisp_losses import LOSSES
from corrsteer_pl.methods.runs.provenance import check_saes, damaged
from corrsteer_pl.models.alignment import alignments, judge_alignments
from corrsteer_pl.models.llm import positions_of
from corrsteer_pl.models.sae import SparseAutoencoder, saes_identity
from corrsteer_pl.models.sites import Site
from corrsteer_pl.selection import Feature
from corrsteer_pl.stats import Salience
from corrsteer_pl.tasks import Example

# What texts of a labelled fit are called, by their gold answer.
TARGET, RETAIN = "positive", "negative"
# Tokens that are encoded at a time while salience is summed.
TOKENS = 512
# Texts whose residual at the last layer is compared in each step.
COHERENT = 4
# Features of each layer that are printed after a fit.
SHOWN = 5


class Crisp(Adapting):
    """Trains a LoRA adapter that suppresses SAE features which fire on target texts and hardly on retain texts.

    ``data.fit_on`` names labelled texts: those with a positive label are the target, the others are to be retained. A
    first pass sums how often and how strongly every feature fires on either. The second pass trains with
    ``(1 - beta) * unlearn + beta * retain + weight * coherence``. *Unlearn* is the activation of the salient features
    on target tokens, see ``loss``. *Retain* is the mean squared difference from the unchanged model of the residual at
    the SAEs' sites, on retain texts. *Coherence* is the same difference at the end of the model, on a few retain texts.
    All three are means over tokens without padding and BOS. The unchanged model is the same one with its adapter
    switched off. Validation and test compare answers of ``data.task``.

    Args:
        llm: Path or Hub id of a causal language model, or ``demo``.
        saes: Folder of SAELens autoencoders, one per layer, a release that SAELens knows, a repository with SAELens
            folders on the Hub, or ``demo``.
        sae_id: Which of them, if a layer has several, with ``{layer}`` for the layer.
        layers: Blocks whose features are quietened, from 0; None for all that have an SAE.
        k: How many salient features of each layer at most.
        least_ratio: How many times as strong a salient feature has to be on target texts.
        counts: ``rates`` compares firing per token, ``counts`` plain counts, as the paper does. Plain counts only
            compare equally many texts, so the first pass leaves out surplus texts of the larger kind, with a warning.
        beta: Weight of retain in the loss; unlearn has ``1 - beta``. In [0, 1].
        gamma: Weight of coherence, at least 0.
        lam: Weight of the second part of unlearn, at least 0; what it multiplies depends on ``loss``.
        loss: Form of the loss. ``paper``: sum of the salient activations plus ``lam`` times the mean activation of all
            features (eq. 9), coherence after the final norm with weight ``gamma``. ``authors``, as in the public code:
            mean of the positive salient activations, with ``lam`` times the absolute mean of all features added before
            the activation function where a feature fires in the unchanged model; coherence after the final norm with
            weight ``beta * gamma``. ``ours``: mean of the salient activations plus ``lam`` times their values before
            the threshold where they fire in the unchanged model; coherence before the final norm with weight ``gamma``.
        adapter_layers: Blocks that get low-rank matrices, from 0; None for all up to the last of ``layers``.
        rank: Their rank.
        alpha: Their strength, of which ``alpha / rank`` counts; None for twice the rank.
        dropout: Share of their inputs that are dropped in training.
        lr: Highest learning rate.
        weight_decay: AdamW's.
        site: ``declared`` by the SAE, or ``resid_pre``, ``resid_post``, ``attn_out`` or ``mlp_out`` whatever it
            declares; ``resid_pre`` reproduces the public code, which reads block inputs.
        check_alignment: What to do if an SAE does not reconstruct what it reads in the first texts: stop with an
            ``error``, ``warn``, or do not look, ``off``.
        dtype: The model's precision: ``float32``, ``bfloat16`` or ``float16``. The matrices are float32.
        sae_dtype: The same for the SAEs.
        sae_offload: Let SAEs rest in main memory and come to the GPU one by one while salience is summed.
        sae_revision: Branch, tag or commit of the SAEs on the Hub; None for the newest.
        llm_args: Further options for loading the model: ``revision``, ``attn_implementation``,
            ``trust_remote_code``, ``blocks`` (where its decoder blocks are).
        candidate_batch_size: As for other methods; here variants never share a forward pass.
        noise_floor: Let a test answer unsteered once more, in other batches: how many answers rounding alone changes.

    Attributes:
        salient: Indices of the salient features, by layer.

    Source:
        CRISP, arXiv 2508.13650.
    """

    settings = Settings(
        settled=(
            "k",
            "least_ratio",
            "counts",
            "loss",
            "beta",
            "gamma",
            "lam",
            "site",
            "adapter_layers",
            "rank",
            "alpha",
        ),
        resumed=("dtype", "sae_dtype", "layers", "lr", "weight_decay", "dropout"),
        tested=("dtype", "llm_args"),
    )
    amsgrad = True

    def __init__(
        self,
        llm: str,
        saes: str,
        sae_id: str | None = None,
        layers: list[int] | None = None,
        k: int = 30,
        least_ratio: float = 3.0,
        counts: Literal["rates", "counts"] = "rates",
        beta: float = 0.99,
        gamma: float = 0.01,
        lam: float = 30.0,
        loss: Literal["paper", "authors", "ours"] = "paper",
        adapter_layers: list[int] | None = None,
        rank: int = 8,
        alpha: int | None = None,
        dropout: float = 0.05,
        lr: float = 4e-5,
        weight_decay: float = 0.01,
        site: Literal["declared", "resid_pre", "resid_post", "attn_out", "mlp_out"] = "declared",
        check_alignment: Literal["error", "warn", "off", False] = "error",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        sae_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        sae_offload: bool = False,
        sae_revision: str | None = None,
        llm_args: dict | None = None,
        candidate_batch_size: int | str = "auto",
        noise_floor: bool = False,
    ) -> None:
        super().__init__(llm, dtype, llm_args, candidate_batch_size)
        self.save_hyperparameters()
        self.hparams["check_alignment"] = check_alignment or "off"
        check_adapter(self.hparams)
        _check_values(self.hparams)
        self.saes: dict[int, SparseAutoencoder] = {}
        self._identity: dict[str, Any] | None = None
        self.salient: dict[int, list[int]] = {}

    # ---------------------------------------------------------------- fit: first pass, which features are salient

    def begin(self) -> None:
        """Load the autoencoders, and put the low-rank matrices into the model."""
        from corrsteer_pl.models.sae_loading import load_saes

        h, task = self.hparams, self.datamodule.fit_task
        if task.generates:
            raise UserError(
                "crisp learns from labelled texts, but the task of the fit is answered. Name texts with data.fit_on, "
                "as in demo_crisp.yaml."
            )
        examples = self.datamodule.examples["train"]
        require_both(examples)
        self.datamodule.examples["train"] = interleaved(examples)
        options = h["site"], h["sae_id"], h["sae_dtype"], h["sae_offload"], h["sae_revision"]
        self.saes = load_saes(h["saes"], self.llm, h["layers"], *options)
        for sae in self.saes.values():
            sae.require_columns()
        self._identity, self.salient = saes_identity(h["saes"], self.saes), {}
        self._coherent = [e for e in examples if e.gold == RETAIN]
        super().begin()

    def new_adapter(self) -> Lora:
        """Low-rank matrices in the blocks up to the last whose features are quietened."""
        h = self.hparams
        layers = h["adapter_layers"] or list(range(max(self.saes) + 1))
        alpha = 2 * h["rank"] if h["alpha"] is None else h["alpha"]
        return Lora(layers, h["rank"], alpha, h["dropout"], self.datamodule.hparams["seed"])

    def verify(self) -> None:
        """Check that the SAEs fit the model, and sum which features are salient unless a checkpoint has said so."""
        if self.hparams["check_alignment"] != "off":
            batch = next(iter(self.datamodule.train_dataloader())).to(self.device)
            judge_alignments(alignments(self.llm, self.saes, batch).values(), self.hparams["check_alignment"])
        if not self.salient:
            self.salience = self._summed()
            self.salient = self._chosen(self.salience)
        self._indices = {
            layer: torch.tensor(indices, device=self.saes[layer].sae.device)
            for layer, indices in self.salient.items() if indices
        }  # fmt: skip

    @torch.no_grad()
    def _summed(self) -> dict[int, Salience]:
        """Sums over the texts of the fit, of all processes."""
        sums = MergedSums({str(layer): Salience(sae.d_sae) for layer, sae in self.saes.items()})
        sums._apply(lambda tensor: tensor.to(self.device))
        rows = self._salience_rows()
        for batch in self.datamodule.train_dataloader():
            ids, mask, target, counted = self._tokens(batch.to(self.device))
            counted &= torch.tensor([[row in rows] for row in batch.rows], device=self.device)
            with self._residuals(self.saes) as found:
                self.llm.forward(ids, mask, positions_of(mask))
            which = target.unsqueeze(1).expand_as(counted)[counted]
            for layer, sae in self.saes.items():
                tokens = found[sae.site][counted.to(found[sae.site].device)].split(TOKENS)
                for some, kind in zip(tokens, which.split(TOKENS), strict=True):
                    sums.fresh[str(layer)].update(sae.encode(some), kind)
        sums.merge()
        return {layer: sums.merged[str(layer)] for layer in self.saes}

    def _salience_rows(self) -> set[int]:
        """Positions of the texts by which salience is measured: all, or equally many of each kind for plain counts."""
        examples = self.datamodule.examples["train"]
        rows = {kind: [i for i, e in enumerate(examples) if e.gold == kind] for kind in (TARGET, RETAIN)}
        size = max(map(len, rows.values()))
        if self.hparams["counts"] == "counts":
            size = min(map(len, rows.values()))
            if len(examples) > 2 * size:
                warnings.warn(
                    f"model.counts is counts, which compares equally many texts, but the fit has {len(rows[TARGET])} "
                    f"target and {len(rows[RETAIN])} retain texts. The salient features are chosen by the first "
                    f"{size} of each. Set model.counts to rates to use all of them.",
                    stacklevel=2,
                )
        return {row for of_kind in rows.values() for row in of_kind[:size]}

    def _chosen(self, salience: Mapping[int, Salience]) -> dict[int, list[int]]:
        h, counts = self.hparams, self.hparams["counts"] == "counts"
        chosen = {layer: sums.salient(h["k"], h["least_ratio"], counts) for layer, sums in salience.items()}
        if not any(chosen.values()):
            best = {layer: sums.ratio(counts)[sums.difference(counts) > 0] for layer, sums in salience.items()}
            ratios = ", ".join(f"{r.max().item() if len(r) else 0:.2f} in layer {layer}" for layer, r in best.items())
            raise NothingToLearn(
                f"no feature is {h['least_ratio']:g} times as strong on target texts as on retain texts; the largest "
                f"ratios are {ratios}. Lower model.least_ratio, or take texts that differ more."
            )
        self.features = tuple(
            _described(sums, layer, str(self.saes[layer].site), i, counts)
            for layer, sums in salience.items() for i in chosen[layer]
        )  # fmt: skip
        return chosen

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, mask, which texts are target ones ``(batch,)``, and which tokens count ``(batch, longest)``."""
        ids, mask = batch.input_ids, batch.attention_mask
        target = torch.tensor([example.gold == TARGET for example in batch.examples], device=ids.device)
        counted = mask.bool() & self.llm.is_text(ids) & batch.weight.bool().unsqueeze(1)
        return ids, mask, target, counted

    # ---------------------------------------------------------------- fit: second pass, quieten them

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The three losses of a batch of target and retain texts."""
        ids, mask, target, counted = self._tokens(batch)
        positions = positions_of(mask)
        with torch.no_grad(), self._residuals(self._indices) as before:
            self.llm.forward(ids, mask, positions)
        with self.own.active(training=True), self._residuals(self._indices) as after:
            self.llm.forward(ids, mask, positions)
        unlearn = self._unlearn(before, after, counted & target.unsqueeze(1))
        retain = self._distance(before, after, counted & ~target.unsqueeze(1))
        coherence = self._coherence()
        beta, gamma = self.hparams["beta"], self.hparams["gamma"]
        weight = LOSSES[self.hparams["loss"]].coherence_weight(beta, gamma)
        loss = (1 - beta) * unlearn + beta * retain + weight * coherence
        for name, value in {"loss": loss, "unlearn": unlearn, "retain": retain, "coherence": coherence}.items():
            self.log_loss(name, value)
        return loss

    def _unlearn(self, before: Mapping[Site, Tensor], after: Mapping[Site, Tensor], counted: Tensor) -> Tensor:
        """Mean over layers of the unlearning term at target tokens."""
        unlearning, mean = LOSSES[self.hparams["loss"]].unlearning, torch.zeros((), device=self.device)
        for layer, salient in self._indices.items():
            sae = self.saes[layer]
            # Hidden states can be on other devices than the batch.
            at = counted.to(after[sae.site].device)
            total, count = unlearning(sae, salient, before[sae.site][at], after[sae.site][at], self.hparams["lam"])
            mean = mean + self.mean_over_processes(total.to(self.device), count.to(self.device))
        return mean / len(self._indices)

    def _distance(self, before: Mapping[Site, Tensor], after: Mapping[Site, Tensor], counted: Tensor) -> Tensor:
        """Mean squared difference of the residual at counted tokens, over sites."""
        total = torch.zeros((), device=self.device)
        for site, residual in after.items():
            difference = (residual[counted].float() - before[site][counted].float()).square()
            total = total + difference.mean(1).sum().to(self.device)
        return self.mean_over_processes(total / len(after), counted.sum())

    def _coherence(self) -> Tensor:
        """The same at the end of the model, on a few retain texts, the same on all processes and in a resumed fit."""
        first = self.counted_after_step
        some = [self._coherent[(first + i) % len(self._coherent)] for i in range(min(COHERENT, len(self._coherent)))]
        rows = [self.datamodule.token_ids(example, self.datamodule.fit_task) for example in some]
        ids, mask = (tensor.to(self.device) for tensor in self.llm.left_pad(rows))
        with torch.no_grad():
            before = self._final(ids, mask)
        with self.own.active(training=True):
            after = self._final(ids, mask)
        counted = (mask.bool() & self.llm.is_text(ids)).to(after.device)
        return (after[counted].float() - before[counted].float()).square().mean().to(self.device)

    def _final(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states ``(batch, sequence, d_model)`` that coherence compares."""
        if LOSSES[self.hparams["loss"]].after_final_norm:
            return self.llm.final_hidden(ids, mask, positions_of(mask))
        last = Site(self.llm.config.num_hidden_layers - 1, "resid_post")
        with _read(self.llm.model, [last]) as hidden:
            self.llm.forward(ids, mask, positions_of(mask))
        return hidden[last]

    def _residuals(self, layers: Mapping[int, Any]) -> Any:
        return _read(self.llm.model, [self.saes[layer].site for layer in layers])

    # ---------------------------------------------------------------- checkpoints and files

    def state(self) -> dict[str, Any]:
        """The shape of the matrices, and the salient features."""
        features = [vars(feature) for feature in self.features]
        return {**super().state(), "salient": self.salient, "features": features}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the matrices' shape and the salient features."""
        super().restore(state)
        try:
            self.salient = {int(layer): list(map(int, indices)) for layer, indices in state["salient"].items()}
            self.features = tuple(Feature(**plain) for plain in state["features"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged("its salient features cannot be read") from error

    def saes_identity(self) -> dict[str, Any] | None:
        """Name and fingerprints of the autoencoders of the fit."""
        return self._identity

    def check_saes(self, stored: dict[str, Any] | None) -> None:
        """Refuse to go on with other autoencoders; a test needs none."""
        if stored is None or "fingerprints" not in stored:
            raise damaged("it does not say which SAEs it was fitted with")
        if self.saes and self._identity:
            check_saes(stored, self._identity)
        self._identity = stored

    def tables(self) -> list[Table]:
        """The strongest salient features of each layer."""
        table = Table(
            title=f"Salient features of {self.counted} texts: the {SHOWN} strongest of each layer",
            caption=f"share of target and of retain tokens on which each fires; ratio: how many times as strong it is "
            f"on target tokens; all {len(self.features)} are in selection.json",
        )
        for heading in ("site", "feature", "target %", "retain %", "ratio"):
            table.add_column(heading, justify="left" if heading == "site" else "right")
        for layer in self.salient:
            of_layer = (feature for feature in self.features if feature.layer == layer)
            for f in sorted(of_layer, key=lambda feature: -feature.score)[:SHOWN]:
                shares = percent(f.active_right), percent(f.active_wrong)
                table.add_row(f.site, str(f.index), *shares, f"{f.mean_right / (f.mean_wrong + 1e-9):.3g}")
        return [table, *super().tables()]


@contextmanager
def _read(model: Any, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """The residual at some sites of the forward pass within the context."""
    found: dict[Site, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.hook(model, partial(found.__setitem__, site)).remove)
        yield found


def _described(sums: Salience, layer: int, site: str, index: int, counts: bool) -> Feature:
    fired, total = sums.rates()
    return Feature(
        layer=layer, site=site, index=index, sign="negative", coefficient=0.0, correlation=None,
        score=sums.difference(counts)[index].item(), active_right=fired[1, index].item(),
        active_wrong=fired[0, index].item(), mean_right=total[1, index].item(), mean_wrong=total[0, index].item(),
    )  # fmt: skip


def require_both(examples: Sequence[Example]) -> None:
    """Refuse texts of one kind, or that are of both.

    Raises:
        UserError: There are no target or no retain texts, or a text is in both.
    """
    texts = {kind: {e.prompt for e in examples if e.gold == kind} for kind in (TARGET, RETAIN)}
    for kind, name in ((TARGET, "target"), (RETAIN, "retain")):
        if not texts[kind]:
            raise UserError(
                f"crisp needs target and retain texts, but the fit has no {name} texts. Set task_args.positive and "
                "task_args.negative in data.fit_on to labels of both."
            )
    if both := texts[TARGET] & texts[RETAIN]:
        raise UserError(
            f"{len(both)} texts are both to be unlearnt and to be retained, the first of them {min(both)[:60]!r}. "
            "Remove them from one of both."
        )


def interleaved(examples: Sequence[Example]) -> list[Example]:
    """Target and retain texts evenly mixed, so that every batch has its share of both; each kind keeps its order.

    Example:
        >>> texts = [Example(str(i), "", TARGET if i < 2 else RETAIN) for i in range(6)]
        >>> [text.id for text in interleaved(texts)]
        ['2', '0', '3', '4', '1', '5']
    """
    placed = []
    for kind in (TARGET, RETAIN):
        some = [example for example in examples if example.gold == kind]
        placed += [((i + 0.5) / len(some), example) for i, example in enumerate(some)]
    return [example for _, example in sorted(placed, key=lambda pair: pair[0])]


def _check_values(h: Mapping[str, Any]) -> None:
    for name, allowed in {"loss": tuple(LOSSES), "counts": ("rates", "counts")}.items():
        if h[name] not in allowed:
            raise UserError(f"model.{name} is {h[name]!r}; choose one of {choices(allowed)}.")
    if h["k"] < 1:
        raise UserError(f"model.k is {h['k']}; it is a number of features, at least 1.")
    if not 0 <= h["beta"] <= 1:
        raise UserError(f"model.beta is {h['beta']}; it is a share of the loss, from 0 to 1.")
    for name in ("gamma", "lam", "least_ratio"):
        if not 0 <= h[name] < math.inf:
            raise UserError(f"model.{name} is {h[name]}; it is a number from 0 on.")
    if h["layers"] == []:
        raise UserError("model.layers is empty. Name layers, or leave it out for all that have an SAE.")
