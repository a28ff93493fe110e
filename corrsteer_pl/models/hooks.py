"""Hooks that read the residual at each SAE's site, and encode and pool it while the model decodes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from corrsteer_pl.models.pooling import POOLS, Pool
from corrsteer_pl.models.sae import Encoder

# Prompt positions encoded at a time; all at once would need a tensor (batch, prompt, d_sae).
PROMPT_CHUNK = 16


class PoolReader:
    """Pools SAE activations over the tokens of one batch; keeps no residual longer than a forward pass.

    Args:
        saes: The autoencoders, by layer.
        kinds: Which pools to fill, from ``max``, ``mean``, ``all``; each activation is encoded once.

    Attributes:
        pools: ``pools[layer][kind]``, a :class:`Pool` whose value is ``(batch, d_sae)``.
    """

    def __init__(self, saes: Mapping[int, Encoder], kinds: Sequence[str]) -> None:
        self.saes = saes
        self.pools = {layer: {kind: Pool(kind) for kind in kinds} for layer in saes}
        self._residuals: dict[int, Tensor] = {}

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator["PoolReader"]:
        """Hook the sites of ``model`` for the length of the context."""
        with ExitStack() as stack:
            for layer, sae in self.saes.items():
                stack.callback(sae.site.hook(model, partial(self._residuals.__setitem__, layer)).remove)
            yield self

    @property
    def values(self) -> dict[tuple[int, str], Tensor]:
        """The pooled activations by layer and kind, ``(batch, d_sae)`` each."""
        return {(layer, kind): pool.value for layer, some in self.pools.items() for kind, pool in some.items()}

    @property
    def reads_prompt(self) -> bool:
        """Whether any pool counts prompt tokens."""
        return any(kind == "all" for pools in self.pools.values() for kind in pools)

    def read_prompt(self, counted: Tensor) -> None:
        """Pool the prompt tokens of the last forward pass where ``counted``, ``(batch, sequence)`` bool."""
        self._read_tokens(counted, ("all",))

    def read_text(self, counted: Tensor) -> None:
        """Pool the tokens of a text, in every pool, where ``counted``, ``(batch, sequence)`` bool."""
        self._read_tokens(counted, POOLS)

    def _read_tokens(self, counted: Tensor, kinds: Sequence[str]) -> None:
        for layer, residual in self._residuals.items():
            for start in range(0, counted.shape[1], PROMPT_CHUNK):
                chunk = slice(start, start + PROMPT_CHUNK)
                activations = self.saes[layer].encode(residual[:, chunk])  # (B, chunk, d_sae)
                for position, column in enumerate(counted[:, chunk].unbind(1)):
                    for kind in self.pools[layer].keys() & set(kinds):
                        self.pools[layer][kind].update(activations[:, position], column)

    def read_step(self, counted: Tensor, text: Tensor, samples: Tensor) -> None:
        """Pool the last position of the last forward pass.

        Shape:
            - counted: ``(rows,)`` bool, for the pools of generated tokens.
            - text: ``(rows,)`` bool, for the pool of all tokens.
            - samples: ``(rows,)``, which sample of the batch a row is, in ascending order; all of them at first.
        """
        for layer, residual in self._residuals.items():
            activations = self.saes[layer].encode(residual[:, -1])  # (rows, d_sae)
            for kind, pool in self.pools[layer].items():
                pool.update(activations, text if kind == "all" else counted, samples)
