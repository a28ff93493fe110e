"""Rewards: how right a generated text is, in [0, 1]. Plain strings in, plain numbers out."""

from corrsteer_pl.rewards.base import Reward, TextReward, reward
from corrsteer_pl.rewards.registry import TEXT_REWARDS, make_reward

__all__ = ["TEXT_REWARDS", "Reward", "TextReward", "make_reward", "reward"]
