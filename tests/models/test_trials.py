"""Models that count for themselves, or keep what they read in their own way, are found out before they answer."""

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GPTNeoConfig,
    Llama4TextConfig,
    MambaConfig,
    MptConfig,
    RecurrentGemmaConfig,
)

from corrsteer_pl.errors import UserError
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.decoding.decode import Decoder
from tests.architectures import GROUPED, NEW, PROMPTS, SIZES, WIDTH, batch_of, hf_texts, make_tiny, vectors

ENDS = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
SELDOM = {
    # Windows and chunks that are counted along the cache.
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=1024, hidden_size=WIDTH, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        window_size=24, max_position_embeddings=128, **ENDS,
    ),
    "llama4": lambda: Llama4TextConfig(
        **GROUPED | {"num_hidden_layers": 4}, head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
        attention_chunk_size=24, moe_layers=[1, 3],
    ),
    # Distances that are counted along the cache, and along the mask.
    "mpt": lambda: MptConfig(vocab_size=1024, d_model=WIDTH, n_layers=3, n_heads=4, max_seq_len=128, **ENDS),
    "bloom": lambda: BloomConfig(vocab_size=1024, hidden_size=WIDTH, n_layer=3, n_head=4, **ENDS),
    # Heads of several widths.
    "gemma4": lambda: Gemma4TextConfig(**GROUPED, head_dim=8, sliding_window=8),
}  # fmt: skip
LONG = [[1, *range(20, 50), *tail] for tail in ([70, 71, 72], [80] * 12, [90])]


def alone(model, prompts):
    """What Hugging Face says to each prompt by itself, without padding."""
    return [hf_texts(model, batch_of(model, [prompt]), use_cache=True)[0] for prompt in prompts]


@pytest.mark.parametrize("name", SELDOM)
@pytest.mark.parametrize("prompts", [PROMPTS, LONG])
def test_whatever_a_model_counts_it_says_what_hugging_face_says(llm, name, prompts):
    model = make_tiny(name, llm.tokenizer, SELDOM[name]())
    batch, many = batch_of(model, prompts), [{}] + [vectors((k % 3,), seed=k) for k in range(5)]
    decoder = Decoder(model, NEW)
    assert decoder.generate(batch) == alone(model, prompts)
    for variant, texts in zip(many, decoder.compare(batch, SteeringVectors.stack(many, Schedule())), strict=True):
        with SteeringVectors(variant).attached(model.model):
            assert texts == alone(model, prompts)


@pytest.mark.parametrize(
    "config",
    [
        lambda: MambaConfig(vocab_size=1024, hidden_size=WIDTH, num_hidden_layers=3, state_size=4, **ENDS),
        lambda: RecurrentGemmaConfig(
            vocab_size=1024, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            lru_width=WIDTH, attention_window_size=8, **ENDS,
        ),
    ],
)  # fmt: skip
def test_a_model_whose_memory_cannot_be_repeated_is_refused(llm, config):
    model = make_tiny("own_memory", llm.tokenizer, config())
    with pytest.raises(UserError, match="own_memory .* keeps what it has read in a way that cannot be repeated"):
        Decoder(model, NEW).compare(batch_of(model), SteeringVectors.stack([{}, vectors()], Schedule()))


def test_a_stream_of_four_dimensions_is_refused(llm):
    config = Gemma3nTextConfig(
        **SIZES, head_dim=8, sliding_window=8, num_key_value_heads=2, vocab_size_per_layer_input=512,
        hidden_size_per_layer_input=8, num_kv_shared_layers=1, laurel_rank=4, altup_num_inputs=2,
    )  # fmt: skip
    model = make_tiny("gemma3n", llm.tokenizer, config)
    with pytest.raises(UserError, match=r"blocks.0.hook_resid_post of Gemma3nForCausalLM has 4 dimensions"):
        Decoder(model, NEW).compare(batch_of(model), SteeringVectors.stack([{}, vectors((0,))], Schedule()))


def test_a_model_near_the_end_of_its_context_still_branches(llm):
    # The keys of all branches are more than the context has places.
    model = make_tiny("gpt2", llm.tokenizer)
    batch = batch_of(model, [[1, *range(3, 110)], [1, *range(5, 40)]])
    many = [{}] + [vectors((k % 3,), seed=k) for k in range(5)]
    for variant, texts in zip(
        many, Decoder(model, NEW).compare(batch, SteeringVectors.stack(many, Schedule())), strict=True
    ):
        with SteeringVectors(variant).attached(model.model):
            assert texts == hf_texts(model, batch)
    assert model.abilities["branches"]


def test_rounding_fails_no_trial(llm):
    model = make_tiny("llama", llm.tokenizer)
    model.model.to(torch.bfloat16)
    Decoder(model, NEW).generate(batch_of(model, LONG))
    assert model.abilities == {"rows": True, "gaps": True, "branches": True}
