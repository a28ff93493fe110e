"""The method as a LightningModule, from Python."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.methods.runs.files import RunFiles
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.models.sites import Site
from tests.conftest import make_sae, make_trainer, random_saes

SMALL = {"train_size": 120, "val_size": 40, "test_size": 60}


def fit(module=None, data=None, **trainer):
    module = module or CorrSteer("demo", "demo")
    data = data or TaskDataModule(**SMALL)
    trainer = make_trainer(**trainer)
    trainer.fit(module, datamodule=data)
    return module, data, trainer


@pytest.fixture(scope="module")
def fitted():
    return fit()


def summary(selection):
    return [(f.layer, f.index, f.sign) for f in selection.features], [(f.layer, f.index) for f in selection.candidates]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_change_the_selection(fitted, batch_size):
    module, _, _ = fit(data=TaskDataModule(**SMALL, batch_size=batch_size))
    assert summary(module.selection) == summary(fitted[0].selection)
    assert module.selection.samples == 120
    for one, other in zip(module.selection.candidates, fitted[0].selection.candidates, strict=True):
        # Padding changes float32 rounding inside the model, about 1e-6 relative.
        assert one.correlation == pytest.approx(other.correlation, abs=1e-4)
        assert one.coefficient == pytest.approx(other.coefficient, rel=1e-4)
        assert one.validation_reward == other.validation_reward


def test_correlations_equal_a_naive_computation_over_all_samples(fitted):
    from scipy import stats

    from corrsteer_pl.models.hooks import PoolReader

    module, data, _ = fitted
    layer, xs, ys = 2, [], []
    for example in data.examples["train"]:
        ids, mask = module.llm.left_pad([module.llm.token_ids(example.prompt)])
        reader = PoolReader({layer: module.saes[layer]}, ["max"])
        texts = module.answering.decoder.generate(
            type("Prompts", (), {"input_ids": ids, "attention_mask": mask}), reader
        )
        xs.append(reader.pools[layer]["max"].value[0].double())
        ys.append(data.task.reward(texts, [example])[0])
    x, y = torch.stack(xs).numpy(), torch.tensor(ys).numpy()
    for f in (f for f in module.selection.candidates if f.layer == layer):
        assert f.correlation == pytest.approx(stats.pearsonr(x[:, f.index], y).statistic, abs=1e-5)
        assert abs(f.coefficient) == pytest.approx(x[y > 0, f.index].mean(), rel=1e-5)
        assert f.active_wrong == pytest.approx((x[y == 0, f.index] > 0).mean())


@pytest.fixture
def planted(tmp_path, llm):
    """SAEs of noise, but for one feature at block 1 that fires when the model is about to answer with a letter.

    The direction is the difference of the mean residuals before letters and before sentences.
    """
    data = TaskDataModule(**SMALL)
    data.setup("fit")
    residuals, letter = [], []
    handle = Site(1, "resid_post").hook(llm.model, lambda h: residuals.append(h[0, -1].clone()))
    with torch.no_grad():
        for example in data.examples["train"]:
            token = llm.model(torch.tensor([llm.token_ids(example.prompt)])).logits[0, -1].argmax()
            letter.append(llm.tokenizer.decode(token).strip() in "ABCD")
    handle.remove()
    h, letter = torch.stack(residuals), torch.tensor(letter)
    assert 10 < letter.sum() < 110
    difference = h[letter].mean(0) - h[~letter].mean(0)
    unit, middle = difference / difference.norm(), (h[letter].mean(0) + h[~letter].mean(0)) / 2
    for layer in (0, 1):
        random_saes(tmp_path, [layer], seed=layer)
    W_enc = torch.randn(128, 24, generator=torch.Generator().manual_seed(5)) / 128**0.5
    W_dec, b_enc = W_enc.T.clone(), torch.zeros(24)
    W_enc[:, 17], W_dec[17], b_enc[17] = unit, unit * 3, -(unit @ middle)
    return make_sae(tmp_path, 1, W_enc, W_dec, b_enc)


def test_a_planted_feature_is_found_and_repairs_answers(planted):
    module, data, trainer = fit(CorrSteer("demo", str(planted), rule="global", sign="positive", check_alignment="off"))
    (feature,) = module.selection.features
    assert (feature.layer, feature.index) == (1, 17)
    assert feature.correlation > module.selection.null_max_correlation
    assert feature.validation_reward > module.selection.baseline_reward
    trainer.test(module, datamodule=data, verbose=False)
    assert module.metrics["difference"] > 0


def test_test_metrics_are_the_outcomes(fitted):
    module, data, trainer = fitted
    trainer.test(module, datamodule=data, verbose=False)
    assert [o.id for o in module.outcomes] == [e.id for e in data.examples["test"]]
    steered = [o.reward_steered for o in module.outcomes]
    assert module.metrics["reward_steered"] == pytest.approx(sum(steered) / 60)
    assert module.metrics["n"] == 60
    for o, example in zip(module.outcomes, data.examples["test"], strict=True):
        assert data.task.reward([o.answer_steered], [example]) == [o.reward_steered]


def test_scale_zero_changes_nothing_and_another_scale_does(fitted):
    module, data, trainer = fitted
    results = {}
    for scale in (0.0, 1.0, 3.0):
        module.hparams.scale = scale
        trainer.test(module, datamodule=data, verbose=False)
        results[scale] = [o.answer_steered for o in module.outcomes]
        if scale == 0:
            assert module.metrics["changed"] == 0
            assert module.metrics["side_effect_ratio"] is None
            assert results[scale] == [o.answer_baseline for o in module.outcomes]
    module.hparams.scale = 1.0
    assert results[3.0] != results[0.0]


def test_the_vectors_are_coefficients_times_directions(fitted):
    module, _, _ = fitted
    expected: dict = {}
    for f in module.selection.features:
        row = f.coefficient * module.saes[f.layer].sae.W_dec[f.index].cpu()
        expected[Site.parse(f.site)] = row
    vectors = module.steering_vectors()
    assert vectors.keys() == expected.keys()
    for site, vector in vectors.items():
        torch.testing.assert_close(vector, expected[site])


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ({"rule": "all"}, lambda s: all(f.validation_reward is None for f in s.features) and len(s.features) == 4),
        ({"rule": "global"}, lambda s: len(s.features) == 1),
        ({"rule": "layer", "layers": [3]}, lambda s: [f.layer for f in s.features] == [3]),
        ({"sign": "negative"}, lambda s: all(f.coefficient <= 0 and f.correlation < 0 for f in s.candidates)),
        ({"sign": "positive", "topk": 2}, lambda s: len(s.ranking) == 8 and len(s.candidates) == 4),
        ({"layers": [0, 2]}, lambda s: {f.layer for f in s.candidates} == {0, 2}),
        ({"site": "resid_pre"}, lambda s: all("resid_pre" in f.site for f in s.candidates)),
    ],
)
@pytest.mark.filterwarnings("ignore:the SAE blocks:UserWarning")  # forced to another site than they declare
def test_rules_signs_layers_and_sites(options, check):
    assert check(fit(CorrSteer("demo", "demo", **options))[0].selection)


def test_coefficients_have_a_pool_and_a_kind_of_their_own():
    data = {"task": "demo_refusal", **SMALL}
    same = fit(CorrSteer("demo", "demo", layers=[2]), TaskDataModule(**data))[0].selection.candidates
    mean = fit(CorrSteer("demo", "demo", layers=[2], coefficient_pool="mean"), TaskDataModule(**data))[0]
    active = fit(CorrSteer("demo", "demo", layers=[2], coefficient="active_mean"), TaskDataModule(**data))[0]
    for a, b, c in zip(same, mean.selection.candidates, active.selection.candidates, strict=True):
        assert a.index == b.index == c.index
        assert abs(b.coefficient) <= abs(a.coefficient) <= abs(c.coefficient)
    assert set(mean.sums.merged) == {"layer2_max", "layer2_mean"}


def test_the_order_of_samples_does_not_change_the_selection(tmp_path, fitted):
    # The same rows in two files, one turned round: seeded orders differ, the set is the same.
    data, selections = TaskDataModule(**SMALL), []
    data.setup("fit")
    for name, step in (("one", 1), ("other", -1)):
        for split in ("train", "validation", "test"):
            rows = [{"prompt": e.prompt, "a": e.gold} for e in data.examples[split]][::step]
            write_jsonl(tmp_path / name / f"{split}.jsonl", rows)
        options = {"answer": "a", "reward": "letter", "max_new_tokens": 1}
        module = fit(data=TaskDataModule("generic", str(tmp_path / name), options))[0]
        selections.append(summary(module.selection))
    assert selections[0] == selections[1]


def test_a_second_fit_starts_from_nothing():
    module, _, _ = fit()
    fit(module, TaskDataModule("demo_refusal", **SMALL))
    alone, _, _ = fit(data=TaskDataModule("demo_refusal", **SMALL))
    assert module.selection == alone.selection


def test_a_loaded_module_can_validate_again(tmp_path, fitted):
    module, _, trainer = fitted
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    loaded = CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt")
    make_trainer().validate(loaded, datamodule=TaskDataModule(**SMALL), verbose=False)
    assert loaded.selection == module.selection


def test_equal_rewards_between_zero_and_one_are_found(tmp_path, monkeypatch):
    data = TaskDataModule(**SMALL)
    monkeypatch.setattr(data.task, "reward", lambda texts, examples: [0.7] * len(texts))
    with pytest.raises(UserError, match="all 120 rewards are 0.7"):
        fit(data=data)
    monkeypatch.setattr(data.task, "reward", lambda texts, examples: [1.0])
    with pytest.raises(UserError, match="gave 1 rewards for 32 responses; give one for each"):
        fit(data=data)
    monkeypatch.setattr(data.task, "reward", lambda texts, examples: [float("nan")] * len(texts))
    with pytest.raises(UserError, match=r"the reward of demo_qa-train-\d+ is nan; .* lie between 0 and 1"):
        fit(data=data)


def test_validation_during_the_epoch_gives_snapshots():
    module, _, _ = fit(data=TaskDataModule(**SMALL, batch_size=10), val_check_interval=4)
    assert [s["samples"] for s in module.snapshots] == [40, 80, 120]
    assert module.snapshots[-1]["features"] == [[f.layer, f.index] for f in module.selection.features]


def test_one_pass_is_all_even_if_the_trainer_has_a_thousand_epochs():
    module, _, trainer = fit(max_epochs=1000)
    assert module.selection.samples == 120
    assert trainer.current_epoch == 1


def test_lightnings_own_checkpoints_are_written(tmp_path):
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    last = ModelCheckpoint(tmp_path / "epoch", monitor="val/best_candidate_reward", mode="max")
    fit(enable_checkpointing=True, callbacks=[every, last])
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]
    assert len(list((tmp_path / "epoch").glob("*.ckpt"))) == 1


def test_sanity_validation_before_any_training_is_harmless():
    assert fit(num_sanity_val_steps=2)[0].selection.samples == 120


def test_checkpoints_hold_no_weights_and_load_safely(tmp_path, fitted):
    module, data, trainer = fitted
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert all(key.startswith("sums.merged.layer") for key in checkpoint["state_dict"])
    assert (tmp_path / "x.ckpt").stat().st_size < 400_000
    loaded = CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.selection == module.selection
    for site, vector in module.steering_vectors().items():
        assert torch.equal(loaded.steering_vectors()[site], vector)
    again = make_trainer()
    again.test(loaded, datamodule=TaskDataModule(**SMALL), verbose=False)
    trainer.test(module, datamodule=data, verbose=False)
    assert again.lightning_module.metrics == module.metrics
    assert not loaded.saes, "testing needs no SAE"


def test_rule_and_sign_may_change_when_testing(tmp_path, fitted):
    module, _, trainer = fitted
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    best = CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt", rule="global").selection
    (feature,) = best.features
    assert feature.validation_reward == max(f.validation_reward for f in module.selection.candidates)
    left_out = [f for f in module.selection.features if f.layer != 2]
    with pytest.warns(UserWarning, match=f"{len(left_out)} of the .* steer nothing here .*{left_out[0].name}"):
        CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt", layers=[2])
    with pytest.warns(UserWarning, match="steer nothing here"):
        positive = CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt", rule="all", layers=[1]).selection
    assert [(f.layer, f.sign) for f in positive.features] == [(1, "positive")]
    with pytest.raises(UserError, match=r"layer 9 was not read by the fit, which has 0, 1, 2, 3"):
        CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt", layers=[9])
    with pytest.raises(UserError, match="model.pool is mean, but the checkpoint was fitted with max"):
        CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt", pool="mean")


def test_untested_candidates_cannot_be_pruned(tmp_path):
    _, _, trainer = fit(CorrSteer("demo", "demo", rule="all"))
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    with pytest.raises(UserError, match="needs tested candidates, but the checkpoint was fitted with rule all"):
        CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt", rule="foreach")


def test_a_checkpoint_of_another_model_or_sae_is_refused(tmp_path, fitted, llm):
    _, _, trainer = fitted
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    other = tmp_path / "other"
    changed = {name: tensor * 1.1 for name, tensor in llm.model.state_dict().items()}
    llm.model.save_pretrained(other, state_dict=changed)
    llm.tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=r"fitted on the model demo, but model.llm is .*other"):
        make_trainer().test(CorrSteer(str(other), "demo"), TaskDataModule(**SMALL), ckpt_path=tmp_path / "x.ckpt")
    saes = str(random_saes(tmp_path / "saes", [0, 1, 2, 3], d_sae=512))
    for run in ("test", "validate"):
        with pytest.raises(UserError, match=r"fitted with the SAEs demo .* but model.saes is .*saes"):
            getattr(make_trainer(), run)(
                CorrSteer("demo", saes), TaskDataModule(**SMALL), ckpt_path=tmp_path / "x.ckpt"
            )


def test_saes_that_changed_since_the_fit_are_refused(tmp_path):
    data, saes = TaskDataModule(**SMALL), random_saes(tmp_path / "saes", [1, 2])
    module, trainer = CorrSteer("demo", str(saes), check_alignment="off"), make_trainer()
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    random_saes(saes, [1, 2], seed=1)
    changed = CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="which differ"):
        make_trainer().validate(changed, datamodule=data)
    # A test needs none of them.
    make_trainer().test(CorrSteer.load_from_checkpoint(tmp_path / "x.ckpt"), datamodule=data, verbose=False)


def test_a_fit_goes_on_with_its_own_samples_and_precision_alone(tmp_path):
    rows = [{"prompt": f"Request: sing {i} songs\nResponse:", "a": ("Sure", "no")[i % 2]} for i in range(60)]
    task = {"task": "generic", "path": str(tmp_path / "rows.jsonl"), "batch_size": 8}
    task |= {"task_args": {"answer": "a", "reward": "contains", "max_new_tokens": 2}, "val_size": 8}

    def go_on(**model):
        checkpoint = tmp_path / "x.ckpt" if (tmp_path / "x.ckpt").exists() else None
        trainer = make_trainer()
        trainer.fit(CorrSteer("demo", "demo", layers=[1], **model), TaskDataModule(**task), ckpt_path=checkpoint)
        return trainer

    write_jsonl(tmp_path / "rows.jsonl", rows)
    go_on().save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    go_on()
    with pytest.raises(UserError, match="model.sae_dtype is bfloat16, but the checkpoint was fitted with float32"):
        go_on(sae_dtype="bfloat16")
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "prompt": row["prompt"].replace("sing", "play")} for row in rows])
    with pytest.raises(UserError, match="samples of the fit are no longer those that the checkpoint has counted"):
        go_on()


def test_the_same_model_elsewhere_is_recognised(tmp_path, fitted, llm):
    _, _, trainer = fitted
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    llm.model.save_pretrained(tmp_path / "moved")
    llm.tokenizer.save_pretrained(tmp_path / "moved")
    module = CorrSteer(str(tmp_path / "moved"), "demo")
    make_trainer().test(module, TaskDataModule(**SMALL), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert module.metrics["n"] == 60


def test_low_precision_models_keep_float64_sums():
    module, _, _ = fit(CorrSteer("demo", "demo", dtype="bfloat16"))
    assert module.llm.model.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float64 for buffer in module.sums.buffers())
    assert module.selection.samples == 120


def test_nothing_improves_is_a_result(fitted, tmp_path):
    module, data, _ = fitted
    worse = tuple(replace(f, validation_reward=0.0) for f in module.selection.candidates)
    stored = replace(module.selection, candidates=worse, features=())
    checkpoint_trainer = fitted[2]
    checkpoint_trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    checkpoint["corrsteer_pl"]["state"]["selection"] = stored.as_dict()
    torch.save(checkpoint, tmp_path / "y.ckpt")
    loaded = CorrSteer.load_from_checkpoint(tmp_path / "y.ckpt")
    make_trainer().test(loaded, datamodule=data, verbose=False)
    assert loaded.selection.features == ()
    assert loaded.metrics["changed"] == 0


def generic(tmp_path, gold, n=40):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Request: {i}\nResponse:", "a": gold} for i in range(n)])
    return TaskDataModule("generic", str(tmp_path / "rows.jsonl"), {"answer": "a", "reward": "contains"})


def test_equal_rewards_are_an_error_that_says_so(tmp_path):
    with pytest.raises(UserError, match="all 20 rewards are 0, so there is nothing to correlate with"):
        fit(data=generic(tmp_path, "never said"))


def test_prompts_longer_than_the_context_are_left_out(tmp_path):
    rows = [{"prompt": f"{i} sings", "a": "x", "id": f"row-{i}"} for i in range(60)]
    for i in (3, 7, 20):
        rows[i]["prompt"] += " very" * 5000
    write_jsonl(tmp_path / "rows.jsonl", rows)
    task_args = {"answer": "a", "reward": "tests.cli.test_arguments.half", "max_new_tokens": 2}
    data = TaskDataModule("generic", str(tmp_path / "rows.jsonl"), task_args)
    sentence = (
        r"the prompt of row-\d+ has \d+ tokens; with 2 new .* of demo \(4096\): \d of \d+ \w+ prompts are left out"
    )
    module = CorrSteer("demo", "demo", layers=[1], rule="all", check_alignment="off")
    with pytest.warns(UserWarning, match=sentence):
        _fit_and_test(module, data)
    longest = max(len(e.prompt) for examples in data.examples.values() for e in examples)
    assert longest < 100
    assert module.selection.samples + len(module.outcomes) >= 60 - 6 - 3


def _fit_and_test(module, data):
    _, _, trainer = fit(module, data)
    trainer.test(module, datamodule=data, verbose=False)


def test_prompts_that_are_all_too_long_are_an_error(tmp_path):
    rows = [{"prompt": f"{i}" + " very" * 5000, "a": "x", "id": f"row-{i}"} for i in range(20)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = TaskDataModule("generic", str(tmp_path / "rows.jsonl"), {"answer": "a"})
    with pytest.raises(UserError, match=r"exceeds the context of demo \(4096\), and so do all \w+ prompts"):
        fit(data=data)


def test_empty_prompts_are_named(tmp_path, llm):
    tokens = llm.token_ids("")
    assert tokens == [llm.tokenizer.bos_token_id], "BOS stands before every prompt, once"
    assert llm.token_ids("Where does").count(llm.tokenizer.bos_token_id) == 1


def test_bad_settings_are_explained(tmp_path, hub):
    with pytest.raises(UserError, match="model.rule is layer, but model.layers is None. Name one layer"):
        CorrSteer("demo", "demo", rule="layer")
    with pytest.raises(UserError, match="model.sign is 'pos'; choose one of both, positive, negative"):
        CorrSteer("demo", "demo", sign="pos")
    with pytest.raises(UserError, match="model.topk is 0"):
        CorrSteer("demo", "demo", topk=0)
    for options, sentence in (
        ({"topm": 0}, "model.topm is 0; it is a number of features from 1 to model.topk, which is 10"),
        ({"topm": 3, "topk": 2}, "model.topm is 3; .* from 1 to model.topk, which is 2"),
        ({"min_improvement": -0.1}, "model.min_improvement is -0.1; it is a difference of rewards"),
        ({"significance_level": 0.0}, "model.significance_level is 0.0; it is a p-value above 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            CorrSteer("demo", "demo", **options)
    with pytest.raises(UserError, match="model.positions is 'here'; choose one of generated, all"):
        CorrSteer("demo", "demo", positions="here")
    with pytest.raises(UserError, match="model.first_k is 0"):
        CorrSteer("demo", "demo", first_k=0)
    with pytest.raises(UserError, match=r"model.decay is 1.5; it is a factor"):
        CorrSteer("demo", "demo", decay=1.5)
    with pytest.raises(UserError, match="model.candidate_batch_size is 0"):
        CorrSteer("demo", "demo", candidate_batch_size=0)
    with pytest.raises(UserError, match="model.candidate_batch_size is 'x'; it is a number of candidates"):
        CorrSteer("demo", "demo", candidate_batch_size="x")
    with pytest.raises(UserError, match="model.dtype is 'int4'; choose one of float32, bfloat16, float16"):
        fit(CorrSteer("demo", "demo", dtype="int4"))
    with pytest.raises(UserError, match="'nowhere' could not be loaded as a causal language model"):
        fit(CorrSteer("nowhere", "demo"))
    with pytest.raises(UserError, match="every_n_train_steps is 0"):
        RunFiles(every_n_train_steps=0)


def test_trainers_under_which_the_sums_would_be_wrong_are_refused():
    with pytest.raises(
        UserError, match=r"precision is bf16-true.* set the language model's own precision with model.dtype"
    ):
        fit(precision="bf16-true")
    with pytest.raises(UserError, match="needs datamodule=TaskDataModule"):
        make_trainer().fit(CorrSteer("demo", "demo"), train_dataloaders=[1], val_dataloaders=[1])


@pytest.mark.parametrize("option", ["limit_train_batches", "limit_val_batches", "max_epochs"])
def test_fits_without_a_step_are_refused(option):
    with pytest.raises(UserError, match=f"--trainer.{option} is 0, which leaves nothing to do"):
        fit(**{option: 0})


def test_validating_before_fitting_is_an_error():
    with pytest.raises(UserError, match="has not been fitted"):
        make_trainer().validate(CorrSteer("demo", "demo"), datamodule=TaskDataModule(**SMALL))


def test_predictions_are_not_judged(fitted, monkeypatch):
    module, data, _ = fitted
    monkeypatch.setattr(type(data.task), "reward", lambda *_: pytest.fail("judged"))
    monkeypatch.setattr(type(data.task), "load", lambda *_: pytest.fail("a judge was loaded"))
    make_trainer().predict(module, datamodule=data, return_predictions=False)
    assert len(module.predictions) == 60


def test_testing_before_fitting_is_an_error():
    with pytest.raises(UserError, match="has not been fitted: there is no selection"):
        make_trainer().test(CorrSteer("demo", "demo"), TaskDataModule(**SMALL))
    with pytest.raises(UserError, match="not written by corrsteer_pl"):
        CorrSteer("demo", "demo").on_load_checkpoint({"state_dict": {}})


def test_sorting_by_length_changes_padding_alone():
    found = []
    for sort in (True, False):
        module, data, trainer = fit(data=TaskDataModule("demo_refusal", **SMALL, batch_size=8, sort_by_length=sort))
        trainer.test(module, datamodule=data, verbose=False)
        found.append((module, module.outcomes, data))
    (one, sorted_outcomes, _), (other, outcomes, data) = found
    assert [o.id for o in sorted_outcomes] == [example.id for example in data.examples["test"]]
    assert sorted_outcomes == outcomes
    assert summary(one.selection) == summary(other.selection)
    for a, b in zip(one.selection.candidates, other.selection.candidates, strict=True):
        assert a.correlation == pytest.approx(b.correlation, abs=1e-4)
        assert a.validation_reward == b.validation_reward


def test_saes_in_low_precision_find_the_same_features():
    exact = fit(CorrSteer("demo", "demo", layers=[2], rule="all"))[0].selection.candidates
    module = fit(CorrSteer("demo", "demo", layers=[2], rule="all", sae_dtype="bfloat16"))[0]
    assert module.saes[2].sae.W_enc.dtype == torch.bfloat16
    assert [f.index for f in module.selection.candidates] == [f.index for f in exact]
    assert [f.correlation for f in module.selection.candidates] == pytest.approx(
        [f.correlation for f in exact], abs=0.05
    )
    with pytest.raises(UserError, match="model.sae_dtype is 'int8'; choose one of"):
        load_saes("demo", module.llm, dtype="int8")


def test_steering_of_the_prompt_warns_that_prompts_are_read_again():
    module, data = CorrSteer("demo", "demo", layers=[1], positions="all"), TaskDataModule(train_size=48, val_size=8)
    with pytest.warns(UserWarning, match="model.positions is all, .* each variant reads every prompt again"):
        make_trainer().fit(module, datamodule=data)
