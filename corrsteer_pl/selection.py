"""From scores to the features that steer: candidates, and the rules that choose among the tested ones."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.stats.moments import Moments
from corrsteer_pl.stats.scores import mean_right, mean_wrong

SIGNS = ("both", "positive", "negative")


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
    llm: dict[str, Any] = field(default_factory=dict)
    saes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, as stored in ``selection.json`` and in checkpoints."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Selection":
        """Inverse of :meth:`as_dict`."""
        lists = {name: tuple(Feature(**f) for f in plain[name]) for name in ("features", "candidates", "ranking")}
        return cls(**{**plain, **lists})


def rank(scores: Tensor, k: int) -> tuple[list[int], list[int]]:
    """The ``k`` features of the largest positive and of the most negative scores, ties by lower index.

    Example:
        >>> rank(torch.tensor([0.1, -0.4, 0.3, 0.3, 0.0]), k=2)
        ([2, 3], [1])
    """

    def best(values: Tensor) -> list[int]:
        order = torch.sort(values, descending=True, stable=True).indices[:k]
        return [i for i in order.tolist() if values[i] > 0]

    return best(scores), best(-scores)


def describe(moments: Moments, scores: Tensor, coefficients: Tensor, layer: int, site: str, index: int) -> Feature:
    """Everything the sums say about one feature. A negative feature gets the coefficient ``-|c|``."""
    correlation, coefficient = scores[index].item(), coefficients[index].item()
    n_wrong = (moments.n - moments.n_right).clamp(min=1)
    return Feature(
        layer=layer,
        site=site,
        index=index,
        sign="positive" if correlation > 0 else "negative",
        coefficient=coefficient if correlation > 0 else -abs(coefficient),
        correlation=correlation,
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

    Source:
        CorrSteer, arXiv 2508.12535, section 3.
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
