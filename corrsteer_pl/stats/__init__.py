"""Streaming statistics: sums in constant memory, and the scores computed from them."""

from corrsteer_pl.stats.histogram import Histogram
from corrsteer_pl.stats.means import ClassMeans
from corrsteer_pl.stats.moments import Moments
from corrsteer_pl.stats.pairs import TOLERANCE, changes, sign_test
from corrsteer_pl.stats.probe import Probe
from corrsteer_pl.stats.salience import Salience
from corrsteer_pl.stats.scores import COEFFICIENTS, SCORES, null_max_correlation, pearson
from corrsteer_pl.stats.search import PARTS, SearchSums, halves, null_maxima, search_p_value
from corrsteer_pl.stats.sums import Sums

__all__ = [
    "COEFFICIENTS",
    "PARTS",
    "SCORES",
    "TOLERANCE",
    "ClassMeans",
    "Histogram",
    "Moments",
    "Probe",
    "Salience",
    "SearchSums",
    "Sums",
    "changes",
    "halves",
    "null_max_correlation",
    "null_maxima",
    "pearson",
    "search_p_value",
    "sign_test",
]
