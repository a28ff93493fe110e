"""Builds the embedded world from a seed: ``python -m corrsteer_pl.demo.build [--out DIR] [--seed 0]``.

Ten minutes or so on two CPU cores: a tokenizer, a language model, an SAE for each of its blocks, the rows.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from corrsteer_pl.demo import ROOT
from corrsteer_pl.demo.corpus import World
from corrsteer_pl.files import write_folder
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae_training.train import Recipe, train_saes

VOCABULARY, TOKENIZER_TEXTS = 1024, 20_000
STEPS, BATCH, LEARNING_RATE = 1500, 96, 3e-3
SAE_TEXTS, SAE_STEPS, SAE_ACTIVE = 20_000, 400, 6
PROMPT_WEIGHT = 0.05  # of a prompt token in the loss; an answer token counts 1
STUDY_TEXTS, STUDY_SEED = 480, 4  # texts of each kind that are read to forget one of them
POOL = 16  # batches sorted by length together, so that little is spent on padding


def build(out: Path = ROOT, seed: int = 0) -> None:
    """Builds everything in a temporary folder and moves it into place at the end.

    Args:
        out: Folder to write, replaced if it exists.
        seed: Seed of the world, the weights and the order of the texts.
    """
    write_folder(out, lambda folder: _write(folder, World(seed), seed))


def _write(folder: Path, world: World, seed: int) -> None:
    _write_rows(world, folder / "data")
    tokenizer = train_tokenizer(_texts(world, TOKENIZER_TEXTS, seed + 1))
    tokenizer.save_pretrained(folder / "model")
    model = train_model(tokenizer, world, seed)
    model.save_pretrained(folder / "model")
    llm = LanguageModel("demo", model, tokenizer)
    recipe = Recipe(k=SAE_ACTIVE, steps=SAE_STEPS, seed=seed)
    train_saes(llm, _texts(world, SAE_TEXTS, seed + 3), folder / "saes", recipe)


def _texts(world: World, n: int, seed: int) -> list[str]:
    return [prompt + answer for prompt, answer in world.training_texts(n, seed)]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that encodes any text and puts one BOS before it.

    Args:
        texts: What to learn the merges from.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def train_model(tokenizer: PreTrainedTokenizerFast, world: World, seed: int) -> LlamaForCausalLM:
    """A four-block Llama taught to answer as the world's training texts do.

    Args:
        tokenizer: Encodes the texts.
        world: Where the texts come from.
        seed: Seed of the weights and of the texts.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 15, STEPS)
    for ids, weight in _training_batches(tokenizer, world, seed):
        loss = _loss(model, ids, weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _training_batches(tokenizer: PreTrainedTokenizerFast, world: World, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields ids and loss weights, both ``(BATCH, tokens)``, right-padded."""
    pairs = list(world.training_texts(STEPS * BATCH, seed + 2))
    for start in range(0, len(pairs), POOL * BATCH):
        pool = [_encode(tokenizer, *pair) for pair in pairs[start : start + POOL * BATCH]]
        # By prompt alone: a batch of one kind of answer would weigh its tokens by that kind's length.
        pool.sort(key=lambda item: int((item[1] < 1).sum()))
        batches = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        for i in torch.randperm(len(batches)):
            ids, weight = zip(*batches[i], strict=True)
            yield (
                torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True),
                torch.nn.utils.rnn.pad_sequence(list(weight), batch_first=True),
            )


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> tuple[Tensor, Tensor]:
    head = tokenizer(prompt)["input_ids"]
    tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    weight = torch.full((len(head) + len(tail),), PROMPT_WEIGHT)
    weight[len(head) :] = 1.0
    return torch.tensor(head + tail), weight


def _loss(model: LlamaForCausalLM, ids: Tensor, weight: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # (BATCH, tokens - 1, vocabulary)
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weight[:, 1:].flatten()
    return losses @ weight / weight.sum()


def _write_rows(world: World, folder: Path) -> None:
    for task, splits in {**world.splits, "demo_texts": world.study_texts(STUDY_TEXTS, STUDY_SEED)}.items():
        (folder / task).mkdir(parents=True)
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task / f"{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the embedded world.")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder to write (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0)
    build(**vars(parser.parse_args()))
