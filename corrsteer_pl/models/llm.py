"""A causal language model with its tokenizer."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.files import absolute
from corrsteer_pl.models.fingerprint import fingerprint
from corrsteer_pl.models.llm_loading import pretrained
from corrsteer_pl.models.sites import name_blocks

# Names of attention windows that layers compute from the place of a key in the cache, whatever the mask says.
OWN_COUNT = ("attention_chunk_size", "window_size", "attention_window_size", "attention_types", "attention_layers")
# What transformers calls a cache of keys and values: since 5.24, and before.
CACHE = ("cache", "past_key_values")
# Raised by a chat template that does not parse, calls raise_exception, or uses something undefined.
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


@dataclass
class LanguageModel:
    """A frozen Hugging Face causal language model and its tokenizer.

    It is not an ``nn.Module``: as a child of a LightningModule it would be written to checkpoints, and ``.to`` would
    undo its ``device_map``.

    Attributes:
        name: The path or Hub id that it was loaded from.
        model: The causal language model, in evaluation mode, without gradients.
        tokenizer: Its tokenizer.
        placed: Whether it must not be moved to another device, because it has a ``device_map`` or is quantised.
        abilities: Results of :mod:`~corrsteer_pl.models.decoding.trials`, by name.
    """

    name: str
    model: Any
    tokenizer: Any
    placed: bool = False
    abilities: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        name: str,
        dtype: str = "float32",
        *,
        revision: str | None = None,
        attn_implementation: str | None = None,
        device_map: str | dict[str, Any] | None = None,
        offload_folder: str | None = None,
        quantize: int | None = None,
        trust_remote_code: bool = False,
        blocks: str | None = None,
    ) -> "LanguageModel":
        """Load a local folder, a Hub id, a GGUF file, or the model that ships with the package, ``demo``.

        Args:
            name: What to load; a GGUF file, with the extra ``gguf``, is a local one or ``owner/repository/file.gguf``
                on the Hub. Its weights become plain ones of the given ``dtype``. An adapter of peft is merged into
                the base model that it names.
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            revision: Branch, tag or commit on the Hub.
            attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ...; None for the model's default.
            device_map: How layers are spread over devices, ``auto`` for example; None for one device.
            offload_folder: Where layers that ``device_map`` puts on ``disk`` are kept.
            quantize: 4 or 8 bits per weight, with the extra ``quant``.
            trust_remote_code: Run code that the model's repository brings.
            blocks: Where the decoder blocks are, such as ``model.layers``, if they are not found.

        Raises:
            UserError: It cannot be loaded, its weights are not those that its configuration asks for, or an option is
                unknown.
        """
        model, tokenizer = pretrained(
            name,
            dtype,
            revision=revision,
            attn_implementation=attn_implementation,
            device_map=device_map,
            offload_folder=offload_folder,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
        )
        llm = cls(name, model, tokenizer, bool(device_map or quantize))
        if blocks is not None:
            name_blocks(model, blocks)
        return llm

    @property
    def config(self) -> Any:
        """The configuration of the text decoder."""
        return self.model.config.get_text_config(decoder=True)

    def require_layers(self, layers: Iterable[int], option: str = "model.layers") -> None:
        """Refuse blocks that the model has not.

        Raises:
            UserError: Naming the first, and the option by which it was asked for.
        """
        depth = self.config.num_hidden_layers
        if missing := sorted(layer for layer in layers if not 0 <= layer < depth):
            raise UserError(
                f"layer {missing[0]} is not in {self.name} (layers 0..{depth - 1}). Set {option} to a subset of it."
            )

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        device = self.model.device
        if device.type == "meta":
            # The first weights are offloaded; accelerate brings them here for each forward pass.
            device = torch.device(self.model._hf_hook.execution_device)
        return device

    @property
    def context(self) -> int:
        """How many tokens the model reads at most."""
        return getattr(self.config, "max_position_embeddings", None) or 10**9

    @property
    def cache_size_per_token(self) -> int:
        """Elements of the KV cache per token, over all layers; an estimate if layers differ."""
        config = self.config
        try:
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        except (AttributeError, RuntimeError):
            width = config.hidden_size
        return 2 * config.num_hidden_layers * width

    @property
    def attention(self) -> str:
        """Which of transformers' implementations of attention is used: ``sdpa``, ``eager``, ..."""
        return self.config._attn_implementation

    @property
    def sees_by_mask(self) -> bool:
        """Whether the attention mask and a sliding window alone decide what a token attends to.

        Other models also use the place of a key in the cache.
        """
        kinds = set(getattr(self.config, "layer_types", None) or ())
        counts = any(getattr(self.config, name, None) for name in OWN_COUNT)
        return kinds <= {"full_attention", "sliding_attention"} and not counts

    @property
    def eos_token_ids(self) -> list[int]:
        """All tokens that end a generation in Hugging Face ``generate``."""
        eos = self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Name and fingerprint; by the fingerprint a checkpoint recognises its model under any path."""
        return {"name": self.name, "fingerprint": fingerprint(self.model)}

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template, as those of instruction models do."""
        return bool(self.tokenizer.chat_template)

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer begins a text with BOS."""
        return self.tokenizer.bos_token_id is not None and self.token_ids("")[:1] == [self.tokenizer.bos_token_id]

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a prompt, with the special tokens that the tokenizer adds (BOS once, if any)."""
        return self.tokenizer(text)["input_ids"]

    def prompt_ids(self, turns: Sequence[str], chat: bool, system: str | None = None) -> list[int]:
        """Tokens of prompts and responses in turn, the prompt that is to be answered last; BOS once, if any.

        Args:
            turns: An odd number of texts.
            chat: Whether they are the turns of user and assistant in the tokenizer's chat template; otherwise each
                response follows its prompt, and an empty line separates one pair from the next.
            system: The chat's system message, before all turns; None leaves it to the template.

        Raises:
            UserError: The chat template is broken, or refuses the turns.
        """
        if not chat:
            pairs = zip(turns[:-1:2], turns[1::2], strict=True)
            return self.token_ids("".join(f"{prompt} {response}\n\n" for prompt, response in pairs) + turns[-1])
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TEMPLATE_ERRORS as error:
            raise UserError(
                f"the chat template of the tokenizer of {self.name} fails on {len(turns)} turns of user and assistant "
                f"{'after a system message ' if system is not None else ''}"
                f"({type(error).__name__}: {one_line(error)}). Correct it, or set data.chat_template to false."
            ) from error
        return self.chat_ids(text)

    def chat_ids(self, text: str) -> list[int]:
        """Tokens of what a chat template has written; BOS once, if any."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # Most templates write BOS themselves; the tokenizer would add a second one.
        bos = [self.tokenizer.bos_token_id]
        return bos + ids if self.adds_bos and ids[:1] != bos else ids

    def is_text(self, ids: Tensor) -> Tensor:
        """Mask of tokens that are not BOS, whose activations are orders of magnitude larger than those of text."""
        bos = self.tokenizer.bos_token_id
        return torch.ones_like(ids, dtype=torch.bool) if bos is None else ids != bos

    def forward(self, ids: Tensor, mask: Any, positions: Tensor, cache: Any = None, last: int = 1) -> Tensor:
        """One pass over tokens ``(batch, sequence)``; logits ``(batch, last, vocabulary)`` of the last positions."""
        return self._output(ids, mask, positions, cache, last).logits[:, -last:]

    def final_hidden(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Hidden states after the model's final norm, ``(batch, sequence, d_model)``."""
        return self._output(ids, mask, positions, output_hidden_states=True).hidden_states[-1]

    def _output(self, ids: Tensor, mask: Any, positions: Tensor, cache: Any = None, last: int = 1, **more: Any) -> Any:
        # As a number it would make a view of strided rows, whose product with the head is far slower in bfloat16.
        kept = torch.arange(ids.shape[1] - last, ids.shape[1], device=ids.device)
        optional = {"position_ids": positions, "logits_to_keep": kept}
        known = {name: value for name, value in optional.items() if name in self._accepts}
        known[self.cache_name] = cache
        return self.model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **known, **more)

    @property
    def cache_name(self) -> str:
        """What the model's forward pass calls the cache of keys and values that it goes on with."""
        return next((name for name in CACHE if name in self._accepts), CACHE[-1])

    @cached_property
    def _accepts(self) -> Any:
        return inspect.signature(self.model.forward).parameters

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
        """The token of each answer string as it follows a prompt.

        Raises:
            UserError: An answer is not exactly one token.
        """
        encoded = {answer: self.following_ids(answer) for answer in answers}
        for answer, ids in encoded.items():
            if len(ids) != 1:
                raise UserError(
                    f"the option {answer!r} is {len(ids)} tokens for the tokenizer of {self.name}, so it cannot be "
                    "answered in one step. Use option letters that are single tokens, or another tokenizer."
                )
        return [ids[0] for ids in encoded.values()]

    def following_ids(self, answer: str) -> list[int]:
        """Tokens of an answer as it follows a prompt, where some tokenizers put no mark before the first word.

        A prompt ends with ``Answer:`` if the answer begins with a space, with a new line otherwise, as in a chat.
        """
        prompt = "Answer:" if answer[:1].isspace() else "\n"
        before, after = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer)
        )
        if after[: len(before)] == before:
            return after[len(before) :]
        return self.tokenizer(answer, add_special_tokens=False)["input_ids"]

    def decode(self, tokens: Tensor, lengths: Tensor) -> list[str]:
        """Text of generated tokens ``(batch, steps)``, of which the first ``lengths[i]`` count."""
        rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def positions_of(mask: Tensor) -> Tensor:
    """Position of every token under an attention mask ``(batch, sequence)``, from 0; 0 where it is masked."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def local_name(name: str) -> str:
    """An absolute path for a folder, so that a checkpoint finds it from anywhere; any other name as it is."""
    return name if name == "demo" else absolute(name)
