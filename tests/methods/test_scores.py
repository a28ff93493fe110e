"""Fits by other scores, on the residual's own coordinates, and by contrastive vectors."""

import numpy as np
import pytest
import torch
from scipy import stats

from corrsteer_pl import CorrSteer, Example, Task, TaskDataModule
from corrsteer_pl.commands.report import report_on
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.methods.accumulation.sums import Accumulator
from corrsteer_pl.methods.mean_difference import MeanDifference
from corrsteer_pl.methods.runs.files import RunFiles
from corrsteer_pl.models.sites import Site
from corrsteer_pl.stats import Histogram
from corrsteer_pl.stats.scores import mutual_information
from tests.conftest import assert_same_selection, make_trainer

SMALL = {"train_size": 96, "val_size": 24, "test_size": 24}


def saving(folder, **options):
    return {"callbacks": [RunFiles(**options)], "enable_checkpointing": True, "default_root_dir": folder}


def fit(module, ckpt_path=None, trainer=None, **data):
    trainer, data = trainer or make_trainer(), TaskDataModule(**{**SMALL, **data})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, data


def residuals_of_answers(module, data, layer):
    """The residual at each decoding step of each answer of the fit, one sample at a time, and the rewards."""
    found, rewards = [], []
    for example in data.examples["train"]:
        ids = torch.tensor([module.llm.token_ids(example.prompt)])
        out = module.llm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=data.task.max_new_tokens, do_sample=False,
            output_hidden_states=True, return_dict_in_generate=True,
        )  # fmt: skip
        end = module.llm.eos_token_ids
        tokens = [t for t in out.sequences[0, ids.shape[1] :].tolist() if t not in end]
        # hidden_states[step][block + 1] is what the block gives.
        steps = [out.hidden_states[step][layer + 1][0, -1] for step in range(len(tokens))]
        found.append(torch.stack(steps) if steps else torch.zeros(1, 128))
        rewards.append(data.task.reward([module.llm.tokenizer.decode(tokens)], [example])[0])
    return found, np.array(rewards)


@pytest.fixture(scope="module")
def raw():
    return fit(CorrSteer("demo", raw=True, layers=[1, 2], topk=5), task="demo_refusal")


def test_coordinates_correlate_as_in_a_naive_loop_over_hugging_face(raw):
    module, data = raw
    steps, y = residuals_of_answers(module, data, layer=1)
    x = torch.stack([some.amax(0) for some in steps]).numpy()  # a maximum that may be below 0
    assert (x < 0).any()
    expected = np.array([stats.pearsonr(column, y).statistic for column in x.T])
    ranked = [f for f in module.selection.ranking if f.layer == 1]
    assert [f.index for f in ranked[:5]] == np.argsort(-expected)[:5].tolist()
    for f in ranked:
        assert f.correlation == pytest.approx(expected[f.index], abs=1e-5)
        mean = x[y > 0, f.index].mean()
        assert f.coefficient == pytest.approx(np.copysign(mean, f.correlation), rel=1e-4)
        vector = module.vectors_of([f])[Site(1, "resid_post")]
        assert torch.equal(vector.nonzero().flatten(), torch.tensor([f.index]))


