"""A KV cache that is allocated ahead, instead of copied at every step."""

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Tokens that a cache allocates ahead by default.
ROOM = 32


class FullCache(DynamicCache):
    """A cache that keeps every token, also in layers with a sliding window; the masks hide those outside it.

    A decoding step writes its own keys and values only; transformers' cache copies all of them at each step.

    Args:
        room: Tokens to allocate ahead.
    """

    def __init__(self, room: int = ROOM) -> None:
        super().__init__()
        self.room = room
        self.layer_class_to_replicate = partial(_RoomyLayer, room)  # type: ignore[assignment]

    def fill(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> "FullCache":
        """Append a copy of keys and values of each layer, ``(batch, heads, tokens, head_dim)``; returns itself."""
        for layer, (keys, values) in enumerate(pairs):
            self.update(keys, values, layer)
        return self

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values."""
        layers: Any = self.layers
        return [(layer.keys, layer.values) for layer in layers]

    def picked(self, rows: Tensor) -> "FullCache":
        """A new cache with the given rows, in any number and order."""
        return FullCache(self.room).fill((keys[rows], values[rows]) for keys, values in self.pairs)

    def rewind(self, length: int) -> None:
        """Remove all tokens but the first ``length``."""
        layers: Any = self.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


class _RoomyLayer(DynamicLayer):
    """One layer's keys and values, stored as views of the beginnings of larger tensors."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._spaces: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.keys, self.values = self._longer("keys", key_states), self._longer("values", value_states)
        return self.keys, self.values

    def join(self, parts: Sequence[Any]) -> None:
        """Hold what layers of different rows, equally long, hold."""
        self.lazy_initialization(parts[0].keys, parts[0].values)
        for name in ("keys", "values"):
            held = [getattr(part, name) for part in parts]
            rows, (_, heads, length, width) = [len(some) for some in held], held[0].shape
            self._spaces[name] = held[0].new_empty(sum(rows), heads, length + self._room, width)
            for some, place in zip(held, self._spaces[name].split(rows), strict=True):
                place[:, :, :length] = some
            setattr(self, name, self._spaces[name][:, :, :length])

    def _longer(self, name: str, new: Tensor) -> Tensor:
        held, space = getattr(self, name), self._spaces.get(name)
        length, end = held.shape[2], held.shape[2] + new.shape[2]
        if space is None or space.shape[2] < end or held.data_ptr() != space.data_ptr():
            space = new.new_empty(*new.shape[:2], end + max(self._room, length // 4), new.shape[3])
            space[:, :, :length] = held
            self._spaces[name] = space
        space[:, :, length:end] = new
        return space[:, :, :end]


def picked(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A new cache with the given rows of one, in any number and order."""
    if isinstance(cache, FullCache):
        return cache.picked(rows)
    own = copy.deepcopy(cache)
    own.reorder_cache(rows)  # type: ignore[arg-type]
    return own


def joined(caches: Sequence[FullCache]) -> FullCache:
    """Caches of different rows, equally long, as one; they lose their layers, so that memory holds each once."""
    whole = FullCache(caches[0].room)
    while caches[0].layers:
        layer = _RoomyLayer(whole.room)
        layer.join([cache.layers.pop(0) for cache in caches])
        whole.layers.append(layer)
    return whole
