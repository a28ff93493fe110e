"""What methods share that leave a selection: what was tried in validation, and what of it was chosen."""

from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from corrsteer_pl.errors import one_line
from corrsteer_pl.evaluation.tables import selection_table
from corrsteer_pl.files import write_json
from corrsteer_pl.methods.base import Method
from corrsteer_pl.methods.runs.provenance import damaged
from corrsteer_pl.selection import Feature, Selection


class Selecting(Method):
    """A method whose fit ends with a selection.

    Attributes:
        selection: What the fit chose, after validation; None before.
        snapshots: What validations chose, and what that reached, as the fit went on.
    """

    selection: Selection | None
    snapshots: list[dict]

    @property
    def is_fitted(self) -> bool:
        """Whether there is a selection, be it empty."""
        return self.selection is not None

    @property
    def mark(self) -> str | None:
        """That of the selection that the fit made, whatever a test makes of it."""
        return self.selection.mark if self.selection else None

    def take_snapshot(self, baseline: float, best: float) -> None:
        """Log what the selection reaches in validation, and keep it.

        Args:
            baseline: Mean reward of the unchanged model.
            best: That of the best candidate.
        """
        selection = self.chosen()
        joint = baseline if selection.joint_reward is None else selection.joint_reward
        logged = {"samples": self.counted, "baseline_reward": baseline, "best_candidate_reward": best}
        logged |= {"joint_reward": joint, "scale": selection.scale}
        features = [[f.layer, f.index] for f in selection.features]
        earlier = [snapshot for snapshot in self.snapshots if snapshot["samples"] != self.counted]
        self.snapshots = [*earlier, {**logged, "features": features}]
        self.log_validation(logged)

    def select_whole(self, rewards: Tensor, score: str, features: tuple[Feature, ...] = ()) -> None:
        """Take the change as it is, where there is nothing to choose among.

        Args:
            rewards: Those of a validation, ``(2, n)``.
            score: How the change came about.
            features: What it is about.
        """
        baseline, changed = rewards.mean(1)[:2].tolist()
        self.selection = Selection(
            rule="global", features=features, candidates=(), ranking=(), joint_reward=changed,
            baseline_reward=baseline, samples=self.learnt_from, reward=0.0, null_max_correlation=None,
            score=score, llm=self.llm.identity, saes=self.saes_identity() or {},
        ).marked()  # fmt: skip
        self.take_snapshot(baseline, changed)

    def chosen(self) -> Selection:
        """The selection.

        Raises:
            UserError: Nothing has been fitted.
        """
        if self.selection is None:
            raise self.unfitted()
        return self.selection

    def state(self) -> dict[str, Any]:
        """The selection, and what validations chose."""
        selection = self.selection.as_dict() if self.selection else None
        return {"selection": selection, "snapshots": self.snapshots}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the selection, and what validations chose."""
        try:
            self.selection = None if state["selection"] is None else Selection.from_dict(state["selection"])
            self.snapshots = list(state["snapshots"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise damaged(f"what its fit found cannot be read ({one_line(error)})") from error

    def write(self, folder: Path) -> None:
        """``selection.json``."""
        told = {"method": self.name, **self.chosen().as_dict(), "snapshots": self.snapshots}
        write_json(folder / "selection.json", told)

    def tables(self) -> list[Table]:
        """The tested candidates."""
        return [selection_table(self.selection)] if self.selection else []
