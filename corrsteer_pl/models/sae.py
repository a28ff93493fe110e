"""Sparse autoencoders, each with the site that it reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.models.fingerprint import fingerprint
from corrsteer_pl.models.residency import at_hand, bring
from corrsteer_pl.models.sites import KINDS, Site

SITES = ("declared", *KINDS)
# Architectures whose encoder does not use W_dec, unless they scale activations by its norms.
ENCODE_ALONE = ("standard", "jumprelu", "gated", "topk")
# Architectures whose features are, each by itself, a function of their encoder column, but for the choice of the top k.
WITH_COLUMNS = ("standard", "jumprelu", "topk")


class Encoder(Protocol):
    """What reads the residual at a site as features, each with a direction: an autoencoder, or coordinates."""

    @property
    def site(self) -> Site:
        """Where the residual is read."""

    @property
    def d_sae(self) -> int:
        """Number of features."""

    def encode(self, residual: Tensor) -> Tensor:
        """Feature activations of residuals: ``(..., d_model)`` to ``(..., d_sae)``."""

    def direction(self, index: int) -> Tensor:
        """What one unit of a feature adds to the residual, ``(d_model,)`` float32."""

    def page(self, index: int) -> str | None:
        """Address of a page about a feature, if there is one."""


@dataclass
class SparseAutoencoder:
    """An SAE and where it reads the model. Not an ``nn.Module``, for the reasons given at :class:`LanguageModel`.

    It computes on ``sae.device``. Weights that encoding does not need stay in main memory; with offloading all do.

    Attributes:
        site: The site that activations are read from and steering vectors are added to.
        sae: The SAELens autoencoder.
        name: Where it was loaded from.
        declared: The site that the SAE itself names.
        expected: What its publishers say of it: ``variance_explained`` in [0, 1] and ``l0``, as far as they do.
    """

    site: Site
    sae: Any
    name: str
    declared: Site
    expected: dict[str, float]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.sae.cfg.d_sae

    def page(self, index: int) -> str | None:
        """Address of a feature's page on Neuronpedia, if the SAE's metadata name one."""
        name = self.sae.cfg.metadata.neuronpedia_id
        return f"https://www.neuronpedia.org/{name}/{index}" if name else None

    @property
    def _centred(self) -> bool:
        """Whether it was trained on a residual stream whose mean TransformerLens had removed."""
        return bool((self.sae.cfg.metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"))

    def inputs(self, residual: Tensor) -> Tensor:
        """Residuals as the SAE reads and reconstructs them, ``(..., d_model)``."""
        residual = residual.to(self.sae.device, self.sae.dtype)
        return residual - residual.mean(-1, keepdim=True) if self._centred else residual

    def encode(self, residual: Tensor) -> Tensor:
        """Feature activations of residuals: ``(..., d_model)`` to ``(..., d_sae)``.

        They are in units of the residual stream: an activation times the feature's :meth:`direction` is what the
        feature contributes to the reconstruction, whether or not the SAE scales its input for every token.
        """
        inputs = self.inputs(residual)
        with at_hand(self.sae, self.sae.device, without=unneeded(self.sae)):
            activations = self._activations(inputs)
        match self.sae.cfg.normalize_activations:
            case "layer_norm":
                return activations * inputs.std(-1, keepdim=True)
            case "constant_norm_rescale":
                return activations * inputs.norm(dim=-1, keepdim=True) / inputs.shape[-1] ** 0.5
            case _:
                return activations

    def require_columns(self) -> str:
        """The name of the architecture, whose features have to be functions of their encoder columns.

        Raises:
            UserError: They are not.
        """
        kind = self.sae.cfg.architecture()
        if kind not in WITH_COLUMNS:
            raise UserError(
                f"the SAE {self.name} has the architecture {kind}, of which single features cannot be trained on. "
                f"Choose SAEs of one of {choices(WITH_COLUMNS)}."
            )
        return kind

    def columns(self, indices: Sequence[int]) -> "Columns":
        """Some features alone.

        Raises:
            UserError: The architecture's features cannot be told from encoder columns.
        """
        kind = self.require_columns()
        some, device = list(indices), self.sae.device
        weight, bias = self.sae.W_enc.detach()[:, some], self.sae.b_enc.detach()[some]
        threshold = self.sae.threshold.detach()[some] if kind == "jumprelu" else torch.zeros_like(bias)
        if _rescales(self.sae):
            norms = self.sae.W_dec.detach()[some].norm(dim=-1).to(bias.device)
            weight, bias = weight * norms, bias * norms
        return Columns(self, weight.to(device), bias.to(device), threshold.to(device))

    def pre_activations(self, residual: Tensor) -> Tensor:
        """Values of all features before the activation function, with gradients to the residual.

        Shape:
            - residual: ``(..., d_model)``.
            - returns ``(..., d_sae)``, in the units in which the SAE computes.

        Raises:
            UserError: The architecture has no such values, see :meth:`require_columns`.
        """
        self.require_columns()
        inputs = self.inputs(residual)
        with at_hand(self.sae, self.sae.device, without=unneeded(self.sae)):
            pre = self.sae.process_sae_in(inputs) @ self.sae.W_enc.detach() + self.sae.b_enc.detach()
            return pre * self.sae.W_dec.detach().norm(dim=-1) if _rescales(self.sae) else pre

    def activate(self, pre: Tensor) -> Tensor:
        """Activations from :meth:`pre_activations`, both ``(..., d_sae)``."""
        with at_hand(self.sae, self.sae.device, without=("W_enc", "W_dec")):
            activations = self.sae.activation_fn(pre)
            activations = activations.to_dense() if activations.is_sparse else activations
            if self.sae.cfg.architecture() == "jumprelu":
                return activations * (pre > self.sae.threshold.detach())
            return activations

    def reconstruct(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction ``(..., d_model)`` of residuals, and how many features are active ``(...)``."""
        with at_hand(self.sae, self.sae.device):
            activations = self._activations(inputs := self.inputs(residual))
            return self.sae.decode(activations).reshape(inputs.shape), (activations != 0).sum(-1)

    def _activations(self, inputs: Tensor) -> Tensor:
        activations = self.sae.encode(inputs)
        return activations.to_dense() if activations.is_sparse else activations

    def direction(self, index: int) -> Tensor:
        """What one unit of a feature adds to the residual: its decoder row, ``(d_model,)`` float32."""
        # A view would keep the storage of the whole decoder alive, and torch.save would write all of it.
        row = self.sae.W_dec[index].detach().to("cpu", torch.float32, copy=True)
        # Some TopK autoencoders divide by the row's norm when they decode.
        return row / row.norm() if _rescales(self.sae) else row


