"""The residual stream's own coordinates, in the place of an autoencoder's features."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sites import Site


@dataclass(frozen=True)
class Coordinates:
    """Reads the residual at a site as it is: each coordinate is a feature, whose direction is its axis.

    It stands where a :class:`~corrsteer_pl.models.sae.SparseAutoencoder` may stand; what it reads may be negative.

    Attributes:
        site: The site that is read and steered.
        d_sae: Number of features, which is ``d_model``.

    Example:
        >>> Coordinates(Site(0, "resid_post"), 3).direction(1)
        tensor([0., 1., 0.])
    """

    site: Site
    d_sae: int

    def encode(self, residual: Tensor) -> Tensor:
        """Residuals ``(..., d_model)`` in float32."""
        return residual.float()

    def direction(self, index: int) -> Tensor:
        """The axis of a coordinate, ``(d_model,)`` float32."""
        return torch.eye(self.d_sae)[index]

    def page(self, index: int) -> None:
        """No address: nobody describes coordinates."""


def coordinates(llm: LanguageModel, layers: Sequence[int] | None, site: str) -> dict[int, Coordinates]:
    """Coordinates of some blocks' residual, by layer.

    Args:
        llm: The model.
        layers: Blocks, from 0; None for all.
        site: One of :data:`~corrsteer_pl.models.sites.KINDS`, or ``declared`` for ``resid_post``.

    Raises:
        UserError: The model has no such block.
    """
    llm.require_layers(layers or ())
    kind = "resid_post" if site == "declared" else site
    wanted = range(llm.config.num_hidden_layers) if layers is None else sorted(set(layers))
    return {layer: Coordinates(Site(layer, kind), llm.config.hidden_size) for layer in wanted}
