"""llama.cpp itself, by the functions of ``llama.h`` in the library of the wheel xllamacpp.

The wheel's Python interface hides control vectors. Parameters and batches, which go by value, stay opaque here, in more
room than they need.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from torch import Tensor

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
POINTER = ctypes.c_void_p


class Opaque(ctypes.Structure):
    """Something that is passed by value."""

    _fields_ = [("words", ctypes.c_uint32 * 64)]


class File(ctypes.Structure):
    """What the loader of control vectors asks: a strength and a path, ``std::string`` before C++11: one pointer."""

    _fields_ = [("strength", ctypes.c_float), ("path", ctypes.c_char_p)]


class Vectors(ctypes.Structure):
    """What it returns: a width, -1 if it refuses, and ``std::vector<float>``, from block 1 on."""

    _fields_ = [("width", ctypes.c_int), ("begin", POINTER), ("end", POINTER), ("room", POINTER)]


class LlamaCpp:
    """A model of a GGUF file, in float32 throughout."""

    def __init__(self, path: Path) -> None:
        call("llama_log_set", None, POINTER, POINTER)(SILENT, None)
        parameters = call("llama_model_default_params", Opaque)()
        self.model = call("llama_model_load_from_file", POINTER, ctypes.c_char_p, Opaque)(bytes(path), parameters)
        assert self.model, f"llama.cpp does not load {path}"
        self.width = call("llama_model_n_embd", ctypes.c_int, POINTER)(self.model)
        self.blocks = call("llama_model_n_layer", ctypes.c_int, POINTER)(self.model)
        self.vocabulary = call("llama_vocab_n_tokens", ctypes.c_int, POINTER)(
            call("llama_model_get_vocab", POINTER, POINTER)(self.model)
        )

    def logits(self, prompt: Sequence[int], control_vector: Path | None = None, from_token: int = 0) -> Tensor:
        """Logits ``(tokens, vocabulary)`` of a prompt, with a control vector that is added from a token on."""
        parameters = call("llama_context_default_params", Opaque)()
        assert list(parameters.words[26:28]) == [1, 1], "the types of keys and values are elsewhere in this version"
        # No flash attention, and keys and values not in float16.
        parameters.words[13], parameters.words[26:28] = 0, [0, 0]
        context = call("llama_init_from_model", POINTER, POINTER, Opaque)(self.model, parameters)
        rows = []
        for position, token in enumerate(prompt):
            if control_vector is not None and position == from_token:
                self.add(context, control_vector)
            batch = call("llama_batch_get_one", Opaque, POINTER, ctypes.c_int)((ctypes.c_int * 1)(token), 1)
            assert call("llama_decode", ctypes.c_int, POINTER, Opaque)(context, batch) == 0
            row = call("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), POINTER, ctypes.c_int)(context, -1)
            rows.append(torch.from_numpy(np.ctypeslib.as_array(row, (self.vocabulary,)).copy()))
        call("llama_free", None, POINTER)(context)
        return torch.stack(rows)

    def add(self, context: int, control_vector: Path) -> None:
        """Add a control vector, as ``--control-vector`` does."""
        read = loaded(control_vector)
        assert read.width == self.width, f"llama.cpp refuses {control_vector}"
        add = call("llama_set_adapter_cvec", ctypes.c_int, POINTER, POINTER, ctypes.c_size_t, *[ctypes.c_int32] * 3)
        assert add(context, read.begin, (read.end - read.begin) // 4, self.width, 1, self.blocks) == 0


def loaded(path: Path) -> Vectors:
    """What llama.cpp's own loader makes of a control vector."""
    call("_Z30common_log_set_verbosity_tholdi", None, ctypes.c_int)(-1)
    asked = File(1, bytes(path))
    begin = ctypes.addressof(asked)
    end = begin + ctypes.sizeof(asked)
    load = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
    return call(load, Vectors, POINTER)((POINTER * 3)(begin, end, end))


def call(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the library."""
    function = library[name]
    function.restype, function.argtypes = result, arguments
    return function


def write_model(model: Any, path: Path) -> None:
    """A tiny model of Hugging Face's for llama.cpp, in float32 and without a tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter = interleaved(parameter, config.hidden_size // config.num_attention_heads)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), parameter.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: Tensor, head: int) -> Tensor:
    """Rows of each head as llama.cpp rotates them for Llama, pair after pair, where Hugging Face has halves."""
    return weight.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).reshape(weight.shape)


library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, POINTER)(lambda *_: None)
