"""The permuted rewards and the halves of a fit: exact whatever the batches, the processes and the interruptions."""

import numpy as np
import pytest
import torch
from scipy import stats

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.data.batches import Batch
from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.accumulation import blocks as blocks_module
from corrsteer_pl.methods.accumulation.blocks import Blocks, SparseRows
from corrsteer_pl.methods.runs.files import RunFiles
from tests.conftest import make_trainer

SMALL = {"train_size": 150, "val_size": 20, "test_size": 20}
KEY = (0, "max")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 40 samples."""
    for module in (blocks_module, __import__("corrsteer_pl.data.module", fromlist=["BUCKET"])):
        monkeypatch.setattr(module, "BUCKET", 40)


def fit(data=None, run=None, ckpt_path=None, trainer=None, **options):
    module = CorrSteer("demo", "demo", layers=[1, 2], **options)
    saved = {} if run is None else {"callbacks": [RunFiles(every_n_train_steps=1)], "enable_checkpointing": True}
    trainer = make_trainer(default_root_dir=run, **saved, **(trainer or {}))
    trainer.fit(module, datamodule=TaskDataModule(**{**SMALL, **(data or {})}), ckpt_path=ckpt_path)
    return module


def samples(n=100, features=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.relu(torch.randn(n, features, generator=generator) - 0.5)
    return x, (torch.rand(n, generator=generator) < 0.4).double()


def batch_of(rows, counted, fillers=0):
    weight = torch.tensor([1.0] * len(rows) + [0.0] * fillers)
    rows = [*rows, *rows[-1:] * fillers]
    return Batch(torch.zeros(1), torch.zeros(1), weight, [], rows, counted)


def dealt(x, y, batch_size, processes=1, seed=3, **options):
    """All blocks of samples that several processes take in turn, as x, y and permuted rewards in order of the rows."""
    ranks = [Blocks(6, seed=seed, **options) for _ in range(processes)]
    everyone = [(row, y[row].item()) for row in range(len(y))]
    found, start = [], 0

    def gather(pairs):
        known = {row // blocks_module.BUCKET for row, _ in pairs}
        return [pair for pair in everyone if pair[0] // blocks_module.BUCKET in known]

    with pytest.MonkeyPatch.context() as patch:
        if processes > 1:
            patch.setattr(blocks_module, "gather_lists", gather)
        while start < len(y):
            counted = min(start + batch_size * processes, len(y))
            for rank, some in enumerate(ranks):
                rows = list(range(start, counted))[rank * batch_size : (rank + 1) * batch_size]
                if rows:
                    some.add(batch_of(rows, counted, fillers=1), {KEY: x[[*rows, rows[-1]]]}, y[[*rows, rows[-1]]])
            found += [block for some in ranks for block in some.finished(counted) if block.rows]
            start = counted
        found += [block for some in ranks for block in some.unfinished(len(y)) if block.rows]
    order = torch.tensor([row for block in found for row in block.rows]).argsort()
    return tuple(
        torch.cat(parts, -1 if name == "permuted" else 0)[..., order] if name != "x" else torch.cat(parts)[order]
        for name, parts in {
            "x": [block.activations(KEY).to_dense() for block in found],
            "y": [block.y for block in found],
            "permuted": [block.permuted for block in found],
        }.items()
    )


def test_sparse_rows_are_the_same_dense():
    x, _ = samples()
    x[3] = 0
    x[4, 5] = torch.nan
    torch.testing.assert_close(SparseRows.of(x).matrix().to_dense(), x, equal_nan=True)


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (7, 1), (100, 1), (8, 2), (3, 3), (25, 4)])
@pytest.mark.parametrize("deal", [False, True])
def test_neither_batches_nor_processes_change_who_gets_which_reward(small_blocks, batch_size, processes, deal):
    x, y = samples()
    reference = dealt(x, y, 10, deal=deal)
    found = dealt(x, y, batch_size, processes, deal=deal)
    for one, other in zip(reference, found, strict=True):
        assert torch.equal(one, other)


def test_every_permutation_keeps_the_rewards_of_its_block(small_blocks):
    x, y = samples()
    again, own, permuted = dealt(x, y, 10)
    assert torch.equal(again, x)
    assert torch.equal(own, y)
    for rewards in permuted:
        assert not torch.equal(rewards, y)
        for start in (0, 40, 80):
            some = slice(start, start + 40)
            assert torch.equal(rewards[some].sort().values, y[some].sort().values)
    _, shuffled, _ = dealt(x, y, 10, deal=True)
    assert not torch.equal(shuffled, y)
    assert torch.equal(shuffled[:40].sort().values, y[:40].sort().values)


def test_a_checkpoint_within_a_block_goes_on_as_if_nothing_had_happened(small_blocks):
    x, y = samples(60)
    whole, first, second = (Blocks(4, seed=1) for _ in range(3))
    for some in (whole, first):
        for start in (0, 25):
            rows = list(range(start, start + 25))
            some.add(batch_of(rows, start + 25), {KEY: x[rows]}, y[rows])
            some.finished(start + 25)
    second.restore(first.state(), rank=0)
    assert second.size == first.size > 0
    idle = Blocks(4, seed=1)
    idle.restore(first.state(), rank=1)
    assert idle.size == 0
    for some in (whole, second):
        some.add(batch_of(list(range(50, 60)), 60), {KEY: x[50:]}, y[50:])
    (a,), (b,) = whole.unfinished(60), second.unfinished(60)
    assert a.rows == b.rows == list(range(40, 60))
    assert torch.equal(a.permuted, b.permuted)
    assert torch.equal(a.activations(KEY).to_dense(), b.activations(KEY).to_dense())


def test_batch_size_does_not_change_what_chance_finds(small_blocks):
    one, other = fit(permutations=20), fit({"batch_size": 13}, permutations=20)
    # Padding changes float32 rounding inside the model, about 1e-6 relative.
    np.testing.assert_allclose(one.selection.null_maxima, other.selection.null_maxima, atol=1e-5)
    assert one.selection.overlap == pytest.approx(other.selection.overlap, abs=0.02)
    assert [f.stability for f in one.selection.candidates] == [f.stability for f in other.selection.candidates]


@pytest.mark.parametrize("control", ["none", "shuffled_rewards"])
def test_an_interrupted_fit_finds_the_same(small_blocks, tmp_path, control):
    options = {"permutations": 20, "control": control}
    whole = fit({"batch_size": 10}, tmp_path / "whole", **options)
    fit({"batch_size": 10}, tmp_path / "cut", trainer={"max_steps": 7}, **options)
    checkpoint = tmp_path / "cut/last.ckpt"
    stored = torch.load(checkpoint, weights_only=True)
    assert any(name.startswith("search.sums.") for name in stored["state_dict"])
    again = fit({"batch_size": 10}, tmp_path / "cut", ckpt_path=checkpoint, **options)
    if control == "none":
        # A control that was stopped in the middle of a block has dealt the rewards of that half among themselves.
        assert again.selection == whole.selection
    assert again.selection.samples == 150
    finished = torch.load(checkpoint, weights_only=True)
    assert not any(name.startswith("search.sums.") for name in finished["state_dict"])
    # It has nothing more to do, and still says the same.
    once_more = fit({"batch_size": 10}, tmp_path / "cut", ckpt_path=checkpoint, **options)
    assert once_more.selection == again.selection


class Watched(CorrSteer):
    """A fit that keeps what it pools."""

    def begin(self):
        super().begin()
        self.seen = []

    def accumulate(self, batch, reader, rewards):
        super().accumulate(batch, reader, rewards)
        real = batch.weight.bool()
        self.seen.append((torch.cat([p["max"].value for p in reader.pools.values()], 1)[real], rewards[real]))


def test_the_null_agrees_with_a_permutation_test_made_offline():
    module = Watched("demo", "demo", layers=[1, 2], permutations=300)
    make_trainer().fit(module, datamodule=TaskDataModule(**SMALL))
    x, y = (torch.cat(parts).double().numpy() for parts in zip(*module.seen, strict=True))
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1) / len(y)
    y = (y - y.mean()) / y.std()
    generator = np.random.default_rng(0)
    offline = [np.abs(generator.permutation(y) @ x).max() for _ in range(2000)]
    # Two samples of one distribution.
    assert stats.ks_2samp(module.selection.null_maxima, offline).pvalue > 0.01
    for f in module.selection.candidates:
        expected = (1 + sum(m >= abs(f.correlation) for m in offline)) / 2001
        assert f.search_p_value == pytest.approx(expected, abs=0.05)
    assert f"{len(module.selection.null_maxima)} permutations" in module.tables()[0].caption


def test_shuffled_rewards_find_nothing_and_say_so():
    module = fit({"train_size": 300}, control="shuffled_rewards")
    assert all(f.like_chance for f in module.selection.candidates)
    assert "No candidate correlates more than chance" in module.tables()[0].caption
    true = fit({"train_size": 300})
    assert module.selection.reward == pytest.approx(true.selection.reward)
    assert min(f.search_p_value for f in true.selection.candidates) == pytest.approx(1 / 33)
    assert max(module.selection.overlap.values()) < min(true.selection.overlap.values())


def test_sums_of_shuffled_rewards_are_those_of_the_same_activations(small_blocks):
    module = Watched("demo", "demo", layers=[1], control="shuffled_rewards", permutations=19)
    make_trainer().fit(module, datamodule=TaskDataModule(**SMALL, sort_by_length=False))
    x, y = (torch.cat(parts).double() for parts in zip(*module.seen, strict=True))
    _, wrong, _ = dealt(x, y, 10, seed=0, deal=True)
    moments = module.sums.moments(1, "max")
    assert moments.n == 150
    assert moments.y == y.sum()
    torch.testing.assert_close(moments.xx, x.square().sum(0))
    torch.testing.assert_close(moments.xy, wrong @ x)
    assert not torch.allclose(moments.xy, y @ x)


def test_random_features_have_the_coefficients_of_those_that_they_replace():
    true, module = fit(), fit(control="random_features")
    for f, g in zip(true.selection.candidates, module.selection.candidates, strict=True):
        assert (f.layer, f.sign, f.coefficient) == (g.layer, g.sign, g.coefficient)
    assert [f.index for f in true.selection.candidates] != [f.index for f in module.selection.candidates]
    assert true.selection.ranking == module.selection.ranking


def test_halves_say_nothing_of_candidates_that_are_not_ranked_by_correlation():
    module = fit(score="mean_difference")
    assert all(f.stability is None and f.search_p_value is not None for f in module.selection.candidates)


def test_without_permutations_there_is_no_p_value():
    module = fit(permutations=0)
    assert all(f.search_p_value is None and f.stability is not None for f in module.selection.candidates)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"permutations": -1}, "model.permutations is -1"),
    ({"permutations": 18}, "it is 0 for none, or a number from 19, with which a p-value can be 0.05, to 1000."),
    ({"permutations": 1001}, "model.permutations is 1001"),
    ({"control": "placebo"}, "model.control is 'placebo'; choose one of none, shuffled_rewards, random_features"),
])  # fmt: skip
def test_options_that_cannot_be_are_told(options, sentence):
    with pytest.raises(UserError, match=sentence):
        CorrSteer("demo", "demo", **options)
