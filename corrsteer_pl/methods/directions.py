"""From requests of two classes to the edits of ROSI that are tried."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.interventions.rank_one import Edit
from corrsteer_pl.models.sites import Site
from corrsteer_pl.selection import Feature
from corrsteer_pl.stats import ClassMeans
from corrsteer_pl.tasks import Example

# What the gold answers of requests are called.
REFUSE, COMPLY = "refuse", "comply"


@dataclass(frozen=True)
class Tried:
    """An edit that was tried in validation.

    Attributes:
        feature: Its direction, as a candidate whose index is the position from the end, and whose coefficient is the
            strength.
        edit: The edit.
    """

    feature: Feature
    edit: Edit


def grid(means: ClassMeans, layers: Sequence[int], strengths: Sequence[float], topm: int, form: str) -> list[Tried]:
    """The ``topm`` directions that separate the classes best, each with every strength in ascending order.

    Args:
        means: Sums of harmful and harmless requests, by layer and position.
        layers: The layers.
        strengths: Sizes of the change in percent.
        topm: Number of directions.
        form: That of the edits.
    """
    separation, differences = means.separation, means.difference
    positions = separation.shape[1]
    found = []
    for place in separation.flatten().argsort(descending=True, stable=True)[:topm].tolist():
        at = divmod(place, positions)
        direction = torch.nn.functional.normalize(differences[at], dim=0)
        harmless, harmful = (means.means[:, at[0], at[1]] @ direction).tolist()
        layer, direction = layers[at[0]], direction.float().cpu()
        for strength in sorted(map(float, strengths)):
            feature = Feature(
                layer=layer, site=str(Site(layer, "resid_post")), index=positions - at[1], sign="positive",
                coefficient=strength, correlation=None, score=separation[at].item(), active_right=1.0,
                active_wrong=1.0, mean_right=harmful, mean_wrong=harmless,
            )  # fmt: skip
            found.append(Tried(feature, Edit(direction, strength, form)))
    return found


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
