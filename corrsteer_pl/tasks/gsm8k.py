"""GSM8K: grade-school word problems with a number for an answer."""

from collections.abc import Mapping
from typing import Any

from corrsteer_pl.rewards import TextReward
from corrsteer_pl.rewards.numbers import gold_number, number, written
from corrsteer_pl.tasks.base import PAPER_SHARES, Example, Source, Task, check_new_tokens, column, not_a_number
from corrsteer_pl.tasks.template import Template, check_instruction

FINAL = "Give the final number after ####."


class GSM8K(Task):
    """Word problems; the response is right if its final number is that of the worked solution.

    Args:
        question: Column with the problem.
        answer: Column with the worked solution, whose number follows ``####``.
        chain_of_thought: Ask for reasoning step by step.
        max_new_tokens: Longest response.
        template: The prompt, with the fields ``{question}``, ``{instruction}`` (what asks for the number, and for
            reasoning with chain of thought), and any column of the row.

    Source:
        Cobbe et al. 2021, arXiv 2110.14168; Hub id ``openai/gsm8k``.
    """

    source = Source("openai/gsm8k", ("main",), train="train", validation="train", test="test", shares=PAPER_SHARES)
    instructs = True

    def __init__(
        self,
        question: str = "question",
        answer: str = "answer",
        chain_of_thought: bool = False,
        max_new_tokens: int = 512,
        template: str = "Q: {question}\n{instruction}\nA:",
    ) -> None:
        self.question, self.answer = question, answer
        self.instruction = f"Think step by step. {FINAL}" if chain_of_thought else FINAL
        self.template = Template(template, "data.task_args.template", ("question", "instruction"))
        check_instruction(self.template, chain_of_thought)
        self.max_new_tokens = check_new_tokens(max_new_tokens)
        self.scorer = TextReward("final number", number)

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """Make the prompt of one problem."""
        question, solution = (
            str(column(row, self.question, "question", id)),
            str(column(row, self.answer, "answer", id)),
        )
        gold = gold_number(solution)
        if gold is None:
            raise not_a_number(id, self.answer, solution)
        prompt = self.template.fill(row, id, {"question": question, "instruction": self.instruction})
        return Example(id, prompt, written(gold), solution=solution)
