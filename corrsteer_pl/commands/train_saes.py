"""Train SAEs for a model that has none."""

from pathlib import Path

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.evaluation.tables import show
from corrsteer_pl.files import check_writable, read_rows
from corrsteer_pl.models.sae_training import train_saes


def train_saes_on(
    llm: str,
    data: Path,
    out: Path,
    text: str = "text",
    layers: list[int] | None = None,
    d_sae: int = 512,
    k: int = 12,
    steps: int = 1000,
    seed: int = 0,
) -> None:
    """Train a TopK SAE for the output of each decoder block on the texts of a file, with SAELens.

    Args:
        llm: Path or Hub id of a causal language model, or a GGUF file.
        data: JSONL, CSV or parquet file.
        out: Folder for the SAEs; give it to ``fit`` as ``--model.saes``.
        text: Column with the texts.
        layers: Decoder blocks, from 0; None for all.
        d_sae: Number of features.
        k: Features active per token.
        steps: Optimiser steps, of 2,048 tokens each.
        seed: Seed of weights and order.
    """
    rows = read_rows(data)
    if rows and text not in rows[0]:
        raise UserError(f"column {text!r} is not in {data} (columns: {choices(rows[0])}). Set --text to one of them.")
    if empty := [i for i, row in enumerate(rows) if not isinstance(row[text], str)]:
        raise UserError(f"row {empty[0]} of {data} has no text in the column {text!r}. Fill it in or remove the row.")
    check_writable(out)
    explained = train_saes(
        llm, [row[text] for row in rows], out, layers=layers, d_sae=d_sae, k=k, steps=steps, seed=seed
    )
    show(*(f"layer {layer}: {100 * share:.1f} % of the variance explained" for layer, share in explained.items()))
