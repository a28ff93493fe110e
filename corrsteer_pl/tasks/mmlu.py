"""MMLU: exam questions of 57 subjects with four options."""

from corrsteer_pl.tasks.base import Source
from corrsteer_pl.tasks.choice import TEMPLATE, MultipleChoice


class MMLU(MultipleChoice):
    """Exam questions with four options; subjects are the groups.

    Args:
        chain_of_thought: Ask for reasoning before the answer.
        max_new_tokens: Longest response; None for one token, or 256 with chain of thought.
        template: The prompt; its fields are those of :class:`~corrsteer_pl.tasks.choice.MultipleChoice`.

    Source:
        Hendrycks et al. 2021, arXiv 2009.03300; Hub id ``cais/mmlu``.
    """

    source = Source("cais/mmlu", ("all",), train="auxiliary_train")
    instructs = True

    def __init__(
        self, chain_of_thought: bool = False, max_new_tokens: int | None = None, template: str = TEMPLATE
    ) -> None:
        super().__init__(
            group="subject", chain_of_thought=chain_of_thought, max_new_tokens=max_new_tokens, template=template
        )