def test_coordinates_need_no_autoencoder(raw, tmp_path):
    module, data = raw
    assert module.selection.saes == {}
    trainer = make_trainer(**saving(tmp_path))
    other, _ = fit(CorrSteer("demo", raw=True, layers=[1, 2], topk=5), trainer=trainer, task="demo_refusal")
    again = CorrSteer("demo", raw=True, layers=[1, 2], topk=5)
    make_trainer().test(again, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert again.selection.features == other.selection.features
    with pytest.raises(UserError, match="model.raw is False, but the checkpoint was fitted with True"):
        make_trainer().test(CorrSteer("demo", "demo"), datamodule=data, ckpt_path=tmp_path / "last.ckpt")


def test_without_autoencoders_and_coordinates_there_is_nothing_to_read():
    with pytest.raises(UserError, match="model.saes is not given.*or set model.raw to true"):
        CorrSteer("demo")
    with pytest.raises(UserError, match="layer 9 is not in demo .layers 0..3.. Set model.layers to a subset"):
        fit(CorrSteer("demo", raw=True, layers=[9]))


@pytest.mark.parametrize("score", ["mutual_information", "fisher", "auroc"])
def test_batch_size_does_not_change_what_a_score_ranks(score):
    found = [
        fit(CorrSteer("demo", "demo", score=score, layers=[1, 2]), batch_size=size)[0].selection for size in (7, 64)
    ]
    one, other = ([(f.layer, f.index, f.sign) for f in selection.candidates] for selection in found)
    assert one == other
    assert found[0].score == score


def test_a_fit_that_was_interrupted_has_counted_every_sample_in_its_histograms(tmp_path):
    options = {"score": "mutual_information", "layers": [1], "permutations": 0}
    whole, _ = fit(CorrSteer("demo", "demo", **options), batch_size=8)
    trainer = make_trainer(**saving(tmp_path, every_n_train_steps=1), max_steps=5)
    fit(CorrSteer("demo", "demo", **options), trainer=trainer, batch_size=8)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert stored["sums.merged.layer1_histogram.counts"].sum(1).sum(0).tolist() == [40] * 512
    trainer = make_trainer(**saving(tmp_path))
    onwards, _ = fit(CorrSteer("demo", "demo", **options), tmp_path / "last.ckpt", trainer, batch_size=8)
    assert_same_selection(onwards.selection, whole.selection)
    # A finished fit keeps its scores, and no histogram.
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not [name for name in stored["state_dict"] if "histogram" in name]
    again = CorrSteer("demo", "demo", **options)
    data = TaskDataModule(**SMALL)
    make_trainer().validate(again, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert [f.score for f in again.selection.candidates] == [f.score for f in whole.selection.candidates]


def test_processes_merge_their_histograms(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.relu(torch.randn(60, 9, generator=generator)), torch.rand(60, generator=generator).round()
    shares = [Accumulator({0: 9}, ["max"], binned="max") for _ in range(2)]
    for rank, sums in enumerate(shares):
        sums.update(0, "max", x[rank::2], y[rank::2], torch.ones(30))
    buffers = [[buffer.clone() for sums in share.fresh.values() for buffer in sums.buffers()] for share in shares]
    places = iter(range(100))
    monkeypatch.setattr(
        "corrsteer_pl.methods.accumulation.sums.all_reduce_sum",
        lambda buffer: buffer.add_(buffers[1][next(places)]),
    )
    shares[0].merge()
    whole = Histogram(9)
    whole.update(x, y)
    assert torch.equal(shares[0].merged["layer0_histogram"].counts, whole.counts)
    assert torch.equal(shares[0].scores(0, "max", "mutual_information"), mutual_information(whole))


def test_only_scores_that_need_histograms_keep_them():
    assert not [name for name in Accumulator({0: 9}, ["max"]).merged if "histogram" in name]


@pytest.fixture(scope="module")
def contrast():
    return fit(MeanDifference("demo"))


def test_a_contrastive_vector_is_the_difference_of_means_over_hugging_faces_residuals(contrast):
    module, data = contrast
    steps, y = residuals_of_answers(module, data, layer=2)
    means = torch.stack([some.mean(0) for some in steps])
    right = torch.from_numpy(y > 0)
    expected = means[right].mean(0) - means[~right].mean(0)
    (f,) = [f for f in module.selection.candidates if f.layer == 2]
    torch.testing.assert_close(module.vectors_of([f])[Site(2, "resid_post")], expected, rtol=1e-3, atol=1e-4)
    assert f.mean_right - f.mean_wrong == pytest.approx(f.coefficient, rel=1e-6)
    assert f.correlation is None


def test_a_contrastive_vector_raises_the_reward_of_questions_that_were_held_out(contrast):
    module, _ = contrast
    make_trainer().test(module, datamodule=TaskDataModule(**{**SMALL, "test_size": 200}))
    assert module.metrics["difference"] > 0.1


def test_a_contrastive_fit_is_tested_and_reported_like_any_other(tmp_path):
    trainer = make_trainer(**saving(tmp_path))
    module, data = fit(MeanDifference("demo", rule="greedy", scale=[0.5, 1]), trainer=trainer, task="demo_refusal")
    again = MeanDifference("demo", rule="greedy", scale=[0.5, 1])
    trainer = make_trainer(**saving(tmp_path))
    trainer.test(again, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert again.steering_vectors().keys() == module.steering_vectors().keys()
    report_on([tmp_path])
    assert "nan" not in (tmp_path / "report.html").read_text(encoding="utf-8")


class Graded(Task):
    """Rewards that differ and are all above 0."""

    max_new_tokens = 1

    def example(self, row, id):
        return Example(id, row["text"], "")

    def reward(self, texts, examples):
        return [0.25 + 0.5 * (len(example.prompt) % 2) for example in examples]


def test_a_contrast_needs_wrong_answers(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": f"Question of the elder: {2**i}"} for i in range(40)])
    with pytest.raises(UserError, match="all .* rewards are above 0, so there are no wrong samples to differ from"):
        fit(
            MeanDifference("demo", layers=[0]),
            task=f"{__name__}.Graded",
            path=str(tmp_path / "rows.jsonl"),
        )
