"""Train TopK SAEs for the outputs of decoder blocks, with SAELens."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformers import PreTrainedModel

from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_atomically
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae_training.activations import Activations
from corrsteer_pl.models.sae_training.quality import Quality, qualities
from corrsteer_pl.models.sae_training.texts import digest, held_out, token_rows
from corrsteer_pl.models.sites import Site, decoder_blocks

# Where an unfinished training lies in its folder; it is removed at the end.
UNFINISHED = "unfinished.ckpt"
# Products of SAEs with so many features are worth computing in bfloat16, where the processor has such products.
AUTOCAST_FROM = 1024
# What a SAELens trainer counts.
COUNTS = (
    "n_training_steps", "n_training_samples", "act_freq_scores", "n_forward_passes_since_fired", "n_frac_active_samples"
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How SAEs are trained.

    Attributes:
        layers: Decoder blocks, counted from 0; None for all of them.
        d_sae: Number of features of each SAE.
        k: Features active per token.
        steps: Optimiser steps of each SAE.
        batch_tokens: Tokens per step.
        lr: Learning rate of Adam; it falls to zero over the last fifth of the steps.
        seed: Seed of the weights and of the order of the texts.
        reuse: Steps that learn from each token that is read; more cost less, where reading is what takes long.
    """

    layers: tuple[int, ...] | None = None
    d_sae: int = 512
    k: int = 12
    steps: int = 1000
    batch_tokens: int = 2048
    lr: float = 1e-3
    seed: int = 0
    reuse: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "reuse"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} is {value}; it is a number from 1 on.")
        if not 0 < self.k <= self.d_sae or self.steps < 1:
            raise UserError(
                f"k is {self.k}, d_sae {self.d_sae} and steps {self.steps}; needed are 1 <= k <= d_sae and at least "
                "one step."
            )


@dataclass(frozen=True)
class Training:
    """What came of it.

    Attributes:
        loss: The unchanged model's on held-out texts, in nats per token.
        qualities: Layer to the quality of its SAE, on held-out texts.
        tokens: Tokens that every SAE has learnt from.
        seconds: Time of the steps, without what comes before and after; without an interruption's, too.
    """

    loss: float
    qualities: dict[int, Quality]
    tokens: int
    seconds: float


def train_saes(
    llm: str | Path | LanguageModel,
    texts: Sequence[str] | Sequence[Sequence[int]],
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    max_tokens: int = 256,
    save_every: int | None = None,
    report: Callable[[int, float], None] = lambda steps, tokens_per_second: None,
) -> Training:
    """Train a TopK SAE for the output of each decoder block and save it in SAELens' inference format.

    All layers learn from one stream of activations, so the model reads a text once for all of them. A few texts are
    held out, and tell in the end how good the SAEs are. Each SAE lies under ``out/blocks.{layer}.hook_resid_post`` and
    loads with ``SAE.load_from_disk``. Large SAEs are trained with products in bfloat16 where the device has them.

    Args:
        llm: Folder of a Hugging Face causal language model, or the model itself.
        texts: What the model reads, as text or as tokens; in a new order as often as the steps need.
        out: Folder for the SAEs.
        recipe: Sizes, steps and seed.
        max_tokens: Tokens read of each text that is given as text.
        save_every: Write the unfinished training every so many steps; a later call with the same arguments goes on
            from there, and ends with the same SAEs. None never does.
        report: Called every few steps with the steps so far and the tokens per second since the start.

    Raises:
        UserError: There are too few texts, a layer is not in the model, or the folder has an unfinished training of
            other texts or another recipe.
    """
    recipe = recipe or Recipe()
    llm = llm if isinstance(llm, LanguageModel) else LanguageModel.load(str(llm))
    sites = _sites(llm.model, recipe.layers)
    rows = _rows(llm, texts, max_tokens)
    rows, judged = held_out(rows, recipe.seed)
    if (found := sum(map(len, rows))) < recipe.batch_tokens:
        raise UserError(
            f"the texts to learn from have {found} tokens, fewer than one step needs ({recipe.batch_tokens}). Give "
            "more texts."
        )
    work = _Work(llm, sites, rows, recipe, Path(out))
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        work.run(save_every, report)
    return work.finish(judged)


def _rows(llm: LanguageModel, texts: Any, max_tokens: int) -> list[list[int]]:
    """Tokens of the texts that have any."""
    texts = list(texts)
    rows = token_rows(llm, texts, max_tokens) if texts and isinstance(texts[0], str) else texts
    return [list(row) for row in rows if len(row)]


def _sites(model: PreTrainedModel, layers: Sequence[int] | None) -> dict[int, Site]:
    n_layers = len(decoder_blocks(model))
    layers = range(n_layers) if layers is None else layers
    for layer in layers:
        if layer not in range(n_layers):
            raise UserError(f"layer {layer} is not in the model (layers 0..{n_layers - 1}).")
    return {layer: Site(layer, "resid_post") for layer in layers}


