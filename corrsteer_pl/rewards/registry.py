"""Rewards by name."""

from collections.abc import Callable

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.options import imported
from corrsteer_pl.rewards import text
from corrsteer_pl.rewards.base import Reward, TextReward

TEXT_REWARDS: dict[str, Callable[[str, str], float]] = {
    "exact": text.exact,
    "match": text.match,
    "letter": text.letter,
    "number": text.number,
    "token_f1": text.token_f1,
    "contains": text.contains,
    "regex": text.matches,
}


def make_reward(name: str) -> Reward:
    """Make the reward of a name, or of the import path of one of the user's own.

    That is a :class:`Reward` without arguments, or a function of a response and a gold text.

    Raises:
        UserError: Neither is known.
    """
    if name in TEXT_REWARDS:
        return TextReward(name, TEXT_REWARDS[name])
    unknown = (
        f"data.task_args.reward is {name!r}; choose one of {choices(TEXT_REWARDS)}, or give the import path of a "
        "Reward of your own, or of a function of a response and a gold text."
    )
    found = imported(name, unknown)
    if isinstance(found, type) and issubclass(found, Reward):
        reward = found()
        reward.name = reward.name or name
        return reward
    if callable(found) and not isinstance(found, type):
        return TextReward(name, found)
    raise UserError(unknown)
