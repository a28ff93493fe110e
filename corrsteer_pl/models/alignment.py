"""Whether SAEs fit the model: do they reconstruct what they read?"""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.decoding.decode import Prompts
from corrsteer_pl.models.llm import LanguageModel, positions_of
from corrsteer_pl.models.sae import SparseAutoencoder
from corrsteer_pl.models.sites import Site

CHECKS = ("error", "warn", "off")
# Tokens of the first prompts that the fit is measured on.
TOKENS = 256
# With fewer distinct tokens the variance is too small to judge by.
FEWEST = 32
# Shares of variance explained. Below NONSENSE an SAE does not reconstruct its input. Below DOUBTFUL it is measured at
# every other site, above it at the neighbouring blocks only. Another site fits better if it explains BETTER more, and
# the misfit is certain from CLEARLY_BETTER on.
NONSENSE, DOUBTFUL, BETTER, CLEARLY_BETTER = 0.1, 0.5, 0.04, 0.1


@dataclass(frozen=True)
class Alignment:
    """How well an SAE fits the site that it reads.

    Attributes:
        site: The site.
        name: The SAE.
        explained: Share of the variance of the tokens' residuals that its reconstruction explains; at most 1, and
            negative if it is worse than the mean.
        l0: Mean number of active features per token.
        d_sae: Number of features.
        expected: What its publishers say: ``variance_explained`` and ``l0``, as far as they do.
        better: A site that it fits better, if there is one.
        better_explained: The share of variance explained there.
        forced: Whether the user chose the site against what the SAE declares.
        enough: Whether there were enough different tokens to judge by.
    """

    site: str
    name: str
    explained: float
    l0: float
    d_sae: int
    expected: Mapping[str, float]
    better: str | None
    better_explained: float | None
    forced: bool
    enough: bool

    @property
    def problem(self) -> str | None:
        """A sentence on the misfit with its figures and likely cause; None if the SAE fits."""
        if not self.enough:
            return None
        figures = f"the SAE {self.name} explains {100 * self.explained:.0f} % of the variance at {self.site}" + (
            f" with {self.l0:.0f} of {self.d_sae} features active"
            + (f" (its publishers say {self.expected['l0']:.0f})" if "l0" in self.expected else "")
        )
        if self.better is not None:
            return (
                f"{figures}, but {100 * (self.better_explained or 0):.0f} % at {self.better}: "
                "it was probably trained there, so the layer or the site is wrong"
            )
        if self.explained < NONSENSE or self.l0 == 0:
            return f"{figures}: it was probably trained on another model, or on activations that were scaled otherwise"
        return None

    @property
    def verdict(self) -> str:
        """``fits``, ``perhaps misfit``, ``misfit`` or ``too few tokens``."""
        if not self.enough:
            return "too few tokens"
        if not self.problem:
            return "fits"
        return "misfit" if self.is_certain else "perhaps misfit"

    @property
    def is_certain(self) -> bool:
        """Whether the misfit is large, and the site not chosen by the user."""
        gain = (self.better_explained or 0) - self.explained if self.better else 0
        return not self.forced and (self.explained < NONSENSE or self.l0 == 0 or gain > CLEARLY_BETTER)


@torch.no_grad()
def alignments(llm: LanguageModel, saes: Mapping[int, SparseAutoencoder], prompts: Prompts) -> dict[int, Alignment]:
    """Measure how well each SAE fits, on the text tokens of some prompts; BOS and padding are left out."""
    residuals = _residuals(llm, {sae.site for sae in saes.values()}, prompts)
    text = prompts.input_ids[prompts.attention_mask.bool() & llm.is_text(prompts.input_ids)][:TOKENS]
    enough = len(text.unique()) >= FEWEST
    return {layer: _alignment(sae, residuals, enough) for layer, sae in saes.items()}


def judge_alignments(measured: Iterable[Alignment], check: str) -> None:
    """Raise or warn if SAEs do not fit.

    Args:
        measured: What was measured of them.
        check: ``error`` stops where a misfit is beyond doubt and warns of others, ``warn`` warns of all, ``off`` of
            none.

    Raises:
        UserError: One does not fit beyond doubt.
    """
    doubtful = [alignment for alignment in measured if alignment.problem and check != "off"]
    certain = [alignment for alignment in doubtful if alignment.is_certain]
    if certain and check == "error":
        raise UserError(
            f"{certain[0].problem} ({len(certain)} such SAEs in all). Set model.llm, model.saes, model.sae_id and "
            "model.site to what belongs together, or model.check_alignment to warn."
        )
    for alignment in doubtful:
        warnings.warn(f"{alignment.problem}.", stacklevel=2)


def _alignment(sae: SparseAutoencoder, residuals: Mapping[Site, Tensor], enough: bool) -> Alignment:
    explained, l0 = _fit(sae, residuals[sae.site])
    reach = 1 if explained >= DOUBTFUL else len(residuals)
    others = [site for site in residuals if site != sae.site and abs(site.layer - sae.site.layer) <= reach]
    elsewhere = {site: _fit(sae, residuals[site])[0] for site in others}
    best = max(elsewhere, key=elsewhere.__getitem__, default=sae.site)
    better: tuple[str | None, float | None] = None, None
    if elsewhere.get(best, -1) > max(explained + BETTER, NONSENSE):
        better = str(best), elsewhere[best]
    forced = sae.site != sae.declared
    return Alignment(str(sae.site), sae.name, explained, l0, sae.d_sae, sae.expected, *better, forced, enough)


def _fit(sae: SparseAutoencoder, residual: Tensor) -> tuple[float, float]:
    """Share of the variance explained, and L0, over tokens ``(n, d_model)``."""
    reconstruction, active = sae.reconstruct(residual)
    inputs = sae.inputs(residual)
    error, variance = (inputs - reconstruction).square().sum(), (inputs - inputs.mean(0)).square().sum()
    return (1 - error / variance).item(), active.float().mean().item()


def _residuals(llm: LanguageModel, sites: set[Site], prompts: Prompts) -> dict[Site, Tensor]:
    """Text tokens ``(n, d_model)`` at the sites, and at the input and output of every block."""
    every = {Site(layer, "resid_post") for layer in range(llm.config.num_hidden_layers)}
    found: dict[Site, Any] = {}
    ids, mask = prompts.input_ids, prompts.attention_mask
    counted = (mask.bool() & llm.is_text(ids)).flatten().nonzero().squeeze(-1)[:TOKENS]
    with ExitStack() as stack:
        for site in sites | every | {Site(0, "resid_pre")}:
            stack.callback(site.hook(llm.model, partial(_store, found, site, counted)).remove)
        llm.forward(ids, mask, positions_of(mask))
    return found


def _store(found: dict[Site, Any], site: Site, counted: Tensor, residual: Tensor) -> None:
    found[site] = residual.flatten(0, 1)[counted.to(residual.device)]
