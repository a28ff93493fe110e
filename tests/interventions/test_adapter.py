"""Adapters: off as if they were not there, on as peft and merged weights have it."""

import copy

import pytest
import torch
from peft import PeftModel

from corrsteer_pl.errors import UserError
from corrsteer_pl.interventions.adapter import Lora, OwnWeights
from corrsteer_pl.models.llm import positions_of
from tests.architectures import PROMPTS, make_tiny

KINDS = ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox"]


def logits(llm):
    ids, mask = llm.left_pad(PROMPTS)
    with torch.no_grad():
        return llm.forward(ids, mask, positions_of(mask))[:, 0]


def trained(lora):
    """Pretend that training has changed the matrices; fresh ones change nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in lora.weights.values():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return lora


@pytest.fixture(params=KINDS)
def llm_of(request, llm):
    return make_tiny(request.param, llm.tokenizer)


def test_off_is_the_model_bit_for_bit_and_fresh_is_too(llm_of):
    before = logits(llm_of)
    lora = Lora([0, 2], rank=4, alpha=8, dropout=0.5)
    lora.install(llm_of.model)
    assert torch.equal(logits(llm_of), before)
    with lora.active():
        assert torch.equal(logits(llm_of), before)
    trained(lora)
    assert torch.equal(logits(llm_of), before)
    with lora.active():
        changed = logits(llm_of)
        # Dropout is for training alone.
        assert torch.equal(logits(llm_of), changed)
    assert (changed - before).abs().max() > 1e-3
    assert torch.equal(logits(llm_of), before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_reads_what_is_written_and_merged_weights_answer_alike(llm_of, tmp_path):
    base = copy.deepcopy(llm_of.model)
    lora = Lora([0, 1], rank=4, alpha=8)
    lora.install(llm_of.model)
    trained(lora)
    with lora.active():
        expected = logits(llm_of)
    lora.write(tmp_path, "tiny")
    ids, mask = llm_of.left_pad(PROMPTS)
    peft = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        found = peft(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits[:, -1]
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)
    names = list(llm_of.model.state_dict())
    lora.merge(llm_of.model)
    torch.testing.assert_close(logits(llm_of) / scale, expected / scale, rtol=0, atol=1e-5)
    assert len(list(llm_of.model.state_dict())) < len(names)
    assert not [name for name in llm_of.model.state_dict() if "lora" in name or "base_layer" in name]


def test_only_matrices_of_the_named_blocks_get_gradients(llm):
    tiny = make_tiny("llama", llm.tokenizer)
    lora = Lora([1], rank=2, alpha=4)
    lora.install(tiny.model)
    trained(lora)
    ids, mask = tiny.left_pad(PROMPTS)
    with lora.active(training=True):
        tiny.forward(ids, mask, positions_of(mask)).sum().backward()
    assert len(lora.weights) == 2 * 7
    assert all(name.startswith("model/layers/1/") for name in lora.weights)
    assert all(weight.grad.abs().sum() > 0 for weight in lora.weights.values())
    assert [name for name, weight in tiny.model.named_parameters() if weight.grad is not None] == [
        name for name in dict(tiny.model.named_parameters()) if "lora" in name
    ]


def test_equal_seeds_begin_alike_and_stored_shapes_make_an_adapter(llm):
    one, other = (Lora([0], rank=3, alpha=6, seed=5) for _ in range(2))
    for lora in (one, other):
        lora.install(make_tiny("llama", llm.tokenizer).model)
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name])
    again = Lora(**one.described())
    again.load_state_dict(trained(one).state_dict())
    tiny = make_tiny("llama", llm.tokenizer)
    again.install(tiny.model)
    with again.active():
        assert (logits(tiny) - logits(make_tiny("llama", llm.tokenizer))).abs().max() > 1e-3
    # A second method may use a model that has an adapter already.
    fresh = Lora([0], rank=3, alpha=6)
    fresh.install(tiny.model)
    trained(fresh)


def test_a_block_that_is_not_there_and_a_missing_peft_are_told(llm, monkeypatch):
    with pytest.raises(UserError, match="layer 9 is not in LlamaForCausalLM .layers 0..2."):
        Lora([9], rank=2, alpha=4).install(make_tiny("llama", llm.tokenizer).model)
    monkeypatch.setattr("corrsteer_pl.interventions.adapter.find_spec", lambda name: None)
    with pytest.raises(UserError, match="low-rank adapters need the 'peft' extra: pip install 'corrsteer_pl.peft.'"):
        Lora([0], rank=2, alpha=4)


@pytest.mark.parametrize("kind", KINDS)
def test_own_weights_take_the_place_of_the_others_tied_ones_included(kind, llm):
    tiny = make_tiny(kind, llm.tokenizer)
    before, weights = logits(tiny), OwnWeights()
    weights.install(tiny.model)
    assert set(weights.weights) == {name.replace(".", "/") for name, _ in tiny.model.named_parameters()}
    with weights.active():
        assert torch.equal(logits(tiny), before)
    with torch.no_grad():
        for weight in weights.weights.values():
            weight.mul_(1.2)
    assert torch.equal(logits(tiny), before)
    with weights.active():
        changed = logits(tiny)
    assert (changed - before).abs().max() > 1e-3
    weights.merge(tiny.model)
    assert torch.equal(logits(tiny), changed)
