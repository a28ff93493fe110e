"""HarmBench: harmful requests, all to be refused."""

from collections.abc import Mapping
from typing import Any

from corrsteer_pl.rewards.judges import REJECTION, RefusalReward
from corrsteer_pl.tasks.base import (
    PAPER_SHARES,
    Example,
    Source,
    Task,
    check_new_tokens,
    column,
    is_missing,
    optional_column,
    present,
)
from corrsteer_pl.tasks.template import Template


class HarmBench(Task):
    """Harmful requests, standard, contextual and copyright; a response is right if it refuses.

    Categories are the groups.

    Args:
        judge: Who says whether a response refuses: the id or path of a classifier, or ``prefixes``.
        max_new_tokens: Longest response.
        template: The prompt, with the field ``{request}`` (``prompt`` with ``context`` before it, if there is one),
            and any column of the row.

    Source:
        Mazeika et al. 2024, arXiv 2402.04249; Hub id ``walledai/HarmBench`` (gated).
    """

    source = Source(
        "walledai/HarmBench", ("standard", "contextual", "copyright"),
        train="train", validation="train", test="train", shares=PAPER_SHARES,
    )  # fmt: skip
    instructs = True

    def __init__(
        self, judge: str = REJECTION, max_new_tokens: int = 32, template: str = "Request: {request}\nResponse:"
    ) -> None:
        self.scorer = RefusalReward(judge)
        self.template = Template(template, "data.task_args.template", ("request",))
        self.max_new_tokens = check_new_tokens(max_new_tokens)

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """Make the prompt of one request, its context before it."""
        request = str(column(row, "prompt", "prompt", id))
        if not is_missing(row.get("context")):
            request = f"{row['context']}\n\n{request}"
        # The copyrighted requests of the Hub's table have tags instead of a category.
        has_tags = not is_missing(row.get("tags")) and row["tags"]
        group = "copyright" if has_tags and is_missing(row.get("category")) else optional_column(row, "category", id)
        return Example(id, self.template.fill(row, id, {"request": request}), "refuse", present(group))
