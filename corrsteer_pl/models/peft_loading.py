"""Adapters of peft as models: the base model with the adapter merged into its weights."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from corrsteer_pl import demo
from corrsteer_pl.errors import UserError, choices, one_line

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Files that make a folder a complete model.
MODEL_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
# Largest difference of logits between the active and the merged adapter, as a share of the largest logit.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Share of the vocabulary in which the tokenizers of adapter and base may differ: renamed reserved tokens.
RENAMED = 0.01
# Names of embeddings in the weights of an adapter.
EMBEDDINGS = ("embed_tokens.", "embed_in.", "wte.", "word_embeddings.", "lm_head.")
# Options of configurations under which all matrices of a part have biases, with names of the part.
BIAS_OPTIONS = {"mlp_bias": ("mlp",), "attention_bias": ("self_attn", "attention")}
MERGE_FIRST = "Merge it first (PeftModel.merge_and_unload, then save_pretrained), and set model.llm to that folder."


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that was named as a model.

    Attributes:
        name: The folder or Hub id, as it was given.
        revision: Branch, tag or commit of the adapter on the Hub.
        base: The folder, file or Hub id of its base model.
        base_revision: Branch, tag or commit of the base model on the Hub.
    """

    name: str
    revision: str | None
    base: str
    base_revision: str | None

    @property
    def has_tokenizer(self) -> bool:
        """Whether it comes with a tokenizer of its own."""
        folder = Path(self.name)
        if folder.is_dir():
            return any((folder / file).is_file() for file in TOKENIZERS)
        from transformers.utils import cached_file

        return cached_file(
            self.name, TOKENIZERS[0], revision=self.revision,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        ) is not None  # fmt: skip


def find_adapter(name: str, revision: str | None) -> PeftAdapter | None:
    """The adapter in a folder or a repository on the Hub; None if it is no adapter.

    Raises:
        UserError: It names no usable base model, or the folder holds several adapters or a complete model, too.
    """
    folder = Path(name)
    try:
        file = find_adapter_config_file(name, revision=revision)
    except (OSError, ValueError):
        return None  # Loading the model gives the reason.
    if file is None:
        _require_one_adapter(folder)
        return None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        base = settings.get("base_model_name_or_path")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{file} describes no adapter ({one_line(error)}). {MERGE_FIRST}") from error
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{file} has base_model_name_or_path {base!r}, so the base model of the adapter is unknown. Set it "
            "there to a folder or an id on the Hugging Face Hub."
        )
    path = base_path(base, folder)
    has_weights = any((folder / weights).is_file() for weights in WEIGHTS)
    if folder.is_dir() and not has_weights:
        raise UserError(f"{name} has {ADAPTER_CONFIG_NAME} without one of {choices(WEIGHTS)}. Remove it, or add those.")
    if any(any(folder.glob(pattern)) for pattern in MODEL_WEIGHTS):
        raise UserError(
            f"{name} has the weights of a complete model and an adapter of {base}, so it is unclear whether "
            "they are merged. Move one of them to a folder of its own, and set model.llm to that."
        )
    return PeftAdapter(name, revision, path, settings.get("revision") or (revision if folder.is_dir() else None))


def base_path(base: str, folder: Path) -> str:
    """Where the base model is that an adapter in a folder names.

    A relative path starts at the working directory, as in transformers, or else at the adapter's folder.

    Raises:
        UserError: It is a path, and there is nothing.
    """
    if base == "demo":
        return str(demo.MODEL)
    for path in (Path(base).expanduser(), folder / base):
        if path.exists():
            return str(path)
    if Path(base).is_absolute() or base.startswith((".", "~")) or base.count("/") > 1:
        raise UserError(
            f"the adapter {str(folder)!r} names the base model {base!r}, which does not exist. Set "
            f"base_model_name_or_path in its {ADAPTER_CONFIG_NAME} to a folder or an id on the Hugging Face Hub."
        )
    return base


def _require_one_adapter(folder: Path) -> None:
    adapters = sorted(folder.glob(f"*/{ADAPTER_CONFIG_NAME}")) if folder.is_dir() else []
    if adapters and not (folder / "config.json").is_file():
        names = [str(file.parent) for file in adapters]
        raise UserError(f"{folder} is no model, but has adapters below it. Set model.llm to one of {choices(names)}.")


