"""Steer language models with the SAE features that correlate with their own success.

What is where:
    methods: the LightningModules, such as :class:`CorrSteer`.
    data, tasks, rewards: what a model is asked, and how right its answer is.
    models, interventions: language models, SAEs, decoding; vectors added to the residual stream.
    stats, selection: running sums, scores, and the rules that choose features.
    evaluation: paired comparison and reports.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from corrsteer_pl.version import __version__

if TYPE_CHECKING:
    from corrsteer_pl.data import TaskDataModule
    from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
    from corrsteer_pl.methods.corrsteer import CorrSteer
    from corrsteer_pl.selection import Feature, Selection
    from corrsteer_pl.tasks import Example, Task

# Where each public name is. They are imported when they are asked for, so that `--help` need not import torch.
_PLACES = {
    "CorrSteer": "methods.corrsteer",
    "Example": "tasks",
    "Feature": "selection",
    "Schedule": "interventions.steering",
    "Selection": "selection",
    "SteeringVectors": "interventions.steering",
    "Task": "tasks",
    "TaskDataModule": "data",
}

__all__ = [
    "CorrSteer",
    "Example",
    "Feature",
    "Schedule",
    "Selection",
    "SteeringVectors",
    "Task",
    "TaskDataModule",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
