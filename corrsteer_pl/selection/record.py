"""The features that steer, and where they come from."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any

from corrsteer_pl.errors import UserError
from corrsteer_pl.options import check_options
from corrsteer_pl.selection.feature import SIGNS, Feature
from corrsteer_pl.selection.rules import RULES
from corrsteer_pl.selection.strength import Strength, best_strength

# Fields of a selection that hold features.
FEATURES = ("features", "candidates", "ranking")


@dataclass(frozen=True)
class Selection:
    """The features that steer, and where they come from: the one thing that travels between stages.

    Attributes:
        rule: The rule that chose them.
        features: The chosen features; none is a result: nothing improved on the baseline.
        candidates: All tested features, ``topm`` per layer and sign at most.
        ranking: Per layer and sign the ``topk`` features by correlation, for analysis.
        baseline_reward: Mean unsteered validation reward in [0, 1].
        samples: Number of samples behind the correlations.
        reward: Mean reward of those samples.
        null_max_correlation: About the largest |r| per layer that chance alone gives; None without a search.
        score: Name of the score that ranked the features.
        joint_reward: Mean validation reward in [0, 1] of all chosen features together; None if that was not tried.
        steps: For the rule ``greedy``, the joint reward after each feature was added.
        scale: Factor on all coefficients at which they were tried together.
        strengths: What they do at each strength that was tried, if validation chose one.
        control: What the fit was deprived of, to see what it finds then; ``none`` for a fit of its own.
        null_maxima: The largest |r| of all features of all layers under each permutation of the rewards.
        overlap: By layer, the mean share of the ``topk`` features by |r| that two halves of the samples have in common.
        mark: A short hash of all that a fit says here, by which its tests are recognised.
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
    null_max_correlation: float | None
    score: str = "pearson"
    joint_reward: float | None = None
    steps: tuple[float, ...] = ()
    scale: float = 1.0
    strengths: tuple[Strength, ...] = ()
    control: str = "none"
    null_maxima: tuple[float, ...] = ()
    overlap: dict[str, float] = field(default_factory=dict)
    mark: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)
    saes: dict[str, Any] = field(default_factory=dict)

    def at(self, strengths: Sequence[Strength], allows: Callable[[Strength], bool]) -> "Selection":
        """The same features at the best strength that is allowed."""
        best = best_strength(strengths, allows)
        return replace(self, scale=best.scale, joint_reward=best.reward, strengths=tuple(strengths))

    def marked(self, beside: str = "") -> "Selection":
        """The same with its mark, which tells apart what is said beside it, too."""
        said = json.dumps({**self.as_dict(), "mark": ""}, sort_keys=True)
        return replace(self, mark=sha256((said + beside).encode()).hexdigest()[:16])

    @property
    def is_like_chance(self) -> bool:
        """Whether it is known that no candidate correlates more than chance would have it."""
        return bool(self.candidates) and all(f.like_chance for f in self.candidates)

    @property
    def doubts(self) -> list[str]:
        """Sentences on what speaks against steering with all of them."""
        if self.strengths and self.scale == 0:
            return [
                "no strength of model.scale that keeps within model.budget beats the unsteered model on validation, so "
                "the chosen strength is 0, which changes nothing. Set model.scale to auto, or choose another rule."
            ]
        return [self.overshoot] if self.overshoot else []

    @property
    def overshoot(self) -> str | None:
        """A sentence, if the chosen features do worse together than the best of them alone."""
        alone = [f for f in self.features if f.validation_reward is not None]
        if self.joint_reward is None or not alone:
            return None
        best = max(alone, key=lambda f: f.validation_reward or 0.0)
        if self.joint_reward >= (best.validation_reward or 0.0):
            return None
        return (
            f"the {len(self.features)} selected features reach {100 * self.joint_reward:.1f} % on validation together, "
            f"and {best.layer}/{best.index} alone {100 * (best.validation_reward or 0.0):.1f} %. "
            "Set model.rule to greedy or global, or lower model.scale."
        )

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
            plain = {**plain, **{name: tuple(plain.get(name, ())) for name in ("steps", "null_maxima")}}
            check_options(cls, {k: v for k, v in plain.items() if k not in (*FEATURES, "strengths")}, "selection")
            lists: dict[str, Any] = {name: tuple(_read_feature(f) for f in plain[name]) for name in FEATURES}
            lists["strengths"] = tuple(_read_strength(one) for one in plain.get("strengths", ()))
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


def _read_strength(plain: dict[str, Any]) -> Strength:
    check_options(Strength, plain, "strength")
    strength = Strength(**plain)
    if not _finite(strength):
        raise ValueError("a strength has a number that is not finite")
    return strength


def _finite(record: Any) -> bool:
    return all(math.isfinite(value) for value in vars(record).values() if isinstance(value, float))