def check_tokenizer(adapter: PeftAdapter, own: Any, base: Any) -> None:
    """Reject an adapter whose tokenizer is that of another model than its base.

    Args:
        adapter: The adapter.
        own: The tokenizer beside the adapter.
        base: The tokenizer of the base model.

    Raises:
        UserError: They have different tokens under the same ids.
    """
    if any(name in key for key in read_weights(adapter) for name in EMBEDDINGS):
        return  # Embeddings of its own go with any tokenizer.
    expected = {index: token for token, index in base.get_vocab().items()}
    given = {index: token for token, index in own.get_vocab().items()}
    different = [index for index, token in expected.items() if given.get(index) != token]
    if len(different) > max(RENAMED * len(expected), 1):
        raise UserError(
            f"the tokenizer in {adapter.name} differs from that of the base model {adapter.base} in "
            f"{len(different)} of {len(expected)} tokens, so the adapter belongs to another base model. Correct "
            f"base_model_name_or_path in {ADAPTER_CONFIG_NAME}, or remove the tokenizer from the folder."
        )


@torch.no_grad()
def merge_adapter(model: Any, adapter: PeftAdapter, tokenizer_size: int) -> Any:
    """The base model with the adapter in its weights.

    Args:
        model: The base model, which is changed.
        adapter: The adapter.
        tokenizer_size: Number of tokens of a tokenizer that comes with the adapter, else 0; embeddings are extended to
            it, as by ``AutoPeftModel``.

    Raises:
        UserError: It cannot be merged, its weights are not those of its configuration and base model, or the merged
            model does not compute the same.
    """
    if getattr(model, "hf_quantizer", None) is not None and getattr(model, "is_quantized", False):
        raise UserError(
            f"the adapter {adapter.name} has a quantised base model ({adapter.base}), whose weights cannot be changed. "
            f"{MERGE_FIRST}"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"model.llm_args.device_map offloads weights of the base model of the adapter {adapter.name}, which can "
            f"then not be merged. {MERGE_FIRST}"
        )
    config, weights = _config(adapter), read_weights(adapter)
    _fit_embeddings(model, weights, tokenizer_size)
    with warnings.catch_warnings():
        # Of the adapter's layers, which are checked here: missing biases, unusual layer types, missing weights.
        warnings.simplefilter("ignore")
        active = _attached(model, config, adapter, weights)
        expected = _logits(active)
        biased = _give_biases(active)
        _separate_head(active)
        try:
            merged = active.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"the adapter {adapter.name} cannot be merged into its base model ({one_line(error)}). {MERGE_FIRST}"
            ) from error
    merged.__dict__.pop("peft_config", None)
    _declare_biases(merged, biased)
    _untie(merged)
    require_merged(merged, adapter.name)
    difference = (_logits(merged) - expected).abs().max() / expected.abs().max()
    if not difference <= TOLERANCES.get(merged.dtype, TOLERANCES[torch.bfloat16]):
        raise UserError(
            f"the adapter {adapter.name} computes something else after it was merged into its base model (logits "
            f"differ by {difference:.2g} of the largest), so it depends on the input. Set model.llm to another adapter "
            "or to a complete model."
        )
    return merged


def require_merged(model: Any, name: str) -> None:
    """Reject a model with layers of peft in it: methods could take them for adapters that they train themselves.

    Raises:
        UserError: It has some.
    """
    if find_spec("peft") is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise UserError(f"the model {name!r} has an adapter of peft at {path} that is not merged. {MERGE_FIRST}")


def read_weights(adapter: PeftAdapter) -> dict[str, Tensor]:
    """All weights of an adapter, by name, in main memory.

    Raises:
        UserError: They cannot be read.
    """
    from peft.utils.save_and_load import load_peft_weights

    try:
        return load_peft_weights(adapter.name, device="cpu", revision=adapter.revision)
    except Exception as error:  # Broken files raise many kinds.
        raise UserError(
            f"the weights of the adapter {adapter.name} cannot be read ({type(error).__name__}: {one_line(error)}). "
            "Save the adapter again."
        ) from error


