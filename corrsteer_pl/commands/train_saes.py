"""Train SAEs for a model that has none."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.evaluation.tables import percent, show
from corrsteer_pl.files import check_writable, read_rows, write_json, write_jsonl
from corrsteer_pl.models.llm import LanguageModel, local_name
from corrsteer_pl.models.sae_training.texts import answered_rows, answers, token_rows
from corrsteer_pl.models.sae_training.train import Recipe, Training, train_saes
from corrsteer_pl.version import commit, machine

# In the folder of the SAEs: the model's answers to the prompts, and what came of the training.
ANSWERS, RECORD = "answers.jsonl", "training.json"


def train_saes_on(
    llm: str,
    out: Path,
    data: Path | list[Path] | None = None,
    prompts: Path | list[Path] | None = None,
    text: str = "text",
    prompt: str = "prompt",
    answer_tokens: int = 64,
    max_tokens: int = 256,
    layers: list[int] | None = None,
    d_sae: int = 512,
    k: int = 12,
    steps: int = 1000,
    batch_tokens: int = 2048,
    reuse: int = 1,
    dtype: str = "float32",
    save_every: int = 200,
    seed: int = 0,
) -> None:
    """Train a TopK SAE for the output of each decoder block with SAELens, on texts, or on prompts with the answers.

    Prompts are put into the chat template, if there is one, and followed by the model's own answers: what it thinks
    while it answers is what SAEs are needed for. An interrupted training goes on if it is started again.

    Args:
        llm: Path or Hub id of a causal language model, or a GGUF file.
        out: Folder for the SAEs; give it to ``fit`` as ``--model.saes``.
        data: JSONL, CSV or parquet file with texts, or a list of files.
        prompts: The same with prompts.
        text: Column with the texts.
        prompt: Column with the prompts.
        answer_tokens: Longest answer to a prompt.
        max_tokens: Tokens read of each text, or prompt with answer.
        layers: Decoder blocks, from 0; None for all.
        d_sae: Number of features.
        k: Features active per token.
        steps: Optimiser steps.
        batch_tokens: Tokens of a step.
        reuse: Steps that learn from each token that is read; more cost less, where reading is what takes long.
        dtype: Precision of the model: ``float32``, ``bfloat16`` or ``float16``.
        save_every: Steps between two savings of the unfinished training.
        seed: Seed of weights and order.
    """
    recipe = Recipe(None if layers is None else tuple(layers), d_sae, k, steps, batch_tokens, seed=seed, reuse=reuse)
    for name, value in (("answer_tokens", answer_tokens), ("max_tokens", max_tokens), ("save_every", save_every)):
        if value < 1:
            raise UserError(f"--{name} is {value}; it is a number from 1 on.")
    texts, asked = column_of(data, text, "--text"), column_of(prompts, prompt, "--prompt")
    if not texts and not asked:
        raise UserError("there is nothing to train SAEs on. Give texts with --data, or prompts with --prompts.")
    check_writable(out, "--out")
    model = LanguageModel.load(llm, dtype)
    rows = token_rows(model, texts, max_tokens)
    with _bar() as bar:
        if asked:
            rows += answered_rows(model, asked, _answers(model, asked, answer_tokens, out, bar), max_tokens)
        task = bar.add_task("training", total=steps, note="")

        def report(done: int, rate: float) -> None:
            bar.update(task, completed=done, note=f"{rate:,.0f} tokens/s")
            if not bar.console.is_terminal:
                left = (steps - done) * batch_tokens / rate / 60
                bar.console.print(f"{done} of {steps} steps, {rate:,.0f} tokens/s, {left:.0f} minutes left")

        training = train_saes(model, rows, out, recipe, save_every=save_every, report=report)
    given = {"llm": local_name(llm), "data": data, "prompts": prompts, "text": text, "prompt": prompt}
    options = {**given, "answer_tokens": answer_tokens, "max_tokens": max_tokens, "dtype": dtype, **asdict(recipe)}
    write_json(out / RECORD, record(options, training, {"texts": len(texts), "prompts": len(asked)}))
    show(qualities_table(training))


def column_of(files: Path | Sequence[Path] | None, name: str, option: str) -> list[str]:
    """The texts of a column of one or several files, but empty ones.

    Raises:
        UserError: A file cannot be read, or has no such column; a row has no text there.
    """
    found = []
    for file in [files] if isinstance(files, str | Path) else files or []:
        rows = read_rows(Path(file))
        if rows and name not in rows[0]:
            raise UserError(
                f"column {name!r} is not in {file} (columns: {choices(rows[0])}). Set {option} to one of them."
            )
        if empty := [i for i, row in enumerate(rows) if not isinstance(row.get(name), str)]:
            raise UserError(
                f"row {empty[0]} of {file} has no text in the column {name!r}. Fill it in or remove the row."
            )
        found += [row[name] for row in rows if row[name]]
    return found


def _answers(llm: LanguageModel, asked: list[str], new_tokens: int, out: Path, bar: Progress) -> list[str]:
    """The model's answers, kept in the folder for a training that goes on."""
    kept = out / ANSWERS
    about = {"model": llm.identity["fingerprint"], "dtype": str(llm.model.dtype), "answer_tokens": new_tokens}
    if kept.exists():
        first, *rows = read_rows(kept) or [{}]
        if first == about and [row.get("prompt") for row in rows] == asked:
            return [row["response"] for row in rows]
    task = bar.add_task("answering", total=len(asked), note="prompts")
    found = answers(llm, asked, new_tokens, lambda done: bar.update(task, completed=done))
    pairs = [{"prompt": prompt, "response": response} for prompt, response in zip(asked, found, strict=True)]
    write_jsonl(kept, [about, *pairs])
    return found


def _bar() -> Progress:
    parts = "[progress.description]{task.description}", "{task.completed}/{task.total}", "{task.fields[note]}"
    name, count, note = (TextColumn(part) for part in parts)
    return Progress(
        name, BarColumn(), count, note, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )


def record(options: dict[str, Any], training: Training, counts: dict[str, int]) -> dict[str, Any]:
    """What a training was given, what came of it, and on what machine."""
    return {
        "options": {name: _plain(value) for name, value in options.items()},
        **counts,
        "tokens": training.tokens,
        "seconds": round(training.seconds, 1),
        "loss": training.loss,
        "layers": {str(layer): asdict(quality) for layer, quality in training.qualities.items()},
        "commit": commit(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def qualities_table(training: Training) -> Table:
    """The quality of each SAE."""
    table = Table(
        title=f"SAEs after {training.tokens:,} tokens, {training.tokens / max(training.seconds, 1e-9):,.0f} per second",
        caption=(
            f"on held-out texts, where the model's loss is {training.loss:.3f} nats per token; loss: with the "
            "reconstruction in place; recovered: its share between zeros in that place and the unchanged model"
        ),
    )
    for heading in ("layer", "explained %", "L0", "dead %", "loss", "recovered %"):
        table.add_column(heading, justify="right")
    for layer, q in training.qualities.items():
        figures = percent(q.explained), f"{q.l0:.1f}", percent(q.dead), f"{q.loss:.3f}", percent(q.recovered)
        table.add_row(str(layer), *figures)
    return table
