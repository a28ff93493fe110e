"""P-values: exact where they are said to be, and shown as bounds where permutations can say no more."""

import itertools
import json
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import rankdata, wilcoxon

from corrsteer_pl.commands.report import report_on
from corrsteer_pl.evaluation.paired import paired_metrics, signed_rank_test
from corrsteer_pl.evaluation.tables import permutation_p_value, selection_table
from tests.evaluation.runs import FEATURES, selection, write_run


def enumerated(differences):
    """The two-sided p-value of the signed-rank test by all assignments of signs."""
    differences = np.asarray([d for d in differences if d != 0])
    ranks = rankdata(np.round(np.abs(differences), 9))
    observed = abs((np.sign(differences) * ranks).sum())
    signs = np.array(list(itertools.product([-1, 1], repeat=len(ranks))))
    return float((np.abs(signs @ ranks) >= observed - 1e-9).mean())


SAMPLES = {
    "ties": [0.1, 0.1, 0.1, -0.1, 0.2, 0.2, -0.3, 0.3, 0.3, 0.5, -0.5, 0.1],
    "zeros": [0.0, 0.1, 0.0, -0.1, 0.2, 0.2, 0.0, 0.4],
    "all tied": [0.25] * 6 + [-0.25] * 3,
    "one": [0.5],
    "one sign": [0.1, 0.2, 0.2, 0.3],
    "none tied": [0.11, -0.12, 0.23, 0.34, -0.05, 0.46, 0.57],
    "balanced": [0.1, -0.1, 0.2, -0.2],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_signed_rank_test_is_exact(name):
    differences = SAMPLES[name]
    assert signed_rank_test(torch.tensor(differences, dtype=torch.float64)) == pytest.approx(enumerated(differences))


@pytest.mark.parametrize("seed", range(20))
def test_the_signed_rank_test_is_exact_for_random_differences_with_ties(seed):
    generator = np.random.default_rng(seed)
    differences = generator.integers(-4, 6, size=generator.integers(2, 15)) / 10
    exact = enumerated(differences) if differences.any() else 1.0
    assert signed_rank_test(torch.tensor(differences)) == pytest.approx(exact)


@pytest.mark.parametrize("count", [7, 20, 24, 50])
def test_without_ties_the_signed_rank_test_is_that_of_scipy(count):
    differences = np.random.default_rng(count).normal(0.3, 1.0, count)
    expected = wilcoxon(differences, method="exact").pvalue
    assert signed_rank_test(torch.tensor(differences)) == pytest.approx(expected, rel=1e-9)


def test_twenty_tied_differences_have_the_exact_p_value():
    differences = [0.1] * 12 + [-0.1] * 4 + [-0.4] * 2 + [0.2] * 2
    exact = enumerated(differences)
    assert wilcoxon(differences, method="asymptotic").pvalue != pytest.approx(exact, rel=0.02)
    assert signed_rank_test(torch.tensor(differences, dtype=torch.float64)) == pytest.approx(exact)


def test_differences_that_rounding_alone_tells_apart_are_tied():
    # In floating point 0.3 - 0.1 is less than 0.2, and 0.7 - 0.5 is less than both.
    baseline = torch.tensor([0.1, 0.0, 0.5, 0.9, 0.2, 0.0], dtype=torch.float64)
    steered = torch.tensor([0.3, 0.2, 0.7, 0.7, 0.3, 0.4], dtype=torch.float64)
    exact = enumerated([0.2, 0.2, 0.2, -0.2, 0.1, 0.4])
    assert paired_metrics(baseline, steered)["p_value"] == pytest.approx(exact)
    assert paired_metrics(baseline.float(), steered.float())["p_value"] == pytest.approx(exact)


def test_above_fifty_differences_the_normal_approximation_is_that_of_scipy():
    differences = np.random.default_rng(0).integers(1, 5, 60) * np.random.default_rng(1).choice([-1, 1, 1], 60) / 10
    expected = wilcoxon(differences.round(6), method="asymptotic").pvalue
    assert signed_rank_test(torch.tensor(differences)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("value", "permutations", "shown"),
    [
        (1 / 33, 32, "≤ 0.03 (32 permutations)"),
        (1 / 20, 19, "≤ 0.05 (19 permutations)"),
        (1 / 1001, 1000, "≤ 0.001 (1000 permutations)"),
        (2 / 33, 32, "0.061"),
        (1.0, 32, "1"),
        (None, 0, "-"),
        (None, 32, "-"),
    ],
)
def test_a_p_value_that_no_permutation_reached_is_shown_as_a_bound(value, permutations, shown):
    assert permutation_p_value(value, permutations) == shown


def test_every_page_and_table_shows_the_bound(tmp_path):
    features = tuple(replace(f, search_p_value=1 / 33) for f in FEATURES)
    chosen = selection(features=features[:1], candidates=features)
    folder = write_run(tmp_path / "run", chosen=chosen)
    report_on([folder])
    table = Console(record=True, width=200, file=StringIO())
    table.print(selection_table(chosen))
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")]
    for text in (*texts, table.export_text()):
        assert "≤ 0.03 (32 permutations)" in text
    # The stored number stays.
    stored = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
    assert stored["candidates"][0]["search_p_value"] == pytest.approx(1 / 33)
