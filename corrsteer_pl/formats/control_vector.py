"""Control vectors of llama.cpp, in GGUF: ``direction.N`` is added to the output of block N, at every position."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError
from corrsteer_pl.formats.outputs import by_block
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sites import Site

ARCHITECTURE, DIRECTION = "controlvector", "direction."


def require_gguf() -> None:
    """Refuse to go on without the package that reads and writes GGUF.

    Raises:
        UserError: It is not installed.
    """
    if find_spec("gguf") is None:
        raise UserError("GGUF files need the extra 'gguf': pip install 'corrsteer_pl[gguf]'.")


def read_gguf(path: Path) -> tuple[dict[Site, Tensor], dict[str, Any]]:
    """Vectors ``(d_model,)`` float32 by site, and the metadata.

    Raises:
        ValueError: It is no control vector.
        UserError: The package gguf is not installed.
    """
    require_gguf()
    from gguf import GGUFReader

    reader = GGUFReader(path)
    told = reader.get_field("general.architecture")
    architecture = str(told.contents()) if told else None
    if architecture != ARCHITECTURE:
        raise ValueError(f"its architecture is {architecture!r}, so it is a model and no control vector")
    found: dict[Site, Tensor] = {}
    for tensor in reader.tensors:
        number = tensor.name.removeprefix(DIRECTION)
        if not tensor.name.startswith(DIRECTION) or not number.isdecimal() or tensor.tensor_type.name != "F32":
            raise ValueError(f"its tensor {tensor.name} of type {tensor.tensor_type.name} is no direction")
        vector, site = torch.tensor(tensor.data.copy()), Site(int(number), "resid_post")
        # llama.cpp adds a block's directions up.
        found[site] = found[site] + vector if site in found else vector
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return found, metadata


def write_control_vector(llm: LanguageModel, vectors: Mapping[Site, Tensor], path: Path) -> None:
    """Write a control vector of llama.cpp.

    Raises:
        UserError: A vector is not added to the output of a block, or to that of block 0, which llama.cpp refuses.
    """
    blocks = by_block(vectors, "gguf")
    if 0 in blocks:
        raise UserError(
            "the run steers at the output of block 0, which llama.cpp's control vectors cannot say: they begin with "
            "block 1. Choose --to peft, merged or lm_eval, or fit with other model.layers."
        )
    write_gguf(blocks, llm.config.model_type, path)


def write_gguf(blocks: Mapping[int, Tensor], model_type: str, path: Path) -> None:
    """Write vectors ``(d_model,)`` by block, for a model of a type such as ``llama``."""
    require_gguf()
    from gguf import GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(blocks))
    for layer, vector in blocks.items():
        writer.add_tensor(f"{DIRECTION}{layer}", vector.float().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def as_llama_cpp_adds(model: Any, path: Path) -> Iterator[Any]:
    """The model with what is in a file added to the outputs of its blocks, as llama.cpp does."""
    with ExitStack() as stack:
        for site, vector in read_gguf(path)[0].items():
            hook = partial(_add, vector.to(model.device, model.dtype))
            stack.callback(site.module(model).register_forward_hook(hook).remove)
        yield model


def _add(vector: Tensor, _module: Any, _args: tuple, output: Any) -> Any:
    return output + vector if isinstance(output, Tensor) else (output[0] + vector, *output[1:])
