"""Requests of EasySteer, which steers in vLLM: a control vector, and when it is added."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_json
from corrsteer_pl.formats.control_vector import write_gguf
from corrsteer_pl.formats.outputs import by_block
from corrsteer_pl.interventions.steering import Schedule
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.sites import Site

VECTORS, REQUEST = "vectors.gguf", "request.json"
# Any token, or the last position.
ANY = LAST = [-1]


def write_easysteer(llm: LanguageModel, vectors: Mapping[Site, Tensor], folder: Path, schedule: Schedule) -> None:
    """Write ``vectors.gguf`` and ``request.json``, the ``steer_vector_request`` of a request to its server.

    Raises:
        UserError: Its phases cannot say the schedule.
    """
    blocks = by_block(vectors, "easysteer")
    when = phases(schedule)
    write_gguf(blocks, llm.config.model_type, folder / VECTORS)
    config = {"path": VECTORS, "scale": 1.0, "target_layers": list(blocks), "algorithm": "direct", "normalize": False}
    request = {"steer_vector_name": "corrsteer", "steer_vector_int_id": 1, "vector_configs": [{**config, **when}]}
    write_json(folder / REQUEST, {"steer_vector_request": request})


def phases(schedule: Schedule) -> dict[str, Any]:
    """When a vector is added, in the prompt and in what is generated.

    Raises:
        UserError: It is added to some generated tokens only, or ever more weakly.

    Example:
        >>> phases(Schedule("generated"))
        {'prefill_trigger_positions': [-1], 'generate_trigger_tokens': [-1]}
    """
    if schedule.decay != 1 or schedule.positions == "first_k":
        raise UserError(
            "easysteer steers the prompt, its last position, or all generated tokens, so model.decay has to be 1 and "
            "model.positions generated, all or prompt_last. Export a run with these."
        )
    prompt = {"prefill_trigger_tokens": ANY} if schedule.positions == "all" else {"prefill_trigger_positions": LAST}
    return prompt if schedule.positions == "prompt_last" else {**prompt, "generate_trigger_tokens": ANY}
