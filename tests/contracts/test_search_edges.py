"""Searches for a strength: the best one must not be an artefact of where a list of strengths ends."""

import json
import math
import warnings

import numpy as np
import pytest

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.answers.calibration import Budget, warn_of_edge, warn_of_open_end
from corrsteer_pl.methods.rosi import Rosi
from corrsteer_pl.selection import Strength, best_strength, beyond_edge, search_strengths
from corrsteer_pl.selection.strength import ROUNDS
from tests.conftest import make_trainer, run_here
from tests.processes import forked

SMALL = {"train_size": 96, "val_size": 48, "test_size": 60}
LIMIT = 0.2


def curve_of(scales, reward, kl=lambda s: 0.0):
    return [Strength(s, reward(s), kl=kl(s)) for s in scales]


def searched(start, reward, kl=lambda s: 0.0, most=math.inf):
    """The chosen strength and all measured ones, in the order of measurement."""
    calls = []

    def measure(pairs):
        calls.extend(scale for _, scale in pairs)
        return curve_of([scale for _, scale in pairs], reward, kl)

    curve = search_strengths({"": curve_of([0.0, *start], reward, kl)}, measure, Budget(kl=LIMIT).allows, most)[""]
    return best_strength(curve, Budget(kl=LIMIT).allows), calls


def scanned(reward, kl=lambda s: 0.0, end=200.0):
    """The best reward within the limit, by a dense scan."""
    return max(reward(s) for s in np.linspace(0, end, 20001) if kl(s) <= LIMIT)


RISING = {
    "linear": (lambda s: min(s / 100, 0.99), lambda s: s / 300),  # 60 is at the limit
    "convex cost": (lambda s: 0.3 + 0.7 * s / (s + 20), lambda s: 1e-4 * s * s),  # 44.7
    "late start": (lambda s: 0.5 + 0.5 / (1 + math.exp((20 - s) / 3)), lambda s: 1e-6 * s**3),  # 58.5
    "no cost": (lambda s: s / (s + 50), lambda s: 0.0),
}


@pytest.mark.parametrize("name", RISING)
@pytest.mark.parametrize("start", [[1.0, 4.0, 16.0], [0.25, 0.5, 1, 2, 4, 8], [8.0]])
def test_a_rising_reward_is_followed_to_the_limit_of_the_budget(name, start):
    reward, kl = RISING[name]
    best, calls = searched(start, reward, kl)
    assert kl(best.scale) <= LIMIT
    assert best.scale > max(start)
    # Strengths next to each other differ by an eighth at most.
    assert best.reward >= 7 / 8 * scanned(reward, kl)
    assert len(calls) <= 3 * ROUNDS


@pytest.mark.parametrize("peak", [0.07, 0.3, 1.7, 5.5, 11.0, 24.0, 45.0, 100.0])
@pytest.mark.parametrize("start", [[1.0, 4.0, 16.0], [0.5, 1.0, 2.0]])
def test_a_peak_between_or_beyond_the_first_strengths_is_found(peak, start):
    best, _ = searched(start, lambda s: 0.2 + 0.7 * math.exp(-(math.log((s + 1e-9) / peak) ** 2)))
    assert best.scale == pytest.approx(peak, rel=1 / 8)


def test_two_equal_rewards_may_have_a_better_one_between_them():
    best, _ = searched([8.0, 16.0, 32.0], lambda s: 0.75 - abs(s - 24) / 100)
    assert best.scale == pytest.approx(24, rel=1 / 8)


@pytest.mark.parametrize("limit_at", [0.9, 0.3, 0.05])
def test_strengths_that_are_all_over_the_budget_are_halved(limit_at):
    best, _ = searched([1.0, 4.0, 16.0], lambda s: min(0.5 + s / 10, 0.99), lambda s: LIMIT * s / limit_at)
    assert limit_at * 7 / 8 <= best.scale <= limit_at


def test_a_strength_that_is_worse_than_none_is_halved():
    best, _ = searched([1.0, 2.0], lambda s: 0.5 + s * (0.4 - s))  # best at 0.2, worse than 0 from 0.4 on
    assert best.scale == pytest.approx(0.2, rel=1 / 8)


