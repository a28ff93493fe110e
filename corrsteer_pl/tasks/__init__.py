"""Tasks: rows of a data set, the prompt made of each, and the reward of a response. No tensor is known here."""

from corrsteer_pl.tasks.base import Example, Task, rewards_of, users_own
from corrsteer_pl.tasks.registry import TASKS, make_task

__all__ = ["TASKS", "Example", "Task", "make_task", "rewards_of", "users_own"]
