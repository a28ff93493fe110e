"""A short hash of all weights of a module, wherever they lie."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corrsteer_pl.errors import UserError

# Numbers that are converted and hashed at a time, by each thread.
CHUNK = 2**22
# Hashing releases Python's lock; more threads than this wait for memory.
THREADS = 4


def fingerprint(module: nn.Module) -> str:
    """A short hash of a module's parameter and buffer names, shapes and all their values.

    Floating-point values are compared in bfloat16, so that the same weights loaded with another dtype agree. Weights
    that accelerate has offloaded are read from where it stores them, one by one.

    Raises:
        UserError: An offloaded weight cannot be found.
    """
    state = dict(sorted(module.state_dict().items()))
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(partial(_digest, module), state, state.values()))
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _digest(module: nn.Module, name: str, value: Any) -> bytes:
    digest = hashlib.sha256(name.encode())
    if isinstance(value, Tensor):
        tensor = _offloaded(module, name) if value.device.type == "meta" else value.detach()
        digest.update(f"{tuple(tensor.shape)}".encode())
        for chunk in _chunks(tensor):
            digest.update(chunk)
    else:
        # What a layer keeps beside its tensors, how they are quantised for example.
        digest.update(repr(value).encode())
    return digest.digest()


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, floating-point values as bfloat16."""
    for chunk in tensor.reshape(-1).split(CHUNK):
        values = chunk.to("cpu", torch.bfloat16) if chunk.is_floating_point() else chunk.cpu()
        yield values.contiguous().view(torch.uint8).numpy().data


def _offloaded(module: nn.Module, name: str) -> Tensor:
    """A weight that accelerate loads for each forward pass, from the hook of the module that owns it."""
    path, _, key = name.rpartition(".")
    while True:
        hook = getattr(module.get_submodule(path), "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            weights = getattr(one, "weights_map", None)
            if weights is not None:
                return weights[key]
        if not path:
            raise UserError(
                f"the weight {name} has no values: it was offloaded to where it cannot be read. Set "
                "model.llm_args.device_map to devices that hold the whole model."
            )
        path, _, parent = path.rpartition(".")
        key = f"{parent}.{key}"
