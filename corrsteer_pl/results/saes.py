"""The SAEs of a plan, trained once."""

import json
from pathlib import Path

from corrsteer_pl.commands.train_saes import RECORD, train_saes_on
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.files import read_rows, write_jsonl
from corrsteer_pl.results.plan import Plan


def make_saes(plan: Plan) -> None:
    """Train the SAEs of a plan, if it says how and they are not there.

    Raises:
        UserError: They are there, but trained otherwise.
    """
    if plan.train is None:
        return
    folder = Path(plan.saes)
    wanted = {"answer_tokens": plan.train.answer_tokens, "dtype": plan.dtype, **plan.train.recipe}
    if (folder / RECORD).exists():
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))["options"]
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UserError(
                    f"the SAEs in {folder} were trained with {name} {found.get(name)}, and the plan says {value}. "
                    "Remove them, or name another folder."
                )
        return
    texts, prompts = folder / "texts.jsonl", folder / "prompts.jsonl"
    write_jsonl(texts, ({"text": row["text"]} for row in _rows(plan, plan.train.texts)))
    asked = [row["prompt"] for row in _rows(plan, plan.train.prompts)] + _fit_prompts(plan, plan.train.tasks)
    write_jsonl(prompts, ({"prompt": prompt} for prompt in dict.fromkeys(asked)))
    train_saes_on(plan.llm, folder, texts, prompts, **wanted)


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
