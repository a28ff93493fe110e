"""Loading sparse autoencoders: from a folder, a release that SAELens knows, or a repository on the Hub.

A module of its own because SAELens is slow to import, and what tests a finished fit needs no autoencoder.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name
from sae_lens.loading.pretrained_saes_directory import (
    get_config_overrides,
    get_pretrained_saes_directory,
    get_releases_for_repo_id,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors import SafetensorError
from safetensors.torch import load_file

from corrsteer_pl import demo
from corrsteer_pl.errors import UserError, choices, nearest
from corrsteer_pl.hub import HUB_ERRORS, reason
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.llm_loading import DTYPES
from corrsteer_pl.models.sae import SITES, SparseAutoencoder, place
from corrsteer_pl.models.sae_formats import (
    AUTOENCODERS,
    LOADERS,
    SPARSIFY,
    check_architecture,
    check_single_site,
    declared_hook,
    hook_site,
    is_module,
    is_sparsify,
    read_settings,
    sparsify_settings,
    unread,
)
from corrsteer_pl.models.sites import Site, decoder_blocks

LAYER = "{layer}"


@dataclass
class _Published:
    """An SAE that could be loaded, how to load it into main memory, and what its publishers say of it."""

    name: str
    load: Callable[[], Any]
    expected: dict[str, float]


def load_saes(
    source: str,
    llm: LanguageModel,
    layers: Iterable[int] | None = None,
    site: str = "declared",
    sae_id: str | None = None,
    dtype: str = "float32",
    offload: bool = False,
    revision: str | None = None,
) -> dict[int, SparseAutoencoder]:
    """Load the SAEs of the named layers, or of all layers that have one.

    Args:
        source: A folder with one folder of SAELens or sparsify per layer, a release that SAELens knows, a repository
            on the Hub with SAELens folders, or ``demo``.
        llm: The model that they read.
        layers: Block indices, from 0.
        site: ``declared`` by the SAE, or forced: another site of the same block.
        sae_id: Which SAEs of the source, if a layer has several: the id of one with ``{layer}`` in place of the layer,
            such as ``layer_{layer}/width_16k/canonical``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        offload: Let them rest in main memory, and come to the device one by one while they encode.
        revision: Branch, tag or commit of the repository on the Hub that they come from; None for its main branch.

    Returns:
        The autoencoders by layer, in ascending order.

    Raises:
        UserError: No such source, id or revision, a layer without SAE, a site that cannot be steered, another width
            than the model's, or weights that are not finite.
    """
    if dtype not in DTYPES:
        raise UserError(f"model.sae_dtype is {dtype!r}; choose one of {choices(DTYPES)}.")
    if site not in SITES:
        raise UserError(f"model.site is {site!r}; choose one of {choices(SITES)}.")
    folder = demo.SAES if source == "demo" else Path(source)
    if revision is not None and folder.is_dir():
        raise UserError(
            f"the revision {revision!r} is asked for of the SAEs {source!r}, which are a folder and have none. Leave "
            "it out, or name a release or a repository on the Hub."
        )
    found = _in_folder(folder, sae_id) if folder.is_dir() else _on_the_hub(source, sae_id, revision)
    depth = llm.config.num_hidden_layers
    wanted = sorted(found if layers is None else set(layers))
    if layers is None and wanted and wanted[-1] >= depth:
        warnings.warn(
            f"{source} has SAEs for layers up to {wanted[-1]}, but {llm.name} has layers 0..{depth - 1} only: they "
            "may have been trained on another model.",
            stacklevel=2,
        )
        wanted = [layer for layer in wanted if layer < depth]
    llm.require_layers(wanted)
    if missing := [layer for layer in wanted if layer not in found]:
        raise UserError(
            f"layer {missing[0]} has no SAE in {source} (it has layers {choices(sorted(found))}). "
            "Set model.layers to a subset of them."
        )
    return {layer: _load(found[layer], layer, llm, site, DTYPES[dtype], offload) for layer in wanted}


def _in_folder(folder: Path, sae_id: str | None) -> dict[int, _Published]:
    configs: dict[int, list[Path]] = {}
    for config in sorted(folder.glob("**/cfg.json")):
        hook = declared_hook(read_settings(config), config.parent)
        configs.setdefault(hook_site(hook, str(config.parent)).layer, []).append(config)
    if not configs:
        raise unread(str(folder), map(str, folder.glob("**/*")), ())
    return {layer: _only(folder, layer, several, sae_id) for layer, several in configs.items()}


def _only(folder: Path, layer: int, configs: list[Path], sae_id: str | None) -> _Published:
    """The SAE of a layer; if there are several, the one whose name is like ``sae_id``."""
    names = {str(config.parent.relative_to(folder)): config.parent for config in configs}
    meant = [name for name in names if len(names) == 1 or (sae_id and _pattern(sae_id).fullmatch(name))]
    if len(meant) != 1:
        raise UserError(
            f"{folder} holds {len(names)} SAEs for layer {layer} ({choices(names)}), of which model.sae_id {sae_id!r} "
            f"names {len(meant)}. Set it to the name of one, with {LAYER} for the layer."
        )
    return _Published(meant[0], partial(_from_disk, names[meant[0]]), {})


def _from_disk(path: Path) -> Any:
    settings = read_settings(path / "cfg.json")
    if is_sparsify(settings, path):
        return _from_sparsify(path, settings)
    sae: Any = SAE.load_from_disk(path)
    if sae.cfg.normalize_activations == "expected_average_only_in":
        raise ValueError(
            "it was trained on scaled activations, and its folder does not say by how much; fold the factor into it "
            "with SAELens's fold_activation_norm_scaling_factor before saving"
        )
    return sae


def _from_sparsify(path: Path, settings: dict[str, Any]) -> Any:
    """An autoencoder of sparsify: the k largest of relu(W_enc (x - b_dec) + b_enc)."""
    options = sparsify_settings(settings, str(path))
    weights = load_file(path / SPARSIFY)
    sae = TopKSAE(TopKSAEConfig(**options, metadata=SAEMetadata(hook_name=path.absolute().name)))
    W_enc = weights["encoder.weight"].T.contiguous()  # stored as (d_sae, d_in)
    state = {"W_enc": W_enc, "b_enc": weights["encoder.bias"], "W_dec": weights["W_dec"], "b_dec": weights["b_dec"]}
    sae.load_state_dict({name: weight.float() for name, weight in state.items()})
    return sae


def _on_the_hub(source: str, sae_id: str | None, revision: str | None) -> dict[int, _Published]:
    release = get_pretrained_saes_directory().get(source)
    if release:
        check_architecture(LOADERS.get(get_conversion_loader_name(source), AUTOENCODERS[0]), source)
    ids = list(release.saes_map) if release else _ids_in_repository(source, revision)
    template = sae_id or _only_template(source, ids)
    matches = {id: _pattern(template).fullmatch(id) for id in ids}
    found: dict[int, _Published] = {}
    for id, match in matches.items():
        if match:
            layer = next(iter([*match.groups(), *re.findall(r"\d+", id), 0]))
            expected = _expected(release, id) if release else {}
            found[int(layer)] = _Published(id, partial(_from_hub, source, id, revision), expected)
    if not found:
        kinds = sorted({_templated(id) for id in ids})
        raise UserError(
            f"{source} has no SAE whose id is like {template!r}. Set model.sae_id to one of "
            f"{choices(nearest(template, kinds))}."
        )
    return found


def _ids_in_repository(source: str, revision: str | None) -> list[str]:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        known = nearest(source, get_pretrained_saes_directory(), 3)
        raise UserError(
            f"the SAEs {source!r} do not exist, neither as a folder nor as a release that SAELens knows (the nearest "
            f"are {choices(known)}). Set model.saes to a folder of SAELens SAEs, a release, or a repository on the Hub."
        )
    try:
        files = HfApi().list_repo_files(source, revision=revision)
    except HUB_ERRORS as error:
        raise UserError(
            f"the SAEs {source!r} could not be found ({reason(error)}). Set model.saes to a folder of SAELens SAEs, "
            "a release that SAELens knows, or a repository on the Hub."
        ) from error
    folders = {file.removesuffix("/cfg.json") for file in files if file.endswith("/cfg.json")}
    folders -= {file.removesuffix(f"/{SPARSIFY}") for file in files if file.endswith(f"/{SPARSIFY}")}
    if not folders:
        raise unread(source, files, get_releases_for_repo_id(source))
    return sorted(folders)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(re.escape(LAYER), r"(\d+)", 1).replace(re.escape(LAYER), r"\1"))


def _templated(id: str) -> str:
    """An id with ``{layer}`` for the first number in it.

    Example:
        >>> _templated("layer_3/width_16k/canonical"), _templated("l11r_8x")
        ('layer_{layer}/width_16k/canonical', 'l{layer}r_8x')
    """
    return re.sub(r"\d+", LAYER, id, count=1)


def _only_template(source: str, ids: list[str]) -> str:
    counts: dict[str, int] = {}
    for id in ids:
        counts[_templated(id)] = counts.get(_templated(id), 0) + 1
    most = max(counts, key=counts.__getitem__, default="")
    if 2 * counts.get(most, 0) <= len(ids):
        raise UserError(
            f"{source} has several SAEs for a layer. Set model.sae_id to one of {choices(nearest(LAYER, counts, 12))}."
        )
    return most


def _expected(release: Any, id: str) -> dict[str, float]:
    """What SAELens's directory, or the path, says of an SAE."""
    l0 = release.expected_l0.get(id) or next(iter(re.findall(r"average_l0_(\d+)", release.saes_map[id])), 0)
    explained = release.expected_var_explained.get(id, 1.0)
    # SAELens writes a variance of 1 and an L0 of 0 where its table has no entry.
    known = {"l0": float(l0), "variance_explained": explained}
    return {name: value for name, value in known.items() if value not in (0.0, 1.0)}


