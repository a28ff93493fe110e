"""MMLU-Pro: harder exam questions with up to ten options."""

from corrsteer_pl.tasks.base import PAPER_SHARES, Source
from corrsteer_pl.tasks.choice import TEMPLATE, MultipleChoice


class MMLUPro(MultipleChoice):
    """Exam questions with up to ten options; categories are the groups. Its one large split is divided.

    Args:
        chain_of_thought: Ask for reasoning before the answer.
        max_new_tokens: Longest response; None for one token, or 256 with chain of thought.
        template: The prompt; its fields are those of :class:`~corrsteer_pl.tasks.choice.MultipleChoice`.

    Source:
        Wang et al. 2024, arXiv 2406.01574; Hub id ``TIGER-Lab/MMLU-Pro``.
    """

    source = Source("TIGER-Lab/MMLU-Pro", train="test", validation="test", test="test", shares=PAPER_SHARES)
    instructs = True

    def __init__(
        self, chain_of_thought: bool = False, max_new_tokens: int | None = None, template: str = TEMPLATE
    ) -> None:
        super().__init__(
            choices="options", answer="answer_index", group="category", options=10,
            chain_of_thought=chain_of_thought, max_new_tokens=max_new_tokens, template=template,
        )  # fmt: skip
