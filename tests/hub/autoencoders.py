"""Autoencoders in the layouts in which their publishers keep them.

All are identities: feature i reads coordinate i, feature d_in + i the same one with a minus.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import sae_lens
import torch
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

from tests.hub.language_models import ACTIVE
from tests.hub.server import Hub

THRESHOLD = 0.01  # of the JumpReLU autoencoders


def _identity(d_in: int, d_sae: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a (d_in, d_sae) encoder: feature i reads coordinate i, feature d_in + i the same one with a minus."""
    if d_sae < 2 * d_in:
        raise ValueError(f"An identity of {d_in} coordinates takes {2 * d_in} features, not {d_sae}.")
    W_enc = torch.zeros(d_in, d_sae, dtype=dtype)
    i = torch.arange(d_in)
    W_enc[i, i], W_enc[i, d_in + i] = 1.0, -1.0
    return W_enc


def add_gemma_scope(hub: Hub, name: str, folders: Sequence[str], d_in: int = 2304, d_sae: int = 16384) -> Path:
    """Write FOLDER/params.npz, one file under several names; the loader takes d_in and d_sae from the names."""
    repository, first = hub.model(name), None
    for folder in folders:
        file = repository / folder / "params.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        if first is None:
            first, w_enc = file, _identity(d_in, d_sae).numpy()
            zeros = {"b_enc": np.zeros(d_sae, np.float32), "b_dec": np.zeros(d_in, np.float32)}
            threshold = np.full(d_sae, THRESHOLD, np.float32)
            np.savez_compressed(file, w_enc=w_enc, w_dec=w_enc.T, threshold=threshold, **zeros)
        else:
            os.link(first, file)
    return repository


def add_gemma_scope_2(hub: Hub, name: str, folders: Sequence[str], d_in: int = 64, d_sae: int = 256) -> Path:
    """Write FOLDER/config.json and FOLDER/params.safetensors."""
    repository, w_enc = hub.model(name), _identity(d_in, d_sae)
    weights = {
        "w_enc": w_enc,
        "w_dec": w_enc.T.contiguous(),
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_in),
        "threshold": torch.full((d_sae,), THRESHOLD),
    }
    for folder in folders:
        (repository / folder).mkdir(parents=True, exist_ok=True)
        hook = f"model.layers.{_layer('layer_', folder)}.output"
        config = {
            "hf_hook_point_in": hook,
            "hf_hook_point_out": hook,
            "width": d_sae,
            "model_name": name.rpartition("/")[2].replace("gemma-scope-2", "gemma-v3"),
            "architecture": "jump_relu",
            "l0": ACTIVE,
            "affine_connection": False,
            "type": "sae",
        }
        (repository / folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(weights, repository / folder / "params.safetensors")
    return repository


def add_llama_scope(hub: Hub, name: str, folders: Sequence[str], d_in: int = 64, d_sae: int = 256) -> Path:
    """Write FOLDER/hyperparams.json and FOLDER/checkpoints/final.safetensors.

    SAELens multiplies the encoder by a factor from its own table and divides the decoder by it: still an identity.
    """
    repository, w_enc = hub.model(name), _identity(d_in, d_sae, torch.bfloat16)
    weights = {
        "encoder.weight": w_enc.T.contiguous(),
        "decoder.weight": w_enc,
        "encoder.bias": torch.zeros(d_sae, dtype=torch.bfloat16),
        "decoder.bias": torch.zeros(d_in, dtype=torch.bfloat16),
    }
    for folder in folders:
        hook = f"blocks.{_layer('-L', folder)}.hook_resid_post"
        config = {
            "hook_point_in": hook,
            "hook_point_out": hook,
            "act_fn": "jumprelu",
            "jump_relu_threshold": THRESHOLD,
            "norm_activation": "dataset-wise",
            "dataset_average_activation_norm": {"in": d_in**0.5, "out": d_in**0.5},
            "use_decoder_bias": True,
            "expansion_factor": d_sae // d_in,
            "d_model": d_in,
            "d_sae": d_sae,
            "top_k": 50,
        }
        (repository / folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (repository / folder / "hyperparams.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(weights, repository / folder / "checkpoints" / "final.safetensors")
    return repository


def add_qwen_scope(hub: Hub, name: str, layers: Iterable[int], d_in: int = 2048, d_sae: int = 32768) -> Path:
    """Write layerN.sae.pt; the loader takes d_in, d_sae and k from the repository's name.

    The weights are views of one line, equal where i + j is, which keeps the files small: feature i reads coordinate
    d_in - 1 - i, and feature d_in + i the same one with a minus.
    """
    if d_sae < 2 * d_in:
        raise ValueError(f"An identity of {d_in} coordinates takes {2 * d_in} features, not {d_sae}.")
    repository = hub.model(name)
    line = torch.zeros(d_sae + d_in)
    line[d_in - 1], line[2 * d_in - 1] = 1.0, -1.0
    weights = {
        "W_enc": torch.as_strided(line, (d_sae, d_in), (1, 1)),
        "W_dec": torch.as_strided(line, (d_in, d_sae), (1, 1)),
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_in),
    }
    for layer in layers:
        torch.save(weights, repository / f"layer{layer}.sae.pt")
    return repository


def add_sae_lens(
    hub: Hub,
    name: str,
    folders: Mapping[str, str],
    d_in: int = 64,
    d_sae: int = 256,
    architecture: str = "standard",
    k: int = 50,
    old: bool = False,
) -> Path:
    """Write FOLDER/cfg.json and FOLDER/sae_weights.safetensors as SAELens does.

    Args:
        folders: Hook name by folder.
        architecture: standard, gated, jumprelu or topk, of which the last keeps `k` features.
        old: Write the configuration as before version 6.
    """
    prefix = {"standard": "Standard", "gated": "Gated", "jumprelu": "JumpReLU", "topk": "TopK"}[architecture]
    build, configure = getattr(sae_lens, f"{prefix}SAE"), getattr(sae_lens, f"{prefix}SAEConfig")
    repository, W_enc = hub.model(name), _identity(d_in, d_sae)
    for folder, hook in folders.items():
        options = {"k": k} if architecture == "topk" else {}
        metadata = SAEMetadata(model_name=name.rpartition("/")[2], hook_name=hook, context_size=128, prepend_bos=True)
        sae = build(configure(d_in=d_in, d_sae=d_sae, metadata=metadata, **options))
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.zero_()
            sae.W_enc.copy_(W_enc)
            sae.W_dec.copy_(W_enc.T)
            if architecture == "gated":
                sae.b_gate.fill_(-THRESHOLD)
            if architecture == "jumprelu":
                sae.threshold.fill_(THRESHOLD)
        _, config = sae.save_model(repository / folder)
        if old:
            kept = {
                name: value
                for name, value in json.loads(config.read_text(encoding="utf-8")).items()
                if name != "metadata"
            }
            config.write_text(json.dumps({**kept, "hook_point": hook, "activation_fn_str": "relu"}), encoding="utf-8")
    return repository


def _layer(before: str, folder: str) -> int:
    return int(re.search(rf"{before}(\d+)", folder)[1])
