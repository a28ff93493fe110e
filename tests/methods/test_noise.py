"""The unchanged model against itself."""

import torch

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.data import Batch
from corrsteer_pl.methods.answers.noise import NoiseFloor, _halves
from corrsteer_pl.tasks import Example
from tests.conftest import make_trainer

SMALL = {"train_size": 120, "val_size": 40, "test_size": 45}


def batch_of(lengths, weight=None):
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    ids = torch.arange(len(lengths)).unsqueeze(1) * 100 + torch.arange(longest)
    examples = [Example(str(i), "", "") for i in range(len(lengths))]
    weight = torch.ones(len(lengths)) if weight is None else torch.tensor(weight)
    return Batch(ids, mask, weight, examples, [10 + i for i in range(len(lengths))], 0)


class Scripted:
    """Answers a row by its number, and one row otherwise than before."""

    def __init__(self, other=None):
        self.other, self.shapes = other, []

    def compare(self, batch, variants):
        self.shapes.append(tuple(batch.input_ids.shape))
        rewards = torch.tensor([float(row != self.other) for row in batch.rows], dtype=torch.float64)
        return [([f"answer {row}{'!' * (row == self.other)}" for row in batch.rows], rewards)]


def test_every_sample_is_answered_once_more_in_another_shape():
    batch, answering = batch_of([3, 7, 2, 5, 6], [1.0, 1.0, 1.0, 1.0, 0.0]), Scripted(11)
    noise = NoiseFloor(answering, None)
    noise.step(batch, [f"answer {row}" for row in batch.rows], torch.ones(5, dtype=torch.float64))
    assert answering.shapes == [(3, 5), (2, 7)]
    found = noise.result()
    assert (found["n"], found["flips"], found["worse"], found["better"]) == (4, 1, 1, 0)
    assert found["side_effect_ratio"] == 1


def test_halves_keep_the_prompts():
    batch = batch_of([3, 7, 2, 5, 6])
    for half in _halves(batch):
        for i, row in enumerate(half.rows):
            kept = half.attention_mask[i].bool()
            whole = batch.attention_mask[row - 10].bool()
            assert half.input_ids[i][kept].tolist() == batch.input_ids[row - 10][whole].tolist()


def test_a_batch_of_one_is_read_twice_and_counts_once():
    batch, answering = batch_of([4]), Scripted()
    noise = NoiseFloor(answering, None)
    noise.step(batch, ["answer 10"], torch.ones(1, dtype=torch.float64))
    assert answering.shapes == [(2, 4)]
    assert noise.result()["n"] == 1
    assert noise.result()["flips"] == 0


def test_a_test_reports_its_noise_if_asked():
    module, trainer = CorrSteer("demo", "demo", layers=[1]), make_trainer()
    trainer.fit(module, datamodule=TaskDataModule(**SMALL))
    trainer.test(module, datamodule=TaskDataModule(**SMALL), verbose=False)
    assert "noise_floor" not in module.metrics
    without = dict(module.metrics)
    module.hparams["noise_floor"] = True
    trainer.test(module, datamodule=TaskDataModule(**SMALL), verbose=False)
    noise = module.metrics.pop("noise_floor")
    assert module.metrics == without
    assert noise["n"] == 45
    assert noise["changed"] == noise["better"] + noise["worse"] <= noise["flips"] < 5, "float32 rounds little"
