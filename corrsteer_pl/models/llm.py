"""A causal language model with its tokenizer."""

import inspect
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.files import absolute
from corrsteer_pl.models.chat_template import ChatTemplate
from corrsteer_pl.models.fingerprint import fingerprint
from corrsteer_pl.models.llm_loading import pretrained
from corrsteer_pl.models.sites import name_blocks
from corrsteer_pl.models.special_tokens import special_ids, token_texts, turn_end, without_appended

# Names of attention windows that layers compute from the place of a key in the cache, whatever the mask says.
OWN_COUNT = ("attention_chunk_size", "window_size", "attention_window_size", "attention_types", "attention_layers")
# What transformers calls a cache of keys and values: since 5.24, and before.
CACHE = ("cache", "past_key_values")


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
        appended: Ids of special tokens that the given tokenizer appends to a text; ``tokenizer`` does not.
        message_parts: Results of the checks of :class:`~corrsteer_pl.models.chat_template.ChatTemplate`.
    """

    name: str
    model: Any
    tokenizer: Any
    placed: bool = False
    abilities: dict[str, bool] = field(default_factory=dict)
    message_parts: dict[Any, frozenset[str]] = field(default_factory=dict)
    appended: list[int] = field(init=False, default_factory=list)
    # Given by the user, in place of those of configuration, tokenizer and chat template.
    _eos_token_ids: list[int] | None = field(init=False, default=None)
    _turn_ends: dict[str, tuple[int | None, str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer, self.appended = without_appended(self.tokenizer, self.name)

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
        eos_tokens: list[str] | None = None,
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
            eos_tokens: Texts of the tokens that end an answer, such as ``["</s>"]``; by default those of generation
                configuration and tokenizer, and the special token that ends a turn in the chat template.

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
        if eos_tokens is None:
            llm._warn_of_added_ends()
        else:
            llm._eos_token_ids = [llm._token_id(text) for text in eos_tokens]
        # The same for Hugging Face generate: in the endpoint, in lm-eval, and in an exported model.
        model.generation_config.eos_token_id = llm.eos_token_ids or None
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
        """All tokens that end a generation.

        Those of the generation configuration, the tokenizer's EOS token, and the special token that the chat template
        writes directly after an assistant turn; or those that were given as ``eos_tokens``. Ids outside the vocabulary
        are left out.
        """
        if self._eos_token_ids is not None:
            return self._eos_token_ids
        ids = [*self._configured_ends(), self.tokenizer.eos_token_id, self._turn_end()[0]]
        return [id for id in dict.fromkeys(ids) if id is not None and 0 <= id < self.config.vocab_size]

    def _configured_ends(self) -> list[int]:
        """EOS tokens of the generation configuration; without any, special tokens that the model's one names as EOS."""
        if (eos := self.model.generation_config.eos_token_id) is not None:
            return _as_list(eos)
        if (eos := getattr(self.config, "eos_token_id", None)) is None:
            return []
        # The default of a configuration class can be an ordinary token of another vocabulary.
        special = special_ids(self.tokenizer)
        return [id for id in _as_list(eos) if id in special]

    def _turn_end(self) -> tuple[int | None, str]:
        """Special token, or else text, that the chat template writes directly after an assistant turn."""
        template = str(getattr(self.tokenizer, "chat_template", None))
        if template not in self._turn_ends:
            self._turn_ends[template] = turn_end(self.tokenizer)
        return self._turn_ends[template]

    def _warn_of_added_ends(self) -> None:
        """Warn about EOS tokens that are missing in the configuration, or cannot be generated."""
        configured, size, eos = self._configured_ends(), self.config.vocab_size, self.tokenizer.eos_token_id
        known = configured or [eos]
        choose = "Set model.llm_args.eos_tokens to choose the tokens yourself."
        if outside := [id for id in configured if id >= size]:
            _warn(f"eos_token_id of {self.name} is {outside[0]}, but it has {size} tokens, so it is ignored. {choose}")
        end, text = self._turn_end()
        known_texts = token_texts(self.tokenizer, configured) or "none"
        for id, source in ((eos, "EOS token of its tokenizer"), (end, "token after an answer in its chat template")):
            if id is not None and 0 <= id < size and id not in known:
                _warn(
                    f"the EOS tokens of {self.name} ({known_texts}) lack the {source}, "
                    f"{token_texts(self.tokenizer, [id])}. Answers end at it, too. {choose}"
                )
                known = [*known, id]
        if text:
            _warn(
                f"the chat template of {self.name} ends an answer with {text!r}, which is not a special token, so that "
                f"answers can go on with another turn. {choose}"
            )

    def _token_id(self, text: str) -> int:
        """The token with a given text.

        Raises:
            UserError: There is none.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            special = choices(self.tokenizer.convert_ids_to_tokens(sorted(special_ids(self.tokenizer))))
            raise UserError(
                f"model.llm_args.eos_tokens has {text!r}, which is not one token of {self.name}. Its special tokens "
                f"are {special}."
            )
        return ids[0]

    @cached_property
    def identity(self) -> dict[str, str]:
        """Name and fingerprint; by the fingerprint a checkpoint recognises its model under any path."""
        return {"name": self.name, "fingerprint": fingerprint(self.model)}

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template, as those of instruction models do."""
        return bool(self.tokenizer.chat_template)

    @property
    def chat(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer, self.name, self.message_parts)

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer begins a text with BOS."""
        return self.tokenizer.bos_token_id is not None and self.token_ids("")[:1] == [self.tokenizer.bos_token_id]

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a prompt after the special tokens that the tokenizer puts before it (BOS once, if any)."""
        return self._with_one_bos(self.tokenizer(text)["input_ids"])

    def token_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of many texts."""
        return [self._with_one_bos(row) for row in self.tokenizer(list(texts))["input_ids"]] if texts else []

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        """Remove the tokenizer's BOS from a text that begins with one itself."""
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def prompt_ids(self, turns: Sequence[str], chat: bool, system: str | None = None) -> list[int]:
        """Tokens of prompts and responses in turn, the prompt that is to be answered last; BOS once, if any.

        Args:
            turns: An odd number of texts.
            chat: Whether they are the turns of user and assistant in the tokenizer's chat template; otherwise each
                response follows its prompt, and an empty line separates one pair from the next.
            system: The chat's system message, before all turns; None leaves it to the template.

        Raises:
            UserError: The chat template fails, or loses a turn or the system message.
        """
        text = self.prompt_text(turns, chat, system)
        return self.chat_ids(text) if chat else self.token_ids(text)

    def prompt_text(self, turns: Sequence[str], chat: bool, system: str | None = None) -> str:
        """The text of a prompt, with the arguments of :meth:`prompt_ids`.

        Raises:
            UserError: The chat template fails, or loses a turn or the system message.
        """
        if not chat:
            pairs = zip(turns[:-1:2], turns[1::2], strict=True)
            return "".join(f"{prompt} {response}\n\n" for prompt, response in pairs) + turns[-1]
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        return self.chat.text(messages)

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
        # Masked, so that any token of the vocabulary will do; some tokenizers have an added one without an embedding.
        pad = pad if pad is not None and pad < self.config.vocab_size else (self.eos_token_ids or [0])[0]
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


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)


def _as_list(ids: int | Sequence[int]) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids)


def local_name(name: str) -> str:
    """An absolute path for a folder, so that a checkpoint finds it from anywhere; any other name as it is."""
    return name if name == "demo" else absolute(name)
