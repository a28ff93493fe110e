"""The matrices that write to the residual stream: of each block, attention's output and the MLP's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.models.sites import ATTENTION, MLP, decoder_blocks

# Names of the last projection within attention and within the MLP.
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "dense_4h_to_h", "fc_out", "fc2", "w2", "wo")


@dataclass(frozen=True)
class Writer:
    """A matrix whose output is added to the residual stream, perhaps after a norm, as in Gemma 2 and 3.

    Attributes:
        name: Of its module in the model.
        module: A linear layer, or GPT-2's ``Conv1D``, which stores the transpose.
    """

    name: str
    module: Any

    @property
    def matrix(self) -> Tensor:
        """The weight as ``(d_model, d_in)``, a view."""
        return self.module.weight.T if isinstance(self.module, Conv1D) else self.module.weight

    def written(self, output: Tensor) -> Tensor:
        """What the matrix itself gave, ``W x``, of the module's output: without the bias."""
        bias = getattr(self.module, "bias", None)
        return output if bias is None else output - bias


def writers(model: Any, on_block: bool = False) -> list[Writer]:
    """The writing matrices of all blocks, attention before MLP.

    Args:
        model: The language model.
        on_block: Whether an MLP may be matrices of the block itself, as OPT's, whose outputs are
            ``(batch * sequence, d_model)``, so that hooks cannot tell the rows of a batch.

    Raises:
        UserError: A block has none that is known, several experts, or quantised ones.
    """
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise UserError(
            f"the weights of {type(model).__name__} are quantised, and cannot be edited. Load the model without "
            "model.llm_args.quantize."
        )
    paths = {module: name for name, module in model.named_modules()}
    return [
        Writer(paths[module], module)
        for block in decoder_blocks(model)
        for module in _of_block(block, type(model), on_block)
    ]


def _of_block(block: nn.Module, kind: type, on_block: bool) -> Iterator[nn.Module]:
    for parts in (ATTENTION, MLP):
        own = block if on_block and parts is MLP else None
        part = next((getattr(block, name) for name in parts if hasattr(block, name)), own)
        module = next((getattr(part, name) for name in PROJECTIONS if hasattr(part, name)), None)
        if not isinstance(module, (nn.Linear, Conv1D)):
            what = "attention" if parts is ATTENTION else "the MLP"
            names, place = (parts, block) if part is None else (PROJECTIONS, part)
            raise UserError(
                f"the matrix by which {what} of {kind.__name__} writes to the residual stream is not known (none of "
                f"{choices(names)} in {type(place).__name__}; mixtures of experts are not supported). Choose "
                "another model."
            )
        if not module.weight.is_floating_point():
            raise UserError(f"the weights of {kind.__name__} are quantised, and cannot be edited.")
        yield module


def mean_share(matrix: Tensor) -> float:
    """Share of a matrix ``(d_model, d_in)`` that lies in the mean of its rows, in [0, 1] by Frobenius norms.

    ``1 / sqrt(d_model)`` for a random one, 0 for one whose output is centred.

    Example:
        >>> import torch
        >>> round(mean_share(torch.ones(4, 2)), 6), mean_share(torch.tensor([[1.], [-1.]]))
        (1.0, 0.0)
    """
    matrix = matrix.float()
    return (matrix.mean(0).norm() * matrix.shape[0] ** 0.5 / matrix.norm().clamp(min=1e-30)).item()
