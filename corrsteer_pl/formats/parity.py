"""How far an exported file does what the run does: the largest difference of logits, and the same greedy text."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError

# New tokens that are compared.
TOKENS = 16
# Largest difference, as a share of what steering itself changes, that is rounding in each precision.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Answers:
    """What a model says to some prompts.

    Attributes:
        logits: For each prompt ``(tokens, vocabulary)`` float32.
        tokens: For each prompt what follows it, greedily.
    """

    logits: list[Tensor]
    tokens: list[list[int]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, prompts: Sequence[Sequence[int]], changed: AbstractContextManager) -> Self:
        """Let a Hugging Face model answer prompts one by one, within a context."""
        logits, tokens = [], []
        with changed:
            for prompt in prompts:
                ids = torch.tensor([prompt], device=model.device)
                mask = torch.ones_like(ids)
                logits.append(model(input_ids=ids, attention_mask=mask).logits[0].float().cpu())
                answer = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, num_beams=1
                )
                tokens.append(answer[0, len(prompt) :].tolist())
        return cls(logits, tokens)

    def distance(self, other: Self) -> float:
        """The largest difference of a logit."""
        pairs = zip(self.logits, other.logits, strict=True)
        return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


@dataclass(frozen=True)
class Parity:
    """What was measured.

    Attributes:
        prompts: Number of prompts.
        difference: The largest difference of a logit between the run and what was exported.
        effect: The largest difference of a logit that the run itself makes.
        same_text: For how many prompts the greedy text is the same.
        measured_by: What read the exported file.
    """

    prompts: int
    difference: float
    effect: float
    same_text: int
    measured_by: str

    @classmethod
    def between(cls, unchanged: Answers, ours: Answers, theirs: Answers, measured_by: str) -> Self:
        """Compare what the run answers with what the exported file does."""
        same = sum(a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True))
        return cls(len(ours.tokens), ours.distance(theirs), ours.distance(unchanged), same, measured_by)

    def require(self, dtype: torch.dtype) -> None:
        """Refuse what does something else than the run.

        Raises:
            UserError: The difference is more than rounding.
        """
        if self.difference > ROUNDING[dtype] * self.effect:
            raise UserError(
                f"what was written does not do the same as the run, so it was removed: logits differ by up to "
                f"{self.difference:.2g}, where steering itself changes them by {self.effect:.2g}. This model cannot be "
                "exported to this format; choose another one."
            )

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.difference:.1e} from those of the run at every position (which it changes "
            f"by up to {self.effect:.3g}), and the greedy text is the same for {self.same_text} of {self.prompts} "
            f"prompts; read by {self.measured_by}"
        )