@dataclass(frozen=True)
class Columns:
    """A few features of an SAE, by their encoder columns alone, with gradients.

    Attributes:
        sae: The autoencoder.
        weight: ``(d_model, k)``.
        bias: ``(k,)``.
        threshold: ``(k,)``, below which a feature is not active.
    """

    sae: SparseAutoencoder
    weight: Tensor
    bias: Tensor
    threshold: Tensor

    def __call__(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What a feature has before its threshold, but not below 0, and its activation, ``(..., k)`` each.

        A TopK autoencoder's features are taken as if each were among the top ones.
        """
        inputs = self.sae.inputs(residual)
        with at_hand(self.sae.sae, self.sae.sae.device, without=("W_enc", "W_dec")):
            left = torch.relu(self.sae.sae.process_sae_in(inputs) @ self.weight + self.bias)
        return left, left * (left > self.threshold)


def unneeded(sae: Any) -> tuple[str, ...]:
    """Names of a SAELens autoencoder's weights that encoding does not use."""
    return ("W_dec",) if sae.cfg.architecture() in ENCODE_ALONE and not _rescales(sae) else ()


def place(sae: Any, device: torch.device, offload: bool = False) -> None:
    """Set the device on which an SAE computes, and move its encoder there unless it is offloaded."""
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    sae.device, sae.cfg.device = device, str(device)
    if not offload:
        bring(sae, device, without=unneeded(sae))


def _rescales(sae: Any) -> bool:
    """Whether a TopK autoencoder weighs features by the norms of their decoder rows."""
    return getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)


def saes_identity(source: str, saes: Mapping[int, Any]) -> dict[str, Any]:
    """Name and fingerprints, by which a checkpoint recognises its autoencoders."""
    return {"name": source, "fingerprints": {str(layer): fingerprint(sae.sae) for layer, sae in saes.items()}}