def test_no_effect_yet_is_no_reason_to_stop():
    """Rewards of greedy answers do not change at all up to some strength."""
    best, _ = searched([1.0, 4.0], lambda s: 0.9 if s >= 30 else 0.5, lambda s: s / 200)  # the limit is 40
    assert best.reward == 0.9
    # Flat up to the strongest one that is within the budget, and the next one is not.
    best, _ = searched([1.0, 4.0, 16.0], lambda s: 0.9 if s >= 9 else 0.5, lambda s: s / 60)  # the limit is 12
    assert best.reward == 0.9


def test_of_equal_rewards_the_weakest_is_chosen():
    best, _ = searched([1.0, 4.0, 16.0], lambda s: min(0.5 + s / 40, 0.8))  # level from 12 on
    assert 12 <= best.scale <= 12 * 9 / 8
    # Nothing is better than 1: no stronger one is measured.
    best, calls = searched([1.0, 4.0, 16.0], lambda s: 1.0 if s >= 3 else 0.5)
    assert best.scale == 4
    assert max(calls) < 4
    best, calls = searched([1.0, 4.0], lambda s: 0.5)
    assert best.scale == 0
    assert len(calls) <= ROUNDS


def test_a_given_end_is_not_exceeded():
    best, calls = searched([1.0, 4.0, 16.0], lambda s: s / 1000, most=100.0)
    assert best.scale == max(calls) == 100


def test_a_figure_that_is_missing_is_within_no_limit():
    best, calls = searched([1.0, 2.0], lambda s: s / 100, lambda s: None if s > 6 else 0.0)
    assert 5 <= best.scale <= 6
    assert max(calls) == 8


def test_curves_that_are_searched_together_are_those_that_are_searched_alone():
    rewards = {"a": lambda s: s / (s + 50), "b": lambda s: 0.9 - abs(s - 3) / 20}
    start = [0.0, 1.0, 4.0, 16.0]

    def measure(pairs):
        return [Strength(s, rewards[name](s)) for name, s in pairs]

    curves = {name: curve_of(start, reward) for name, reward in rewards.items()}
    together = search_strengths(curves, measure, Budget().allows)
    for name, curve in curves.items():
        assert search_strengths({name: curve}, measure, Budget().allows)[name] == together[name]


