"""``python -m benchmarks.gpu``: a model of the shape of Gemma 2 2B with SAEs at every block, on one GPU.

Weights are random and made on the device. Reported are seconds by phase, tokens per second, the share of time in the
language model's forward passes, and peak memory.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config

from benchmarks.world import BOS, EOS, PAD, NumberTokenizer, World, as_prompts, fit_pass, no_sums
from corrsteer_pl.files import write_json
from corrsteer_pl.interventions.steering import Schedule, SteeringVectors
from corrsteer_pl.models.decoding.decode import Decoder
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sae import SparseAutoencoder, place
from corrsteer_pl.models.sites import Site

RESULTS = Path(__file__).parent / "gpu.json"


def make_gemma(options: Namespace) -> World:
    """A Gemma 2 of random weights, and a JumpReLU SAE at the output of every block."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=4 * options.width,
        num_hidden_layers=options.layers, num_attention_heads=8, num_key_value_heads=4, head_dim=options.width // 9,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    saes = {layer: _sae(layer, options) for layer in range(options.layers)}
    return World(LanguageModel("random", model, NumberTokenizer()), saes, torch.Generator().manual_seed(0))


def _sae(layer: int, options: Namespace) -> SparseAutoencoder:
    site = Site(layer, "resid_post")
    sizes = {"d_in": options.width, "d_sae": options.d_sae, "device": options.device}
    sae = JumpReLUSAE(JumpReLUSAEConfig(**sizes, metadata=SAEMetadata(hook_name=str(site))))
    sae.threshold.data.fill_(1.0)
    # As a fit leaves it: what encodes on the device, the decoder in main memory.
    sae.W_dec = nn.Parameter(sae.W_dec.detach().cpu(), requires_grad=False)
    place(sae, torch.device(options.device))
    return SparseAutoencoder(site, sae.eval().requires_grad_(False), str(site), site, {})


class Stopwatch:
    """Seconds of a phase, and of the language model's forward passes within it."""

    def __init__(self, model: Any, device: str) -> None:
        self.device, self.inside, self._began = device, 0.0, 0.0
        model.register_forward_pre_hook(lambda *_: setattr(self, "_began", self.now()))
        model.register_forward_hook(lambda *_: setattr(self, "inside", self.inside + self.now() - self._began))

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def phase(self, run: Any, tokens: int) -> dict[str, float]:
        self.inside = 0.0
        began = self.now()
        run()
        seconds = self.now() - began
        return {"seconds": seconds, "tokens_per_second": tokens / seconds, "share_in_model": self.inside / seconds}


@torch.no_grad()
def phases(world: World, options: Namespace, prompts: int, new: int) -> dict[str, Any]:
    """Fit on so many prompts, and validate all candidates on ``options.validation`` ones."""
    decoder, watch = Decoder(world.llm, new), Stopwatch(world.llm.model, options.device)
    fitted = world.prompts(prompts, options.tokens).input_ids.to(options.device)
    validated = world.prompts(options.validation, options.tokens).input_ids.to(options.device)
    candidates = world.candidates(2 * options.layers)
    variants = SteeringVectors.stack(world.vectors(candidates), Schedule())

    def fit() -> None:
        fit_pass(world, decoder, fitted.split(options.batch_size), no_sums(world))

    def validate() -> None:
        for ids in validated.split(options.batch_size):
            decoder.compare(as_prompts(ids), variants)

    return {
        "fit": watch.phase(fit, prompts * (options.tokens + new)),
        "validation": watch.phase(validate, options.validation * (options.tokens + new * (1 + len(candidates)))),
    }


def main(args: list[str]) -> int:
    parser = ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    sizes = {
        "layers": 26, "width": 2304, "d_sae": 16384, "vocabulary": 256000, "tokens": 150, "batch_size": 64,
        "prompts": 4000, "long_prompts": 400, "validation": 200,
    }  # fmt: skip
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(args)
    world = make_gemma(options)
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "sizes": {n: getattr(options, n) for n in sizes}}
    found["device"] = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    for prompts, new in ((options.prompts, 1), (options.long_prompts, 32)):
        found[f"{prompts} prompts, {new} new tokens"] = phases(world, options, prompts, new)
    if options.device == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    write_json(options.out, found)
    sys.stdout.write(options.out.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
