"""A causal language model and its tokenizer from a folder, a GGUF file or the Hugging Face Hub, checked."""

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from corrsteer_pl import demo
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.hub import HUB_ERRORS, reason
from corrsteer_pl.models.gguf import dequantisation, is_gguf, source
from corrsteer_pl.models.peft_loading import (
    MERGE_FIRST,
    PeftAdapter,
    check_tokenizer,
    find_adapter,
    merge_adapter,
    require_merged,
)

# Options of a generation configuration that change greedy choices, each with its value that changes nothing.
NEUTRAL = {
    "repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "num_beams": 1,
    "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None, "forced_eos_token_id": None,
}  # fmt: skip
# Raised by transformers if a folder or repository has no model, or a broken one.
LOADING_ERRORS: Any = (*HUB_ERRORS, ImportError, TypeError, SafetensorError, StrictDataclassError)
# Raised on broken files with a message that does not explain itself.
UNREADABLE = (UnpicklingError, EOFError, LookupError, JSONDecodeError)
# Number of weights that an error message names.
NAMED = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pretrained(
    name: str,
    dtype: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: int | None = None,
    **placement: Any,
) -> tuple[Any, Any]:
    """A frozen model with all its weights and no others, and its tokenizer; an adapter is merged into its base model.

    Options are those of :meth:`corrsteer_pl.models.llm.LanguageModel.load`; of ``placement``, None leaves the default.

    Raises:
        UserError: It cannot be loaded, its weights are not those that its configuration asks for, or an option is
            unknown.
    """
    if dtype not in DTYPES:
        raise UserError(f"model.dtype is {dtype!r}; choose one of {choices(DTYPES)}.")
    path = str(demo.MODEL) if name == "demo" else name
    if Path(path).is_absolute() and not Path(path).exists() and not is_gguf(path):
        raise UserError(f"the model {name!r} does not exist. Set model.llm to a folder or GGUF file that does.")
    options = {option: value for option, value in placement.items() if value is not None}
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    model, tokenizer = _loaded(name, path, shared, {"dtype": DTYPES[dtype], **options}, quantize)
    require_merged(model, name)
    _warn_of_penalties(name, model.generation_config)
    return model.eval().requires_grad_(False), tokenizer


def _loaded(
    name: str,
    path: str,
    shared: dict[str, Any],
    options: Mapping[str, Any],
    quantize: int | None,
    adapters: tuple[str, ...] = (),
) -> tuple[Any, Any]:
    """Model and tokenizer; ``adapters`` are the names of those whose base model is loaded, to find a circle."""
    adapter = None if is_gguf(path) else find_adapter(path, shared["revision"])
    if adapter is not None:
        return _merged(adapter, shared, options, quantize, adapters)
    quantization: dict[str, Any] = {}
    if quantize is not None:
        quantization = {"quantization_config": _quantization(quantize, path)}
    elif is_gguf(path):
        quantization = dequantisation()
    model, tokenizer, info = _read(name, path, shared, {**options, **quantization})
    _check_weights(name, info)
    return model, tokenizer


def _merged(
    adapter: PeftAdapter,
    shared: dict[str, Any],
    options: Mapping[str, Any],
    quantize: int | None,
    adapters: tuple[str, ...],
) -> tuple[Any, Any]:
    """The base model of an adapter with the adapter in its weights, and the tokenizer of the adapter, if it has one."""
    if find_spec("peft") is None:
        raise UserError(
            f"model.llm is {adapter.name}, an adapter, which needs the 'peft' extra: pip install 'corrsteer_pl[peft]'."
        )
    if quantize is not None:
        raise UserError(
            f"model.llm_args.quantize is {quantize}, but {adapter.name} is an adapter, whose base model has to keep "
            f"its weights. Leave it out. Or: {MERGE_FIRST}"
        )
    if adapter.name in adapters:
        raise UserError(f"the adapters {choices(adapters)} are each other's base models. {MERGE_FIRST}")
    base = {**shared, "revision": adapter.base_revision}
    try:
        model, tokenizer = _loaded(adapter.base, adapter.base, base, options, None, (*adapters, adapter.name))
    except UserError as error:
        raise UserError(f"the base model of the adapter {adapter.name} cannot be used: {error}") from error
    if adapter.has_tokenizer:
        try:
            own = AutoTokenizer.from_pretrained(adapter.name, **shared)
        except (*LOADING_ERRORS, *UNREADABLE) as error:
            raise UserError(
                f"the tokenizer of the adapter {adapter.name} cannot be read ({type(error).__name__}). Save it again, "
                "or remove its files, to use that of the base model."
            ) from error
        check_tokenizer(adapter, own, tokenizer)
        tokenizer = own
    model = merge_adapter(model, adapter, len(tokenizer) if adapter.has_tokenizer else 0)
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = adapter.name
    return model, tokenizer


