"""Tiny models of many architectures, prompts for them, and what Hugging Face says to those."""

from types import SimpleNamespace

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sites import Site

WIDTH, NEW = 32, 12
SIZES = {
    "vocab_size": 1024, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 128, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=8, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=1024, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=128, eos_token_id=2, bos_token_id=1
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    # Its MLP lies on the block itself.
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=48),
    # Linear attention in all blocks but the last.
    "qwen3_5": lambda: Qwen3_5TextConfig(
        **GROUPED,
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
    ),
}
PROMPTS = [[1, 17, 250, 33, 9], [1, 400], [1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [1, 99, 98]]


def make_tiny(name, tokenizer, config=None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or CONFIGS[name]()).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        # Random initialisations are nearly constant functions; larger weights give texts that differ.
        if parameter.ndim > 1 and "embed" not in parameter_name:
            parameter.mul_(6)
    model.generation_config.pad_token_id = 0
    return LanguageModel(name, model, tokenizer)


def batch_of(llm, prompts=PROMPTS):
    ids, mask = llm.left_pad(prompts)
    return SimpleNamespace(input_ids=ids, attention_mask=mask)


def hf_texts(llm, batch, new=NEW, **options):
    tokens = llm.model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=new, **options
    )  # (B, P + new)
    return llm.tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def vectors(layers=(0, 2), kind="resid_post", strength=4.0, seed=0, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return {Site(layer, kind): strength * torch.randn(width, generator=generator) for layer in layers}


def hf_log_likelihood(llm, prompt, option, vectors):
    """Of an option's tokens after a prompt, each read on its own while Hugging Face's cache grows, under vectors."""
    total, cache, chunk = 0.0, None, torch.tensor([prompt])
    with torch.no_grad(), vectors.attached(llm.model):
        for token in option:
            out = llm.model(chunk, use_cache=True, **{llm.cache_name: cache})
            total += out.logits[0, -1].double().log_softmax(-1)[token].item()
            cache, chunk = out[llm.cache_name], torch.tensor([[token]])
    return total