@contextmanager
def _pinned(revision: str | None) -> Iterator[None]:
    """Let SAELens download at a revision: it has no option for that, and all its loaders call these functions."""
    if revision is None:
        yield
        return
    own = {name: getattr(pretrained_sae_loaders, name) for name in ("hf_hub_download", "hf_hub_url")}
    try:
        for name, download in own.items():
            setattr(pretrained_sae_loaders, name, partial(_download, download, revision))
        yield
    finally:
        for name, download in own.items():
            setattr(pretrained_sae_loaders, name, download)


def _download(download: Callable[..., str], revision: str, *args: Any, **kwargs: Any) -> str:
    return download(*args, **{**kwargs, "revision": revision})


def _from_hub(release: str, id: str, revision: str | None) -> Any:
    with _pinned(revision):
        sae = SAE.from_pretrained(release, id)
    for name, value in get_config_overrides(release, id).items():
        # Some SAEs lack metadata that SAELens's table has.
        if name in ("neuronpedia_id", "model_from_pretrained_kwargs") and not sae.cfg.metadata[name]:
            sae.cfg.metadata[name] = value
    return sae


def _load(
    published: _Published, layer: int, llm: LanguageModel, site: str, dtype: torch.dtype, offload: bool
) -> SparseAutoencoder:
    device = next(decoder_blocks(llm.model)[layer].parameters()).device
    # An offloaded block computes on the model's device.
    device = llm.device if device.type == "meta" else device
    try:
        with warnings.catch_warnings():
            # The options that it recommends for TransformerLens are applied by SparseAutoencoder.inputs.
            warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
            warnings.filterwarnings("error", message="norm_scaling_factor not found")
            sae: Any = published.load()
    except (*HUB_ERRORS, TypeError, UserWarning, SafetensorError) as error:
        raise UserError(
            f"the SAE {published.name} cannot be loaded ({reason(error)}). Set model.saes to others."
        ) from error
    declared = _declared_site(sae, published.name, llm)
    if sae.cfg.d_in != llm.config.hidden_size:
        raise UserError(
            f"the SAE {published.name} reads width {sae.cfg.d_in}, but {llm.name} has width {llm.config.hidden_size}. "
            "Set model.saes to autoencoders that were trained on this model."
        )
    at = declared if site == "declared" else Site(declared.layer, site)
    _check_k(sae, published.name)
    _check_finite(sae, published.name)
    sae = sae.to(dtype=dtype).eval().requires_grad_(False)
    _check_finite(sae, published.name)
    place(sae, device, offload)
    return SparseAutoencoder(at, sae, published.name, declared, published.expected)


