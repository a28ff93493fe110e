"""What is to be measured, as a YAML file says it."""

import json
from collections.abc import Collection, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import yaml

from corrsteer_pl.data import TaskDataModule
from corrsteer_pl.errors import UserError, choices, one_line
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.options import check_options
from corrsteer_pl.rewards.judges import RefusalReward
from corrsteer_pl.selection import RULES

# Options of the method that all tasks of a plan share.
FIXED = ("llm", "saes", "dtype", "llm_args", "rule", "sign")


@dataclass(frozen=True)
class SaePlan:
    """The SAEs, trained first.

    Attributes:
        recipe: Options of :class:`~corrsteer_pl.models.sae_training.train.Recipe`.
        texts: Files of texts below the folder of rows, with how many of their first rows are read.
        prompts: The same with prompts, which the model answers.
        tasks: Names of tasks, with how many prompts of their fit splits are added to those at most.
        answer_tokens: Longest answer.
    """

    recipe: dict[str, Any]
    texts: dict[str, int] = field(default_factory=dict)
    prompts: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    answer_tokens: int = 48


@dataclass(frozen=True)
class TaskPlan:
    """A task, and what it is compared with.

    Attributes:
        data: Options of :class:`~corrsteer_pl.data.TaskDataModule`; a path that is below the folder of rows is looked
            for there.
        system_prompt: The sentence that is tried instead of steering; None tries none.
        shots: Solved examples that are tried instead of steering; 0 tries none.
        seeds: Seeds of its fits; None for those of all tasks.
        draws: Draws of random features; None for those of all tasks.
        refusing: Whether the log-odds of a refusing first token judge its answers a second time.
        model: Options of the method for this task alone.
        note: What it asks, for the page.
    """

    data: dict[str, Any]
    system_prompt: str | None = None
    shots: int = 0
    seeds: list[int] | None = None
    draws: int | None = None
    refusing: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class Plan:
    """All that is measured.

    Attributes:
        title: The name of the model, for the page.
        llm: The model.
        saes: Folder of the SAEs, made if it is not there.
        tasks: Name to task.
        dtype: The model's precision.
        rows: Folder with the rows of the benchmarks; None for the Hub.
        train: How the SAEs are trained, if they are not there.
        rules: Rules of selection that are compared.
        seeds: Seeds of the fits.
        draws: Random selections that every selection is compared with.
        scales: Strengths of the first rule's selection, of which the best on validation is tested too; none tries none.
        text: File below the folder of rows, whose last rows tell how a selection changes the loss on plain text.
        text_rows: How many of them.
        harmless: A task whose reward tells how a selection changes harmless answers; see :class:`TaskPlan`.
        page: Where the page is written.
        name: Name of the file, which the results are named after.
    """

    title: str
    llm: str
    saes: str
    tasks: dict[str, TaskPlan]
    dtype: str = "float32"
    rows: Path | None = None
    train: SaePlan | None = None
    rules: Sequence[str] = ("foreach", "global", "all")
    seeds: Sequence[int] = (0, 1, 2)
    draws: int = 10
    scales: Sequence[float] = ()
    text: str | None = None
    text_rows: int = 200
    harmless: TaskPlan | None = None
    page: str | None = None
    name: str = "results"

    def __post_init__(self) -> None:
        for name in ("rules", "seeds"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty. Name at least one, or leave it out.")
        if unknown := [rule for rule in self.rules if rule not in RULES]:
            raise UserError(f"rules has {unknown[0]!r}, which is none of {choices(RULES)}.")
        limits: list[tuple[str, int, Sequence[float]]] = [
            ("draws", 0, [self.draws]), ("text_rows", 1, [self.text_rows]), ("scales", 0, self.scales),
            ("seeds", 0, self.seeds),
        ]  # fmt: skip
        for name, least, values in limits:
            if low := [value for value in values if value < least]:
                raise UserError(f"{name} is or has {low[0]}; it takes numbers from {least} on.")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a plan.

        Raises:
            UserError: The file is missing, or says something that is not known.
        """
        try:
            said = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} cannot be read as YAML ({one_line(error)}). Give a plan of results with --config."
            ) from None
        given = _checked(cls, said, str(path), {"tasks", "train", "harmless", "rows"})
        tasks = given.pop("tasks")
        if not isinstance(tasks, dict) or not tasks:
            raise UserError(f"{path} names no tasks. Give it at least one.")
        given["tasks"] = {name: _made(TaskPlan, task, f"the task {name} in {path}") for name, task in tasks.items()}
        for name, kind in (("train", SaePlan), ("harmless", TaskPlan)):
            if given.get(name) is not None:
                given[name] = _made(kind, given[name], f"{name} in {path}")
        for name in ("rules", "seeds", "scales"):
            if name in given:
                given[name] = tuple(given[name])
        if given.get("rows") is not None:
            given["rows"] = Path(str(given["rows"]))
            if not given["rows"].is_dir():
                raise UserError(
                    f"the rows in {path} are {given['rows']}, which is no folder. Name one, or null for the Hub."
                )
        return cls(**given, name=path.stem)

    def cells(self) -> list[tuple[str, int]]:
        """Task and seed of every cell, seed by seed."""
        seeds = {name: self.seeds if task.seeds is None else task.seeds for name, task in self.tasks.items()}
        return [(name, seed) for seed in sorted(set().union(*seeds.values())) for name in seeds if seed in seeds[name]]

    def settings(self, name: str) -> str:
        """A hash of all that a task's figures depend on, but for the seed and the code."""
        said = {**asdict(self), "tasks": asdict(self.tasks[name])}
        kept = {key: value for key, value in said.items() if key not in ("title", "page", "name", "seeds", "rows")}
        for name in ("seeds", "note"):
            kept["tasks"].pop(name)
        return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    def check(self) -> None:
        """Make every task and method once, before hours are spent.

        Raises:
            UserError: One cannot be made, or a task is to be judged as a refusal and has another reward.
        """
        if self.harmless is not None:
            self.data(self.harmless)
        for name, task in self.tasks.items():
            if fixed := [option for option in task.model if option in FIXED]:
                raise UserError(
                    f"the task {name} has an option of its own for {fixed[0]}, which all tasks share. Leave it out."
                )
            check_options(CorrSteer, task.model, f"tasks.{name}.model")
            CorrSteer(self.llm, self.saes, **task.model)
            scorer = self.data(task).task.scorer
            if task.refusing and not isinstance(scorer, RefusalReward):
                raise UserError(f"the task {name} is refusing, but its reward is none of refusals. Leave refusing out.")

    def data(self, task: TaskPlan, **changed: Any) -> TaskDataModule:
        """The data module of a task, with some options changed."""
        options = {**task.data, **changed}
        check_options(TaskDataModule, options, "data")
        if "path" in options:
            if self.rows is not None:
                options["path"] = str(self.rows / options["path"])
            else:
                del options["path"]
        return TaskDataModule(**options)

    def file(self, name: str) -> Path:
        """A file below the folder of rows.

        Raises:
            UserError: There is no such folder.
        """
        if self.rows is None:
            raise UserError(f"{name} lies below a folder of rows. Name that folder in the plan, as rows.")
        return self.rows / name


def _made(cls: type, said: Any, where: str) -> Any:
    return cls(**_checked(cls, said, where))


def _checked(cls: Any, said: Any, where: str, later: Collection[str] = ()) -> dict[str, Any]:
    """What is said, if it names fields of a dataclass, and all that are needed, with values of their types.

    Fields that are ``later`` made of what is said are not looked into.
    """
    known = {f.name: f for f in fields(cls) if f.name != "name"}
    if not isinstance(said, dict):
        raise UserError(f"{where} holds no settings. Give some of {choices(known)}.")
    if unknown := [name for name in said if name not in known]:
        raise UserError(f"{where} has {unknown[0]!r}, which is none of {choices(known)}.")
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in said]:
        raise UserError(f"{where} lacks {missing[0]!r}. Add it.")
    check_options(cls, {name: value for name, value in said.items() if name not in later}, where)
    return dict(said)