def _read(name: str, path: str, shared: dict[str, Any], options: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Model, tokenizer, and what transformers says of the weights; ``shared`` is for both of them."""
    part = "weights"
    try:
        with source(path, shared["revision"]) as (place, file):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, output_loading_info=True, ignore_mismatched_sizes=True, **shared, **options, **file
            )
            model, info = loaded
            part = "tokenizer"
            tokenizer = AutoTokenizer.from_pretrained(place, **shared, **file)
    except (*LOADING_ERRORS, *UNREADABLE) as error:
        kind = "folder" if Path(path).is_dir() else "file" if Path(path).exists() else "model"
        unreadable = isinstance(error, UNREADABLE) and error.__cause__ is None
        why = f"its {part} cannot be read: {type(error).__name__}" if unreadable else reason(error)
        raise UserError(
            f"the {kind} {name!r} could not be loaded as a causal language model ({why}). Set model.llm "
            "to a local folder or GGUF file, to the id of a model on the Hugging Face Hub, or to 'demo'."
        ) from error
    if place != path:
        model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = path
    return model, tokenizer, info


def _check_weights(name: str, info: Mapping[str, Any]) -> None:
    """Check that the weights on disk fit the configuration; transformers initialises missing ones at random."""
    mismatched = [key for key, *_ in info["mismatched_keys"]]
    for keys, what in (
        (info["missing_keys"], "lacks {} of its weights"),
        (info["unexpected_keys"], "has weights that its configuration does not ask for, {} in all"),
        (mismatched, "has {} of its weights in other shapes than its configuration asks for"),
    ):
        if keys:
            named = choices([*sorted(keys)[:NAMED], *(["..."] if len(keys) > NAMED else [])])
            raise UserError(
                f"the model {name!r} {what.format(len(keys))} ({named}). Its configuration and its weights do not "
                "belong together; set model.llm to a complete model."
            )


def penalties_off(config: Any) -> dict[str, Any]:
    """What a generation configuration sets that makes another token than the likeliest be taken, each switched off.

    Example:
        >>> from transformers import GenerationConfig
        >>> penalties_off(GenerationConfig()), penalties_off(GenerationConfig(repetition_penalty=1.3))
        ({}, {'repetition_penalty': 1})
    """
    return {option: off for option, off in NEUTRAL.items() if getattr(config, option, None) not in (None, off)}


def _warn_of_penalties(name: str, config: Any) -> None:
    if asked := penalties_off(config):
        warnings.warn(
            f"the generation configuration of {name} sets {', '.join(asked)}, which is left out: every token is the "
            "likeliest one, so answers can differ from those of transformers' generate.",
            stacklevel=3,
        )


def _quantization(bits: int, path: str) -> Any:
    if bits not in (4, 8):
        raise UserError(f"model.llm_args.quantize is {bits!r}; choose 4 or 8 bits, or leave it out.")
    if is_gguf(path):
        raise UserError(
            f"model.llm_args.quantize is {bits}, but {path} is a GGUF file. Leave it out, or give a folder."
        )
    if find_spec("bitsandbytes") is None:
        raise UserError("quantised models need the 'quant' extra: pip install 'corrsteer_pl[quant]'.")
    return BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
