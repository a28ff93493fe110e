"""Prompts that are answered several times are read once, as long as their keys and values fit into some memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Kept:
    """What is kept of a batch of prompts.

    Attributes:
        prompts: The batch itself, so that no other can have its identity.
        together: How many variants shared a forward pass when it was first answered.
        read: The prompts as they were laid, and their cache; None if there was no room for it.
    """

    prompts: Any
    together: int
    read: tuple[Any, Any] | None = None


class KeptPrompts:
    """Batches of prompts that have been read.

    Args:
        limit: How many bytes of keys and values are kept; prompts beyond it are read again.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._kept: dict[int, Kept] = {}

    def find(self, prompts: Any) -> Kept | None:
        """What is kept of a batch; None if it is new."""
        return self._kept.get(id(prompts))

    def keep(self, prompts: Any, together: int, read: tuple[Any, Any] | None) -> None:
        """Keep what was read, if there is room."""
        kept = Kept(prompts, together)
        if read is not None:
            storages = [tensor.untyped_storage() for layer in read[1].layers for tensor in _tensors(vars(layer))]
            # What is allocated ahead counts, and what several views share counts once.
            size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
            if size <= self._left:
                self._left -= size
                kept.read = read
        self._kept[id(prompts)] = kept


def _tensors(held: Any) -> Iterator[Tensor]:
    """All tensors of a cache's layer, whatever kind of state it keeps."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        yield from _tensors(list(held.values()))
    elif isinstance(held, (list, tuple)):
        for part in held:
            yield from _tensors(part)
