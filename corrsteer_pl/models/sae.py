"""Sparse autoencoders from SAELens, each with the site that it reads."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE
from safetensors import SafetensorError
from torch import Tensor

from corrsteer_pl import demo
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.models.llm import LanguageModel, fingerprint
from corrsteer_pl.models.sites import Site

SITES = ("declared", "resid_pre", "resid_post")


@dataclass
class SparseAutoencoder:
    """An SAE and where it reads the residual stream. Not a module, for the reasons of :class:`LanguageModel`.

    Attributes:
        site: The site that activations are read from and steering vectors are added to.
        sae: The SAELens autoencoder.
        name: Where it was loaded from.
    """

    site: Site
    sae: Any
    name: str

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.sae.cfg.d_sae

    def encode(self, residual: Tensor) -> Tensor:
        """Feature activations of residuals: ``(..., d_model)`` to ``(..., d_sae)``."""
        activations = self.sae.encode(residual.to(self.sae.device, self.sae.dtype))
        return activations.to_dense() if activations.is_sparse else activations

    def direction(self, index: int) -> Tensor:
        """What one unit of a feature adds to the residual: its decoder row, ``(d_model,)`` float32."""
        row = self.sae.W_dec[index].detach().float().cpu()
        # Some TopK autoencoders divide by the row's norm when they decode.
        return row / row.norm() if getattr(self.sae.cfg, "rescale_acts_by_decoder_norm", False) else row


def load_saes(
    source: str, llm: LanguageModel, layers: Iterable[int] | None = None, site: str = "declared"
) -> dict[int, SparseAutoencoder]:
    """Load the SAEs of the named layers, or of all that the folder holds.

    Args:
        source: A folder with one SAELens folder per layer, or ``demo``.
        llm: The model that they read.
        layers: Block indices, from 0.
        site: ``declared`` by the SAE, or forced: ``resid_pre``, ``resid_post`` of the same block.

    Returns:
        The autoencoders by layer, in ascending order.

    Raises:
        UserError: No such folder, a layer without SAE, two SAEs for one layer, or another width than the
            model's.
    """
    declared = _declared_sites(demo.SAES if source == "demo" else Path(source), source)
    depth = llm.config.num_hidden_layers
    wanted = sorted(declared if layers is None else set(layers))
    if outside := [layer for layer in wanted if not 0 <= layer < depth]:
        raise UserError(
            f"layer {outside[0]} is not in {llm.name} (layers 0..{depth - 1}). Set model.layers to a subset of it."
        )
    if missing := [layer for layer in wanted if layer not in declared]:
        raise UserError(
            f"layer {missing[0]} has no SAE in {source} (it has layers {choices(sorted(declared))}). "
            "Set model.layers to a subset of them."
        )
    return {layer: _load(*declared[layer], llm, site) for layer in wanted}


def _declared_sites(folder: Path, source: str) -> dict[int, tuple[Path, Site]]:
    if not folder.is_dir():
        raise UserError(f"the SAE folder {source!r} does not exist. Set model.saes to a folder of SAELens SAEs.")
    found: dict[int, tuple[Path, Site]] = {}
    for config in sorted(folder.glob("**/cfg.json")):
        try:
            settings = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{config} is no valid JSON ({error}). Save the SAE again with SAELens.") from error
        if not isinstance(settings, dict):
            raise UserError(f"{config} describes no SAE. Save the SAE again with SAELens.")
        hook = (settings.get("metadata") or {}).get("hook_name") or settings.get("hook_name", "")
        site = Site.parse(hook)
        if site.layer in found:
            raise UserError(
                f"{source} holds two SAEs for layer {site.layer} ({found[site.layer][0].name} and "
                f"{config.parent.name}). Keep one per layer in the folder that model.saes names."
            )
        found[site.layer] = (config.parent, site)
    if not found:
        raise UserError(f"the folder {source!r} holds no SAE: no cfg.json below it. Set model.saes to one that does.")
    return found


def _load(path: Path, declared: Site, llm: LanguageModel, site: str) -> SparseAutoencoder:
    if site not in SITES:
        raise UserError(f"model.site is {site!r}; choose one of {choices(SITES)}.")
    try:
        sae: Any = SAE.load_from_disk(path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the SAE in {path} cannot be read ({str(error).splitlines()[0]}). Save it again with SAELens."
        ) from error
    if sae.cfg.d_in != llm.config.hidden_size:
        raise UserError(
            f"the SAE {path.name} reads width {sae.cfg.d_in}, but {llm.name} has width {llm.config.hidden_size}. "
            "Set model.saes to autoencoders that were trained on this model."
        )
    at = declared if site == "declared" else Site(declared.layer, site)
    sae = sae.to(llm.device).eval().requires_grad_(False)
    return SparseAutoencoder(at, sae, path.name)


def saes_identity(source: str, saes: dict[int, SparseAutoencoder]) -> dict[str, Any]:
    """Name and fingerprints, by which a checkpoint recognises its autoencoders."""
    return {"name": source, "fingerprints": {str(layer): fingerprint(sae.sae) for layer, sae in saes.items()}}
