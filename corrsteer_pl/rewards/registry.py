"""Rewards by name."""

from collections.abc import Callable
from inspect import signature

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.options import described, imported
from corrsteer_pl.rewards import numbers, text
from corrsteer_pl.rewards.base import Reward, TextReward

TEXT_REWARDS: dict[str, Callable[[str, str], float]] = {
    "exact": text.exact,
    "match": text.match,
    "letter": text.letter,
    "number": numbers.number,
    "token_f1": text.token_f1,
    "contains": text.contains,
    "regex": text.matches,
}


def make_reward(name: str) -> Reward:
    """Make the reward of a name, or of the import path of one of the user's own.

    That is a class derived from :class:`Reward`, made without arguments, or a function of a response and a gold
    text with the decorator :func:`~corrsteer_pl.rewards.reward`.

    Raises:
        UserError: Neither is known, or it cannot be made or called so.
    """
    if name in TEXT_REWARDS:
        return TextReward(name, TEXT_REWARDS[name])
    found = imported(
        name,
        f"data.task_args.reward is {name!r}; choose one of {choices(TEXT_REWARDS)}, or give the import path of a "
        "Reward of your own, or of a function of a response and a gold text.",
    )
    if isinstance(found, type) and issubclass(found, Reward):
        return _made(name, found)
    if not getattr(found, "is_reward", False) or isinstance(found, type):
        raise UserError(
            f"data.task_args.reward is {name!r}, which is not declared as a reward. Derive a class from "
            "corrsteer_pl.rewards.Reward, or put the decorator corrsteer_pl.rewards.reward before a function."
        )
    try:
        signature(found).bind("", "")
    except TypeError as error:
        raise UserError(
            f"the reward {name} cannot be called with a response and a gold text ({error}). "
            "Give it these two arguments."
        ) from error
    return TextReward(name, found)


def _made(name: str, cls: type[Reward]) -> Reward:
    try:
        made = cls()
    except (Exception, SystemExit) as error:  # The user's own code.
        raise UserError(f"the reward {name} cannot be made without arguments ({described(error)}).") from error
    made.name = made.name or name
    return made
