"""What a change to the model does to the loss on plain text."""

from torch import Tensor

from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.losses import next_token_loss
from corrsteer_pl.models.sae_training.texts import token_rows
from corrsteer_pl.models.sites import Site

# Tokens read of each text.
TEXT_TOKENS = 256


def text_loss(llm: LanguageModel, texts: list[str], vectors: dict[Site, Tensor]) -> float:
    """Mean loss of the next token of texts in nats, with vectors ``(d_model,)`` added at every position."""
    steering = SteeringVectors(vectors, Schedule("all"))
    return next_token_loss(llm, token_rows(llm, texts, TEXT_TOKENS), lambda _: steering.attached(llm.model))
