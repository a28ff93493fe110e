"""Interventions whose variants cannot stand side by side in a batch: one edited weight at a time."""

from contextlib import contextmanager

import pytest
import torch

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.sae_loading import load_saes
from tests.architectures import NEW, batch_of, hf_texts
from tests.conftest import random_saes


class EditedWeight:
    """Variants that each multiply every other row of one weight by a factor."""

    most_together = 1

    def __init__(self, parameter, factors, changes_prompt=True):
        self.parameter, self.factors, self.changes_prompt = parameter, factors, changes_prompt

    def __len__(self):
        return len(self.factors)

    def described(self, variant):
        return None if self.factors[variant] == 1 else f"a weight times {self.factors[variant]}"

    def groups(self, size):
        for start in range(0, len(self), size):
            factors = [*self.factors[start : start + size]]
            yield EditedWeight(self.parameter, factors + [1] * (size - len(factors)), self.changes_prompt)

    @contextmanager
    def attached(self, model, run=None):
        (factor,) = self.factors  # with several, no weight would be right
        weight = model.get_parameter(self.parameter)
        before = weight.clone()
        weight[::2] *= factor  # not all of it: norms would undo that
        try:
            yield
        finally:
            weight.copy_(before)


def mlp_of(llm, layer):
    weights = [name for name, parameter in llm.model.named_parameters() if parameter.ndim == 2]
    return [name for name in weights if f".{layer}." in name and ("mlp" in name or ".fc" in name)]


def first_block(llm):
    return mlp_of(llm, 1)[0]


def last_matrix(llm):
    # Of the last block's MLP: no key or value depends on it.
    return mlp_of(llm, 2)[-1]


@pytest.fixture
def passes(tiny):
    seen = []
    handle = tiny.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    handle.remove()


@pytest.mark.filterwarnings("ignore:the prompt itself is changed")
@pytest.mark.parametrize("branches", [None, False])
@pytest.mark.parametrize("changes_prompt", [True, False])
def test_each_edited_model_says_what_hugging_face_says(tiny, passes, changes_prompt, branches):
    factors = [1, -3.0, 2.5]
    edited = EditedWeight(first_block(tiny) if changes_prompt else last_matrix(tiny), factors, changes_prompt)
    batch = batch_of(tiny)
    Decoder(tiny, NEW).generate(batch)
    Decoder(tiny, NEW, candidate_batch_size=8).compare(batch, edited)  # what is tried once with every model
    passes.clear()
    found = Decoder(tiny, NEW, candidate_batch_size=8).compare(batch, edited, branches)
    prefills = [shape for shape in passes if shape[1] > 1]
    assert len(prefills) == (len(factors) if changes_prompt else 1)
    assert {shape[0] for shape in passes} <= set(range(len(batch.input_ids) + 1))
    for alone, texts in zip(edited.groups(1), found, strict=True):
        with alone.attached(tiny.model):
            assert texts == hf_texts(tiny, batch)
    assert len({tuple(texts) for texts in found}) == 3


def test_in_low_precision_all_of_them_have_passes_of_one_shape(tiny, passes):
    tiny.model.to(torch.bfloat16)
    batch, edited = batch_of(tiny), EditedWeight(last_matrix(tiny), [1, 2.0, 1], changes_prompt=False)
    decoder = Decoder(tiny, NEW)
    decoder.end = torch.arange(2, tiny.config.vocab_size, 6)
    decoder.compare(batch, edited)
    passes.clear()
    unsteered, _, again = decoder.compare(batch, edited)
    assert unsteered == again
    assert set(passes[1:]) == {(len(batch.input_ids), 1)}


def test_texts_are_read_under_one_after_the_other(llm, tmp_path):
    saes = load_saes(str(random_saes(tmp_path, [2])), llm)
    batch, decoder = batch_of(llm), Decoder(llm, 1)
    edited = EditedWeight("model.layers.1.mlp.down_proj.weight", [1, -2.0])
    found = []
    for group in decoder.groups(batch, edited):
        reader = PoolReader(saes, ["max"])
        decoder.read(batch, reader, group)
        found.append(reader.pools[2]["max"].value)
    for alone, values in zip(edited.groups(1), found, strict=True):
        reader = PoolReader(saes, ["max"])
        with alone.attached(llm.model):
            decoder.read(batch, reader)
        assert torch.equal(values, reader.pools[2]["max"].value)
    assert not torch.equal(*found)
    with pytest.raises(ValueError, match="2 variants cannot share a forward pass; read the groups of groups"):
        decoder.read(batch, PoolReader(saes, ["max"]), edited)


def test_any_number_of_vectors_shares_a_pass(llm):
    decoder, batch = Decoder(llm, NEW), batch_of(llm)
    for most, expected in ((None, 7), (1, 1), (3, 3), (4, 4), (9, 7)):
        assert decoder.together(batch, 7, most_together=most) == expected


def test_texts_whose_activations_overflow_are_refused(llm, tmp_path):
    saes = load_saes(str(random_saes(tmp_path, [2])), llm)
    edited = EditedWeight("model.layers.3.mlp.down_proj.weight", [torch.inf])
    with pytest.raises(UserError, match="a weight times inf makes the activations of demo overflow in float32"):
        Decoder(llm, 1).read(batch_of(llm), PoolReader(saes, ["max"]), edited)