class _Work:
    """SAEs in training, with the stream that they learn from; written and restored between two rounds."""

    def __init__(
        self, llm: LanguageModel, sites: dict[int, Site], rows: list[list[int]], recipe: Recipe, out: Path
    ) -> None:
        self.llm, self.sites, self.recipe, self.out = llm, sites, recipe, out
        self.stream = Activations(llm, sites, rows, recipe.batch_tokens, recipe.seed, recipe.reuse)
        self.trainers: dict[int, SAETrainer] = {}
        self.steps, self.seconds = 0, 0.0
        about = {**asdict(recipe), "layers": list(sites), "model": llm.identity["fingerprint"], "texts": digest(rows)}
        self.about = {**about, "dtype": str(llm.model.dtype)}

    def run(self, save_every: int | None, report: Callable[[int, float], None]) -> None:
        """Train up to the recipe's number of steps."""
        if save_every is not None:
            self._resume()
        saved = self.steps
        while self.steps < self.recipe.steps:
            start = time.perf_counter()
            self._learn(self.stream.round())
            self.seconds += time.perf_counter() - start
            report(self.steps, self.steps * self.recipe.batch_tokens / self.seconds)
            if save_every is not None and saved + save_every <= self.steps < self.recipe.steps:
                self._save()
                saved = self.steps

    def _learn(self, batches: Iterator[dict[int, Tensor]]) -> None:
        for batch in islice(batches, self.recipe.steps - self.steps):
            if not self.trainers:
                self._start(batch)
            for layer, trainer in self.trainers.items():
                trainer.step(batch[layer])
                trainer.n_training_steps += 1
            self.steps += 1

    def _start(self, sample: Mapping[int, Tensor]) -> None:
        """New SAEs, scaled and centred for a sample of what they will read, ``(tokens, d_model)`` each."""
        for layer, x in sample.items():
            self.trainers[layer] = trainer = self._trainer(layer, x.shape[-1])
            trainer.activation_scaler.scaling_factor = x.shape[-1] ** 0.5 / x.norm(dim=-1).mean().item()
            trainer.sae.b_dec.data = trainer.activation_scaler(x).mean(dim=0)

    def _trainer(self, layer: int, d_model: int) -> SAETrainer:
        cfg = _trainer_cfg(self.recipe, str(self.llm.device))
        config = TopKTrainingSAEConfig(
            d_in=d_model,
            d_sae=self.recipe.d_sae,
            k=self.recipe.k,
            device=cfg.device,
            apply_b_dec_to_input=True,
            normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(model_name=Path(self.llm.name).name, hook_name=str(self.sites[layer])),
        )
        return SAETrainer(cfg, TopKTrainingSAE(config), data_provider=iter(()))

    def _save(self) -> None:
        trainers = {
            layer: {
                **{name: getattr(trainer, name) for name in COUNTS},
                "scale": trainer.activation_scaler.scaling_factor,
                "weights": trainer.sae.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "lr_scheduler": trainer.lr_scheduler.state_dict(),
            }
            for layer, trainer in self.trainers.items()
        }
        state = {"steps": self.steps, "seconds": self.seconds, "stream": self.stream.state(), "trainers": trainers}
        write_atomically(self.out / UNFINISHED, lambda file: torch.save({"about": self.about, **state}, file))

    def _resume(self) -> None:
        if not (path := self.out / UNFINISHED).exists():
            return
        state = torch.load(path, map_location=self.llm.device, weights_only=True)
        for name, value in self.about.items():
            if (other := state["about"].get(name)) != value:
                raise UserError(
                    f"{path} is an unfinished training with {name} {other}, not {value}. Start it as it was to go on, "
                    "remove it to begin anew, or choose another folder."
                )
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.stream.restore({**state["stream"], "random": state["stream"]["random"].cpu()})
        for layer, found in state["trainers"].items():
            self.trainers[layer] = trainer = self._trainer(layer, found["weights"]["b_dec"].shape[-1])
            trainer.sae.load_state_dict(found["weights"])
            trainer.activation_scaler.scaling_factor = found["scale"]
            trainer.optimizer.load_state_dict(found["optimizer"])
            trainer.lr_scheduler.load_state_dict(found["lr_scheduler"])
            for name in COUNTS:
                setattr(trainer, name, found[name])

    def finish(self, judged: list[list[int]]) -> Training:
        """Save the SAEs for residuals as they are, and judge them on held-out texts."""
        saes = {}
        for layer, trainer in self.trainers.items():
            trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
            trainer.set_final_sae_metadata()
            trainer.sae.save_inference_model(self.out / str(self.sites[layer]))
            saes[layer] = (self.sites[layer], trainer.sae.eval())
        loss, found = qualities(self.llm, saes, judged)
        (self.out / UNFINISHED).unlink(missing_ok=True)
        return Training(loss, found, self.steps * self.recipe.batch_tokens, self.seconds)


def _trainer_cfg(recipe: Recipe, device: str) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=recipe.steps * recipe.batch_tokens,
        train_batch_size_samples=recipe.batch_tokens,
        lr=recipe.lr,
        lr_end=recipe.lr,  # constant after the warm-up; the decay steps then go to zero
        lr_warm_up_steps=recipe.steps // 20,
        lr_decay_steps=recipe.steps // 5,
        dead_feature_window=max(1, recipe.steps // 10),
        autocast=recipe.d_sae >= AUTOCAST_FROM and has_bfloat16_products(device),
        device=device,
        logger=LoggingConfig(log_to_wandb=False),
    )


def has_bfloat16_products(device: str) -> bool:
    """Whether products in bfloat16 are faster than in float32; a processor without them takes seven times as long."""
    if not device.startswith("cpu"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
