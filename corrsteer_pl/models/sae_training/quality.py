"""How good SAEs are on texts that they have not learnt from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.losses import next_token_loss
from corrsteer_pl.models.sae_training.activations import is_text
from corrsteer_pl.models.sites import Site


@dataclass(frozen=True)
class Quality:
    """What an SAE does on held-out texts.

    Attributes:
        explained: Share of the variance that its reconstruction explains, over text tokens.
        l0: Features active per token.
        dead: Share of the features that are active at no token.
        loss: Of the next token in nats, with the reconstruction in place of the residual at text tokens.
        recovered: Share of the loss between the model with zeros in that place (0) and the unchanged one (1).
    """

    explained: float
    l0: float
    dead: float
    loss: float
    recovered: float


@torch.no_grad()
def qualities(
    llm: LanguageModel, saes: dict[int, tuple[Site, Any]], rows: Sequence[Sequence[int]]
) -> tuple[float, dict[int, Quality]]:
    """The unchanged model's loss on held-out texts, and the quality of each SAE there.

    Args:
        llm: The model.
        saes: Layer to site and SAELens autoencoder, for residuals as they are.
        rows: Tokens of the texts.

    Returns:
        The loss in nats per token, and layer to quality.
    """
    unchanged = next_token_loss(llm, rows)
    return unchanged, {layer: _quality(llm, site, sae, rows, unchanged) for layer, (site, sae) in saes.items()}


def _quality(llm: LanguageModel, site: Site, sae: Any, rows: Sequence[Sequence[int]], unchanged: float) -> Quality:
    watch = _Watch(sae)
    loss = _loss(llm, rows, site, watch)
    zero = _loss(llm, rows, site, torch.zeros_like)
    recovered = (zero - loss) / (zero - unchanged) if zero > unchanged else float("nan")
    return Quality(*watch.figures(), loss, recovered)


class _Watch:
    """Reconstructs residuals and adds up how well, in double precision."""

    def __init__(self, sae: Any) -> None:
        self.sae = sae
        self.total = torch.zeros(sae.cfg.d_in, dtype=torch.float64, device=sae.device)
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=sae.device)
        self.squares = self.error = self.tokens = 0.0

    def __call__(self, residual: Tensor) -> Tensor:
        x = residual.to(self.sae.device, torch.float32)
        features = self.sae.encode(x)
        reconstruction = self.sae.decode(features)
        self.tokens += len(x)
        self.total += x.double().sum(0)
        self.squares += x.double().square().sum().item()
        self.error += (x - reconstruction).double().square().sum().item()
        self.fired += (features > 0).double().sum(0)
        return reconstruction.to(residual)

    def figures(self) -> tuple[float, float, float]:
        """Share of the variance explained, L0, and share of the features that never fired."""
        variance = self.squares - (self.total.square().sum() / self.tokens).item()
        dead = (self.fired == 0).double().mean().item()
        return 1 - self.error / variance, self.fired.sum().item() / self.tokens, dead


def _loss(llm: LanguageModel, rows: Sequence[Sequence[int]], site: Site, change: Callable[[Tensor], Tensor]) -> float:
    """Mean loss of the next token in nats, with text tokens ``(n, d_model)`` at a site changed."""
    return next_token_loss(
        llm, rows, lambda batch: site.hook(llm.model, partial(_replace, change, is_text(llm, batch)))
    )


def _replace(function: Callable[[Tensor], Tensor], text: Tensor, residual: Tensor) -> Tensor:
    changed = residual.clone()
    changed[text] = function(residual[text])
    return changed