def _declared_site(sae: Any, name: str, llm: LanguageModel) -> Site:
    """The site that a loaded SAE declares, which is checked to be an autoencoder of it."""
    check_architecture(sae.cfg.architecture(), name)
    hook = sae.cfg.metadata.hook_name or ""
    check_single_site(sae.cfg.metadata.to_dict(), hook, name)
    if sae.cfg.normalize_activations == "covariance_whitening":
        raise UserError(
            f"the SAE {name} was trained on whitened activations (normalize_activations covariance_whitening), and its "
            "folder does not have the whitening. Fold it in with SAELens's fold_activation_whitening before saving."
        )
    site = hook_site(hook, name)
    if is_module(hook) and (norm := site.norm(llm.model)):
        raise UserError(
            f"the SAE {name} reads the output of {hook!r}, but in {type(llm.model).__name__} a norm follows there "
            f"({norm}), and only what comes after it can be steered. Choose SAEs of the residual stream."
        )
    return site


def _check_finite(sae: Any, name: str) -> None:
    for tensor_name, tensor in sae.state_dict().items():
        # Extremes are NaN where any value is, and take no mask as large as the tensor.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"the SAE {name} has values in {tensor_name} that are not finite in {dtype}. Set model.saes to "
                "others, or model.sae_dtype to a precision with a larger range."
            )


def _check_k(sae: Any, name: str) -> None:
    if sae.cfg.architecture() not in ("topk", "abstopk"):
        return
    k, d_sae = sae.cfg.k, sae.cfg.d_sae
    if type(k) is not int or not 1 <= k <= d_sae:
        raise UserError(
            f"the SAE {name} keeps k = {k!r} of {d_sae} features; k is a whole number from 1 to {d_sae}. Correct its "
            "cfg.json, or set model.saes to others."
        )
