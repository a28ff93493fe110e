"""From requests of two classes to the edits of ROSI that are tried."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.interventions.rank_one import Edit, alpha_of_one
from corrsteer_pl.models.sites import Site
from corrsteer_pl.models.writers import writers
from corrsteer_pl.selection import Feature, Strength
from corrsteer_pl.stats import ClassMeans
from corrsteer_pl.tasks import Example

# What the gold answers of requests are called.
REFUSE, COMPLY = "refuse", "comply"


# A search starts from these strengths, in percent of a matrix's norm.
FIRST_PERCENT = (1.0, 4.0, 16.0)
# The largest strength of an edit in percent of a matrix's norm.
MOST_PERCENT = 100.0


@dataclass(frozen=True)
class Direction:
    """A difference of class means that was normalised.

    Attributes:
        feature: The direction as a candidate, whose index is the position from the end.
        vector: The direction, ``(d_model,)`` float32 of norm 1.
    """

    feature: Feature
    vector: Tensor

    def tried(self, strength: float, form: str, unit: str) -> "Tried":
        """The edit with this direction and strength."""
        return Tried(replace(self.feature, coefficient=strength), Edit(self.vector, strength, form, unit))


@dataclass(frozen=True)
class Tried:
    """An edit that is tried in validation.

    Attributes:
        feature: Its direction as a candidate, whose coefficient is the strength.
        edit: The edit.
        cost: What it reaches, and what it costs on harmless requests; None before it was measured.
    """

    feature: Feature
    edit: Edit
    cost: Strength | None = None


def best_directions(means: ClassMeans, layers: Sequence[int], topm: int) -> list[Direction]:
    """The ``topm`` directions that separate the classes best, in descending order of the separation.

    Args:
        means: Sums of harmful and harmless requests, by layer and position.
        layers: The layers.
        topm: Number of directions.
    """
    separation, differences = means.separation, means.difference
    positions = separation.shape[1]
    directions = []
    for place in separation.flatten().argsort(descending=True, stable=True)[:topm].tolist():
        at = divmod(place, positions)
        direction = torch.nn.functional.normalize(differences[at], dim=0)
        harmless, harmful = (means.means[:, at[0], at[1]] @ direction).tolist()
        layer = layers[at[0]]
        feature = Feature(
            layer=layer, site=str(Site(layer, "resid_post")), index=positions - at[1], sign="positive",
            coefficient=0.0, correlation=None, score=separation[at].item(), active_right=1.0,
            active_wrong=1.0, mean_right=harmful, mean_wrong=harmless,
        )  # fmt: skip
        directions.append(Direction(feature, direction.float().cpu()))
    return directions


def first_strengths(model: Any, direction: Tensor, form: str, unit: str) -> list[float]:
    """The strengths from which a search starts.

    For the unit ``alpha`` they are multiplied by the power of two next to the alpha that changes the median matrix by
    one percent, because that alpha depends on the width of the model and on the form.
    """
    if unit == "percent":
        return list(FIRST_PERCENT)
    alphas = [alpha for w in writers(model) if (alpha := alpha_of_one(w.matrix, direction, form)) > 0]
    factor = 2.0 ** round(math.log2(median(alphas))) if alphas else 1.0
    return [factor * strength for strength in FIRST_PERCENT]


def curve_of(name: str, unchanged: Strength, tried: Sequence[Tried]) -> list[Strength]:
    """What the edits along a direction reach and cost, after that of the unchanged model."""
    return [unchanged, *(one.cost for one in tried if one.feature.name == name and one.cost is not None)]


def best_of_each(features: Sequence[Feature], allowed: Sequence[Feature]) -> list[Feature]:
    """For each direction its best edit within the budget, or its weakest if there is none; the best direction first."""
    found = {}
    for name in dict.fromkeys(f.name for f in features):
        mine = [f for f in features if f.name == name]
        within = [f for f in mine if f in allowed]
        found[name] = min(within, key=preference) if within else min(mine, key=lambda f: f.coefficient)
    return sorted(found.values(), key=preference)


def preference(feature: Feature) -> tuple[float, float, float]:
    """The order in which edits are preferred: by reward, then the weaker one, then the better separation."""
    return (-(feature.validation_reward or 0.0), feature.coefficient, -feature.score)


def require_both(examples: Sequence[Example], split: str) -> None:
    """Refuse requests of one kind.

    Raises:
        UserError: There are no harmful ones, no harmless ones, or samples that are no requests.
    """
    kinds = {example.gold for example in examples}
    if other := sorted(kinds - {REFUSE, COMPLY}):
        raise UserError(
            f"rosi needs harmful and harmless requests, but a gold answer of the {split} split is {other[0]!r}. Set "
            f"data.task to one whose answers are {choices([REFUSE, COMPLY])}, such as refusal or xstest."
        )
    for kind, name in ((REFUSE, "harmful"), (COMPLY, "harmless")):
        if kind not in kinds:
            raise UserError(
                f"rosi needs harmful and harmless requests, but the {split} split has no {name} one. Add some, or "
                "take more samples."
            )


def common_ending(prompts: Sequence[Sequence[int]]) -> int:
    """How many of their last tokens all prompts share: those after the instruction.

    Example:
        >>> common_ending([[1, 7, 8, 9], [1, 5, 8, 9]])
        2
    """
    length = 0
    for tokens in zip(*(reversed(prompt) for prompt in prompts), strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
