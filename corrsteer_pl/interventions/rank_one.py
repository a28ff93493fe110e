"""Rank-one edits of the matrices that write to the residual stream, tried as hooks on their outputs."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from corrsteer_pl.models.decoding.branches import Run
from corrsteer_pl.models.writers import Writer, mean_share, writers

FORMS = ("row_mean", "projection")
# How a strength is measured: in percent of each matrix's Frobenius norm, or as one alpha for all matrices.
UNITS = ("percent", "alpha")
# A matrix with a smaller share in the mean of its rows is mean-centred, but for rounding.
CENTRED = 1e-4
PERCENT = 0.01


@dataclass(frozen=True)
class Edit:
    """A change ``W' = W + alpha * s * w^T`` of every writing matrix, where s is a unit direction.

    With the form ``row_mean``, w is the mean of W's rows: what is added along s has the sign of the mean of W's output,
    whichever that is. With ``projection``, w is ``W^T s``, so that the output's own component along s grows.

    Attributes:
        direction: s, ``(d_model,)`` float32 of norm 1.
        strength: Size of the change, in ``unit``.
        form: ``row_mean`` or ``projection``.
        unit: ``percent``: the strength is the Frobenius norm of the change, in percent of that of W, so that alpha
            differs from matrix to matrix. ``alpha``: the strength is alpha, the same for all matrices.

    Source:
        ROSI, arXiv 2508.20766, eq. 6, which is the form ``row_mean`` with the unit ``alpha``.
    """

    direction: Tensor
    strength: float
    form: str
    unit: str = "percent"

    def __str__(self) -> str:
        """What the edit is, as the subject of a sentence."""
        size = f"of {self.strength:g} % of the weights" if self.unit == "percent" else f"with alpha {self.strength:g}"
        return f"an edit {size}"

    def alpha(self, matrix: Tensor) -> float:
        """The factor for a matrix ``(d_model, d_in)``; 0 where there is nothing to scale."""
        return self.strength * alpha_of_one(matrix, self.direction, self.form, self.unit)

    def change(self, matrix: Tensor) -> Tensor:
        """What is added to a matrix, ``(d_model, d_in)`` float32 of rank one.

        Example:
            >>> edit = Edit(torch.tensor([1., 0.]), strength=10, form="projection")
            >>> edit.change(torch.tensor([[3., 0.], [0., 4.]]))
            tensor([[0.5000, 0.0000],
                    [0.0000, 0.0000]])
        """
        matrix = matrix.float()
        direction = self.direction.to(matrix.device)
        row = matrix.mean(0) if self.form == "row_mean" else direction @ matrix
        return self.alpha(matrix) * torch.outer(direction, row)


def alpha_of_one(matrix: Tensor, direction: Tensor, form: str, unit: str = "percent") -> float:
    """The factor alpha of an edit with strength 1.

    With the unit ``percent``, the change has one percent of the matrix's norm; 0 where no factor gives it that.
    """
    if unit == "alpha":
        return 1.0
    matrix = matrix.float()
    if form == "row_mean":
        row, least = matrix.mean(0), CENTRED * matrix.norm() / matrix.shape[0] ** 0.5
    else:
        row, least = direction.to(matrix.device) @ matrix, CENTRED * matrix.norm()
    return PERCENT * (matrix.norm() / row.norm()).item() if row.norm() > least else 0.0


def warn_of_centred(model: Any, form: str) -> None:
    """Warn if writing matrices are mean-centred, so that the form ``row_mean`` adds nothing."""
    shares = {writer.name: mean_share(writer.matrix) for writer in writers(model)} if form == "row_mean" else {}
    centred = [name for name, share in shares.items() if share < CENTRED]
    if centred:
        name = centred[0]
        warnings.warn(
            f"{len(centred)} of {len(shares)} matrices that write to the residual stream are mean-centred (the mean of "
            f"the rows of {name} has {shares[name]:.1e} of its norm): the edit leaves them as they are. Set model.form "
            "to projection.",
            stacklevel=2,
        )


class EditedOutputs:
    """Variants of an edit, tried side by side: hooks add to each row's output what its edited weights would.

    ``W' x = y + alpha * s * mean(y)``, or ``y + alpha * s * (s . y)``, where ``y = W x``: both forms follow from the
    output alone. Equal to edited weights but for rounding.

    Args:
        model: The language model.
        edits: One per variant; None for the unchanged model. All have one form and one unit.

    Attributes:
        most_together: How many variants can share a forward pass: any number.
        changes_prompt: Whether the prompt's keys and values depend on the variant: they do.
    """

    most_together: int | None = None
    changes_prompt = True

    def __init__(self, model: Any, edits: Sequence[Edit | None]) -> None:
        self.edits = list(edits)
        self._writers = writers(model)
        self._factors = {writer.name: self._alphas(writer) for writer in self._writers}

    def _alphas(self, writer: Writer) -> Tensor:
        """Factors ``(variants,)``; a direction that several variants have is looked at once."""
        units: dict[int, float] = {}
        for edit in self.edits:
            if edit is not None and id(edit.direction) not in units:
                units[id(edit.direction)] = alpha_of_one(writer.matrix, edit.direction, edit.form, edit.unit)
        return torch.tensor([0.0 if e is None else e.strength * units[id(e.direction)] for e in self.edits])

    def __len__(self) -> int:
        """Number of variants."""
        return len(self.edits)

    def described(self, variant: int) -> str | None:
        """What a variant does, as the subject of a sentence; None if it changes nothing."""
        edit = self.edits[variant]
        return None if edit is None or edit.strength == 0 else str(edit)

    def groups(self, size: int) -> Iterator[Self]:
        """The variants in groups of ``size``, the last filled up with the unchanged model."""
        for start in range(0, len(self), size):
            group, chunk = copy(self), self.edits[start : start + size]
            group.edits = [*chunk, *[None] * (size - len(chunk))]
            group._factors = {
                name: nn.functional.pad(factors[start : start + size], (0, size - len(chunk)))
                for name, factors in self._factors.items()
            }
            yield group

    @contextmanager
    def attached(self, model: nn.Module, run: Run | None = None) -> Iterator[None]:
        """Change the outputs within the context."""
        known = next((edit for edit in self.edits if edit is not None), None)
        if known is None:
            yield
            return
        directions = torch.stack([torch.zeros_like(known.direction) if e is None else e.direction for e in self.edits])
        with ExitStack() as stack:
            for writer in self._writers:
                placed = _Placed(directions, self._factors[writer.name], run)
                hook = partial(_add, writer, known.form, placed)
                stack.callback(writer.module.register_forward_hook(hook).remove)
            yield


class _Placed:
    """Directions and factors of the rows of a batch, gathered again only if the rows change."""

    def __init__(self, directions: Tensor, factors: Tensor, run: Run | None) -> None:
        self.directions, self.factors, self.run = directions, factors, run
        self._variant: Tensor | None = None
        self._rows: tuple[Tensor, Tensor] | None = None

    def __call__(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Directions ``(rows, 1, d_model)`` and factors ``(rows, 1, 1)``, float32."""
        variant = self.run.variant if self.run else None
        if self._rows is None or variant is not self._variant or len(self._rows[0]) != len(output):
            self._variant = variant
            places = torch.arange(len(output)) % len(self.factors) if variant is None else variant[:, 0].cpu()
            if len(places) != len(output):
                raise ValueError("variants of an edit cannot be branches of one sequence")
            chosen = self.directions[places], self.factors[places]
            directions, factors = (tensor.to(output.device) for tensor in chosen)
            self._rows = directions.unsqueeze(1), factors[:, None, None]
        return self._rows


def _add(writer: Writer, form: str, placed: _Placed, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
    directions, factors = placed(output)
    written = writer.written(output).float()
    size = written.mean(-1, keepdim=True) if form == "row_mean" else (written * directions).sum(-1, keepdim=True)
    return (output.float() + factors * size * directions).to(output.dtype)
