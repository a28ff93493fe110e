"""The strength of a selection, chosen in validation within a budget."""

import pytest
import torch
from scipy.stats import entropy

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.answers.calibration import Budget, divergences
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.selection import Strength
from tests.architectures import batch_of, vectors
from tests.conftest import make_trainer

# Short lists keep these fits fast; the best strength may be at an edge of them.
pytestmark = pytest.mark.filterwarnings("ignore:model.scale.*of the list")

SMALL = {"train_size": 120, "val_size": 40, "test_size": 60}
SCALES = [0.5, 1, 3.0]


def fit(**options):
    module = CorrSteer("demo", "demo", layers=[1, 2], **options)
    trainer = make_trainer()
    trainer.fit(module, datamodule=TaskDataModule(**SMALL))
    return module, trainer


def on_validation(module, vectors, data=None):
    """Mean reward on a validation split, by one pass of its own."""
    data = data or TaskDataModule(**SMALL)
    data.trainer = module.trainer
    data.setup("validate")
    total = weight = 0.0
    for batch in data.val_dataloader():
        ((_, rewards),) = module.answering.compare(batch, SteeringVectors.stack([vectors], module.schedule))
        total, weight = total + float(rewards @ batch.weight.double()), weight + float(batch.weight.sum())
    return total / weight


@pytest.fixture(scope="module")
def fitted():
    return fit(scale=SCALES)


def test_the_best_strength_is_chosen_and_used(fitted, tmp_path):
    module, trainer = fitted
    selection = module.selection
    assert [strength.scale for strength in selection.strengths] == [0, *SCALES]
    assert selection.strengths[0].reward == selection.baseline_reward
    for strength in selection.strengths:
        found = on_validation(module, module.vectors_of(selection.features, strength.scale))
        assert strength.reward == pytest.approx(found)
    best = max(strength.reward for strength in selection.strengths)
    assert selection.joint_reward == best
    assert selection.scale == min(s.scale for s in selection.strengths if s.reward == best)
    unit = module.vectors_of(selection.features, 1.0)
    for site, vector in module.steering_vectors().items():
        torch.testing.assert_close(vector, selection.scale * unit[site])
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    loaded = CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.selection == selection
    assert all(torch.equal(v, module.steering_vectors()[site]) for site, v in loaded.steering_vectors().items())
    other = CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt", scale=0.25)
    for site, vector in other.steering_vectors().items():
        torch.testing.assert_close(vector, 0.25 * unit[site])
    with pytest.raises(
        UserError, match=r"model.scale is a list, .* has chosen none for these features \(rule global\)"
    ):
        CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt", rule="global")


def test_candidates_are_tried_at_one(fitted):
    plain, _ = fit()
    assert fitted[0].selection.candidates == plain.selection.candidates


def test_a_budget_limits_the_divergence_of_the_first_token(fitted):
    free = fitted[0].selection
    module, _ = fit(scale=SCALES, budget={"kl": 1e9})
    costs = [strength.kl for strength in module.selection.strengths]
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(0, abs=1e-6)
    assert module.selection.scale == free.scale
    # Between the weakest strength and the next.
    limited, _ = fit(scale=SCALES, budget={"kl": (costs[1] + costs[2]) / 2})
    assert limited.selection.scale <= 0.5
    assert [s.reward for s in limited.selection.strengths] == [s.reward for s in free.strengths]


def test_where_nothing_is_within_the_budget_nothing_is_steered():
    with pytest.warns(UserWarning, match=r"no strength of model.scale that keeps within model.budget"):
        module, trainer = fit(scale=SCALES, budget={"kl": 0.0})
    assert module.selection.scale == 0
    assert module.selection.features
    trainer.test(module, datamodule=TaskDataModule(**SMALL), verbose=False)
    assert module.metrics["changed"] == 0


def test_a_budget_can_be_the_loss_on_another_task():
    budget = {"task": "demo_refusal", "loss": 1.0, "kl": 1e9, "size": 24}
    module, _ = fit(scale=SCALES, budget=budget)
    data = TaskDataModule("demo_refusal", val_size=24)
    module.answering = module.answering_for(data.task, "evaluation")
    for strength in module.selection.strengths:
        steered = module.vectors_of(module.selection.features, strength.scale)
        expected = on_validation(module, {}, data) - on_validation(module, steered, data)
        assert strength.loss == pytest.approx(expected, abs=1e-9)
    other, _ = fit(scale=SCALES, budget={"kl": 1e9})
    assert [s.kl for s in module.selection.strengths][1:] != [s.kl for s in other.selection.strengths][1:]


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("all")])
def test_divergences_equal_those_of_whole_distributions(tiny, schedule):
    batch, variants = batch_of(tiny), [{}, vectors(), vectors((1,), seed=3)]
    batch.weight = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def distribution(some):
        with SteeringVectors(some, schedule).attached(tiny.model), torch.no_grad():
            # A copy of the prompts through an ordinary call with a cache, which is what counts as a generation.
            position_ids = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
            logits = tiny.model(
                batch.input_ids, attention_mask=batch.attention_mask, position_ids=position_ids, use_cache=True
            ).logits[:, -1]
        return logits.double().softmax(-1).numpy()

    plain = distribution({})
    expected = [entropy(plain, distribution(some), axis=-1)[[0, 1, 3]].mean() for some in variants]
    found = divergences(Decoder(tiny, 1), [batch], SteeringVectors.stack(variants, schedule))
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[1] > 1e-3


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ({}, "model.budget has no limit. Give it kl, in nats, or loss"),
        ({"task": "demo_qa"}, "model.budget has no limit"),
        ({"kl": -1.0}, "model.budget.kl is -1.0; it is a number from 0 on"),
        ({"kl": "much"}, "model.budget.kl is 'much'; it takes float"),
        ({"kl": 1.0, "size": 0}, "model.budget.size is 0; it is a number of prompts"),
        ({"loss": 0.1}, "Name that task as budget.task"),
        ({"kl": 0.1, "path": "x"}, "model.budget has path, but no task"),
        ({"kl": 0.1, "tsk": "x"}, "model.budget has 'tsk', which is none of kl, loss, size, task"),
        ({"kl": 0.1, "task": "my.Task"}, "model.budget names my.Task; it takes tasks and rewards of this program"),
    ],
)
def test_a_budget_that_cannot_be_is_one_sentence(budget, sentence):
    with pytest.raises(UserError, match=sentence):
        CorrSteer("demo", "demo", scale=[1.0], budget=budget)


def test_strengths_that_cannot_be_are_one_sentence():
    with pytest.raises(UserError, match="model.scale is empty"):
        CorrSteer("demo", "demo", scale=[])
    with pytest.raises(UserError, match="model.budget chooses among several strengths, but model.scale is 1.0"):
        CorrSteer("demo", "demo", budget={"kl": 0.1})


def test_a_strength_without_a_figure_is_not_allowed():
    assert Budget(kl=0.1).allows(Strength(1.0, 0.5, kl=0.1))
    assert not Budget(kl=0.1).allows(Strength(1.0, 0.5))
    assert not Budget(kl=0.1, loss=0.0).allows(Strength(1.0, 0.5, kl=0.0, loss=0.01))
    assert Budget().allows(Strength(1.0, 0.5))
