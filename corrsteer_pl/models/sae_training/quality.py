"""How good SAEs are on texts that they have not learnt from."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae_training.activations import batches, is_text
from corrsteer_pl.models.sae_training.texts import Padded
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
    unchanged = _loss(llm, rows, None)
    return unchanged, {layer: _quality(llm, site, sae, rows, unchanged) for layer, (site, sae) in saes.items()}


def _quality(llm: LanguageModel, site: Site, sae: Any, rows: Sequence[Sequence[int]], unchanged: float) -> Quality:
    watch = _Watch(sae)
    loss = _loss(llm, rows, (site, watch))
    zero = _loss(llm, rows, (site, torch.zeros_like))
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


def _loss(
    llm: LanguageModel, rows: Sequence[Sequence[int]], change: tuple[Site, Callable[[Tensor], Tensor]] | None
) -> float:
    """Mean loss of the next token in nats, with text tokens ``(n, d_model)`` at a site changed."""
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches(llm, rows):
        hook = change[0].hook(llm.model, partial(_replace, change[1], is_text(llm, batch))) if change else None
        with hook or nullcontext():
            total += torch.tensor(_losses(llm, batch), dtype=torch.float64)
    return (total[0] / total[1]).item()


def _replace(function: Callable[[Tensor], Tensor], text: Tensor, residual: Tensor) -> Tensor:
    changed = residual.clone()
    changed[text] = function(residual[text])
    return changed


def _losses(llm: LanguageModel, batch: Padded) -> tuple[float, int]:
    """The sum of the losses of a batch's tokens but the first of each text, and their number."""
    ids, mask = batch.input_ids, batch.attention_mask
    logits = llm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    wanted = mask[:, 1:].bool()
    losses = nn.functional.cross_entropy(logits[wanted].float(), ids[:, 1:][wanted], reduction="sum")
    return losses.item(), int(wanted.sum())
