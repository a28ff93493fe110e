"""Where an SAE reads and a vector is added: a named tensor of one decoder block."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from corrsteer_pl.errors import UserError, choices

KINDS = ("resid_pre", "resid_post")


@dataclass(frozen=True, order=True)
class Site:
    """The input (``resid_pre``) or the output (``resid_post``) of one decoder block.

    Written as in TransformerLens and SAELens, ``blocks.3.hook_resid_post``.

    Example:
        >>> Site.parse("blocks.3.hook_resid_post")
        Site(layer=3, kind='resid_post')
        >>> str(Site(3, "resid_pre"))
        'blocks.3.hook_resid_pre'
    """

    layer: int
    kind: str

    @classmethod
    def parse(cls, hook_name: str) -> "Site":
        """Read an SAE's declared hook name.

        Raises:
            UserError: The name is not a residual site of a block.
        """
        match = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", hook_name)
        if not match or match[2] not in KINDS:
            raise UserError(
                f"an SAE declares the hook {hook_name!r}, which cannot be steered here; supported are "
                f"{choices(f'blocks.N.hook_{kind}' for kind in KINDS)}. Choose residual-stream SAEs."
            )
        return cls(int(match[1]), match[2])

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.kind}"

    def hook(self, model: Any, fn: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call ``fn`` with the residual at this site in every forward pass; what it returns replaces it.

        Shape:
            - fn: ``(batch, sequence, d_model)`` to the same shape, or to None to leave it as it is.
        """
        block = decoder_blocks(model)[self.layer]
        if self.kind == "resid_pre":
            return block.register_forward_pre_hook(_on_input(fn), with_kwargs=True)
        return block.register_forward_hook(_on_output(fn))


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The model's decoder blocks, in order.

    Raises:
        UserError: No list of ``num_hidden_layers`` modules is found, or more than one.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    # An inner list of equal length (experts, say) comes after the blocks that contain it.
    outer = [m for m in lists if not any(m in other.modules() for other in lists if other is not m)]
    if len(outer) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(outer)} lists of {depth} modules, so its decoder blocks are not "
            "clear; a causal language model with one stack of blocks is needed."
        )
    return outer[0]


def _on_output(fn: Callable[[Tensor], Tensor | None]) -> Callable:
    def hook(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        # Blocks return the residual itself since transformers 4.56, a tuple that starts with it before.
        if isinstance(output, Tensor):
            return fn(output)
        changed = fn(output[0])
        return None if changed is None else (changed, *output[1:])

    return hook


def _on_input(fn: Callable[[Tensor], Tensor | None]) -> Callable:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args:
            changed = fn(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        changed = fn(kwargs["hidden_states"])
        return None if changed is None else (args, {**kwargs, "hidden_states": changed})

    return hook
