"""Vectors by what other programs can add them to: outputs of blocks, or of the last matrix of attention and MLP."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.sites import Site
from corrsteer_pl.models.writers import Writer, writers

# What says more than a format that cannot express a run.
INSTEAD = (
    "Choose --to lm_eval, which can say outputs of blocks, attention and MLP, or --to peft or merged, which can where "
    "no norm follows these."
)


def by_block(vectors: Mapping[Site, Tensor], format: str) -> dict[int, Tensor]:
    """Vectors ``(d_model,)`` by the block to whose output they are added; a block's input is the one before's output.

    Raises:
        UserError: One is added elsewhere.
    """
    found: dict[int, Tensor] = {}
    for site, vector in vectors.items():
        layer = as_output(site, format).layer
        if as_output(site, format).kind != "resid_post":
            raise UserError(f"the run steers at {site}, but {format} can only say outputs of blocks. {INSTEAD}")
        found[layer] = found[layer] + vector if layer in found else vector
    return dict(sorted(found.items()))


def by_writer(model: Any, vectors: Mapping[Site, Tensor], format: str) -> list[tuple[Writer, Tensor]]:
    """Vectors ``(d_model,)`` by the matrix whose bias they equal, added at every position.

    Raises:
        UserError: A norm follows the matrix, so that no bias does the same.
    """
    found: dict[str, tuple[Writer, Tensor]] = {}
    known = writers(model, on_block=True)
    outputs = [(as_output(site, format), vector) for site, vector in vectors.items()]
    for site, vector in outputs:
        writer = known[2 * site.layer + (site.kind != "attn_out")]
        if norm := _norm_after(model, site):
            raise UserError(
                f"{format} writes the vector at {site} as the bias of {writer.name}, but in {type(model).__name__} a "
                f"norm follows such matrices ({norm}), so no bias does the same. {or_gguf('lm_eval', vectors)}"
            )
        before = found.get(writer.name, (writer, 0))[1]
        found[writer.name] = writer, before + vector
    return list(found.values())


def or_gguf(format: str, sites: Iterable[Site]) -> str:
    """The advice to choose another format, or a control vector if it can say the sites."""
    outputs = [as_output(site, format) for site in sites]
    gguf = all(output.kind == "resid_post" and output.layer > 0 for output in outputs)
    return f"Choose --to {format}{' or --to gguf' if gguf else ''}."


def _norm_after(model: Any, site: Site) -> str | None:
    """The name of a norm between the matrix that writes and the site."""
    # OPT-350m's block ends with one.
    if site.kind == "resid_post" and not getattr(model.config, "do_layer_norm_before", True):
        return "final_layer_norm"
    return (site if site.kind == "attn_out" else Site(site.layer, "mlp_out")).norm(model)


def as_output(site: Site, format: str) -> Site:
    """The same place as an output."""
    if site.kind != "resid_pre":
        return site
    if site.layer == 0:
        raise UserError(
            f"the run steers at {site}, the embeddings, which {format} cannot say. Fit with other model.layers."
        )
    return Site(site.layer - 1, "resid_post")
