"""Weights that are stored in main memory and moved to their device only while they are used."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Moved = list[tuple[dict[str, Any], str, Tensor]]


def bring(module: nn.Module, device: torch.device, without: Collection[str] = ()) -> Moved:
    """Move parameters and buffers to a device, except those named in ``without``.

    Returns:
        Table, name and original tensor of everything that was moved, by which it can be put back.
    """
    tables: list[dict[str, Any]] = [
        table for owner in module.modules() for table in (owner._parameters, owner._buffers)
    ]
    entries = [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]
    elsewhere = [entry for entry in entries if entry[2].device != device and entry[1] not in without]
    for table, name, tensor in elsewhere:
        moved = tensor.detach().to(device)
        table[name] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
    return elsewhere


@contextmanager
def at_hand(module: nn.Module, device: torch.device, without: Collection[str] = ()) -> Iterator[None]:
    """Move parameters and buffers to a device within the context, except those named in ``without``."""
    rested = bring(module, device, without)
    try:
        yield
    finally:
        for table, name, tensor in rested:
            table[name] = tensor
