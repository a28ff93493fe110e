"""Texts with labels: read, not continued."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.naive_bayes import GaussianNB

from corrsteer_pl import CorrSteer, TaskDataModule, demo
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import read_rows, write_jsonl
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.methods.answers.answering import ProbeReading
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.models.sites import Site
from corrsteer_pl.stats import Moments, Probe
from corrsteer_pl.tasks import make_task
from tests.conftest import make_trainer

TEXTS = ["Garin the baker sings.", "Tell me", "Show me how to howl at the old shepherd on market day."]


def test_rows_hold_one_text_or_several():
    task = make_task("text_classification", {"positive": ["neutral"], "group": "kind"})
    (example,) = task.examples({"text": "A nurse.", "label": "neutral", "kind": "job"}, "r")
    assert (example.id, example.prompt, example.gold, example.groups) == (
        "r",
        "A nurse.",
        "positive",
        ("job", "positive"),
    )
    stereo = {"text": "s.sentence", "label": "s.gold", "positive": [1], "negative": [0]}
    task = make_task("text_classification", stereo)
    found = task.examples({"s": {"sentence": ["a", "b", "c"], "gold": [2, 1, 0]}}, "r")
    assert [(e.id, e.prompt, e.gold) for e in found] == [("r/1", "b", "positive"), ("r/2", "c", "negative")]
    assert task.reward(["", "said"], found) == [1, 0]
    with pytest.raises(UserError, match="row r has 2 texts, but not as many labels"):
        task.examples({"s": {"sentence": ["a", "b"], "gold": [1]}}, "r")
    with pytest.raises(UserError, match="data.task_args.positive is 'x'; it takes a list"):
        make_task("text_classification", {"positive": "x"})


def batch_of(llm, texts):
    ids, mask = llm.left_pad([llm.token_ids(text) for text in texts])
    return SimpleNamespace(input_ids=ids, attention_mask=mask)


def pooled(llm, saes, texts, kinds=("max", "mean")):
    reader = PoolReader(saes, kinds)
    Decoder(llm, 1).read(batch_of(llm, texts), reader)
    return {kind: reader.pools[1][kind].value for kind in kinds}


def test_activations_are_pooled_over_the_texts_own_tokens(llm):
    saes = load_saes("demo", llm, [1])
    together = pooled(llm, saes, TEXTS)
    for i, text in enumerate(TEXTS):
        residuals = []
        handle = Site(1, "resid_post").hook(llm.model, lambda h, found=residuals: found.append(h[0]))
        llm.model(torch.tensor([llm.token_ids(text)]))
        handle.remove()
        naive = saes[1].encode(residuals[0])[1:]  # without BOS
        # Padding changes float32 rounding inside the model.
        torch.testing.assert_close(together["max"][i], naive.max(0).values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together["mean"][i], naive.mean(0), rtol=1e-4, atol=1e-4)


def test_the_probe_is_naive_bayes_with_equal_variances():
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(300, generator=generator) < 0.5).double()
    x = torch.randn(300, 1, generator=generator) + 1.5 * y[:, None]
    moments = Moments(1)
    moments.update(x, y)
    probability = Probe.fit(moments, [0]).probability(x).numpy()
    # sklearn's variances differ between the classes; with the pooled one and equal priors it is the same.
    bayes = GaussianNB(priors=[0.5, 0.5], var_smoothing=0).fit(x.numpy(), y.numpy())
    within = np.average(bayes.var_.ravel(), weights=bayes.class_count_)
    bayes.var_ = np.full_like(bayes.var_, within)
    np.testing.assert_allclose(probability, bayes.predict_proba(x.numpy())[:, 1], atol=1e-9)
    with pytest.raises(ValueError, match="a probe needs a feature"):
        Probe.fit(moments, [])


def test_a_probe_compares_variants_whatever_their_grouping(llm):
    saes = load_saes("demo", llm, [0, 3])
    active = pooled(llm, {1: saes[3]}, TEXTS)["max"].sum(0).topk(2).indices.tolist()
    probe = Probe(active, torch.tensor([1.0, -1.0]).double(), torch.tensor([0.2, 0.1]).double())
    reading = ProbeReading(probe, saes[3], "max")
    vectors = [{}, {Site(0, "resid_post"): 3 * saes[0].direction(5)}, {Site(0, "resid_post"): -saes[0].direction(9)}]
    variants = SteeringVectors.stack(vectors, Schedule("all"))
    batch = batch_of(llm, TEXTS)
    together = reading.probabilities(Decoder(llm, 1, candidate_batch_size=8), batch, variants)
    alone = reading.probabilities(Decoder(llm, 1, candidate_batch_size=1), batch, variants)
    assert len(together) == len(alone) == 3
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    reader = PoolReader({0: saes[3]}, ["max"])
    Decoder(llm, 1).read(batch, reader)
    torch.testing.assert_close(together[0], probe.probability(reader.pools[0]["max"].value))
    assert (together[1] - together[0]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    """Requests of the embedded world as texts, labelled harmful or not."""
    folder = tmp_path_factory.mktemp("texts")
    for split in ("train", "validation", "test"):
        rows = read_rows(demo.DATA / "demo_refusal" / f"{split}.jsonl")[:400]
        write_jsonl(folder / f"{split}.jsonl", [{"text": row["prompt"], "label": int(row["harmful"])} for row in rows])
    return str(folder)


def test_texts_give_candidates_that_a_generation_task_validates(requests):
    fit_on = {"task": "text_classification", "path": requests}
    sizes = {"train_size": 200, "val_size": 40, "test_size": 40}
    data = TaskDataModule("demo_refusal", fit_on=fit_on, **sizes)
    module = CorrSteer("demo", "demo")
    trainer = make_trainer()
    trainer.fit(module, datamodule=data)
    labels = [example.gold == "positive" for example in data.examples["train"]]
    assert module.selection.samples == 200
    assert module.selection.reward == pytest.approx(sum(labels) / 200)
    assert {example.prompt[:8] for example in data.examples["validation"]} == {"Request:"}
    best = max(module.selection.candidates, key=lambda f: abs(f.correlation))
    assert abs(best.correlation) > module.selection.null_max_correlation
    assert 0 < module.selection.baseline_reward < 1
    trainer.test(module, datamodule=data, verbose=False)
    assert module.metrics["n"] == 40


def test_texts_alone_are_validated_by_a_probe(requests, tmp_path):
    data = TaskDataModule("text_classification", requests, train_size=200, val_size=40, test_size=40)
    module = CorrSteer("demo", "demo", layers=[0, 3])
    trainer = make_trainer()
    trainer.fit(module, datamodule=data)
    # What goes with the label, added to every token, makes the label more probable.
    assert module.selection.features
    trainer.test(module, datamodule=data, verbose=False)
    fitted = module.metrics
    assert fitted["reward_steered"] > fitted["reward_baseline"] + 0.05
    assert fitted["groups"]["positive"]["reward_baseline"] > fitted["groups"]["negative"]["reward_baseline"]
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    again, trainer = CorrSteer("demo", "demo", layers=[0, 3]), make_trainer()
    trainer.test(again, datamodule=data, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert again.metrics == fitted
    steered = CorrSteer("demo", "demo", layers=[0, 3], scale=0)
    trainer.test(steered, datamodule=data, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert steered.metrics["difference"] == 0


def test_reversed_labels_are_reversed_once(requests):
    data = TaskDataModule("text_classification", requests, train_size=200, val_size=40, test_size=40, reverse=True)
    module, trainer = CorrSteer("demo", "demo", layers=[0, 3]), make_trainer()
    trainer.fit(module, datamodule=data)
    # What goes with the absence of the label, added to every token, makes its absence more probable.
    assert module.selection.features
    trainer.test(module, datamodule=data, verbose=False)
    m = module.metrics
    assert m["reward_steered"] > m["reward_baseline"] + 0.05
    assert m["groups"]["negative"]["reward_baseline"] > m["groups"]["positive"]["reward_baseline"]
    # The texts still say how probable the label is.
    for outcome in module.outcomes:
        assert float(outcome.answer_baseline) == pytest.approx(1 - outcome.reward_baseline, abs=1e-4)


def test_a_probe_has_to_be_fitted(requests, tmp_path):
    module, trainer = CorrSteer("demo", "demo", layers=[1]), make_trainer()
    trainer.fit(module, datamodule=TaskDataModule(train_size=96, val_size=20, test_size=20))
    with pytest.raises(UserError, match="the checkpoint has no probe for probability of the label 1 by a probe"):
        trainer.test(module, datamodule=TaskDataModule("text_classification", requests, test_size=10))
    with pytest.raises(UserError, match="data.fit_on has texts. Leave it out"):
        TaskDataModule(fit_on={"task": "text_classification", "path": requests}, shots=1)
    with pytest.raises(UserError, match="data.fit_on has no option 'tusk'; it takes task, path"):
        TaskDataModule(fit_on={"tusk": "x"})
    with pytest.raises(UserError, match="data.fit_on names no task"):
        TaskDataModule(fit_on={"path": "x"})


def test_texts_to_fit_on_are_not_divided_and_rows_stay_together(tmp_path):
    rows = [{"texts": [f"{i} a", f"{i} b", f"{i} c"], "labels": [1, 0, 2]} for i in range(50)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {"text": "texts", "label": "labels", "positive": [1], "negative": [0]}
    fit_on = {"task": "text_classification", "path": str(tmp_path / "rows.jsonl"), "task_args": options}
    data = TaskDataModule(fit_on=fit_on, val_size=10, test_size=10)
    data.setup("fit")
    assert len(data.examples["train"]) == 100
    alone = TaskDataModule("text_classification", str(tmp_path / "rows.jsonl"), options)
    alone.setup("fit")
    found = [{example.prompt.split()[0] for example in examples} for examples in alone.examples.values()]
    assert [len(numbers) for numbers in found] == [25, 5, 20]
    assert not found[0] & found[1] | found[0] & found[2] | found[1] & found[2]
    with pytest.raises(
        UserError, match=r"data.task_args.positive wants labels 'True', which no row has.*put text into quotes"
    ):
        TaskDataModule("text_classification", str(tmp_path / "rows.jsonl"), {**options, "positive": [True]}).setup(
            "fit"
        )
