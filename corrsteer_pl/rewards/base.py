"""What a reward is: a judgement of responses against gold texts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from corrsteer_pl.errors import UserError

Score = Callable[[str, str], float]


def reward(score: Score) -> Score:
    """Mark a function of a response and a gold text as a reward, so that its import path can be given as an option.

    Only marked functions are called by their import paths; otherwise a configuration could call any function at all.

    Example:
        >>> @reward
        ... def shorter(text: str, gold: str) -> float:
        ...     return float(len(text) < len(gold))
    """
    score.is_reward = True  # type: ignore[attr-defined]
    return score


class Reward(ABC):
    """Judges responses. A class of your own needs ``__call__`` alone.

    Attributes:
        name: What the results say of it.
    """

    name = ""

    def load(self, device: str) -> None:  # noqa: B027 -- most rewards need nothing
        """Load what it needs, a classifier for example, before the first response; called once per process.

        Raises:
            UserError: It cannot be loaded.
        """

    @abstractmethod
    def __call__(self, texts: Sequence[str], golds: Sequence[str]) -> list[float]:
        """Rewards in [0, 1] of responses, each against its gold text."""


class TextReward(Reward):
    """A reward that scores each response by itself.

    Args:
        name: What the results say of it.
        score: Response and gold text to a number in [0, 1].

    Example:
        >>> TextReward("same length", lambda text, gold: float(len(text) == len(gold)))(["ab", "c"], ["xy", "z!"])
        [1.0, 0.0]
    """

    def __init__(self, name: str, score: Score) -> None:
        self.name, self.score = name, score

    def __call__(self, texts: Sequence[str], golds: Sequence[str]) -> list[float]:
        """The score of every response."""
        scores = [self.score(text, gold) for text, gold in zip(texts, golds, strict=True)]
        if wrong := [score for score in scores if not isinstance(score, (int, float))]:
            raise UserError(f"the reward {self.name} returned {wrong[0]!r}; it has to be a number between 0 and 1.")
        return [float(score) for score in scores]
