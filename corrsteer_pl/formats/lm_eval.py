"""Files of lm-eval's ``steered`` model: for each module the vector that is added to its output, at every position."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corrsteer_pl.errors import UserError
from corrsteer_pl.formats.outputs import as_output
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sites import Site


def write_lm_eval(llm: LanguageModel, vectors: Mapping[Site, Tensor], path: Path) -> None:
    """Write a ``.pt`` file for ``--model steered --model_args steer_path=...``."""
    names = {module: name for name, module in llm.model.base_model.named_modules()}
    told: dict[str, dict[str, Any]] = {}
    for site, vector in vectors.items():
        name = names[as_output(site, "lm_eval").module(llm.model)]
        # A name stands once; what is added at it adds up.
        before = told.get(name, {}).get("steering_vector", 0)
        told[name] = {
            "steering_vector": before + vector.float().cpu(),
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
    # torch's own writing to a path hides that a disk is full.
    buffer = BytesIO()
    torch.save(told, buffer)
    path.write_bytes(buffer.getbuffer())


@contextmanager
def as_lm_eval_steers(llm: LanguageModel, path: Path) -> Iterator[Any]:
    """The model within lm-eval's own context, with the file read by lm-eval."""
    if find_spec("lm_eval") is None:
        raise UserError("the format lm_eval is checked with lm-eval itself: pip install 'corrsteer_pl[lm_eval]'.")
    from lm_eval.models.hf_steered import SteeredModel, steer

    steered: Any = SteeredModel(pretrained=llm.model, tokenizer=llm.tokenizer, steer_path=str(path))
    with steer(llm.model, steered.hook_to_steer):
        yield llm.model
