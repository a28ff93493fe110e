"""Train one TopK SAE for the output of every decoder block of a local language model."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn
from transformers import PreTrainedModel

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sites import Site, decoder_blocks

TEXTS_PER_FORWARD = 32
BATCHES_PER_BUFFER = 16
HELD_BACK = 8  # batches for the explained variance


def train_saes(
    llm: str | Path | LanguageModel,
    texts: Sequence[str],
    out: str | Path,
    *,
    layers: Sequence[int] | None = None,
    d_sae: int = 512,
    k: int = 12,
    steps: int = 1000,
    batch_tokens: int = 2048,
    lr: float = 1e-3,
    max_tokens: int = 256,
    seed: int = 0,
) -> dict[int, float]:
    """Trains a TopK SAE for the output of each decoder block and saves it in SAELens' inference format.

    All layers learn from one stream of activations, so the model reads a text once for all of them. BOS and
    padding positions never enter the stream. Each SAE lies under ``out/blocks.{layer}.hook_resid_post`` and
    loads with ``SAE.load_from_disk``.

    Args:
        llm: Folder of a Hugging Face causal language model, or the model itself.
        texts: What the model reads; read again from the start, in a new order, as often as the steps need.
        out: Folder for the SAEs.
        layers: Decoder blocks, counted from 0; all of them by default.
        d_sae: Number of features of each SAE.
        k: Features active per token.
        steps: Optimiser steps of each SAE.
        batch_tokens: Tokens per step.
        lr: Learning rate of Adam; it falls to zero over the last fifth of the steps.
        max_tokens: Tokens read of each text.
        seed: Seed of the weights and of the order of the texts.

    Returns:
        Layer to the share of the variance explained, on tokens drawn after the last step.

    Raises:
        UserError: If there are no texts, or a layer is not in the model.
    """
    if not 0 < k <= d_sae or steps < 1:
        raise UserError(f"k is {k}, d_sae {d_sae} and steps {steps}; needed are 1 <= k <= d_sae and at least one step.")
    if not any(texts):
        raise UserError("texts is empty. Give at least one text to train SAEs on.")
    llm = llm if isinstance(llm, LanguageModel) else LanguageModel.load(str(llm))
    sites = _sites(llm.model, layers)
    cfg = _trainer_cfg(steps, batch_tokens, lr, str(llm.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stream = _batches(llm, sites, texts, batch_tokens, max_tokens)
        sample, model_name = next(stream), Path(llm.name).name
        trainers = {layer: _trainer(cfg, sites[layer], x, model_name, d_sae, k) for layer, x in sample.items()}
        for batch in islice(stream, steps):
            for layer, trainer in trainers.items():
                trainer.step(batch[layer])
                trainer.n_training_steps += 1
        return _finish(trainers, list(islice(stream, HELD_BACK)), Path(out))


def _sites(model: PreTrainedModel, layers: Sequence[int] | None) -> dict[int, Site]:
    n_layers = len(decoder_blocks(model))
    layers = range(n_layers) if layers is None else layers
    for layer in layers:
        if layer not in range(n_layers):
            raise UserError(f"layer {layer} is not in the model (layers 0..{n_layers - 1}).")
    return {layer: Site(layer, "resid_post") for layer in layers}


def _trainer_cfg(steps: int, batch_tokens: int, lr: float, device: str) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * batch_tokens,
        train_batch_size_samples=batch_tokens,
        lr=lr,
        lr_end=lr,  # constant after the warm-up; the decay steps then go to zero
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        dead_feature_window=max(1, steps // 10),
        device=device,
        logger=LoggingConfig(log_to_wandb=False),
    )


def _trainer(cfg: SAETrainerConfig, site: Site, sample: Tensor, model_name: str, d_sae: int, k: int) -> SAETrainer:
    d_model = sample.shape[-1]
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=d_model,
            d_sae=d_sae,
            k=k,
            device=cfg.device,
            apply_b_dec_to_input=True,
            normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(model_name=model_name, hook_name=str(site)),
        )
    )
    trainer = SAETrainer(cfg, sae, data_provider=iter(()))
    trainer.activation_scaler.scaling_factor = d_model**0.5 / sample.norm(dim=-1).mean().item()
    sae.b_dec.data = trainer.activation_scaler(sample).mean(dim=0)
    return trainer


def _finish(trainers: dict[int, SAETrainer], batches: list[dict[int, Tensor]], out: Path) -> dict[int, float]:
    explained = {}
    for layer, trainer in trainers.items():
        trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
        trainer.set_final_sae_metadata()
        explained[layer] = _explained_variance(trainer.sae, torch.cat([batch[layer] for batch in batches]))
        trainer.sae.save_inference_model(out / f"blocks.{layer}.hook_resid_post")
    return explained


@torch.no_grad()
def _explained_variance(sae: TopKTrainingSAE, x: Tensor) -> float:
    residue = (x - sae(x)).pow(2).sum()
    return 1 - (residue / (x - x.mean(dim=0)).pow(2).sum()).item()


def _batches(
    llm: LanguageModel, sites: dict[int, Site], texts: Sequence[str], batch_tokens: int, max_tokens: int
) -> Iterator[dict[int, Tensor]]:
    """Yields mixed batches without end, ``(batch_tokens, d_model)`` for each layer."""
    pieces = _pieces(llm, sites, texts, max_tokens)
    buffer = {layer: torch.empty(0) for layer in sites}
    while True:
        _refill(buffer, pieces, BATCHES_PER_BUFFER * batch_tokens)
        order = torch.randperm(len(next(iter(buffer.values()))))
        # Half of the buffer is kept, so that batches mix activations of different texts.
        for rows in order.split(batch_tokens)[: BATCHES_PER_BUFFER // 2]:
            yield {layer: x[rows] for layer, x in buffer.items()}
        rest = order[BATCHES_PER_BUFFER // 2 * batch_tokens :]
        for layer in buffer:
            buffer[layer] = buffer[layer][rest]


def _refill(buffer: dict[int, Tensor], pieces: Iterator[dict[int, Tensor]], size: int) -> None:
    parts = {layer: [x] if len(x) else [] for layer, x in buffer.items()}
    missing = size - len(next(iter(buffer.values())))
    while missing > 0:
        piece = next(pieces)
        for layer, x in piece.items():
            parts[layer].append(x)
        missing -= len(x)
    for layer in buffer:
        buffer[layer] = torch.cat(parts[layer])


def _pieces(
    llm: LanguageModel, sites: dict[int, Site], texts: Sequence[str], max_tokens: int
) -> Iterator[dict[int, Tensor]]:
    """Yields the activations of a few texts at a time, ``(tokens, d_model)`` for each layer."""
    while True:
        for rows in torch.randperm(len(texts)).split(TEXTS_PER_FORWARD):
            ids, mask = (x.to(llm.device) for x in _encode(llm, [texts[row] for row in rows], max_tokens))
            kept = mask.bool()
            if llm.tokenizer.bos_token_id is not None:
                kept &= ids != llm.tokenizer.bos_token_id
            with torch.no_grad(), _record(llm.model, sites) as outputs:
                llm.model(input_ids=ids, attention_mask=mask, use_cache=False)
            yield {layer: x[kept].float() for layer, x in outputs.items()}


def _encode(llm: LanguageModel, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask, ``(len(texts), tokens)``; works for a tokenizer without a pad token."""
    rows = [torch.tensor(ids[:max_tokens]) for ids in llm.tokenizer(texts)["input_ids"]]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


@contextmanager
def _record(model: PreTrainedModel, sites: dict[int, Site]) -> Iterator[dict[int, Tensor]]:
    """Collects what each block puts out while the context is open."""
    outputs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer, site in sites.items():
            stack.callback(site.hook(model, partial(outputs.__setitem__, layer)).remove)
        yield outputs
