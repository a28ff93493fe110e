"""From scores to the features that steer: candidates, and the rules that choose among them."""

from corrsteer_pl.selection.feature import SIGNS, Feature, describe, rank
from corrsteer_pl.selection.fitted import is_asked_for, reselect
from corrsteer_pl.selection.record import Selection
from corrsteer_pl.selection.rules import RULES, Bar, Choice, choose, measured, select
from corrsteer_pl.selection.strength import Strength, best_strength, beyond_edge, search_strengths

__all__ = [
    "RULES",
    "SIGNS",
    "Bar",
    "Choice",
    "Feature",
    "Selection",
    "Strength",
    "best_strength",
    "beyond_edge",
    "choose",
    "describe",
    "is_asked_for",
    "measured",
    "rank",
    "reselect",
    "search_strengths",
    "select",
]
