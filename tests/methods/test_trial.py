"""What a validation tries, alone and together."""

import pytest
import torch

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.interventions.steering import SteeringVectors
from corrsteer_pl.models.decoding import decode
from tests.conftest import make_trainer

SMALL = {"train_size": 120, "val_size": 40, "test_size": 60}


def fit(**options):
    module = CorrSteer("demo", "demo", **options)
    make_trainer().fit(module, datamodule=TaskDataModule(**SMALL))
    return module


@pytest.fixture(scope="module")
def grown():
    return fit(rule="greedy")


def on_validation(module, sets):
    """Mean rewards of sets of features on the validation split, by an ordinary test on its rows."""
    found = []
    for features in sets:
        data = TaskDataModule(**SMALL)
        data.trainer = module.trainer
        data.setup("fit")
        variants = SteeringVectors.stack([module.vectors_of(features)], module.schedule)
        rewards = [
            reward
            for batch in data.val_dataloader()
            for reward, weight in zip(module.answering.compare(batch, variants)[0][1], batch.weight, strict=True)
            if weight
        ]
        found.append(torch.stack(rewards).mean().item())
    return found


def test_greedy_reports_what_its_features_reach_together(grown):
    selection = grown.selection
    assert len(selection.features) > 1
    prefixes = [selection.features[: i + 1] for i in range(len(selection.features))]
    assert list(selection.steps) == pytest.approx(on_validation(grown, prefixes))
    assert [selection.baseline_reward, *selection.steps] == sorted({selection.baseline_reward, *selection.steps})
    assert selection.joint_reward == selection.steps[-1]
    assert grown.trainer.callback_metrics["val/joint_reward"] == pytest.approx(selection.joint_reward)
    # Nothing that was left out would have helped.
    left = [f for f in selection.candidates if f not in selection.features]
    more = on_validation(grown, [[*selection.features, f] for f in left])
    assert max(more) <= selection.joint_reward


@pytest.mark.parametrize("rule", ["foreach", "all"])
def test_every_rule_measures_its_whole_selection(rule):
    module = fit(rule=rule)
    assert len(module.selection.features) > 1
    assert [module.selection.joint_reward] == pytest.approx(on_validation(module, [module.selection.features]))
    assert module.snapshots[-1]["joint_reward"] == module.selection.joint_reward


def test_prompts_are_read_once_whatever_is_tried(monkeypatch, grown):
    read = []
    prefill = decode.Decoder._prefill
    monkeypatch.setattr(
        decode.Decoder, "_prefill", lambda self, *args, **kwargs: read.append(1) or prefill(self, *args, **kwargs)
    )

    def reads(**options):
        read.clear()
        module = fit(rule="greedy", **options)
        # The fit reads prompts as well, once each.
        return len(read), module.selection

    once, selection = reads()
    assert once == 4 + 2 + 1, "batches of fit and validation, and one of the samples that stand on cards"
    assert selection == grown.selection
    monkeypatch.setattr(decode, "BUDGET", 1)
    often, selection = reads(candidate_batch_size=64)
    assert often == once + 2 * len(selection.features), "with no memory, prompts are read again in each round"
    assert selection == grown.selection


def test_more_candidates_of_a_layer_are_tried_if_wanted():
    module = fit(topm=2, topk=2, layers=[1, 2])
    assert [(f.layer, f.sign) for f in module.selection.candidates] == [
        (layer, sign) for layer in (1, 2) for sign in ("positive",) * 2 + ("negative",) * 2
    ]
    assert module.selection.candidates == tuple(
        f for f in module.selection.candidates if f.validation_reward is not None and f.validation_better is not None
    )
    assert len({f.layer for f in module.selection.features}) == len(module.selection.features)
