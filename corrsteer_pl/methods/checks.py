"""What the options of CorrSteer may be."""

import math
from collections.abc import Mapping
from typing import Any

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.models.alignment import CHECKS
from corrsteer_pl.models.pooling import POOLS
from corrsteer_pl.models.sae import SITES
from corrsteer_pl.selection import RULES, SIGNS
from corrsteer_pl.stats import COEFFICIENTS, SCORES

# Permutations of the rewards.
FEWEST, MOST = 19, 1000
CONTROLS = ("none", "shuffled_rewards", "random_features")


def leaves_scale_open(scale: Any) -> bool:
    """Whether validation chooses the scale: of a list, or by a search."""
    return scale == "auto" or isinstance(scale, list)


def check_values(h: Mapping[str, Any]) -> None:
    """Refuse values of options that are out of range, or do not go together; their types are checked already.

    Args:
        h: Options of :class:`~corrsteer_pl.CorrSteer` by name.

    Raises:
        UserError: Naming the first.
    """
    allowed: dict[str, Any] = {"sign": SIGNS, "pool": POOLS, "coefficient": COEFFICIENTS}
    allowed |= {"check_alignment": CHECKS, "score": SCORES, "control": CONTROLS}
    if h["coefficient_pool"] is not None:
        allowed["coefficient_pool"] = POOLS
    _check_names(h, allowed)
    if h["saes"] is None and not h["raw"]:
        raise UserError(
            "model.saes is not given. Name a folder, a release or a repository of SAEs, or set model.raw to true to "
            "take coordinates of the residual stream."
        )
    check_steering(h)
    if h["rule"] == "all" and h["sign"] == "negative":
        raise UserError("model.rule is all, which takes positive candidates, but model.sign is negative.")
    if h["topk"] < 1:
        raise UserError(f"model.topk is {h['topk']}; it is a number of features, at least 1.")
    if not 1 <= h["topm"] <= h["topk"]:
        raise UserError(
            f"model.topm is {h['topm']}; it is a number of features from 1 to model.topk, which is {h['topk']}."
        )
    if h["permutations"] != 0 and not FEWEST <= h["permutations"] <= MOST:
        raise UserError(
            f"model.permutations is {h['permutations']}; it is 0 for none, or a number from {FEWEST}, with which a "
            f"p-value can be 0.05, to {MOST}."
        )


def check_steering(h: Mapping[str, Any]) -> None:
    """Refuse values of the options that all methods have which steer.

    Args:
        h: Options of a :class:`~corrsteer_pl.methods.steering.Steering` by name.

    Raises:
        UserError: Naming the first.
    """
    _check_names(h, {"rule": RULES, "site": SITES})
    if h["layers"] == []:
        raise UserError("model.layers is empty. Name layers, or leave it out for all that there are.")
    if h["rule"] == "layer" and (h["layers"] is None or len(h["layers"]) != 1):
        raise UserError(f"model.rule is layer, but model.layers is {h['layers']}. Name one layer, such as [4].")
    if not 0 <= h["min_improvement"] < 1:
        raise UserError(
            f"model.min_improvement is {h['min_improvement']}; it is a difference of rewards, from 0 to below 1."
        )
    if h["scale"] == []:
        raise UserError("model.scale is empty. Give a number, a list of them, or auto.")
    if h["budget"] is not None and not leaves_scale_open(h["scale"]):
        raise UserError(
            f"model.budget chooses among several strengths, but model.scale is {h['scale']}. Set it to auto or a list."
        )
    level = h["significance_level"]
    if level is not None and not 0 < level <= 1:
        raise UserError(
            f"model.significance_level is {level}; it is a p-value above 0 and at most 1, or null for no test."
        )


def check_adapter(h: Mapping[str, Any]) -> None:
    """Refuse values of the options that all methods have which train weights.

    Args:
        h: Options of a :class:`~corrsteer_pl.methods.adapting.Adapting` by name.

    Raises:
        UserError: Naming the first.
    """
    if h["rank"] < 1:
        raise UserError(f"model.rank is {h['rank']}; it is a rank, at least 1.")
    if not 0 <= h["dropout"] < 1:
        raise UserError(f"model.dropout is {h['dropout']}; it is a share, from 0 to below 1.")
    if h["adapter_layers"] == []:
        raise UserError("model.adapter_layers is empty. Name blocks, or leave it out for the default.")
    for name in ("lr", "alpha"):
        if h[name] is not None and not 0 < h[name] < math.inf:
            raise UserError(f"model.{name} is {h[name]}; it is a number above 0.")
    if not 0 <= h["weight_decay"] < math.inf:
        raise UserError(f"model.weight_decay is {h['weight_decay']}; it is a number from 0 on.")


def _check_names(h: Mapping[str, Any], allowed: Mapping[str, Any]) -> None:
    for name, values in allowed.items():
        if h[name] not in values:
            raise UserError(f"model.{name} is {h[name]!r}; choose one of {choices(values)}.")