def _config(adapter: PeftAdapter) -> Any:
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(adapter.name, revision=adapter.revision)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"the {ADAPTER_CONFIG_NAME} of the adapter {adapter.name} cannot be read by the installed peft "
            f"({type(error).__name__}: {one_line(error)}). Install the version of peft that wrote it."
        ) from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UserError(
            f"the adapter {adapter.name} is of the type {kind}, which adds virtual tokens and cannot be merged into "
            "weights. Set model.llm to an adapter that changes weights, such as LoRA, or to a complete model."
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(
            f"the adapter {adapter.name} is for the task {config.task_type}; it has to be CAUSAL_LM. Set model.llm to "
            "an adapter of a causal language model."
        )
    config.inference_mode = True
    return config


def _attached(model: Any, config: Any, adapter: PeftAdapter, weights: Mapping[str, Tensor]) -> Any:
    """The model with the adapter beside its weights, all of which come from the file."""
    from peft import PeftModel
    from peft.utils import set_peft_model_state_dict

    try:
        active = PeftModel(model, config)
        result: Any = set_peft_model_state_dict(active, dict(weights))
    except (ValueError, KeyError, RuntimeError, NotImplementedError, TypeError, AttributeError, ImportError) as error:
        raise UserError(
            f"the adapter {adapter.name} does not fit its base model {adapter.base} ({one_line(error)}). Correct "
            f"base_model_name_or_path in its {ADAPTER_CONFIG_NAME}."
        ) from error
    parameters = {name for name, _ in active.named_parameters()}
    prefix = getattr(active.base_model, "prefix", None) or "default"
    lacking = [
        key
        for key in result.missing_keys
        if key in parameters and ".default" in key and (prefix in key or "modules_to_save" in key)
    ]
    for keys, problem in ((lacking, "lacks the weights"), (result.unexpected_keys, "has weights for unknown layers,")):
        if keys:
            raise UserError(
                f"the adapter {adapter.name} {problem} {choices(sorted(keys)[:2])} ({len(keys)} in all). It does not "
                f"belong to its {ADAPTER_CONFIG_NAME} and its base model {adapter.base}; save the adapter again."
            )
    return active.eval()


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Logits ``(1, 16, vocabulary)`` float32 for fixed tokens."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = (7 + 37 * torch.arange(16))[None] % rows
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float()


def _fit_embeddings(model: Any, weights: Mapping[str, Tensor], tokenizer_size: int) -> None:
    """Give the embeddings as many rows as the adapter's, or as many as its tokenizer needs."""
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    paths = tuple(f"{name}.weight" for name, module in model.named_modules() if module in embeddings)
    stored = [len(tensor) for key, tensor in weights.items() if key.replace("modules_to_save.", "").endswith(paths)]
    before = len(model.get_input_embeddings().weight)
    rows = max(stored, default=max(before, tokenizer_size))
    if rows == before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in filter(None, {model.get_input_embeddings(), model.get_output_embeddings()}):
        # The logit of a new row is the mean of all others, so it is never the largest.
        module.weight[before:] = module.weight[:before].mean(0)


def _give_biases(active: Any) -> list[str]:
    """Add biases of 0 to linear layers to which the adapter adds a bias, and return their names in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = active.peft_config["default"]
    if getattr(config.peft_type, "value", None) != "BEFT" and not getattr(config, "lora_bias", False):
        return []
    names: list[str] = []
    for name, module in active.get_base_model().named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        if isinstance(layer, nn.Linear) and layer.bias is None:
            _add_bias(layer)
            names.append(name)
    return names


def _add_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=layer.weight.dtype, device=layer.weight.device))


def _declare_biases(model: Any, names: list[str]) -> None:
    """Set the configuration's options for biases, so that a saved model keeps them; not where there are none."""
    options = [
        option
        for option, parts in BIAS_OPTIONS.items()
        if getattr(model.config, option, None) is False and any(set(parts) & set(name.split(".")) for name in names)
    ]
    if not options:
        return
    for option in options:
        setattr(model.config, option, True)
    with torch.device("meta"):
        declared = AutoModelForCausalLM.from_config(model.config).state_dict()
    present = set(model.state_dict())
    absent = [key for key in declared if key not in present]
    if present - set(declared) or not all(key.endswith(".bias") for key in absent):
        for option in options:
            setattr(model.config, option, False)
        return
    for key in absent:
        _add_bias(model.get_submodule(key.removesuffix(".bias")))


def _separate_head(active: Any) -> None:
    """Give the head weights of its own before a merge, if the adapter changes it or the embeddings that it shares."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = active.get_base_model()
    ends: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    inputs, outputs = (getattr(end, "base_layer", end) for end in ends)
    if outputs is not None and outputs.weight is inputs.weight and any(isinstance(e, BaseTunerLayer) for e in ends):
        outputs.weight = nn.Parameter(outputs.weight.detach().clone())


def _untie(model: Any) -> None:
    """Declare embeddings as separate that an adapter has changed apart, so that a saved model keeps both."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is not None and getattr(model.config, "tie_word_embeddings", False) and (
        outputs.weight.data_ptr() != inputs.weight.data_ptr()
    ):  # fmt: skip
        model.config.tie_word_embeddings = False
