"""The rules that choose among candidates, by how each did alone in validation, and by how they do together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from corrsteer_pl.selection.feature import Feature
from corrsteer_pl.stats import changes, sign_test

# Gives the rewards (sets, n) of sets of features that steer together, on the same samples as each alone.
Measure = Callable[[Sequence[Sequence[Feature]]], Tensor]


@dataclass(frozen=True)
class Bar:
    """What counts as an improvement in validation.

    Args:
        min_improvement: The mean reward has to rise by more than this.
        significance_level: Largest p-value of a one-sided exact sign test that more samples get better than worse; None
            asks for no test.
    """

    min_improvement: float = 0.0
    significance_level: float | None = None

    def cleared(self, gain: float, better: int, worse: int) -> bool:
        """Whether a rise of the mean reward counts, given how many samples got better and worse."""
        level = self.significance_level
        return gain > self.min_improvement and (level is None or sign_test(worse, better, "greater") <= level)

    def cleared_by(self, feature: Feature, baseline: float) -> bool:
        """Whether a tested candidate counts as better than the unsteered model."""
        gain = (feature.validation_reward or 0.0) - baseline
        return self.cleared(gain, feature.validation_better or 0, feature.validation_worse or 0)


@dataclass(frozen=True)
class Choice:
    """What a rule chose.

    Attributes:
        features: The chosen features.
        joint_reward: Mean validation reward in [0, 1] of all of them together; None if that was not tried.
        steps: For the rule ``greedy``, the same after each was added.
    """

    features: tuple[Feature, ...]
    joint_reward: float | None
    steps: tuple[float, ...] = ()


def measured(candidates: Sequence[Feature], rewards: Tensor) -> tuple[Feature, ...]:
    """The candidates with what they did alone in validation.

    Shape:
        - rewards: ``(1 + candidates, n)``, the unsteered model's first.
    """
    means, found = rewards.mean(1).tolist(), []
    for f, mean, after in zip(candidates, means[1:], rewards[1:], strict=True):
        better, worse = changes(rewards[0], after)
        difference = after - rewards[0]
        error = difference.std().item() / len(difference) ** 0.5 if len(difference) > 1 else None
        f = replace(f, validation_reward=mean, validation_error=error)
        found.append(replace(f, validation_better=better, validation_worse=worse))
    return tuple(found)


def choose(rule: str, candidates: Sequence[Feature], rewards: Tensor, bar: Bar, measure: Measure) -> Choice:
    """Apply a rule, and measure what it chooses as a whole.

    Args:
        rule: One of :data:`RULES`.
        candidates: Tested ones; untested ones for ``all``.
        rewards: The unsteered model's on each validation sample, and each tested candidate's, ``(1 + candidates, n)``.
        bar: What counts as an improvement.
        measure: Tries sets of features on the same samples.
    """
    baseline = rewards[0].mean().item()
    if rule == "greedy":
        features, steps = _grown(candidates, rewards, bar, measure)
        return Choice(features, steps[-1] if steps else baseline, steps)
    features = select(rule, candidates, baseline, bar)
    if not features:
        return Choice(features, baseline)
    alone = features[0].validation_reward if len(features) == 1 else None
    return Choice(features, measure([features]).mean().item() if alone is None else alone)


def _grown(
    candidates: Sequence[Feature], rewards: Tensor, bar: Bar, measure: Measure
) -> tuple[tuple[Feature, ...], tuple[float, ...]]:
    """Forward selection: add what helps most beside what has been added, as long as the joint reward improves."""
    order = sorted(range(len(candidates)), key=lambda i: _preference(candidates[i]))
    left, together = [candidates[i] for i in order], rewards[1:][order]
    chosen: list[Feature] = []
    steps: list[float] = []
    best = rewards[0]
    while left:
        # The first of equal ones, which is the preferred one.
        place = int(together.mean(1).argmax())
        mean = together[place].mean().item()
        if not bar.cleared(mean - best.mean().item(), *changes(best, together[place])):
            break
        chosen.append(left.pop(place))
        steps.append(mean)
        best = together[place]
        if left:
            together = measure([[*chosen, f] for f in left])
    return tuple(chosen), tuple(steps)


def select(
    rule: str, candidates: Sequence[Feature], baseline: float | None, bar: Bar | None = None
) -> tuple[Feature, ...]:
    """Apply a rule that looks at each candidate alone.

    Args:
        rule: ``global`` (CorrSteer-S): the one with the highest validation reward. ``foreach`` (CorrSteer-P):
            the better one of each layer, if strictly above the baseline. ``all`` (CorrSteer-A): the top
            positive one of every layer, untested. ``layer``: the better one of the one layer that was named.
        candidates: Features with their validation rewards.
        baseline: Unsteered validation reward.
        bar: What counts as above the baseline; any improvement if left out.

    Candidates of equal validation reward are told apart by the larger correlation, then the lower layer, then the lower
    index. The method's public reference takes the positive one of a layer instead, and leaves out layer 0.

    Source:
        CorrSteer, arXiv 2508.12535, section 3; seonglae/CorrSteer.
    """
    return tuple(_ALONE[rule](candidates, baseline if baseline is not None else 0.0, bar or Bar()))


def _preference(feature: Feature) -> tuple[float, float, int, int]:
    # Ties: larger |r|, then lower layer, then lower index.
    reward = feature.validation_reward if feature.validation_reward is not None else 0.0
    return (-reward, -abs(feature.correlation or 0.0), feature.layer, feature.index)


def _best_of_all(candidates: Sequence[Feature], *_: object) -> list[Feature]:
    return sorted(candidates, key=_preference)[:1]


def _best_per_layer_above_baseline(candidates: Sequence[Feature], baseline: float, bar: Bar) -> list[Feature]:
    return [f for f in _best_per_layer(candidates) if bar.cleared_by(f, baseline)]


def _top_positive_per_layer(candidates: Sequence[Feature], *_: object) -> list[Feature]:
    # A layer's candidates are in the order of their scores. Vectors from elsewhere may be at several sites of a layer.
    top: dict[str, Feature] = {}
    for f in candidates:
        if f.sign == "positive":
            top.setdefault(f.site, f)
    return list(top.values())


def _best_per_layer(candidates: Sequence[Feature], *_: object) -> list[Feature]:
    layers = sorted({f.layer for f in candidates})
    return [min((f for f in candidates if f.layer == layer), key=_preference) for layer in layers]


_ALONE: dict[str, Callable[[Sequence[Feature], float, Bar], list[Feature]]] = {
    "global": _best_of_all,
    "foreach": _best_per_layer_above_baseline,
    "all": _top_positive_per_layer,
    "layer": _best_per_layer,
}
RULES = (*_ALONE, "greedy")
