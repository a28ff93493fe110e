import json
import re
from dataclasses import replace

import pytest
import torch

from corrsteer_pl.errors import UserError
from corrsteer_pl.selection import Bar, Feature, Selection, Strength, choose, describe, measured, rank, reselect, select
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
        "greedy", tuple(CANDIDATES[:2]), tuple(CANDIDATES), (), 0.5, 10, 0.4, 0.3, "pearson", 0.6, (0.55, 0.6), 2.0,
        (Strength(0.0, 0.5), Strength(2.0, 0.6, kl=0.1)), "none", (0.2, 0.1), {"1": 0.5}, "abc",
        {"1": 2}, {"name": "m"}, {},
    )  # fmt: skip
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


# Six samples. Alone, a solves three, b two, c two; unsteered one is solved. Together a and b overshoot.
REWARDS = torch.tensor(
    [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0]], dtype=torch.float64
)
A, B, C = (feature(layer, 0, None) for layer in (0, 1, 2))
TOGETHER = {"AB": [0, 0, 0, 0, 0, 0], "AC": [1, 1, 1, 0, 1, 0], "ACB": [1, 1, 1, 0, 1, 0], "ABC": [1, 0, 0, 0, 0, 0]}


def tried(rule, bar=None):
    """A choice among A, B and C, and the sets that it measured."""
    asked = []

    def measure(sets):
        names = ["".join("ABC"[f.layer] for f in some) for some in sets]
        asked.append(names)
        return torch.tensor([TOGETHER[name] for name in names], dtype=torch.float64)

    return choose(rule, measured((A, B, C), REWARDS), REWARDS, bar or Bar(), measure), asked


def names(features):
    return "".join("ABC"[f.layer] for f in features)


def test_candidates_are_described_by_what_they_changed():
    a, b, _ = measured((A, B, C), REWARDS)
    assert (a.validation_reward, a.validation_better, a.validation_worse) == (0.5, 2, 0)
    assert (b.validation_reward, b.validation_better, b.validation_worse) == (pytest.approx(1 / 3), 1, 0)


def test_a_selection_is_measured_as_a_whole():
    choice, asked = tried("foreach")
    assert (names(choice.features), asked) == ("ABC", [["ABC"]])
    assert choice.joint_reward == pytest.approx(1 / 6)
    choice, asked = tried("global")
    assert (names(choice.features), choice.joint_reward, asked) == ("A", 0.5, []), "one feature alone is known"


def test_greedy_adds_what_helps_beside_the_others_and_stops():
    choice, asked = tried("greedy")
    assert (names(choice.features), choice.steps) == ("AC", (0.5, pytest.approx(2 / 3)))
    assert choice.joint_reward == choice.steps[-1]
    assert asked == [["AB", "AC"], ["ACB"]]


def test_greedy_chooses_nothing_where_nothing_helps():
    choice = choose("greedy", measured((A, B), REWARDS[[1, 0, 1]]), REWARDS[[1, 0, 1]], Bar(), None)
    assert (choice.features, choice.joint_reward, choice.steps) == ((), 0.5, ())


def test_greedy_equals_a_search_by_hand():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        effects = (torch.rand(5, 40, generator=generator) < 0.3).double()
        chance = torch.rand(40, generator=generator)

        def measure(sets, effects=effects, chance=chance):
            added = [sum(effects[f.layer] for f in some) if some else torch.zeros(40) for some in sets]
            return torch.stack([((0.3 * one > chance) & (one < 3)).double() for one in added])

        features = [feature(layer, 0, None) for layer in range(5)]
        rewards = measure([[], *([f] for f in features)])
        choice = choose("greedy", measured(features, rewards), rewards, Bar(), measure)
        chosen, best = [], rewards[0].mean()
        while left := [f for f in features if f.layer not in chosen]:
            of = {f.layer: measure([[*(features[i] for i in chosen), f]])[0].mean() for f in left}
            # Of equal ones the lowest layer, as all have the same correlation and, at first, the better one alone.
            alone = {f.layer: rewards[1 + f.layer].mean() for f in left}
            layer = min(of, key=lambda i: (-of[i], -alone[i], i))
            if of[layer] <= best:
                break
            chosen.append(layer)
            best = of[layer]
        assert [f.layer for f in choice.features] == chosen
        assert choice.joint_reward == pytest.approx(best.item())


def test_what_counts_as_better_can_ask_for_more():
    assert names(tried("foreach", Bar(min_improvement=0.2))[0].features) == "A"
    assert names(tried("foreach", Bar(min_improvement=0.4))[0].features) == ""
    # Two gains and no loss have a p-value of a quarter, one gain has one of a half.
    assert names(tried("foreach", Bar(significance_level=0.25))[0].features) == "A"
    assert names(tried("foreach", Bar(significance_level=0.2))[0].features) == ""
    assert names(tried("greedy", Bar(significance_level=0.25))[0].features) == "A"
    assert names(tried("global", Bar(significance_level=0.2))[0].features) == "A", "the best of all needs no evidence"


def test_a_selection_that_overshoots_says_so():
    choice, _ = tried("foreach")
    selection = Selection(
        "foreach", choice.features, choice.features, (), 1 / 6, 10, 0.4, 0.3, joint_reward=choice.joint_reward
    )
    assert re.match(
        r"the 3 selected features reach 16.7 % on validation together, and 0/0 alone 50.0 %", selection.overshoot
    )
    assert replace(selection, joint_reward=0.5).overshoot is None
    assert reselect(selection, "foreach", "both", None).joint_reward == choice.joint_reward
    assert reselect(selection, "global", "both", None).joint_reward is None, "others were not tried"


def test_greedy_is_no_rule_for_a_fit_that_tried_nothing_together():
    features = measured((A, B, C), REWARDS)
    selection = Selection("foreach", features[:1], features, (), 1 / 6, 10, 0.4, 0.3)
    with pytest.raises(UserError, match="fitted with rule foreach. Fit again with that rule"):
        reselect(selection, "greedy", "both", None)
    grown = replace(selection, rule="greedy", joint_reward=0.5, steps=(0.5,))
    assert reselect(grown, "greedy", "both", None) == grown
    with pytest.raises(UserError, match="fitted with more layers or signs"):
        reselect(grown, "greedy", "both", [0])
    assert names(reselect(grown, "foreach", "both", None).features) == "ABC"


def test_a_layer_that_was_read_may_have_no_candidate():
    features = measured((A, B, C), REWARDS)
    read = {str(layer): "fingerprint" for layer in (*(f.layer for f in features), 8)}
    selection = Selection("foreach", features[:1], features, (), 1 / 6, 10, 0.4, 0.3, saes={"fingerprints": read})
    assert reselect(selection, "foreach", "both", [A.layer, 8]).features
    with pytest.raises(UserError, match="layer 9 was not read by the fit, which has .*, 8"):
        reselect(selection, "foreach", "both", [9])


def test_all_takes_one_of_each_layer_however_many_are_candidates():
    assert chosen("all", [feature(0, 3, None), feature(0, 7, None), feature(1, 2, None)]) == [(0, 3), (1, 2)]


def test_a_level_needs_counts_of_what_changed():
    selection = Selection("foreach", (), tuple(CANDIDATES), (), 0.5, 10, 0.4, 0.3)
    with pytest.raises(UserError, match="does not say how many answers each candidate changed"):
        reselect(selection, "foreach", "both", None, Bar(significance_level=0.05))
