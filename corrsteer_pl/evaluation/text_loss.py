"""What a change to the model does to the loss on plain text."""

from corrsteer_pl.models.decoding.decode import Intervention
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.losses import next_token_loss
from corrsteer_pl.models.sae_training.texts import token_rows

# Tokens read of each text.
TEXT_TOKENS = 256


def text_losses(llm: LanguageModel, texts: list[str], variants: Intervention) -> list[float]:
    """Mean loss of the next token of texts in nats, under each variant."""
    rows = token_rows(llm, texts, TEXT_TOKENS)
    return [_loss(llm, rows, variant) for variant in variants.groups(1)]


def _loss(llm: LanguageModel, rows: list[list[int]], variant: Intervention) -> float:
    return next_token_loss(llm, rows, lambda _: variant.attached(llm.model))
