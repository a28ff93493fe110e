"""How strongly a selection steers: the best of the strengths that were measured, and which to measure next."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# A search stops when the neighbours of the best strength are closer than this share of the larger one.
RESOLUTION = 1 / 8
# The same where the reward is 1 already.
COARSE = 1 / 2
# Upper bound on the rounds of a search: about five to find the edges, and three to bisect a factor of two.
ROUNDS = 8


@dataclass(frozen=True)
class Strength:
    """What a selection does at one strength, in validation.

    Attributes:
        scale: Factor on all coefficients.
        reward: Mean reward in [0, 1] of the task.
        kl: Mean KL divergence of the first new token from the unsteered model's, in nats; None if not asked for.
        loss: Fall of the mean reward of the budget's task; None if not asked for.
    """

    scale: float
    reward: float
    kl: float | None = None
    loss: float | None = None


# Whether a strength is within the budget.
Allows = Callable[[Strength], bool]


def best_strength(strengths: Sequence[Strength], allows: Allows) -> Strength:
    """The strength of the best reward that is allowed, and of equal ones the weakest; 0 is always allowed.

    Example:
        >>> curve = [Strength(0, 0.5, kl=0.0), Strength(1, 0.7, kl=0.05), Strength(2, 0.9, kl=0.4)]
        >>> best_strength(curve, lambda strength: strength.kl <= 0.1).scale
        1
    """
    allowed = [strength for strength in strengths if strength.scale == 0 or allows(strength)]
    return min(allowed, key=lambda strength: (-strength.reward, abs(strength.scale)))


def search_strengths(
    curves: Mapping[str, Sequence[Strength]],
    measure: Callable[[list[tuple[str, float]]], Sequence[Strength]],
    allows: Allows,
    most: float = math.inf,
) -> dict[str, list[Strength]]:
    """Extend and refine measured curves until each has its best strength between close neighbours.

    A curve whose best strength is at an edge of what was measured is extended by doubling or halving, see
    :func:`beyond_edge`. After that the gaps on both sides of the best strength are bisected. All curves advance
    together, so that one call measures them side by side. The result depends on the measurements alone.

    Args:
        curves: By name, what was measured so far, strength 0 included.
        measure: Measures pairs of name and strength, in their order. Every process must make the same calls.
        allows: Whether a strength is within the budget.
        most: The largest strength that may be tried.

    Returns:
        The curves in ascending order of the strength's absolute value.

    Example:
        >>> def measure(pairs):
        ...     return [Strength(scale, 1 - abs(scale - 24) / 32) for _, scale in pairs]
        >>> start = [Strength(0, 0.25), *measure([("", 4.0), ("", 8.0)])]
        >>> curve = search_strengths({"": start}, measure, lambda strength: True)[""]
        >>> best_strength(curve, lambda strength: True).scale
        24.0
    """
    found = {name: list(curve) for name, curve in curves.items()}
    for _ in range(ROUNDS):
        pairs = [(name, scale) for name, curve in found.items() for scale in _next_scales(curve, allows, most)]
        if not pairs:
            break
        for (name, _), strength in zip(pairs, measure(pairs), strict=True):
            found[name].append(strength)
    return {name: sorted(curve, key=lambda strength: abs(strength.scale)) for name, curve in found.items()}


def beyond_edge(curve: Sequence[Strength], allows: Allows, most: float = math.inf) -> float | None:
    """The strength to try beyond what was measured; None if the best one is not at an edge.

    Twice the strongest, if that is the best and within the budget, or if no strength has any effect on the reward yet.
    Half the weakest, if that is the best, over the budget, or worse than strength 0. A reward of 1 is not extended
    upwards, because no reward is larger.

    Args:
        curve: What was measured, strength 0 included.
        allows: Whether a strength is within the budget.
        most: The largest strength that may be tried.
    """
    best, points = best_strength(curve, allows), _branch(curve, allows)
    if not points:
        return None
    weakest, strongest = points[0], points[-1]
    flat = best.scale == 0 and strongest.reward == best.reward
    rising = best == strongest or flat
    if rising and allows(strongest) and best.reward < 1 and abs(strongest.scale) < most:
        return math.copysign(min(2 * abs(strongest.scale), most), strongest.scale)
    too_strong = best.scale == 0 and (not allows(weakest) or weakest.reward < best.reward)
    return weakest.scale / 2 if best == weakest or too_strong else None


def _branch(curve: Sequence[Strength], allows: Allows) -> list[Strength]:
    """The strengths of one sign, that of the best one other than 0, in ascending order of the absolute value."""
    points = [strength for strength in curve if strength.scale != 0]
    # Those within the budget first, then as in best_strength.
    best = min(points, key=lambda s: (not allows(s), -s.reward, abs(s.scale)), default=None)
    same = [strength for strength in points if best and strength.scale * best.scale > 0]
    return sorted(same, key=lambda strength: abs(strength.scale))


def _next_scales(curve: Sequence[Strength], allows: Allows, most: float) -> list[float]:
    beyond = beyond_edge(curve, allows, most)
    return _midpoints(curve, allows) if beyond is None else [beyond]


def _midpoints(curve: Sequence[Strength], allows: Allows) -> list[float]:
    """Midpoints of the gaps on both sides of the best strength, and above the strongest one with the same reward."""
    best = best_strength(curve, allows)
    zero = next(strength for strength in curve if strength.scale == 0)
    points = [zero, *_branch(curve, allows)]
    equal = [i for i, p in enumerate(points) if p.reward == best.reward and (p.scale == 0 or allows(p))]
    # Two equal rewards may have a better one between them. From 0 on, a strength without an effect is no bound.
    lower_ends = {equal[0] - 1} if equal[0] > 0 else set()
    if best.reward < 1:
        lower_ends |= {equal[-1], equal[0]} if equal[0] > 0 else {equal[-1]}
    ends = [(points[i].scale, points[i + 1].scale) for i in sorted(lower_ends) if i + 1 < len(points)]
    # Only a weaker strength can be better than one of reward 1. A fine search would end where the reward begins to
    # fall on these samples, and on others it may fall earlier.
    resolution = RESOLUTION if best.reward < 1 else COARSE
    return [(low + high) / 2 for low, high in ends if abs(high - low) > resolution * abs(high)]
