"""Intervals, side effects and counts of recorded results, over several seeds of a fit."""

import numpy as np
import pytest
import scipy.stats
import torch

from corrsteer_pl.evaluation.paired import average_over_seeds, paired_metrics
from corrsteer_pl.results.cells import RANDOM, SHOTS, UNSTEERED, Cell
from corrsteer_pl.results.plan import Plan, TaskPlan
from corrsteer_pl.results.store import Store
from corrsteer_pl.results.summary import summary
from corrsteer_pl.results.tables import short_table, table

PLAN = Plan("x", "demo", "demo", {"t": TaskPlan({}, shots=2)})
PROMPTED = f"2 {SHOTS}"


def measured(seed, ids, unsteered, steered, random=(), prompted=None):
    """A cell of three systems with the given rewards."""

    def metrics(rewards, vectors=0):
        return {**paired_metrics(torch.tensor(unsteered), torch.tensor(rewards)), "vectors": vectors}

    cell = Cell("t", seed, PLAN.settings("t"), fit_reward=0.5, examples=list(ids))
    cell.rewards = {UNSTEERED: unsteered, "foreach": steered, "shuffled rewards": unsteered}
    cell.systems = {name: metrics(rewards, int(rewards != unsteered)) for name, rewards in cell.rewards.items()}
    cell.random, cell.random_rewards = [metrics(rewards) for rewards in random], list(random)
    if prompted is not None:
        cell.rewards[PROMPTED] = prompted
        tested = [i for i, reward in enumerate(prompted) if reward is not None]
        pairs = torch.tensor([[unsteered[i], prompted[i]] for i in tested])
        cell.systems[PROMPTED] = {**paired_metrics(pairs[:, 0], pairs[:, 1]), "vectors": 0}
    return cell


def test_the_interval_is_that_of_the_example_averages():
    rng = np.random.default_rng(0)
    differences = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=(3, 50))
    average = average_over_seeds([{f"q{i}": d for i, d in enumerate(seed)} for seed in differences])
    averaged = differences.mean(axis=0)
    half = scipy.stats.norm.ppf(0.975) * scipy.stats.sem(averaged)
    assert (average.n, average.difference) == (50, pytest.approx(averaged.mean()))
    assert (average.ci_low, average.ci_high) == (
        pytest.approx(averaged.mean() - half), pytest.approx(averaged.mean() + half)
    )  # fmt: skip


def test_the_interval_covers_the_true_difference_in_95_percent_of_the_repetitions():
    rng = np.random.default_rng(1)
    covered, repetitions, true = 0, 1000, 0.2
    for _ in range(repetitions):
        # Each example has its own probability to change, and the seeds of the fit agree on it only in part.
        own = rng.beta(2, 8, size=200)
        changes = (rng.random((3, 200)) < own).astype(float)
        average = average_over_seeds([dict(enumerate(seed)) for seed in changes.tolist()])
        covered += average.ci_low <= true <= average.ci_high
    # Three standard errors of a share of 0.95 over 1,000 repetitions are 0.02.
    assert covered / repetitions == pytest.approx(0.95, abs=0.02)


def test_test_examples_that_only_some_seeds_drew_are_averaged_over_those():
    average = average_over_seeds([{"a": 1.0, "b": 0.0}, {"b": 1.0, "c": 0.0}])
    assert (average.n, average.difference) == (3, 0.5)
    assert average_over_seeds([{"a": 0.5}]).ci_low is None


def test_changed_answers_are_pooled_for_the_side_effect_ratio():
    # 3 better and 0 worse, 14 better and 15 worse, nothing: 15 of 32, where the mean of the ratios is 0.26.
    ids = [str(i) for i in range(40)]
    counts = [(3, 0), (14, 15), (0, 0)]
    cells = []
    for seed, (better, worse) in enumerate(counts):
        unsteered = [0.0] * better + [1.0] * (40 - better)
        steered = [1.0] * better + [0.0] * worse + [1.0] * (40 - better - worse)
        cells.append(measured(seed, ids, unsteered, steered))
    steered = summary(PLAN, cells)["tasks"]["t"]["systems"]["foreach"]
    assert steered["side_effect_ratio"] == 15 / 32
    assert steered["seeds_selected"] == 2
    assert steered["deviation"] == pytest.approx(np.std([3 / 40, -1 / 40, 0], ddof=1))
    assert "| 0.47 | 2 of 3 |" in table(summary(PLAN, cells))
    assert "| t | 3 (2) | 40 |" in short_table(PLAN, summary(PLAN, cells))


def test_random_features_and_prompts_are_compared_on_the_same_examples():
    ids, unsteered, steered = ["a", "b", "c", "d"], [0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]
    random = [[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]]
    task = summary(PLAN, [measured(0, ids, unsteered, steered, random, prompted=[1.0, 1.0, None, 1.0])])["tasks"]["t"]
    averaged = np.array(random).mean(axis=0) - np.array(unsteered)
    assert task["systems"][RANDOM]["difference"] == pytest.approx(averaged.mean())
    assert task["systems"][RANDOM]["ci_high"] == pytest.approx(averaged.mean() + 1.959964 * scipy.stats.sem(averaged))
    # Prompting minus steering on the three examples that both answered.
    assert task["against"][PROMPTED]["difference"] == pytest.approx(1 / 3)
    assert task["systems"][PROMPTED]["n"] == 3


def test_cells_without_the_rewards_of_single_examples_are_measured_again(tmp_path):
    store, cell = Store(tmp_path), measured(0, ["a", "b"], [0.0, 1.0], [1.0, 1.0])
    store.keep(cell)
    assert store.find("t", 0, cell.settings) == cell
    cell.rewards = {}
    store.keep(cell)
    assert store.find("t", 0, cell.settings) is None