@pytest.mark.parametrize(
    ("scales", "reward", "expected"),
    [
        ([1, 2, 4], lambda s: s / 10, ["model.x", "4, the largest", "KL 0.04 of at most 0.2", "Add 8"]),
        ([4], lambda s: s / 10, ["model.x", "4, the largest", "Add 8"]),
        ([1, 2, 4], lambda s: 0.5 - abs(s - 1) / 10, ["1, the smallest", "KL 0.01 of at most 0.2", "Add 0.5"]),
        ([-4, -2, 2], lambda s: 0.5 - s / 20, ["-4, the largest", "Add -8"]),
        ([30, 60], lambda s: s / 100, ["30, the smallest", "KL 0.3 of at most 0.2", "Add 15"]),
        ([1, 2], lambda s: 0.5, ["2, the largest", "leaves the unchanged model the best", "Add 4"]),
        # The best one lies between others, or nothing is better than 1, or the budget ends the list.
        ([8, 16, 20, 24, 28], lambda s: 0.9 - abs(s - 16) / 100, []),
        ([1, 2, 4], lambda s: 1.0 if s >= 4 else 0.5, []),
        ([1, 16, 32], lambda s: s / 100, []),
    ],
)
def test_a_list_whose_best_strength_is_at_its_edge_is_warned_of(scales, reward, expected):
    curve = curve_of([0, *scales], reward, lambda s: abs(s) / 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_edge("model.x", curve, Budget(kl=LIMIT))
    messages = [str(one.message) for one in caught]
    assert len(messages) == bool(expected)
    assert all(part in messages[0] for part in expected)


def test_a_search_that_ends_at_an_edge_is_warned_of():
    def end(reward):
        def measure(pairs):
            return curve_of([scale for _, scale in pairs], reward)

        start = curve_of([0, 1, 4, 16], reward)
        return search_strengths({"": start}, measure, Budget(kl=LIMIT).allows, most=100)[""]

    with pytest.warns(UserWarning, match="model.x: the search ended at 100, with KL 0 of at most 0.2"):
        warn_of_open_end("model.x", end(lambda s: s / 1000), Budget(kl=LIMIT))
    for reward in (lambda s: 0.9 - abs(s - 24) / 100, lambda s: 0.5):
        warn_of_open_end("model.x", end(reward), Budget(kl=LIMIT))


def test_nothing_is_beyond_an_empty_list():
    assert beyond_edge([Strength(0.0, 0.5)], Budget().allows) is None
    assert search_strengths({"": [Strength(0.0, 0.5)]}, list, Budget().allows) == {"": [Strength(0.0, 0.5)]}


# ---------------------------------------------------------------- methods


def fit_rosi(**options):
    module = Rosi("demo", layers=[2], topm=1, **options)
    make_trainer().fit(module, datamodule=TaskDataModule("demo_refusal", **SMALL))
    return module


@pytest.mark.parametrize("unit", ["percent", "alpha"])
def test_rosi_goes_beyond_the_first_strengths(unit):
    module = fit_rosi(form="row_mean", unit=unit)
    selection = module.selection
    harmless = [f for f in selection.strengths if f.scale == selection.scale]
    assert selection.joint_reward > selection.baseline_reward + 0.25
    assert selection.scale > 16
    assert harmless[0].loss <= 0.02
    assert [s.scale for s in selection.strengths] == sorted(s.scale for s in selection.strengths)
    assert {f.coefficient for f in selection.ranking} == {s.scale for s in selection.strengths[1:]}
    # Strengths that were given are the only ones that are measured.
    with pytest.warns(UserWarning, match=r"model.strengths: 8, the largest of the list.* of at most 0.2.*Add 16"):
        module = fit_rosi(form="row_mean", unit=unit, strengths=[4, 8])
    assert [s.scale for s in module.selection.strengths] == [0, 4, 8]


def fit_corrsteer(**options):
    module = CorrSteer("demo", "demo", layers=[1, 2], **options)
    make_trainer().fit(module, datamodule=TaskDataModule(**{**SMALL, "train_size": 120, "val_size": 40}))
    return module


def test_a_scale_is_searched_within_the_budget():
    module = fit_corrsteer(scale="auto", budget={"kl": 0.02})
    curve = {strength.scale: strength for strength in module.selection.strengths}
    assert {0, 0.5, 1, 2} < curve.keys()
    assert curve[module.selection.scale].kl <= 0.02
    assert module.chosen_scale == module.selection.scale
    # The same strengths as a list give the same rewards, costs and choice.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = fit_corrsteer(scale=sorted(curve.keys() - {0}), budget={"kl": 0.02})
    assert given.selection.scale == module.selection.scale
    for one in given.selection.strengths:
        assert one.reward == curve[one.scale].reward
        assert one.kl == pytest.approx(curve[one.scale].kl, abs=1e-5)


def test_a_list_of_scales_is_warned_of():
    with pytest.warns(UserWarning, match=r"model.scale: 0.5, the largest of the list.*Add 1 to the list.*auto"):
        module = fit_corrsteer(scale=[0.25, 0.5])
    assert [s.scale for s in module.selection.strengths] == [0, 0.25, 0.5]


def test_a_budget_needs_a_scale_that_is_open():
    with pytest.raises(UserError, match="model.scale is 1.0. Set it to auto"):
        CorrSteer("demo", "demo", budget={"kl": 0.1})
    for value in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(UserError, match="model.strengths"):
            Rosi("demo", unit="alpha", strengths=[value])
    with pytest.raises(UserError, match="model.unit is 'percents'; choose one of percent, alpha"):
        Rosi("demo", unit="percents")


@pytest.mark.slow
def test_two_processes_search_what_one_searches(tmp_path):
    """The rounds of a search are the same on every process, or these would wait for each other forever."""
    rosi = ["fit", "--config", "demo_rosi.yaml", "--model.form=row_mean", "--model.topm=3", "--data.train_size=101"]
    auto = ["fit", "--config", "demo.yaml", "--model.scale=auto", "--model.budget={kl: 0.05}", "--model.layers=[1,2]"]
    auto += ["--data.train_size=101"]
    quick = ["--data.val_size=33", "--trainer.enable_progress_bar=false"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    for command in (rosi, auto):
        run_here(*command, *quick, "--trainer.default_root_dir=one", cwd=tmp_path)
        forked(*command, *quick, *two, "--trainer.default_root_dir=two", cwd=tmp_path, ranks=2)
        one, other = (json.loads((tmp_path / name / "selection.json").read_text()) for name in ("one", "two"))
        assert one["scale"] == other["scale"] > 0
        for a, b in zip(one["strengths"], other["strengths"], strict=True):
            assert (a["scale"], a["reward"], a["loss"]) == (b["scale"], b["reward"], b["loss"])
            assert a["kl"] == pytest.approx(b["kl"], abs=1e-6)
