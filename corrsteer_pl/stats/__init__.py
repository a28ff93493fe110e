"""Streaming statistics: sums in constant memory, and the scores computed from them."""

from corrsteer_pl.stats.moments import Moments
from corrsteer_pl.stats.pairs import TOLERANCE, changes, sign_test
from corrsteer_pl.stats.probe import Probe
from corrsteer_pl.stats.scores import COEFFICIENTS, SCORES, null_max_correlation, pearson

__all__ = [
    "COEFFICIENTS",
    "SCORES",
    "TOLERANCE",
    "Moments",
    "Probe",
    "changes",
    "null_max_correlation",
    "pearson",
    "sign_test",
]
