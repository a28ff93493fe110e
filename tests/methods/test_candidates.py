"""From sums to candidates: what is not finite, not different, or ranked by another score."""

from types import SimpleNamespace

import pytest
import torch

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.accumulation.candidates import judge_left_out, rank_features
from corrsteer_pl.methods.accumulation.sums import Accumulator
from corrsteer_pl.models.sites import Site
from tests.conftest import make_trainer

OPTIONS = {
    "pool": "max",
    "coefficient_pool": None,
    "coefficient": "mean",
    "score": "pearson",
    "topk": 2,
    "topm": 1,
    "sign": "both",
}
SAES = {0: SimpleNamespace(site=Site(0, "resid_post"), page=lambda index: None)}


def sums_of(x, y):
    sums = Accumulator({0: x.shape[1]}, ["max"])
    sums.update(0, "max", x, y, torch.ones(len(y)))
    sums.merge()
    return sums


def test_layers_without_finite_activations_are_named():
    x, y = torch.rand(10, 3), torch.tensor([0.0, 1.0] * 5)
    assert judge_left_out(sums_of(x, y), "max", "float16") == {}
    x[:5, 1] = float("inf")
    with pytest.warns(UserWarning, match="5 of 10 samples have activations in layer 0 that are not finite .float16."):
        assert judge_left_out(sums_of(x, y), "max", "float16") == {"0": 5}
    x[5, 0] = float("nan")
    with pytest.raises(UserError, match="6 of 10 samples .* layer 0 .* Set model.dtype and model.sae_dtype to"):
        judge_left_out(sums_of(x, y), "max", "float16")


def test_differences_need_wrong_samples():
    x, y = torch.rand(10, 3), torch.linspace(0.1, 1, 10)
    options = {**OPTIONS, "coefficient": "difference"}
    with pytest.raises(UserError, match="model.coefficient is difference, but all 10 rewards are above 0"):
        rank_features(sums_of(x, y), SAES, options)
    y[0] = 0
    assert rank_features(sums_of(x, y), SAES, options)[1]


def test_another_score_ranks_within_the_signs_of_the_correlation():
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(200, generator=generator).round()
    noise = torch.rand(200, 4, generator=generator)
    # Two rise with the reward: one purely but little, one much but noisily; two fall alike.
    slope = torch.tensor([0.1, 5.0, -0.1, -5.0])
    x = slope.clamp(max=0).abs() + y[:, None] * slope + noise * torch.tensor([0.01, 9.0, 0.01, 9.0])
    by_r = rank_features(sums_of(x, y), SAES, OPTIONS)[1]
    by_difference = rank_features(sums_of(x, y), SAES, {**OPTIONS, "score": "mean_difference"})[1]
    assert [(f.index, f.sign) for f in by_r] == [(0, "positive"), (2, "negative")]
    assert [(f.index, f.sign) for f in by_difference] == [(1, "positive"), (3, "negative")]
    for f in by_difference:
        mean = x[y > 0].double().mean(0) - x[y == 0].double().mean(0)
        assert f.score == pytest.approx(mean[f.index].item(), rel=1e-6)
        assert abs(f.correlation) < 0.99


def test_a_fit_by_another_score_says_so(tmp_path):
    module, trainer = CorrSteer("demo", "demo", layers=[1], score="mean_difference"), make_trainer()
    trainer.fit(module, datamodule=TaskDataModule(train_size=96, val_size=16))
    assert module.selection.score == "mean_difference"
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    with pytest.raises(UserError, match="model.score is pearson, but the checkpoint was fitted with mean_difference"):
        CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt", score="pearson")
    with pytest.raises(
        UserError,
        match="model.score is 'nix'; choose one of pearson, mutual_information, fisher, mean_difference, auroc",
    ):
        CorrSteer("demo", "demo", score="nix")
