"""The cache with room against transformers' own, and its name."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from corrsteer_pl.interventions.steering import Schedule, _Clock
from corrsteer_pl.models.decoding.cache import FullCache, joined, picked
from corrsteer_pl.models.llm import CACHE, LanguageModel

LAYERS = 2


def states(tokens, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed + tokens)
    return [torch.randn(2, batch, 4, tokens, 8, generator=generator).unbind() for _ in range(LAYERS)]


def written(cache, tokens, **options):
    for layer, (keys, values) in enumerate(states(tokens, **options)):
        found = cache.update(keys, values, layer)
    return found


def same(cache, other):
    assert cache.get_seq_length() == other.get_seq_length()
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)


@pytest.mark.parametrize("room", [0, 1, 32])
def test_it_holds_what_transformers_cache_holds(room):
    ours, theirs = FullCache(room), DynamicCache()
    for tokens in (5, 1, 1, 7, 1, 40, 1):
        for found, expected in zip(written(ours, tokens), written(theirs, tokens), strict=True):
            assert torch.equal(found, expected)
    same(ours, theirs)


def test_a_step_is_written_and_the_rest_not_copied():
    cache = FullCache(room=4)
    written(cache, 10)
    places = [layer.keys.data_ptr() for layer in cache.layers]
    for _ in range(4):
        written(cache, 1)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    written(cache, 1)
    assert [layer.keys.data_ptr() for layer in cache.layers] != places


def test_what_was_forgotten_is_overwritten_in_place():
    cache, expected = FullCache(), DynamicCache()
    written(cache, 6)
    written(cache, 3, seed=1)
    place = cache.layers[0].keys.data_ptr()
    cache.rewind(6)
    written(expected, 6)
    for each in (cache, expected):
        written(each, 2, seed=2)
    same(cache, expected)
    assert cache.layers[0].keys.data_ptr() == place


@pytest.mark.parametrize("make", [FullCache, DynamicCache])
def test_picked_rows_go_on_by_themselves(make):
    cache, rows = make(), torch.tensor([2, 0, 2, 1])
    written(cache, 5)
    own = picked(cache, rows)
    written(own, 1, batch=4)
    assert cache.get_seq_length() == 5
    for layer, (keys, values) in enumerate(states(5)):
        assert torch.equal(own.layers[layer].keys[:, :, :5], keys[rows])
        assert torch.equal(own.layers[layer].values[:, :, :5], values[rows])
        assert torch.equal(cache.layers[layer].keys, keys)


def test_a_cache_that_was_filled_owns_what_it_holds():
    # A prefix is shared by batches: none may write behind it.
    prefix = FullCache(room=8)
    written(prefix, 6, batch=1)
    kept = [keys.clone() for keys, _ in prefix.pairs]
    for length in (4, 6):
        cache = FullCache().fill((keys[:, :, :length], values[:, :, :length]) for keys, values in prefix.pairs)
        written(cache, 3, batch=1, seed=5)
    assert all(torch.equal(keys, expected) for (keys, _), expected in zip(prefix.pairs, kept, strict=True))


def test_rows_in_another_order_are_written_elsewhere():
    ours, theirs = FullCache(), DynamicCache()
    for cache in (ours, theirs):
        written(cache, 5)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        written(cache, 2)
    same(ours, theirs)


def test_joined_rows_hold_what_one_cache_does_with_room_and_without_copies_left_behind():
    whole, parts = FullCache(room=4), [FullCache(room=4) for _ in range(2)]
    written(whole, 6)
    for part, rows in zip(parts, (slice(0, 2), slice(2, 3)), strict=True):
        part.fill((keys[rows], values[rows]) for keys, values in whole.pairs)
    ours = joined(parts)
    same(ours, whole)
    assert [part.layers for part in parts] == [[], []]
    before = [keys.data_ptr() for keys, _ in ours.pairs]
    written(ours, 4)
    written(whole, 4)
    same(ours, whole)
    assert [keys.data_ptr() for keys, _ in ours.pairs] == before


class Newer(torch.nn.Module):
    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=False):
        self.given = cache
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2))


class Older(torch.nn.Module):
    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        self.given = past_key_values
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2))


@pytest.mark.parametrize("kind", [Newer, Older])
def test_a_cache_is_given_by_the_name_that_a_model_has(kind):
    llm, ids, cache = LanguageModel("any", kind(), None), torch.zeros(1, 3, dtype=torch.int64), object()
    llm.forward(ids, torch.ones_like(ids), ids, cache)
    assert llm.model.given is cache


@pytest.mark.parametrize("name", CACHE)
def test_an_empty_cache_starts_a_generation_whatever_its_name(name):
    clock, weights = _Clock(Schedule("prompt_last")), []
    for filled in (0, 1, 2, 0, 1):
        cache = SimpleNamespace(get_seq_length=lambda filled=filled: filled)
        clock.tick(torch.nn.Module(), (), {"input_ids": torch.zeros(1, 1), name: cache})
        weights.append(clock.weight)
    assert weights == [1, 0, 0, 1, 0]
