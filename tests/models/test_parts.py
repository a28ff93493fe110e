"""Prompts are read a few at a time on a CPU; the answers and what is read do not depend on how many."""

import pytest
import torch

from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.decoding import decode
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae_loading import load_saes
from corrsteer_pl.models.sites import Site
from tests.architectures import NEW, PROMPTS, batch_of, hf_texts


def read(llm, saes, kinds, prompts):
    decoder, reader = Decoder(llm, NEW), PoolReader(saes, kinds)
    answers = decoder.generate(batch_of(llm, prompts), reader)
    return answers, {(layer, k): pool.value for layer, ks in reader.pools.items() for k, pool in ks.items()}


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("prefix", [0, 20])
def test_reading_in_parts_changes_nothing(llm, monkeypatch, tokens, prefix):
    saes, prompts = load_saes("demo", llm, [1, 3]), [[1, *range(30, 30 + prefix), *prompt[1:]] for prompt in PROMPTS]
    whole, pools = read(llm, saes, ["max", "mean"], prompts)
    monkeypatch.setattr(decode, "CPU_TOKENS", tokens)
    parts, found = read(llm, saes, ["max", "mean"], prompts)
    assert parts == whole == hf_texts(llm, batch_of(llm, prompts))
    for key, values in found.items():
        torch.testing.assert_close(values, pools[key], rtol=1e-4, atol=1e-4)


def test_each_part_is_one_forward_pass(llm, monkeypatch):
    sizes, batch = [], batch_of(llm, PROMPTS)
    Decoder(llm, 1).generate(batch)  # tries the model
    monkeypatch.setattr(decode, "CPU_TOKENS", 1)
    forward = LanguageModel.forward
    monkeypatch.setattr(
        LanguageModel,
        "forward",
        lambda self, ids, *args, **more: (sizes.append(tuple(ids.shape)), forward(self, ids, *args, **more))[1],
    )
    Decoder(llm, 1).generate(batch)
    prefill = batch.input_ids.shape[1] - 1
    assert sizes == [(1, prefill)] * len(PROMPTS) + [(len(PROMPTS), 1)]


def test_variants_after_reading_in_parts(llm, monkeypatch):
    variants = SteeringVectors.stack([{}, {Site(1, "resid_post"): 4 * torch.ones(128)}], Schedule())
    batch = batch_of(llm, PROMPTS)
    whole = Decoder(llm, NEW).compare(batch, variants)
    monkeypatch.setattr(decode, "CPU_TOKENS", 1)
    for branches in (True, False):
        assert Decoder(llm, NEW).compare(batch, variants, branches) == whole
    assert whole[0] != whole[1]
