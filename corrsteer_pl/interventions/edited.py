"""Rank-one edits of weights: applied, undone bit for bit, and on record."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save
from torch import Tensor, nn

from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_atomically, write_json
from corrsteer_pl.interventions.rank_one import FORMS, UNITS, Edit
from corrsteer_pl.models.fingerprint import fingerprint
from corrsteer_pl.models.writers import writers

FILES = ("edit.json", "edit.safetensors")


@dataclass(frozen=True)
class EditRecord:
    """An edit and the model that it belongs to.

    Attributes:
        edit: The edit.
        model: Name of the model that it was made for.
        before: Fingerprint of that model.
        after: Fingerprint of the edited one.
        alphas: The factor of each writing matrix, by name.
    """

    edit: Edit
    model: str
    before: str
    after: str
    alphas: Mapping[str, float]

    @classmethod
    def of(cls, edit: Edit, llm: Any) -> Self:
        """The record of an edit of a language model, which is left as it is."""
        alphas = {writer.name: edit.alpha(writer.matrix) for writer in writers(llm.model)}
        with EditedWeights(llm.model, edit).applied():
            after = fingerprint(llm.model)
        return cls(edit, llm.name, llm.identity["fingerprint"], after, alphas)

    def as_dict(self) -> dict[str, Any]:
        """Plain values and a tensor, for a checkpoint."""
        return {**vars(self), "edit": dict(vars(self.edit)), "alphas": dict(self.alphas)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`as_dict`.

        Raises:
            ValueError: The edit cannot be one.
        """
        edit = Edit(**plain["edit"])
        if edit.direction.ndim != 1 or not edit.direction.isfinite().all():
            raise ValueError("its edit has no usable direction")
        if edit.form not in FORMS or edit.unit not in UNITS:
            raise ValueError(f"its edit has the form {edit.form!r} and the unit {edit.unit!r}")
        return cls(**{**plain, "edit": edit})

    def write(self, folder: Path) -> None:
        """``edit.json``, and ``edit.safetensors`` with the direction."""
        plain = self.as_dict()
        direction = {"direction": plain["edit"].pop("direction")}
        write_atomically(folder / FILES[1], lambda file: file.write_bytes(save(direction)))
        write_json(folder / FILES[0], plain)

    def apply(self, llm: Any) -> "EditedWeights":
        """Edit a language model for good; the result can undo it, bit for bit.

        Raises:
            UserError: It is another model, or has been edited already.
        """
        found = fingerprint(llm.model)
        if found == self.after and self.after != self.before:
            raise UserError(f"{llm.name} has this edit already. Apply it once.")
        if found != self.before:
            raise UserError(
                f"the edit was made for {self.model}, but {llm.name} has other weights. Use the model that it was "
                "made for."
            )
        weights = EditedWeights(llm.model, self.edit)
        weights.apply()
        llm.__dict__.pop("identity", None)
        return weights


def remove_record(folder: Path) -> None:
    """Remove the record of an earlier fit."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


class EditedWeights:
    """The weights of an edited model, beside those that they replace.

    Both are kept, so that changing from one to the other copies nothing and is exact; that takes as much memory as the
    writing matrices once more.

    Args:
        model: The language model.
        edit: The edit.
    """

    def __init__(self, model: Any, edit: Edit) -> None:
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        for writer in writers(model):
            weight = writer.module.weight
            changed = writer.matrix.float() + edit.change(writer.matrix)
            other = changed if writer.matrix is weight else changed.T.contiguous()
            self._pairs.append((weight, other.to(weight.dtype)))

    def apply(self) -> None:
        """Put the edited weights in place; the same call puts the others back."""
        self._pairs = [(weight, _swapped(weight, other)) for weight, other in self._pairs]

    undo = apply

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Edited within the context."""
        self.apply()
        try:
            yield
        finally:
            self.undo()


def _swapped(weight: nn.Parameter, other: Tensor) -> Tensor:
    before, weight.data = weight.data, other
    return before
