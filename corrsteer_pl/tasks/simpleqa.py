"""SimpleQA: short questions of fact."""

import ast
from collections.abc import Mapping
from typing import Any

from corrsteer_pl.rewards.judges import SIMILARITY, SimilarityReward
from corrsteer_pl.tasks.base import (
    PAPER_SHARES,
    Example,
    Source,
    Task,
    check_new_tokens,
    column,
    optional_column,
    present,
)
from corrsteer_pl.tasks.template import Template


class SimpleQA(Task):
    """Questions with a short answer; a response is right if it means the same.

    Topics are the groups.

    Args:
        judge: Who says whether two answers mean the same: the id or path of a cross-encoder, or ``match`` for
            equality after normalisation.
        threshold: Similarity from which on they do.
        max_new_tokens: Longest response.
        template: The prompt, with the field ``{question}``, and any column of the row.

    Source:
        Wei et al. 2024, arXiv 2411.04368; Hub id ``basicv8vc/SimpleQA``.
    """

    source = Source("basicv8vc/SimpleQA", train="test", validation="test", test="test", shares=PAPER_SHARES)
    instructs = True

    def __init__(
        self,
        judge: str = SIMILARITY,
        threshold: float = 0.6,
        max_new_tokens: int = 16,
        template: str = "Question: {question}\nGive a short answer.\nAnswer:",
    ) -> None:
        self.scorer = SimilarityReward(judge, threshold)
        self.template = Template(template, "data.task_args.template", ("question",))
        self.max_new_tokens = check_new_tokens(max_new_tokens)

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """Make the prompt of one question."""
        question, answer = str(column(row, "problem", "problem", id)), str(column(row, "answer", "answer", id))
        prompt = self.template.fill(row, id, {"question": question})
        return Example(id, prompt, answer, present(_topic(optional_column(row, "metadata", id))), answer)


def _topic(metadata: Any) -> str | None:
    # The Hub's copy has the metadata as the text of a Python dict.
    try:
        fields = ast.literal_eval(metadata) if isinstance(metadata, str) else metadata
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # What literal_eval raises.
        return None
    return fields.get("topic") if isinstance(fields, Mapping) else None
