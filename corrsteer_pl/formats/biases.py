"""Vectors as biases: an adapter of peft, or an ordinary checkpoint that needs nothing beside it."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from corrsteer_pl.errors import UserError
from corrsteer_pl.formats.outputs import by_writer, or_gguf
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sites import Site
from corrsteer_pl.models.writers import Writer

# Models without biases of their own that are written as Llama, which can have them; their weights have equal names.
AS_LLAMA = ("qwen2", "mistral")
# What a Llama needs to know of them.
LLAMA_OPTIONS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
)  # fmt: skip


def write_peft(llm: LanguageModel, vectors: Mapping[Site, Tensor], folder: Path) -> None:
    """Write an adapter, BEFT, which is a bias on linear layers, as ``PeftModel.from_pretrained`` reads it.

    Raises:
        UserError: The model's matrices are no linear layers, or a norm follows them.
    """
    require_peft()
    from peft import BeftConfig

    biases = by_writer(llm.model, vectors, "peft")
    for writer, _ in biases:
        if not isinstance(writer.module, nn.Linear):
            raise UserError(
                f"peft puts biases on linear layers, but {writer.name} is a {type(writer.module).__name__}. Choose "
                "--to merged."
            )
    names = [writer.name for writer, _ in biases]
    base = str(llm.model.name_or_path)
    config = BeftConfig(target_modules=names, task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{writer.name}.beft_bias": vector.float().cpu()[None] for writer, vector in biases}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def require_peft() -> None:
    """Refuse to go on without a version of peft that knows this adapter.

    Raises:
        UserError: There is none.
    """
    if find_spec("peft") is None or find_spec("peft.tuners.beft") is None:
        raise UserError("the format peft needs peft 0.21 or newer: pip install 'corrsteer_pl[peft]'.")


@contextmanager
def with_adapter(model: Any, folder: Path) -> Iterator[Any]:
    """The model with an adapter, as peft loads it; without it again afterwards."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # It cannot be merged by peft, and need not be.
        warnings.filterwarnings("ignore", "Detected that the base layer has no bias term")
        warnings.simplefilter("ignore", FutureWarning)
        changed = PeftModel.from_pretrained(model, str(folder))
    try:
        yield changed
    finally:
        changed.unload()


def write_merged(llm: LanguageModel, vectors: Mapping[Site, Tensor], folder: Path) -> None:
    """Write the model with the vectors as biases, in a form that has a place for them.

    Raises:
        UserError: No such form is known.
    """
    model = with_biases(llm.model, vectors)
    model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)


def with_biases(model: Any, vectors: Mapping[Site, Tensor]) -> Any:
    """A model of the same weights whose matrices have biases, on which the vectors ``(d_model,)`` are added.

    Weights are shared with the given model, and not changed.

    Raises:
        UserError: No form of the model is known that has such biases.
    """
    biases = by_writer(model, vectors, "merged")
    added = {f"{writer.name}.bias": vector for writer, vector in biases}
    config = _with_places(model, [writer for writer, _ in biases], vectors)
    with torch.device("meta"):
        changed = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    own = model.state_dict()
    state = {}
    for name, empty in changed.state_dict().items():
        value = own[name] if name in own else torch.zeros(empty.shape, dtype=model.dtype, device=model.device)
        if name in added:
            value = (value.float() + added.pop(name).to(value.device)).to(value.dtype)
        state[name] = value
    if added or set(own) - set(state):
        raise UserError(_impossible(model, next(iter(added), "its weights"), vectors))
    changed.load_state_dict(state, assign=True)
    changed.tie_weights()
    changed.generation_config = model.generation_config
    return changed


def _with_places(model: Any, targets: list[Writer], sites: Iterable[Site]) -> Any:
    """A configuration under which the targets have biases."""
    config = copy.deepcopy(model.config)
    if all(getattr(writer.module, "bias", None) is not None for writer in targets):
        return config
    if config.model_type in AS_LLAMA:
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        if window is not None and window < config.max_position_embeddings:
            raise UserError(_impossible(model, "its sliding window", sites))
        options = {name: getattr(config, name) for name in LLAMA_OPTIONS if hasattr(config, name)}
        return LlamaConfig(**options, attention_bias=True, mlp_bias=True, dtype=config.dtype)
    for writer in targets:
        flag = "attention_bias" if ".mlp." not in f".{writer.name}." else "mlp_bias"
        if not hasattr(config, flag):
            raise UserError(_impossible(model, writer.name, sites))
        setattr(config, flag, True)
    return config


def _impossible(model: Any, what: str, sites: Iterable[Site]) -> str:
    return (
        f"{type(model).__name__} has no ordinary form in which {what} can be written with a bias. "
        f"{or_gguf('peft', sites)}"
    )


@contextmanager
def alone(llm: LanguageModel, folder: Path) -> Iterator[Any]:
    """The model in a folder, in the precision and on the device of another."""
    yield AutoModelForCausalLM.from_pretrained(folder, dtype=llm.model.dtype).eval().to(llm.device)
