"""The formats in which a run can be handed on: how each is written, and how what was written is read again."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from corrsteer_pl.formats.biases import alone, with_adapter, write_merged, write_peft
from corrsteer_pl.formats.control_vector import as_llama_cpp_adds, write_control_vector
from corrsteer_pl.formats.easysteer import VECTORS, write_easysteer
from corrsteer_pl.formats.lm_eval import as_lm_eval_steers, write_lm_eval
from corrsteer_pl.interventions.steering import Schedule
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sites import Site


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        artefact: Name of what is written, in which ``{run}`` stands for that of the run; a folder if it has no ending.
        write: Writes vectors at a place.
        opened: The model as it is with what was written at a place.
        read_by: What reads it there.
        remark: What a user should know, with its ``{path}``, which stands ``{quoted}`` in commands.
    """

    artefact: str
    write: Callable[[LanguageModel, Mapping[Site, Tensor], Path, Schedule], None]
    opened: Callable[[LanguageModel, Path], AbstractContextManager[Any]]
    read_by: str
    remark: str = ""

    @property
    def ending(self) -> str:
        """That of the file that is written; empty if it is a folder."""
        return Path(self.artefact).suffix


def _everywhere(
    write: Callable[[LanguageModel, Mapping[Site, Tensor], Path], None],
) -> Callable[[LanguageModel, Mapping[Site, Tensor], Path, Schedule], None]:
    """A writer of a format that steers every position, whatever the schedule."""
    return lambda llm, vectors, path, _: write(llm, vectors, path)


FORMATS: dict[str, Format] = {
    "gguf": Format(
        "{run}.gguf",
        _everywhere(write_control_vector),
        lambda llm, path: as_llama_cpp_adds(llm.model, path),
        "the package gguf, and added as llama.cpp does",
        "llama-server -m MODEL.gguf --control-vector {quoted}",
    ),
    "peft": Format(
        "peft",
        _everywhere(write_peft),
        lambda llm, path: with_adapter(llm.model, path),
        "PeftModel.from_pretrained",
        "PeftModel.from_pretrained(model, '{path}')",
    ),
    "merged": Format(
        "merged",
        _everywhere(write_merged),
        alone,
        "AutoModelForCausalLM.from_pretrained",
        "AutoModelForCausalLM.from_pretrained('{path}'), or vllm serve {quoted}",
    ),
    "lm_eval": Format(
        "{run}.lm_eval.pt",
        _everywhere(write_lm_eval),
        as_lm_eval_steers,
        "lm-eval's steered model",
        "lm_eval --model steered --model_args pretrained=MODEL,steer_path={quoted}",
    ),
    "easysteer": Format(
        "easysteer",
        write_easysteer,
        lambda llm, path: as_llama_cpp_adds(llm.model, path / VECTORS),
        "the package gguf, and added at every position; EasySteer itself was not run",
        "EasySteer's server: {path}/request.json is what a request to it has as extra_body, with the path at which the "
        "server finds vectors.gguf",
    ),
}
