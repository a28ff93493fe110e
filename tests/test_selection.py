import json

import pytest
import torch

from corrsteer_pl.errors import UserError
from corrsteer_pl.selection import Feature, Selection, describe, rank, select
from corrsteer_pl.stats import Moments, pearson


def feature(layer, index, reward, correlation=0.5, sign="positive"):
    site = f"blocks.{layer}.hook_resid_post"
    return Feature(layer, site, index, sign, 1.0, correlation, correlation, 0.5, 0.5, 1.0, 1.0, reward)


CANDIDATES = [
    feature(0, 3, 0.50), feature(0, 9, 0.55, -0.4, "negative"),
    feature(1, 4, 0.60), feature(1, 8, 0.50, -0.3, "negative"),
    feature(2, 5, 0.40), feature(2, 7, 0.45, -0.2, "negative"),
]  # fmt: skip


def chosen(rule, candidates=CANDIDATES, baseline=0.5):
    return [(f.layer, f.index) for f in select(rule, candidates, baseline)]


def test_global_takes_the_best_of_all_layers():
    assert chosen("global") == [(1, 4)]


def test_foreach_takes_the_better_one_per_layer_if_strictly_above_the_baseline():
    assert chosen("foreach") == [(0, 9), (1, 4)]
    assert chosen("foreach", baseline=0.55) == [(1, 4)]
    assert chosen("foreach", baseline=0.60) == []


def test_all_takes_the_positive_one_of_every_layer():
    assert chosen("all") == [(0, 3), (1, 4), (2, 5)]


def test_layer_takes_the_better_one_even_below_the_baseline():
    assert chosen("layer", CANDIDATES[4:]) == [(2, 7)]


def test_ties_go_to_larger_correlation_then_lower_layer_then_lower_index():
    assert chosen("global", [feature(0, 1, 0.6, 0.3), feature(1, 1, 0.6, -0.4, "negative")]) == [(1, 1)]
    assert chosen("global", [feature(2, 1, 0.6), feature(1, 9, 0.6)]) == [(1, 9)]
    assert chosen("global", [feature(1, 9, 0.6), feature(1, 2, 0.6)]) == [(1, 2)]


def test_rank_leaves_out_scores_of_zero_and_breaks_ties_by_index():
    r = torch.tensor([0.0, 0.2, -0.1, 0.2])
    assert rank(r, r, 3) == ([1, 3], [2])
    assert rank(torch.zeros(4), torch.zeros(4), 2) == ([], [])


def test_the_sign_comes_from_the_correlation_and_the_order_from_the_score():
    r = torch.tensor([0.3, 0.2, -0.1, -0.4, 0.0])
    # A score that is never negative has negative candidates all the same.
    assert rank(torch.tensor([1.0, 5.0, 7.0, 2.0, 9.0]), r, 2) == ([1, 0], [2, 3])
    assert rank(torch.tensor([-1.0, -5.0, -7.0, 2.0, 9.0]), r, 1) == ([1], [2])


def test_a_negative_feature_is_steered_with_minus_its_mean():
    moments = Moments(2)
    moments.update(torch.tensor([[3.0, 0.0], [1.0, 4.0], [2.0, 2.0]]), torch.tensor([1.0, 0.0, 1.0]))
    scores = pearson(moments)
    positive, negative = (describe(moments, scores, 2 * scores, moments.x_right / 2, 0, "s", i) for i in (0, 1))
    assert (positive.sign, positive.coefficient, positive.active_right) == ("positive", 2.5, 1.0)
    assert (negative.sign, negative.coefficient, negative.active_right) == ("negative", -1.0, 0.5)
    assert (positive.score, negative.score) == (2 * positive.correlation, 2 * negative.correlation)
    assert (negative.mean_right, negative.mean_wrong, negative.active_wrong) == (1.0, 4.0, 1.0)


def test_selection_survives_json():
    selection = Selection(
        "foreach",
        tuple(CANDIDATES[:1]),
        tuple(CANDIDATES),
        (),
        0.5,
        10,
        0.4,
        0.3,
        "pearson",
        {"1": 2},
        {"name": "m"},
        {},
    )
    assert Selection.from_dict(json.loads(json.dumps(selection.as_dict()))) == selection


@pytest.mark.parametrize(
    "change",
    [
        {"index": -1}, {"layer": -2}, {"index": 1.5}, {"sign": "up"}, {"coefficient": float("nan")}, {"extra": 1},
        {"correlation": float("inf")}, {"validation_reward": float("nan")}, {"site": 3}, {"validation_reward": "x"},
    ],
)  # fmt: skip
def test_a_damaged_feature_is_refused(change):
    plain = Selection("foreach", (), (CANDIDATES[0],), (), 0.5, 10, 0.4, 0.3).as_dict()
    assert Selection.from_dict(plain).candidates == (CANDIDATES[0],)
    plain["candidates"] = [{**plain["candidates"][0], **change}]
    with pytest.raises(UserError, match=r"^the checkpoint is damaged: its selection cannot be read .*Fit again"):
        Selection.from_dict(plain)


@pytest.mark.parametrize("change", [{"rule": "nix"}, {"reward": float("nan")}, {"candidates": None}, {"samples": "x"}])
def test_a_damaged_selection_is_refused(change):
    plain = Selection("foreach", (), (CANDIDATES[0],), (), 0.5, 10, 0.4, 0.3).as_dict()
    for damaged in ({**plain, **change}, {k: v for k, v in plain.items() if k not in change}):
        with pytest.raises(UserError, match="the checkpoint is damaged"):
            Selection.from_dict(damaged)


def test_an_unknown_rule_is_a_key_error():
    with pytest.raises(KeyError):
        select("nix", CANDIDATES, 0.5)
