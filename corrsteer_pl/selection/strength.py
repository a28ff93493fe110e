"""How strongly a selection steers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Strength:
    """What a selection does at one strength, in validation.

    Attributes:
        scale: Factor on all coefficients.
        reward: Mean reward in [0, 1] of the task.
        kl: Mean KL divergence of the first new token from the unsteered model's, in nats; None if not asked for.
        loss: Fall of the mean reward of the budget's task; None if not asked for.
    """

    scale: float
    reward: float
    kl: float | None = None
    loss: float | None = None


def best_strength(strengths: Sequence[Strength], allows: Callable[[Strength], bool]) -> Strength:
    """The strength of the best reward that is allowed, and of equal ones the weakest; 0 is always allowed.

    Example:
        >>> curve = [Strength(0, 0.5, kl=0.0), Strength(1, 0.7, kl=0.05), Strength(2, 0.9, kl=0.4)]
        >>> best_strength(curve, lambda strength: strength.kl <= 0.1).scale
        1
    """
    allowed = [strength for strength in strengths if strength.scale == 0 or allows(strength)]
    return min(allowed, key=lambda strength: (-strength.reward, abs(strength.scale)))
