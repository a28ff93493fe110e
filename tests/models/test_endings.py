"""Generations that have ended leave the forward passes, and nothing else changes."""

import pytest
import torch

from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.decoding import decode
from corrsteer_pl.models.decoding.decode import Decoder
from tests.architectures import NEW, PROMPTS, batch_of, vectors

# One token in so many ends a sequence.
ENDS = 6


@pytest.fixture
def places(tiny):
    """Rows and places of every forward pass, except what is tried once with every model."""
    Decoder(tiny, 1).compare(batch_of(tiny), SteeringVectors.stack([{}, vectors()], Schedule()))
    seen = []
    handle = tiny.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    handle.remove()


def ending(llm, look_every=1, **options):
    decoder = Decoder(llm, NEW, **options)
    decoder.look_every = look_every
    decoder.end = torch.arange(2, llm.config.vocab_size, ENDS)
    return decoder


def until_the_end(llm, batch, ends):
    """Texts of Hugging Face ``generate``, each up to the token that ends it."""
    longest = batch.input_ids.shape[1]
    options = {"attention_mask": batch.attention_mask, "do_sample": False, "max_new_tokens": NEW}
    rows = llm.model.generate(batch.input_ids, eos_token_id=ends.tolist(), **options)[:, longest:].tolist()
    ended = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    texts = [row[:end] for row, end in zip(rows, ended, strict=True)]
    return llm.tokenizer.batch_decode(texts, skip_special_tokens=True)


@pytest.mark.parametrize("look_every", [1, 5])
def test_texts_are_those_of_hugging_face(tiny, look_every):
    batch, decoder = batch_of(tiny), ending(tiny, look_every)
    assert decoder.generate(batch) == until_the_end(tiny, batch, decoder.end)


def test_what_has_ended_leaves(tiny, places):
    ending(tiny).generate(batch_of(tiny))
    rows = [rows for rows, _ in places]
    assert rows[0] == len(PROMPTS)
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] <= decode.NEEDED * len(PROMPTS)


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize(("at_once", "look_every"), [("auto", 1), (2, 5)])
@pytest.mark.parametrize("schedule", [Schedule(), Schedule("first_k", 3), Schedule(decay=0.7)])
def test_variants_are_those_of_hugging_face(tiny, look_every, branches, at_once, schedule):
    if tiny.name == "qwen3_5" and branches:
        pytest.skip("linear attention has no mask, and so no branches")
    many = [{}] + [vectors((seed % 3,), seed=seed, strength=1.5) for seed in range(4)]
    batch, decoder = batch_of(tiny), ending(tiny, look_every, candidate_batch_size=at_once)
    found = decoder.compare(batch, SteeringVectors.stack(many, schedule), branches)
    for variant, texts in zip(many, found, strict=True):
        with SteeringVectors(variant, schedule).attached(tiny.model):
            assert texts == until_the_end(tiny, batch, decoder.end)


@pytest.mark.parametrize("branches", [True, False])
def test_what_goes_on_reads_as_if_nothing_had_left(tiny, branches):
    if tiny.name == "qwen3_5" and branches:
        pytest.skip("linear attention has no mask, and so no branches")
    generator = torch.Generator().manual_seed(0)
    batch, variants = (
        batch_of(tiny),
        SteeringVectors.stack([vectors(seed=k, strength=2.0) for k in range(3)], Schedule()),
    )
    shape = (len(PROMPTS), 3) if branches else (3 * len(PROMPTS), 1)
    tokens = [torch.randint(3, 1000, shape, generator=generator) for _ in range(7)]
    running = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool).view(shape)

    def logits(leaves):
        decoder = Decoder(tiny, len(tokens))
        laid, cache = decoder._prefill(batch, branches=3 if branches else 0)
        run, _ = decoder._in_branches(laid, cache, 3) if branches else decoder._in_rows(variants, laid, cache)
        order, found = torch.arange(running.numel()).view(shape), []
        with torch.no_grad(), variants.attached(tiny.model, run):
            for step, some in enumerate(tokens):
                if leaves and step == 3:
                    order = run.drop_ended(running)
                found.append(run.forward(some.flatten()[order]).flatten(0, 1))
        return torch.stack(found[3:], 1), order.flatten()

    expected, _ = logits(leaves=False)
    found, order = logits(leaves=True)
    assert len(order) < running.numel()
    assert set(running.flatten().nonzero()[:, 0].tolist()) <= set(order.tolist())
    torch.testing.assert_close(found, expected[order], rtol=1e-3, atol=1e-3)


def test_in_low_precision_groups_of_variants_keep_their_shape(tiny, places):
    tiny.model.to(torch.bfloat16)
    # The second group begins with a copy of the unsteered model, the first one's other variants end elsewhere.
    many = [{}, vectors(seed=1), vectors(strength=0.0), vectors(seed=2)]
    unsteered, _, copied, _ = ending(tiny, candidate_batch_size=2).compare(
        batch_of(tiny), SteeringVectors.stack(many, Schedule())
    )
    assert unsteered == copied
    assert set(places[1:]) == {(2 * len(PROMPTS), 1)}
    places.clear()
    ending(tiny).compare(batch_of(tiny), SteeringVectors.stack(many, Schedule()))
    assert len(set(places[1:])) > 1
