"""Where an SAE reads and a vector is added: a named tensor of one decoder block."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from corrsteer_pl.errors import UserError, choices

# How TransformerLens and SAELens name a site.
HOOK = re.compile(r"blocks\.(\d+)\.hook_(\w+)")
KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_out")
# Names, in decoder blocks, of the parts that write to the residual stream and of the norms after them.
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
ATTENTION_NORM = ("post_self_attn_layernorm", "post_attention_layernorm")
MLP_NORM = ("post_mlp_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True, order=True)
class Site:
    """A tensor of one decoder block, where an SAE reads and a vector is added.

    ``resid_pre`` is the input of the block, ``resid_post`` its output; ``attn_out`` and ``mlp_out`` are what its
    attention and its MLP add to the residual stream, after the norm that some models have there (Gemma 2 and 3,
    OLMo 2, GLM 4). Written as in TransformerLens and SAELens, ``blocks.3.hook_resid_post``.

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
            UserError: The name is none of a supported site.
        """
        match = HOOK.fullmatch(hook_name)
        if not match or match[2] not in KINDS:
            raise UserError(
                f"an SAE declares the hook {hook_name!r}, which cannot be steered here; supported are "
                f"{choices(f'blocks.N.hook_{kind}' for kind in KINDS)}. Choose SAEs of one of these sites."
            )
        return cls(int(match[1]), match[2])

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.kind}"

    def hook(self, model: Any, fn: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call ``fn`` with the tensor at this site in every forward pass; what it returns replaces it.

        Shape:
            - fn: ``(batch, sequence, d_model)`` to the same shape, or to None to leave it as it is.
        """

        def checked(hidden: Tensor) -> Tensor | None:
            if hidden.ndim != 3:
                raise UserError(
                    f"{self} of {type(model).__name__} has {hidden.ndim} dimensions instead of batch, sequence and "
                    "width, so it is no residual stream. Choose another model."
                )
            return fn(hidden)

        if self.kind == "resid_pre":
            block = decoder_blocks(model)[self.layer]
            return block.register_forward_pre_hook(_on_input(checked), with_kwargs=True)
        return self.module(model).register_forward_hook(_on_output(checked))

    def module(self, model: Any) -> nn.Module:
        """The module whose output is the tensor at this site.

        Raises:
            ValueError: It is the input of a block.
            UserError: The block has no part of a known name.
        """
        block = decoder_blocks(model)[self.layer]
        if self.kind == "resid_pre":
            raise ValueError(f"{self} is an input")
        if self.kind == "resid_post":
            return block
        parts = ATTENTION if self.kind == "attn_out" else MLP
        name = self.norm(model) or next((part for part in parts if hasattr(block, part)), None)
        if name is None:
            raise UserError(
                f"{type(block).__name__} has none of {choices(parts)}, so its {self.kind} is not known. "
                "Choose SAEs of the residual stream."
            )
        return getattr(block, name)

    def norm(self, model: Any) -> str | None:
        """The norm through which a block's attention or MLP writes; None if there is none, or at the block itself."""
        block = decoder_blocks(model)[self.layer]
        norms = {"attn_out": ATTENTION_NORM, "mlp_out": MLP_NORM}.get(self.kind, ())
        # Llama's post_attention_layernorm comes before the MLP. Only blocks with a norm after the MLP, as in Gemma 2,
        # have one after attention.
        has_norms = any(hasattr(block, name) for name in MLP_NORM)
        return next((name for name in norms if has_norms and hasattr(block, name)), None)


def name_blocks(model: Any, path: str) -> None:
    """Set the path of a model's decoder blocks, for a model in which :func:`decoder_blocks` finds none.

    Raises:
        UserError: There is no list of modules at that path.
    """
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise UserError(
            f"model.llm_args.blocks is {path!r}, which is no list of modules in {type(model).__name__}; "
            f"there are {choices(lists)}."
        )
    # Stored on the model, because hooks are given nothing else.
    model.corrsteer_blocks = path


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The model's decoder blocks, in order.

    Raises:
        UserError: No list of ``num_hidden_layers`` modules is found, or more than one.
    """
    if named := getattr(model, "corrsteer_blocks", None):
        return model.get_submodule(named)
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [m for m in (decoder or model).modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    # An inner list of equal length (experts, say) comes after the blocks that contain it.
    outer = [m for m in lists if not any(m in other.modules() for other in lists if other is not m)]
    if len(outer) != 1:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise UserError(
            f"{type(model).__name__} has {len(outer)} lists of {depth} modules, so its decoder blocks are not "
            f"clear. Name them with model.llm_args.blocks, as one of {choices(names)}."
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
