"""``transfer``: one fit, tested on many tasks and on plain text."""

from pathlib import Path
from typing import Any

from corrsteer_pl.cli.arguments import checkpoint_path, given_options, split_options
from corrsteer_pl.cli.lightning import guarded, run_among_others
from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.tables import metrics_table, show
from corrsteer_pl.evaluation.text_loss import text_losses
from corrsteer_pl.files import read_rows, write_json

# Options of this command; all others are those of a test.
TEXT = ("--text", "--text_rows")


def run(args: list[str]) -> int:
    """Test a fit on the task of each configuration; the exit status.

    Raises:
        UserError: A mistake of the user.
    """
    return guarded(_transfer, args)


def _transfer(args: list[str], given: dict[str, Any]) -> None:
    configs, others = split_options(args[1:], ("--config", "-c"))
    _, others = split_options(others, TEXT)
    names = [Path(config).stem for config in configs]
    if not names:
        raise UserError("transfer needs tasks to test on. Name the configuration of each: --config a.yaml.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two configurations are named {twice[0]}, and results are told apart by it. Rename one.")
    if checkpoint_path("transfer", given) != Path(str(given["ckpt_path"])):
        raise UserError("--ckpt_path last is another run for each task. Give the checkpoint of one fit by its path.")
    texts = _texts(given)
    method, found = None, {}
    for name, config in zip(names, configs, strict=True):
        stage = ["test", "--config", config, *others]
        cli = run_among_others(stage, given_options(stage), method)
        method, found[name] = cli.model, cli.model.metrics
    loss = _losses(method, texts) if texts else None
    if cli.trainer.is_global_zero:
        folder = Path(cli.trainer.default_root_dir)
        write_json(folder / "transfer.json", {"tasks": found, "text_loss": loss})
        show(_table(found, loss), f"Written to {folder / 'transfer.json'}.")


def _texts(given: dict[str, Any]) -> list[str]:
    if "text" not in given:
        return []
    count = str(given.get("text_rows", 200))
    if not (count.isdecimal() and int(count) > 0):
        raise UserError(f"--text_rows is {count}; it is a number of rows, at least 1.")
    if not Path(given["text"]).is_file():
        raise UserError(f"--text names {given['text']}, which is no file. Give one with plain text in a column text.")
    rows = read_rows(Path(given["text"]))[: int(count)]
    texts = [row["text"] for row in rows if isinstance(row.get("text"), str) and row["text"].strip()]
    if not texts:
        raise UserError(f"{given['text']} has no text in a column text. Give a file with plain text.")
    return texts


def _losses(method: Any, texts: list[str]) -> dict[str, Any]:
    """The loss on plain text, unsteered and steered at every position, in nats per token."""
    unsteered, steered = text_losses(method.llm, texts, method.text_comparison())
    return {"texts": len(texts), "unsteered": unsteered, "steered": steered}


def _table(found: dict[str, dict[str, Any]], loss: dict[str, Any] | None) -> Any:
    table = metrics_table("Transfer", found)
    if loss:
        table.caption = (
            f"{table.caption}\nloss on {loss['texts']} texts, steered at every position: {loss['unsteered']:.3f} "
            f"unsteered, {loss['steered']:.3f} steered, nats per token"
        )
    return table
