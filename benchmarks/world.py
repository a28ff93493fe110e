"""A random model, random SAEs, and prompts of token numbers: nothing here knows anything, but all of it takes time."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Trainer
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from corrsteer_pl import CorrSteer, TaskDataModule
from corrsteer_pl.data import Batch
from corrsteer_pl.files import write_jsonl
from corrsteer_pl.methods.accumulation.search import Search
from corrsteer_pl.methods.accumulation.sums import Accumulator
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.hooks import PoolReader
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae import SparseAutoencoder
from corrsteer_pl.models.sites import Site
from corrsteer_pl.tasks import Example, Task

PAD, BOS, EOS = 0, 1, 2
BATCH = 32
# Layer, feature and coefficient.
Candidate = tuple[int, int, float]


class NumberTokenizer:
    """Text is token numbers, written out."""

    pad_token_id, bos_token_id, eos_token_id, chat_template = PAD, BOS, EOS, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, row: Sequence[int], **_: Any) -> str:
        return " ".join(str(int(token)) for token in row if token > EOS)

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return [self.decode(row) for row in rows]


class NumberTask(Task):
    """A prompt of numbers; a response is right if its first number is even, so that some are."""

    def __init__(self, max_new_tokens: int = 1) -> None:
        self.max_new_tokens = max_new_tokens

    def example(self, row: Mapping[str, Any], id: str) -> Example:
        return Example(id, row["prompt"], "")

    def reward(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        return [is_even(text) for text in texts]


def is_even(text: str) -> float:
    return float(int((text.split() or ["1"])[0]) % 2 == 0)


@dataclass
class World:
    """What is measured on."""

    llm: LanguageModel
    saes: dict[int, SparseAutoencoder]
    generator: torch.Generator

    def prompts(self, count: int, tokens: int, prefix: int = 0) -> Any:
        """Random prompts ``(count, prefix + tokens)`` that begin alike."""
        vocabulary = self.llm.config.vocab_size
        own = torch.randint(3, vocabulary, (count, tokens), generator=self.generator)
        shared = torch.randint(3, vocabulary, (1, prefix), generator=self.generator).expand(count, -1)
        return as_prompts(torch.cat([shared, own], dim=1))

    def candidates(self, count: int) -> list[Candidate]:
        """Some candidates, two to a layer, then round again."""
        layers = [layer for layer in self.saes for _ in range(2)]
        indices = torch.randint(next(iter(self.saes.values())).d_sae, (count,), generator=self.generator).tolist()
        return [(layers[i % len(layers)], index, 8.0 if i % 2 else -8.0) for i, index in enumerate(indices)]

    def vectors(self, candidates: Sequence[Candidate]) -> list[dict[Site, Tensor]]:
        """What each candidate adds, after nothing for the unsteered model."""
        found: list[dict[Site, Tensor]] = [{}]
        for layer, index, coefficient in candidates:
            found.append({self.saes[layer].site: coefficient * self.saes[layer].direction(index)})
        return found


def make_world(layers: int, width: int, d_sae: int, sae_layers: int, seed: int = 0) -> World:
    """A Llama of random weights, and SAEs at the outputs of its first blocks."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=int(width * 2.6875), num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=2048,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            # Random initialisations say the same to everything.
            parameter.mul_(3)
    llm = LanguageModel("random", model, NumberTokenizer())
    saes = {layer: _sae(layer, width, d_sae) for layer in range(sae_layers)}
    return World(llm, saes, torch.Generator().manual_seed(seed))


def _sae(layer: int, width: int, d_sae: int) -> SparseAutoencoder:
    site = Site(layer, "resid_post")
    sae = StandardSAE(StandardSAEConfig(d_in=width, d_sae=d_sae, metadata=SAEMetadata(hook_name=str(site))))
    return SparseAutoencoder(site, sae.eval().requires_grad_(False), str(site), site, {})


def fit(world: World, folder: str, fitted: Any, validated: Any, **trainer: Any) -> CorrSteer:
    """A fit by Lightning, on a model and SAEs that are loaded already."""
    for split, prompts in (("train", fitted), ("validation", validated)):
        texts = [" ".join(map(str, ids)) for ids in prompts.input_ids.tolist()]
        write_jsonl(Path(folder) / f"{split}.jsonl", [{"prompt": text} for text in texts])
    module = CorrSteer("random", "random", check_alignment="off")
    module.llm, module.encoders = world.llm, world.saes
    data = TaskDataModule("benchmarks.world.NumberTask", folder, train_size=10**6, batch_size=BATCH)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(max_epochs=1, accelerator="cpu", logger=False, **quiet, **trainer).fit(module, datamodule=data)
    return module


def no_sums(world: World) -> Accumulator:
    """Running sums of every SAE, still empty."""
    return Accumulator({layer: sae.d_sae for layer, sae in world.saes.items()}, ["max"])


@torch.no_grad()
def fit_pass(
    world: World, decoder: Decoder, batches: Iterable[Tensor], sums: Accumulator, search: Search | None = None
) -> None:
    """What a fit does with batches of prompts ``(batch, tokens)``: generate, read, score, add up, and permute."""
    counted = 0
    for ids in batches:
        reader = PoolReader(world.saes, ["max"])
        texts = decoder.generate(as_prompts(ids), reader)
        rewards = torch.tensor([is_even(text) for text in texts], device=ids.device)
        for layer, pools in reader.pools.items():
            sums.update(layer, "max", pools["max"].value, rewards, torch.ones_like(rewards))
        rows = list(range(counted, counted := counted + len(ids)))
        if search is not None:
            batch = Batch(ids, ids, torch.ones_like(rewards), [], rows, counted)
            search.add(batch, {(layer, "max"): pools["max"].value for layer, pools in reader.pools.items()}, rewards)
    if search is not None:
        search.cut(counted)


def as_prompts(ids: Tensor) -> Any:
    """Prompts without padding."""
    return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that something takes, and what it gives."""
    began = time.perf_counter()
    answer = run()
    return time.perf_counter() - began, answer
