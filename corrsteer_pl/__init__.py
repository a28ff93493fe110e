"""Steer language models with the SAE features that correlate with their own success.

What is where:
    methods: the LightningModules, such as :class:`CorrSteer`.
    data, tasks, rewards: what a model is asked, and how right its answer is.
    models, interventions: language models, SAEs, decoding; vectors added to the residual stream.
    stats, selection: running sums, scores, and the rules that choose features.
    evaluation: paired comparison and reports.
"""

from corrsteer_pl.data import TaskDataModule
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.selection import Feature, Selection
from corrsteer_pl.tasks import Example, Task
from corrsteer_pl.version import __version__

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
