"""The SAEs of a plan, trained once."""

from pathlib import Path

from corrsteer_pl.commands.train_saes import RECORD, train_saes_on
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.files import read_rows, write_jsonl
from corrsteer_pl.results.plan import Plan


def make_saes(plan: Plan) -> None:
    """Train the SAEs of a plan, if it says how and they are not there."""
    folder = Path(plan.saes)
    if plan.train is None or (folder / RECORD).exists():
        return
    texts, prompts = folder / "texts.jsonl", folder / "prompts.jsonl"
    write_jsonl(texts, ({"text": row["text"]} for row in _rows(plan, plan.train.texts)))
    asked = [row["prompt"] for row in _rows(plan, plan.train.prompts)] + _fit_prompts(plan, plan.train.tasks)
    write_jsonl(prompts, ({"prompt": prompt} for prompt in dict.fromkeys(asked)))
    train_saes_on(
        plan.llm, folder, texts, prompts, answer_tokens=plan.train.answer_tokens, dtype=plan.dtype, **plan.train.recipe
    )


def _rows(plan: Plan, files: dict[str, int]) -> list[dict]:
    return [row for name, count in files.items() for row in read_rows(plan.file(name))[:count]]


def _fit_prompts(plan: Plan, wanted: dict[str, int]) -> list[str]:
    """Prompts of the fit splits of some tasks; none of validation or test."""
    found = []
    for name, most in wanted.items():
        if name not in plan.tasks:
            raise UserError(f"SAEs are to be trained on {name}, which is none of the tasks {choices(plan.tasks)}.")
        data = plan.data(plan.tasks[name])
        data.setup("fit")
        found += [example.prompt for example in data.examples["train"][:most]]
    return found
