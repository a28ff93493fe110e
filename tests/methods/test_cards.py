"""Cards of features, against naive loops over all samples."""

import numpy as np
import pytest
import torch
from scipy import stats

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.methods.accumulation import strongest as strongest_module
from corrsteer_pl.methods.accumulation.strongest import KEPT, Strongest
from corrsteer_pl.methods.runs.cards import fisher_interval
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.lens import logit_lens
from tests.architectures import batch_of
from tests.conftest import make_trainer

SMALL = {"train_size": 150, "val_size": 30, "test_size": 20}


def fit(data=None, **options):
    module = CorrSteer("demo", "demo", **{"layers": [1, 2], "rule": "all", **options})
    make_trainer().fit(module, datamodule=data or TaskDataModule(**SMALL))
    return module


@pytest.fixture(scope="module")
def fitted():
    return fit()


def activations(n=90, features=20):
    x = torch.relu(torch.randn(n, features, generator=torch.Generator().manual_seed(0)))
    x = (2 * x).round() / 2  # many are equal
    x[:, 3] = 0
    x[5:, 4] = 0
    return x


@pytest.mark.parametrize(("batch_size", "processes"), [(90, 1), (1, 1), (7, 1), (7, 3)])
def test_the_strongest_samples_are_exact_whatever_the_batches_and_processes(monkeypatch, batch_size, processes):
    x = activations()
    ranks = [Strongest({2: 20}) for _ in range(processes)]
    # Prompts are sorted by length, so that rows come in any order.
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    for i, rows in enumerate(order.split(batch_size)):
        filled = torch.cat([x[rows], torch.full((1, 20), 99.0), torch.full((1, 20), torch.nan)])
        weight = torch.tensor([1.0] * len(rows) + [0.0, 1.0])
        ranks[i % processes].add(2, filled, [*rows.tolist(), 0, 1], weight)
    monkeypatch.setattr(strongest_module, "gather_lists", lambda mine: [{2: (r.values[2], r.rows[2])} for r in ranks])
    merged = Strongest({2: 20})
    merged.restore(ranks[0].state(), rank=0)
    monkeypatch.undo()
    from corrsteer_pl.selection import Feature

    features = [Feature(2, "", i, "positive", 1, 1, 1, 1, 1, 1, 1) for i in range(20)]
    for i, found in enumerate(merged.of(features)):
        naive = sorted((row for row in range(90) if x[row, i] > 0), key=lambda row: (-x[row, i].item(), row))[:KEPT]
        assert found == [(x[row, i].item(), row) for row in naive]
    idle = Strongest({2: 20})
    idle.restore(ranks[0].state(), rank=1)
    assert idle.of(features) == [[]] * 20


def test_snippets_are_of_the_samples_on_which_a_feature_was_strongest(fitted):
    data = fitted.datamodule
    decoder, features = fitted.fit_answering.decoder, fitted.selection.features
    assert [card["name"] for card in fitted.cards] == [f.name for f in features]
    pooled, rewards = {layer: [] for layer in (1, 2)}, []
    for example in data.examples["train"]:
        reader = PoolReader(fitted.saes, ["max"])
        texts = decoder.generate(batch_of(fitted.llm, [data.token_ids(example, data.fit_task)]), reader)
        rewards += data.fit_task.reward(texts, [example])
        for layer in pooled:
            pooled[layer].append(reader.pools[layer]["max"].value[0])
    for f, card in zip(features, fitted.cards, strict=True):
        values = torch.stack(pooled[f.layer])[:, f.index]
        best = values.sort(descending=True).values[:KEPT]
        assert [s["value"] for s in card["snippets"]] == pytest.approx([v for v in best.tolist() if v > 0], rel=1e-4)
        for s in card["snippets"]:
            row = int((values - s["value"]).abs().argmin())
            assert s["reward"] == rewards[row]
            assert data.examples["train"][row].prompt.endswith((s["before"] + s["token"])[-20:])
        interval = stats.pearsonr(values.numpy(), np.array(rewards)).confidence_interval()
        assert (card["ci_low"], card["ci_high"]) == pytest.approx(tuple(interval), abs=1e-4)


def test_cosines_and_tokens_are_those_of_the_vectors_as_they_steer(fitted, llm):
    vectors = {f.name: f.coefficient * fitted.directions[f.name] for f in fitted.selection.features}
    head = llm.model.get_output_embeddings().weight
    for card in fitted.cards:
        vector = vectors[card["name"]]
        expected = {n: (v @ vector / v.norm() / vector.norm()).item() for n, v in vectors.items() if n != card["name"]}
        assert card["cosines"] == pytest.approx(expected, abs=1e-5)
        assert card["likelier"][0] == llm.tokenizer.decode([int((head @ vector).argmax())])
        assert card["unlikelier"][0] == llm.tokenizer.decode([int((head @ vector).argmin())])


def test_the_lens_finds_a_tokens_own_direction(llm):
    head = llm.model.get_output_embeddings().weight
    best, worst = logit_lens(llm, head[300], 3)
    assert best[0] == llm.tokenizer.decode([int((head @ head[300]).argmax())])
    assert len(best) == len(worst) == 3


def test_texts_that_are_only_read_have_snippets_too(tmp_path):
    rows = [
        {"text": f"{'The miller lives on the hill' if i % 2 else 'Response: Sorry'} {i}", "label": str(i % 2)}
        for i in range(60)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = TaskDataModule("text_classification", str(tmp_path / "rows.jsonl"), {"positive": ["1"]})
    module = fit(data, layers=[1])
    (card,) = module.cards
    assert card["snippets"]
    text = card["snippets"][0]
    assert any(text["before"] + text["token"] + text["after"] in f"<s>{row['text']}" for row in rows)


@pytest.mark.parametrize(("r", "n"), [(0.3, 50), (-0.8, 10), (0.0, 4000)])
def test_the_interval_is_fishers(r, n):
    generator = np.random.default_rng(0)
    x, noise = generator.normal(size=(2, n))
    result = stats.pearsonr(x, r * x + np.sqrt(1 - r * r) * noise)
    assert fisher_interval(result.statistic, n) == pytest.approx(tuple(result.confidence_interval()), abs=1e-9)


def test_the_interval_of_few_samples_says_nothing():
    assert fisher_interval(0.5, 3) == (-1.0, 1.0)
