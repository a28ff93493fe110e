"""The SAEs of a plan, trained once."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from corrsteer_pl.commands.train_saes import RECORD, train_saes_on
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.files import read_rows, write_json, write_jsonl
from corrsteer_pl.results.plan import Plan, SaePlan


def make_saes(plan: Plan) -> dict[str, Any] | None:
    """Train the SAEs of a plan, if it says how and they are not there.

    Returns:
        What is on record of their training; None if the plan does not say how they are trained.

    Raises:
        UserError: They are there, but trained otherwise.
    """
    if plan.train is None:
        return None
    path = Path(plan.saes) / RECORD
    wanted = {"model": Path(plan.llm).name, "dtype": plan.dtype, **asdict(plan.train)}
    if not path.exists():
        _train(plan, plan.train, path.parent)
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "plan": wanted})
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        trained = record["plan"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is no record of SAEs that a plan trained ({type(error).__name__}). Remove the folder to train "
            "them, or leave train out of the plan to take them as they are."
        ) from None
    for name, value in wanted.items():
        if (found := trained.get(name)) != value:
            raise UserError(
                f"the SAEs in {path.parent} were trained with {name} {found}, and the plan says {value}. Remove them, "
                "or name another folder."
            )
    return record


def _train(plan: Plan, train: SaePlan, folder: Path) -> None:
    texts, prompts = folder / "texts.jsonl", folder / "prompts.jsonl"
    write_jsonl(texts, ({"text": row["text"]} for row in _rows(plan, train.texts)))
    asked = [row["prompt"] for row in _rows(plan, train.prompts)] + _fit_prompts(plan, train.tasks)
    write_jsonl(prompts, ({"prompt": prompt} for prompt in dict.fromkeys(asked)))
    options = {"answer_tokens": train.answer_tokens, "dtype": plan.dtype, **train.recipe}
    train_saes_on(plan.llm, folder, texts, prompts, **options)


def _rows(plan: Plan, files: dict[str, int]) -> list[dict]:
    return [row for name, count in files.items() for row in read_rows(plan.file(name))[:count]]


def _fit_prompts(plan: Plan, wanted: dict[str, int]) -> list[str]:
    """Prompts of the fit splits of some tasks, by the seed of their data; another seed may validate or test on some."""
    found = []
    for name, most in wanted.items():
        if name not in plan.tasks:
            raise UserError(f"SAEs are to be trained on {name}, which is none of the tasks {choices(plan.tasks)}.")
        data = plan.data(plan.tasks[name])
        data.setup("fit")
        found += [example.prompt for example in data.examples["train"][:most]]
    return found
