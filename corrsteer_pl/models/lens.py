"""What a direction says to the head directly, without the blocks in between."""

import torch
from torch import Tensor

from corrsteer_pl.models.llm import LanguageModel


@torch.no_grad()
def logit_lens(llm: LanguageModel, direction: Tensor, count: int) -> tuple[list[str], list[str]]:
    """The tokens whose logits a direction ``(d_model,)`` raises most, and those that it lowers most, of each ``count``.

    The head reads the direction as it is, without the final norm.

    Source:
        nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    head = llm.model.get_output_embeddings().weight
    logits = head.float() @ direction.to(head.device, torch.float32)
    best, worst = (logits.topk(count, largest=largest).indices.tolist() for largest in (True, False))
    return [llm.tokenizer.decode([token]) for token in best], [llm.tokenizer.decode([token]) for token in worst]
