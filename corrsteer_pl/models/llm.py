"""A causal language model with its tokenizer."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from corrsteer_pl import demo
from corrsteer_pl.errors import UserError, choices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LanguageModel:
    """A frozen Hugging Face causal language model and its tokenizer.

    It is not a module on purpose: kept outside a LightningModule's children it stays out of checkpoints,
    and a ``device_map`` survives ``.to``.

    Attributes:
        name: The path or Hub id that it was loaded from.
        model: The causal language model, in evaluation mode, without gradients.
        tokenizer: Its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str, dtype: str = "float32") -> "LanguageModel":
        """Load a local folder, a Hub id, or the model that ships with the package, ``demo``.

        Raises:
            UserError: It cannot be loaded, or the dtype is unknown.
        """
        if dtype not in DTYPES:
            raise UserError(f"model.dtype is {dtype!r}; choose one of {choices(DTYPES)}.")
        path = str(demo.MODEL) if name == "demo" else name
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, SafetensorError) as error:
            kind = "folder" if Path(path).exists() else "model"
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"the {kind} {name!r} could not be loaded as a causal language model ({reason}). Set model.llm "
                "to a local folder, to the id of a model on the Hugging Face Hub, or to 'demo'."
            ) from error
        return cls(name, model.eval().requires_grad_(False), tokenizer)

    @property
    def config(self) -> Any:
        """The configuration of the text decoder."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return self.model.device

    @property
    def eos_token_ids(self) -> list[int]:
        """Every token that ends a generation, as Hugging Face ``generate`` sees it."""
        eos = self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Name and fingerprint, by which a checkpoint recognises its model wherever it lies."""
        return {"name": self.name, "fingerprint": fingerprint(self.model)}

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a prompt, with the special tokens that the tokenizer adds (BOS once, if any)."""
        return self.tokenizer(text)["input_ids"]

    def left_pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Stack prompts of different lengths.

        Shape:
            - returns input ids and attention mask, both ``(batch, longest)`` int64, padding on the left.
        """
        longest = max(len(prompt) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else (self.eos_token_ids or [0])[0]
        ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids), torch.tensor(mask)

    def single_tokens(self, answers: Iterable[str]) -> list[int]:
        """The token of each answer string.

        Raises:
            UserError: An answer is not exactly one token.
        """
        encoded = {answer: self.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers}
        for answer, ids in encoded.items():
            if len(ids) != 1:
                raise UserError(
                    f"the option {answer!r} is {len(ids)} tokens for the tokenizer of {self.name}, so it cannot be "
                    "answered in one step. Use option letters that are single tokens, or another tokenizer."
                )
        return [ids[0] for ids in encoded.values()]

    def decode(self, tokens: Tensor, lengths: Tensor) -> list[str]:
        """Text of generated tokens ``(batch, steps)``, of which the first ``lengths[i]`` count."""
        rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def local_name(name: str) -> str:
    """An absolute path for a folder, so that a checkpoint finds it from anywhere; any other name as it is."""
    return str(Path(name).absolute()) if name != "demo" and Path(name).is_dir() else name


def fingerprint(module: nn.Module) -> str:
    """A short hash of a module's parameter names, shapes and first values.

    Values are compared in bfloat16, so that the same weights loaded with another dtype agree.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.state_dict().items()):
        head = parameter.detach().flatten()[:16].to("cpu", torch.bfloat16).tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {head}\n".encode())
    return digest.hexdigest()[:16]
