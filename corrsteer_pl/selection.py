"""From scores to the features that steer: candidates, and the rules that choose among the tested ones."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.options import check_options
from corrsteer_pl.stats.moments import Moments
from corrsteer_pl.stats.scores import mean_right, mean_wrong

SIGNS = ("both", "positive", "negative")
# Fields of a selection that hold features.
LISTS = ("features", "candidates", "ranking")


@dataclass(frozen=True)
class Feature:
    """One SAE feature, what the fit saw of it, and how it did on its own in validation.

    Attributes:
        layer: Block index.
        site: Hook name, for example ``blocks.3.hook_resid_post``.
        index: Feature index in the layer's SAE.
        sign: ``positive`` or ``negative``: the sign of the correlation.
        coefficient: What its decoder direction is multiplied with, before ``scale``.
        correlation: Pearson correlation with the reward, in [-1, 1].
        score: What it was ranked by, which is its correlation unless another score was chosen.
        active_right: Share of right samples on which it was active, in [0, 1].
        active_wrong: The same for wrong samples.
        mean_right: Mean pooled activation on right samples.
        mean_wrong: The same on wrong samples.
        validation_reward: Mean reward in [0, 1] when it alone steers the validation split; None if untested.
        neuronpedia: Address of its page on Neuronpedia; None if its SAE names none.
    """

    layer: int
    site: str
    index: int
    sign: str
    coefficient: float
    correlation: float
    score: float
    active_right: float
    active_wrong: float
    mean_right: float
    mean_wrong: float
    validation_reward: float | None = None
    neuronpedia: str | None = None

    def __str__(self) -> str:
        return f"{self.site}/{self.index} (r {self.correlation:+.3f}, coefficient {self.coefficient:+.3f})"


@dataclass(frozen=True)
class Selection:
    """The features that steer, and where they come from: the one thing that travels between stages.

    Attributes:
        rule: The rule that chose them.
        features: The chosen features; none is a result: nothing improved on the baseline.
        candidates: All tested features, two per layer at most.
        ranking: Per layer and sign the ``topk`` features by correlation, for analysis.
        baseline_reward: Mean unsteered validation reward in [0, 1].
        samples: Number of samples behind the correlations.
        reward: Mean reward of those samples.
        null_max_correlation: About the largest |r| per layer that chance alone gives.
        score: Name of the score that ranked the features.
        left_out: By layer, how many samples its correlations lack, because an activation was not finite.
        llm: Name and fingerprint of the model.
        saes: Name and fingerprints of the autoencoders.
    """

    rule: str
    features: tuple[Feature, ...]
    candidates: tuple[Feature, ...]
    ranking: tuple[Feature, ...]
    baseline_reward: float | None
    samples: int
    reward: float
    null_max_correlation: float
    score: str = "pearson"
    left_out: dict[str, int] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)
    saes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, as stored in ``selection.json`` and in checkpoints."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Selection":
        """Inverse of :meth:`as_dict`.

        Raises:
            UserError: A field is missing, of another type, or holds what cannot be.
        """
        try:
            check_options(cls, {k: v for k, v in plain.items() if k not in LISTS}, "selection")
            lists = {name: tuple(_read_feature(f) for f in plain[name]) for name in LISTS}
            found = cls(**{**plain, **lists})
            if found.rule not in RULES or not _finite(found) or found.samples < 0:
                raise ValueError("the rule is not known, or a number is not finite")
        except (UserError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"the checkpoint is damaged: its selection cannot be read ({error}). Fit again to make a new one."
            ) from error
        return found


def _read_feature(plain: dict[str, Any]) -> Feature:
    check_options(Feature, plain, "feature")
    feature = Feature(**plain)
    if feature.index < 0 or feature.layer < 0 or feature.sign not in SIGNS[1:] or not _finite(feature):
        raise ValueError(f"feature {feature.layer}/{feature.index} has a value that cannot be")
    return feature


def _finite(record: Any) -> bool:
    return all(math.isfinite(value) for value in vars(record).values() if isinstance(value, float))


def rank(scores: Tensor, correlations: Tensor, k: int) -> tuple[list[int], list[int]]:
    """The ``k`` features of the largest scores among those that correlate positively, and among the others.

    Ties go to the lower index. A feature that does not correlate, or has no score, is in neither list.

    Shape:
        - scores, correlations: ``(n_features,)``. The size of a score counts, not its sign.

    Example:
        >>> r = torch.tensor([0.1, -0.4, 0.3, 0.3, 0.0])
        >>> rank(r, r, k=2)
        ([2, 3], [1])
        >>> rank(torch.tensor([9., 1., 2., 0., 5.]), r, k=2)
        ([0, 2], [1])
    """

    def best(wanted: Tensor) -> list[int]:
        sizes = torch.where(wanted, scores.abs(), 0)
        order = torch.sort(sizes, descending=True, stable=True).indices[:k]
        return [i for i in order.tolist() if sizes[i] > 0]

    return best(correlations > 0), best(correlations < 0)


def describe(
    moments: Moments, correlations: Tensor, scores: Tensor, coefficients: Tensor, layer: int, site: str, index: int
) -> Feature:
    """Everything the sums say about one feature. A negative feature gets the coefficient ``-|c|``."""
    correlation, coefficient = correlations[index].item(), coefficients[index].item()
    n_wrong = (moments.n - moments.n_right).clamp(min=1)
    return Feature(
        layer=layer,
        site=site,
        index=index,
        sign="positive" if correlation > 0 else "negative",
        coefficient=coefficient if correlation > 0 else -abs(coefficient),
        correlation=correlation,
        score=scores[index].item(),
        active_right=(moments.active_right[index] / moments.n_right.clamp(min=1)).item(),
        active_wrong=(moments.active_wrong[index] / n_wrong).item(),
        mean_right=mean_right(moments)[index].item(),
        mean_wrong=mean_wrong(moments)[index].item(),
    )


def tested(candidates: Sequence[Feature], rewards: Iterable[float]) -> tuple[Feature, ...]:
    """The candidates with their validation rewards filled in."""
    return tuple(replace(f, validation_reward=r) for f, r in zip(candidates, rewards, strict=True))


def _preference(feature: Feature) -> tuple[float, float, int, int]:
    # Ties: larger |r|, then lower layer, then lower index.
    reward = feature.validation_reward if feature.validation_reward is not None else 0.0
    return (-reward, -abs(feature.correlation), feature.layer, feature.index)


def _best_of_all(candidates: Sequence[Feature], _baseline: float) -> list[Feature]:
    return sorted(candidates, key=_preference)[:1]


def _best_per_layer_above_baseline(candidates: Sequence[Feature], baseline: float) -> list[Feature]:
    return [f for f in _best_per_layer(candidates, baseline) if (f.validation_reward or 0.0) > baseline]


def _top_positive_per_layer(candidates: Sequence[Feature], _baseline: float) -> list[Feature]:
    return [f for f in candidates if f.sign == "positive"]


def _best_per_layer(candidates: Sequence[Feature], _baseline: float) -> list[Feature]:
    layers = sorted({f.layer for f in candidates})
    return [min((f for f in candidates if f.layer == layer), key=_preference) for layer in layers]


RULES: dict[str, Callable[[Sequence[Feature], float], list[Feature]]] = {
    "global": _best_of_all,
    "foreach": _best_per_layer_above_baseline,
    "all": _top_positive_per_layer,
    "layer": _best_per_layer,
}


def select(rule: str, candidates: Sequence[Feature], baseline: float | None) -> tuple[Feature, ...]:
    """Apply a rule to tested candidates.

    Args:
        rule: ``global`` (CorrSteer-S): the one with the highest validation reward. ``foreach`` (CorrSteer-P):
            the better one of each layer, if strictly above the baseline. ``all`` (CorrSteer-A): the top
            positive one of every layer, untested. ``layer``: the better one of the one layer that was named.
        candidates: Features with their validation rewards.
        baseline: Unsteered validation reward.

    Candidates of equal validation reward are told apart by the larger correlation, then the lower layer, then the lower
    index. The method's public reference takes the positive one of a layer instead, and leaves out layer 0.

    Source:
        CorrSteer, arXiv 2508.12535, section 3; seonglae/CorrSteer.
    """
    return tuple(RULES[rule](candidates, baseline if baseline is not None else 0.0))


def reselect(fitted: Selection, rule: str, sign: str, layers: Sequence[int] | None) -> Selection:
    """Apply a rule to those candidates of a fit that have a sign and are in some layers.

    Raises:
        UserError: The fit has no such candidates, or has not tested them, which the rule needs.
    """
    known = sorted({f.layer for f in fitted.candidates})
    if missing := sorted(set(layers or ()) - set(known)) if known else []:
        raise UserError(f"layer {missing[0]} has no candidate in the checkpoint (layers {choices(known)}).")
    candidates = [
        f for f in fitted.candidates if sign in ("both", f.sign) and (layers is None or f.layer in layers)
    ]  # fmt: skip
    if fitted.candidates and not candidates:
        signs = choices(sorted({f.sign for f in fitted.candidates}))
        raise UserError(
            f"model.sign is {sign}, but the candidates of the fit are {signs} in the layers asked for. Set model.sign "
            "to what the fit has, or fit again."
        )
    if rule == "all" and candidates and not any(f.sign == "positive" for f in candidates):
        raise UserError("model.rule is all, which takes positive candidates, but the fit has none. Fit again.")
    if rule != "all" and any(f.validation_reward is None for f in candidates):
        raise UserError(
            f"model.rule is {rule}, which needs tested candidates, but the checkpoint was fitted with rule all, which "
            "tests none. Fit again with that rule."
        )
    return replace(fitted, rule=rule, features=select(rule, candidates, fitted.baseline_reward))
