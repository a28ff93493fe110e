"""Formats of sparse autoencoders on disk: which are read, where they read the model, and how to convert the others."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.models.sites import ATTENTION, HOOK, KINDS, MLP, Site

# Architectures of SAELens that reconstruct the tensor which they read.
AUTOENCODERS = ("standard", "gated", "topk", "jumprelu", "abstopk", "matching_pursuit")
# Others, each with the reason why it is rejected.
TRANSCODER = "it reads one site and writes another"
TRAINING = (
    "it is a training checkpoint of SAELens. Convert it with TrainingSAE.load_from_disk(folder)"
    ".save_inference_model(other_folder)"
)
REJECTED = {
    "transcoder": TRANSCODER,
    "skip_transcoder": TRANSCODER,
    "jumprelu_transcoder": TRANSCODER,
    "jumprelu_skip_transcoder": TRANSCODER,
    "crosscoder": "it reads several layers",
    "clt": "it writes several layers",
    "temporal": "its activations depend on earlier tokens",
    "batchtopk": TRAINING,
    "matryoshka_batchtopk": TRAINING,
}
# Loaders of SAELens for releases that hold no autoencoders, with their architecture.
LOADERS = {
    "gemma_2_transcoder": "jumprelu_transcoder",
    "mwhanna_transcoder": "transcoder",
    "mntss_clt_layer_transcoder": "clt",
    "temporal": "temporal",
}
# Activation functions that SAELens applies; it takes any other for ReLU.
ACTIVATIONS = (None, "relu", "topk")
# Names of sites in TransformerLens's bridge, and of a module's output.
BRIDGE = {"hook_in": "resid_pre", "hook_out": "resid_post", "attn.hook_out": "attn_out", "mlp.hook_out": "mlp_out"}
MODULE = re.compile(r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.(\d+)(?:\.([a-z_]+))?")
SPARSIFY = "sae.safetensors"
# Files of formats that are not read: pattern of a path's end, name of the format.
OTHER_FORMATS = {
    r"params\.npz": "Gemma Scope",
    r"params(_layer_\d+)?\.safetensors": "Gemma Scope 2",
    r"(hyperparams|lm_config)\.json": "Llama Scope",
    r"layer\d+\.sae\.pt": "Qwen Scope",
    r"ae\.pt": "dictionary_learning",
    r"sae\.safetensors": "sparsify",
    r"(activations_store_state\.safetensors|runner_cfg\.json)": "a training checkpoint of SAELens",
    r".*\.(pt|pth|bin|npz)": "PyTorch or numpy files without a description (as those of OpenAI)",
}
CONVERT = (
    "Load it with SAELens and save it with SAE.save_model(folder), with cfg.metadata.hook_name such as "
    "blocks.3.hook_resid_post; then set model.saes to that folder"
)


def hook_site(hook: str, name: str) -> Site:
    """The site of a hook name: of TransformerLens or its bridge, or the path of a module whose output is read.

    Args:
        hook: The hook name.
        name: The SAE, for the message.

    Raises:
        UserError: It is the name of no site that can be steered.

    Example:
        >>> hook_site("blocks.3.hook_resid_pre", "sae"), hook_site("gpt_neox.layers.3.mlp", "sae")
        (Site(layer=3, kind='resid_pre'), Site(layer=3, kind='mlp_out'))
    """
    if (match := HOOK.fullmatch(hook)) and match[2] in KINDS:
        return Site(int(match[1]), match[2])
    if (match := re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)) and match[2] in BRIDGE:
        return Site(int(match[1]), BRIDGE[match[2]])
    parts: dict[str | None, str] = {
        None: "resid_post", **dict.fromkeys(ATTENTION, "attn_out"), **dict.fromkeys(MLP, "mlp_out")
    }  # fmt: skip
    if (match := MODULE.fullmatch(hook)) and match[2] in parts:
        return Site(int(match[1]), parts[match[2]])
    raise UserError(
        f"the SAE {name} declares the hook {hook!r}, which cannot be steered here; supported are "
        f"{choices(f'blocks.N.hook_{kind}' for kind in KINDS)}, and modules such as model.layers.N or "
        "model.layers.N.mlp. Choose SAEs of one of these sites."
    )


def is_module(hook: str) -> bool:
    """Whether a hook is named by a module, whose output may go through a norm before it is added."""
    return HOOK.fullmatch(hook) is None


def read_settings(config: Path) -> dict[str, Any]:
    """The settings in an SAE's ``cfg.json``.

    Raises:
        UserError: It is no JSON object.
    """
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config} is no valid JSON ({error}). Save the SAE again with SAELens.") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("metadata") or {}, dict):
        raise UserError(f"{config} describes no SAE. Save the SAE again with SAELens.")
    return settings


def is_sparsify(settings: Mapping[str, Any], folder: Path) -> bool:
    """Whether a folder with a ``cfg.json`` was written by sparsify rather than by SAELens."""
    return (folder / SPARSIFY).is_file() or ({"num_latents", "k", "d_in"} <= set(settings) and "d_sae" not in settings)


def declared_hook(settings: Mapping[str, Any], folder: Path) -> str:
    """The hook that a folder of SAELens or sparsify declares, by any of the names that versions of SAELens use.

    Raises:
        UserError: It declares none, or two that differ, or is no autoencoder.
    """
    if is_sparsify(settings, folder):
        return folder.absolute().name
    check_architecture(settings.get("architecture") or "standard", str(folder))
    both = {**settings, **(settings.get("metadata") or {})}
    hook = both.get("hook_name") or both.get("hook_point")
    if not hook:
        hint = next((f" ({key} is {both[key]!r})" for key in ("hook_name_in", "hook_layer") if key in both), "")
        raise UserError(
            f"{folder / 'cfg.json'} names no hook{hint}. Set metadata.hook_name in it to the site that the SAE reads, "
            f"one of {choices(f'blocks.N.hook_{kind}' for kind in KINDS)}."
        )
    check_single_site(both, str(hook), str(folder))
    named = HOOK.fullmatch(folder.absolute().name)
    if named and (site := hook_site(str(hook), str(folder))).layer != int(named[1]):
        raise UserError(
            f"{folder / 'cfg.json'} declares the hook {hook!r} of layer {site.layer}, but its folder is of layer "
            f"{named[1]}. Correct one of them."
        )
    return str(hook)


def check_architecture(architecture: object, name: str) -> None:
    """Reject what is no autoencoder of one site.

    Raises:
        UserError: Naming the architecture and the reason.
    """
    if architecture not in AUTOENCODERS:
        reason = REJECTED.get(str(architecture), "it is not known to be an autoencoder of one site")
        raise UserError(
            f"the SAE {name} has the architecture {architecture!r}, which is rejected: {reason}. Supported are "
            f"{choices(AUTOENCODERS)}."
        )


def check_single_site(metadata: Mapping[str, Any], hook: str, name: str) -> None:
    """Reject an SAE that writes another site than it reads, reads one attention head, or contradicts itself.

    Args:
        metadata: Its settings, by the names of any version of SAELens.
        hook: The hook that it declares.
        name: The SAE, for the message.

    Raises:
        UserError: Naming the setting and its value.
    """
    for key in ("hook_name_out", "hook_point_out", "hf_hook_name_out"):
        if (written := metadata.get(key)) and written not in (hook, metadata.get("hf_hook_name")):
            raise UserError(
                f"the SAE {name} reads {hook!r} but has {key} {written!r}, so it is a transcoder and no autoencoder "
                "of one site. Set model.saes to autoencoders."
            )
    for key in ("hook_head_index", "hook_point_head_index"):
        if metadata.get(key) is not None:
            raise UserError(
                f"the SAE {name} reads one attention head ({key} {metadata[key]!r}), which cannot be steered here. "
                "Set model.saes to autoencoders of a whole site."
            )
    layer = re.search(r"\.(\d+)(\.|$)", hook)
    for key in ("hook_layer", "hook_point_layer"):
        given = metadata.get(key)
        if isinstance(given, int) and layer and given != int(layer[1]):
            raise UserError(f"the SAE {name} declares the hook {hook!r}, but {key} {given}. Correct its cfg.json.")
    activation = metadata.get("activation_fn_str") or metadata.get("activation_fn")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"the SAE {name} has the activation function {activation!r}, which SAELens does not apply. Set model.saes "
            "to autoencoders with relu or topk."
        )


def sparsify_settings(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Settings of a TopK autoencoder of SAELens that computes what an autoencoder of sparsify does.

    Raises:
        UserError: It is a transcoder, or of another activation function.

    Source:
        https://github.com/EleutherAI/sparsify, ``sparsify/sparse_coder.py``.
    """
    for key in ("transcode", "skip_connection", "signed"):
        if settings.get(key):
            raise UserError(
                f"the SAE {name} is in the format of sparsify and has {key} true, so it is no autoencoder with "
                "activations from 0 on. Set model.saes to autoencoders."
            )
    if settings.get("activation", "topk") != "topk":
        raise UserError(
            f"the SAE {name} is in the format of sparsify and has the activation {settings['activation']!r}; only topk "
            "is supported. Set model.saes to others."
        )
    try:
        d_in, k = int(settings["d_in"]), int(settings["k"])
        d_sae = int(settings.get("num_latents") or d_in * settings["expansion_factor"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the SAE {name} is in the format of sparsify, but its cfg.json lacks d_in, k, or the number of latents. "
            "Save it again with sparsify."
        ) from error
    return {"d_in": d_in, "d_sae": d_sae, "k": k, "apply_b_dec_to_input": True}


def other_format(paths: Iterable[str]) -> str | None:
    """The name of a format that is not read here, by the paths of files; None if there is none.

    Example:
        >>> other_format(["layer_3/width_16k/average_l0_59/params.npz"])
        'Gemma Scope'
    """
    names = {PurePosixPath(path).name for path in paths}
    return next(
        (kind for pattern, kind in OTHER_FORMATS.items() if any(re.fullmatch(pattern, name) for name in names)), None
    )


def unread(source: str, paths: Iterable[str], releases: Iterable[str]) -> UserError:
    """The error for a folder or repository without an SAE in a format that is read.

    Args:
        source: The folder or repository.
        paths: The files in it.
        releases: Releases of SAELens that are made from the same repository.
    """
    kind, known = other_format(paths), list(releases)
    if kind is None:
        return UserError(
            f"the folder or repository {source!r} holds no SAE: no cfg.json below it. Set model.saes to one that does."
        )
    remedy = f"Set model.saes to the release {choices(known)}" if known else CONVERT
    if kind == "sparsify":
        remedy = "Download it (hf download) and set model.saes to the folder"
    return UserError(f"the SAEs {source!r} are in the format {kind}, which is not read from there. {remedy}.")
