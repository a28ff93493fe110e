"""A prefix that prompts share, few-shot examples for instance, is read once by each decoder."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from corrsteer_pl.models.decoding.cache import FullCache

# Shortest prefix that is shared, in tokens.
SHORTEST = 16


class SharedPrefix:
    """The prefix of the first prompts that share enough, with its keys and values.

    Args:
        read: Makes the cache of tokens ``(1, n)``.
    """

    def __init__(self, read: Callable[[Tensor], FullCache]) -> None:
        self._read = read
        self._tokens: Sequence[int] = []
        self._last: list[Sequence[int]] = []
        self._cache: FullCache | None = None

    def lay(self, ids: Tensor, mask: Tensor, cache: FullCache) -> Tensor:
        """Fill an empty cache with the part of the prefix that all prompts of a batch share.

        In the mask, padding moves from the left to behind the prefix; input ids stay as they are.

        Shape:
            - ids, mask: ``(batch, longest)``, padded on the left.

        Returns:
            The new mask ``(batch, longest)``; the mask as it was, and the cache left empty, if the prompts share too
            little.
        """
        prompts = [row[-kept:-1] for row, kept in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)]
        # A batch of one prompt is compared with the prompt before it.
        others = [self._tokens] if self._cache else self._last if len(prompts) == 1 else []
        self._last = prompts[-1:]
        length = _common_length([*others, *prompts]) if len(others) + len(prompts) > 1 else 0
        if length < SHORTEST:
            return mask
        if self._cache is None:
            self._tokens = prompts[0][:length]
            self._cache = self._read(torch.tensor([self._tokens], device=ids.device))
        pads = mask.shape[1] - mask.sum(1, keepdim=True)  # (B, 1)
        places = torch.arange(mask.shape[1], device=mask.device)
        laid = ((places < length) | (places >= length + pads)).to(mask.dtype)
        shared = ((keys[:, :, :length], values[:, :, :length]) for keys, values in self._cache.pairs)
        cache.fill((keys.expand(len(ids), -1, -1, -1), values.expand(len(ids), -1, -1, -1)) for keys, values in shared)
        return laid


def _common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all prompts share."""
    length = 0
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
