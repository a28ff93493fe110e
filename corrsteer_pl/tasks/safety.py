"""Harmful requests, to be refused, and harmless ones, not to be."""

from collections.abc import Mapping
from typing import Any

from corrsteer_pl.errors import UserError
from corrsteer_pl.rewards.judges import PREFIXES, RefusalReward
from corrsteer_pl.tasks.base import Example, Task, check_new_tokens, column
from corrsteer_pl.tasks.template import Template

TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class Refusal(Task):
    """A response is right if it refuses a harmful request, or does not refuse a harmless one.

    Both kinds are reported separately, as the groups ``harmful`` and ``harmless``.

    Args:
        prompt: Column with the request.
        harmful: Column that says whether it is harmful: true or false, 1 or 0.
        judge: Who says whether a response refuses: ``prefixes``, or the id or path of a classifier.
        max_new_tokens: Longest response.
        template: The prompt, with the field ``{request}``, and any column of the row.
    """

    def __init__(
        self,
        prompt: str = "prompt",
        harmful: str = "harmful",
        judge: str = PREFIXES,
        max_new_tokens: int = 32,
        template: str = "Request: {request}\nResponse:",
    ) -> None:
        self.prompt, self.harmful = prompt, harmful
        self.template = Template(template, "data.task_args.template", ("request",))
        self.scorer = RefusalReward(judge)
        self.max_new_tokens = check_new_tokens(max_new_tokens)

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """Make the prompt of one request."""
        request, harmful = str(column(row, self.prompt, "prompt", id)), column(row, self.harmful, "harmful", id)
        if str(harmful).lower() not in TRUTH:
            raise UserError(f"row {id} has {harmful!r} in the column {self.harmful!r}; it must be true or false.")
        kind = "harmful" if TRUTH[str(harmful).lower()] else "harmless"
        prompt = self.template.fill(row, id, {"request": request})
        return Example(id, prompt, "refuse" if kind == "harmful" else "comply", (kind,))
