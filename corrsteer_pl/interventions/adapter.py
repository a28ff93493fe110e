"""Trained changes of a model that can be switched on and off: low-rank adapters, and whole weights of its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.sites import decoder_blocks

# A dot would make a path of a parameter's name.
DOT = "/"


class Adapter(Protocol):
    """What a method that trains weights asks of them.

    Attributes:
        weights: The trained parameters, by name.
        installed: Whether they are part of a model.
    """

    weights: nn.ParameterDict
    installed: bool

    def install(self, model: Any) -> None:
        """Make the parameters part of a model, which stays as it is unless they are active."""

    def active(self, training: bool = False) -> Any:
        """A context in which the model is the changed one; ``training`` for dropout."""

    def merge(self, model: Any) -> None:
        """Change the model for good, and leave no trace of the adapter but its effect."""

    def write(self, folder: Path, base: str) -> None:
        """Write what another program needs to have the changed model of the base of that name."""


def require_peft() -> None:
    """Refuse to go on without peft.

    Raises:
        UserError: It is not installed.
    """
    if find_spec("peft") is None:
        raise UserError("low-rank adapters need the 'peft' extra: pip install 'corrsteer_pl[peft]'.")


class Lora(nn.Module):
    """Low-rank matrices beside every linear layer of some blocks, by peft.

    Fresh ones change nothing, for the second of each pair is 0. Where they are not active, the model computes what it
    computed before, bit for bit.

    Args:
        layers: Blocks, from 0; None for all.
        rank: Rank of each change.
        alpha: The change is ``alpha / rank`` times the product of the pair.
        dropout: Share of inputs that are dropped in training.
        seed: Seed of the initial values.
        shapes: Shapes of parameters that will be loaded, by name; None to initialise them when installed.

    Source:
        LoRA, arXiv 2106.09685, as implemented by peft.
    """

    def __init__(
        self,
        layers: Sequence[int] | None,
        rank: int,
        alpha: int,
        dropout: float = 0.0,
        seed: int = 0,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        require_peft()
        self.layers, self.rank, self.alpha, self.dropout, self.seed = layers, rank, alpha, dropout, seed
        self.weights = nn.ParameterDict({name: torch.zeros(*shape) for name, shape in (shapes or {}).items()})
        self.installed = False
        self._tuners: list[Any] = []
        self._transposed = False  # GPT-2 stores its weights so

    def install(self, model: Any) -> None:
        """Put the matrices beside the linear layers of the named blocks.

        Raises:
            UserError: The model has no such block.
        """
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                inject_adapter_in_model(self._config(model), model)
        self._tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                self._adopt(name, module)
        self._transposed = any(isinstance(tuner.get_base_layer(), Conv1D) for tuner in self._tuners)
        self._switch(on=False)
        self.installed = True

    def _adopt(self, name: str, tuner: Any) -> None:
        """Take over a layer's matrices, or put those in place that were loaded."""
        for part in ("lora_A", "lora_B"):
            linear, key = getattr(tuner, part)["default"], f"{name}.{part}.weight".replace(".", DOT)
            if key in self.weights:
                linear.weight = self.weights[key]
            else:
                linear.weight = nn.Parameter(linear.weight.detach().float())
                self.weights[key] = linear.weight

    def _config(self, model: Any) -> Any:
        from peft import LoraConfig

        blocks, paths = decoder_blocks(model), {module: name for name, module in model.named_modules()}
        wanted = range(len(blocks)) if self.layers is None else self.layers
        if missing := [layer for layer in wanted if not 0 <= layer < len(blocks)]:
            raise UserError(
                f"layer {missing[0]} is not in {type(model).__name__} (layers 0..{len(blocks) - 1}). Set "
                "model.adapter_layers to a subset of it."
            )
        targets = [m for layer in wanted for m in blocks[layer].modules() if isinstance(m, (nn.Linear, Conv1D))]
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=[paths[module] for module in targets],
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets),
            task_type="CAUSAL_LM",
        )

    def _switch(self, on: bool, training: bool = False) -> None:
        for tuner in self._tuners:
            # enable_adapters would also take the gradient of the parameters away, on which DDP relies.
            tuner._disable_adapters = not on
            tuner.lora_dropout.train(training)

    @contextmanager
    def active(self, training: bool = False) -> Iterator[None]:
        """Add the changes within the context."""
        self._switch(on=True, training=training)
        try:
            yield
        finally:
            self._switch(on=False)

    def merge(self, model: Any) -> None:
        """Add the changes to the weights, and take the low-rank matrices away."""
        names = {tuner: name for name, tuner in model.named_modules() if tuner in self._tuners}
        for tuner, name in names.items():
            self._switch(on=True)
            tuner.merge(safe_merge=True)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, tuner.get_base_layer())
        self._tuners, self.installed = [], False

    def write(self, folder: Path, base: str) -> None:
        """``adapter_config.json`` and ``adapter_model.safetensors``, as ``PeftModel.from_pretrained`` reads them."""
        from peft import LoraConfig

        names = sorted({key.rpartition(f"{DOT}lora_")[0].replace(DOT, ".") for key in self.weights})
        LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=names,
            fan_in_fan_out=self._transposed, task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True,
        ).save_pretrained(str(folder))  # fmt: skip
        tensors = {f"base_model.model.{key.replace(DOT, '.')}": w.detach().cpu() for key, w in self.weights.items()}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        (folder / "adapter_model.safetensors").write_bytes(save(contiguous))

    def described(self) -> dict[str, Any]:
        """Plain values that make an adapter of the same shape."""
        names = ("layers", "rank", "alpha", "dropout", "seed")
        shapes = {name: list(weight.shape) for name, weight in self.weights.items()}
        return {**{name: getattr(self, name) for name in names}, "shapes": shapes}


class OwnWeights(nn.Module):
    """A second set of all of a model's weights, which are trained while the first ones stay.

    Args:
        shapes: Shapes of parameters that will be loaded, by name; None to copy the model's when installed.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: torch.zeros(*shape) for name, shape in (shapes or {}).items()})
        self.installed = False
        self._places: list[tuple[nn.Module, str, nn.Parameter, str]] = []

    def install(self, model: Any) -> None:
        """Find every place of every weight; tied ones have several."""
        names: dict[int, str] = {id(weight): name for name, weight in model.named_parameters()}
        for module in model.modules():
            for own, weight in module._parameters.items():
                if weight is not None:
                    self._places.append((module, own, weight, names[id(weight)].replace(".", DOT)))
        for _, _, weight, key in self._places:
            if key not in self.weights:
                self.weights[key] = nn.Parameter(weight.detach().clone())
        self.installed = True

    @contextmanager
    def active(self, training: bool = False) -> Iterator[None]:
        """Put the trained weights in the place of the others within the context."""
        for module, own, _, key in self._places:
            module._parameters[own] = self.weights[key]
        try:
            yield
        finally:
            for module, own, weight, _ in self._places:
                module._parameters[own] = weight

    def merge(self, model: Any) -> None:
        """Copy the trained weights over the others."""
        with torch.no_grad():
            for _, _, weight, key in self._places:
                weight.copy_(self.weights[key])

    def write(self, folder: Path, base: str) -> None:
        """The trained weights as ``model.safetensors``, by the model's own names."""
        tensors: dict[str, Tensor] = {key.replace(DOT, "."): w.detach().cpu() for key, w in self.weights.items()}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        (folder / "model.safetensors").write_bytes(save(contiguous))

    def described(self) -> dict[str, Any]:
        """Plain values that make weights of the same shape."""
        return {"shapes": {name: list(weight.shape) for name, weight in self.weights.items()}}
