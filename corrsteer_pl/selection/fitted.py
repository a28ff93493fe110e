"""Another rule for the candidates of a fit, without a fit."""

from collections.abc import Sequence
from dataclasses import replace

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.selection.feature import Feature
from corrsteer_pl.selection.record import Selection
from corrsteer_pl.selection.rules import Bar, select


def reselect(
    fitted: Selection, rule: str, sign: str, layers: Sequence[int] | None, bar: Bar | None = None
) -> Selection:
    """Apply a rule to those candidates of a fit that have a sign and are in some layers.

    Raises:
        UserError: The fit has no such candidates, or has not tested them as the rule needs.
    """
    _require_read(fitted, layers or ())
    candidates = [f for f in fitted.candidates if is_asked_for(f, sign, layers)]
    bar = bar or Bar()
    _require_usable(fitted, candidates, rule, sign, bar)
    if rule == "greedy":
        return _grown_in_fit(fitted, candidates)
    features = select(rule, candidates, fitted.baseline_reward, bar)
    if set(features) == set(fitted.features):
        return replace(fitted, rule=rule, features=features)
    return replace(fitted, rule=rule, features=features, joint_reward=None, steps=(), strengths=())


def is_asked_for(feature: Feature, sign: str, layers: Sequence[int] | None) -> bool:
    """Whether a feature has a sign, ``both`` for any, and is in some layers, None for any."""
    return sign in ("both", feature.sign) and (layers is None or feature.layer in layers)


def _require_read(fitted: Selection, layers: Sequence[int]) -> None:
    # A layer that was read may have no candidate.
    read = (fitted.saes or {}).get("fingerprints")
    known = {f.layer for f in fitted.candidates}
    known |= {int(layer) for layer in read if str(layer).isdecimal()} if isinstance(read, dict) else set()
    if missing := sorted(set(layers) - known) if fitted.candidates else []:
        raise UserError(
            f"layer {missing[0]} was not read by the fit, which has {choices(sorted(known))}. Set model.layers to some "
            "of these, or fit again."
        )


def _require_usable(fitted: Selection, candidates: Sequence[Feature], rule: str, sign: str, bar: Bar) -> None:
    """Refuse a rule that the fit's candidates, or those that are left of them, do not allow."""
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
    if bar.significance_level is not None and any(f.validation_better is None for f in candidates):
        raise UserError(
            "model.significance_level is set, but the checkpoint does not say how many answers each candidate changed. "
            "Leave it out, or fit again."
        )


def _grown_in_fit(fitted: Selection, candidates: Sequence[Feature]) -> Selection:
    if fitted.rule != "greedy" or len(candidates) < len(fitted.candidates):
        other = f"with rule {fitted.rule}" if fitted.rule != "greedy" else "with more layers or signs"
        raise UserError(
            f"model.rule is greedy, which tries candidates together while it validates, but the checkpoint was fitted "
            f"{other}. Fit again with that rule."
        )
    return fitted
