"""One cell of a comparison: fit and test a system on a task with a seed, while no other process does."""

import contextlib
import inspect
import io
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from corrsteer_pl.cli.arguments import given_options, read_config
from corrsteer_pl.cli.lightning import run_among_others
from corrsteer_pl.data import TaskDataModule
from corrsteer_pl.errors import NotAnOption, UserError
from corrsteer_pl.evaluation.comparison import OWN, Cell
from corrsteer_pl.files import write_json
from corrsteer_pl.methods.registry import DEFAULT

# Options of the model that every method has, or that say which SAEs there are.
SHARED = ("llm", "dtype", "llm_args", "candidate_batch_size")
OF_SAES = ("saes", "sae_id", "sae_dtype", "sae_offload", "sae_revision", "layers", "site")
READS = {"corrsteer": OF_SAES, "crisp": OF_SAES, "mean_difference": ("layers",)}
# Stands before the name of a test in the folder that it leaves, lest the end of another name pass for it.
MARK = "compared-"
# Each way of answering is timed so often, on so many prompts.
REPEATS, TIMED = 5, 8


@dataclass(frozen=True)
class System:
    """A method with some options.

    Attributes:
        method: Name of the method.
        options: Options of its own, beside those of the configuration.
    """

    method: str
    options: Mapping[str, Any]


class Plan:
    """What one cell is measured with.

    Args:
        config: Configuration of the task. Its options of the model are all taken by the method that it is for, and by
            others as far as they say which model and which SAEs.
        name: Name of the system.
        system: The system.
        seed: Seed of the fit.
        elsewhere: Configurations of tasks on which the change may do harm.
        others: Further arguments of fit and test.

    Attributes:
        settings: A hash of all that.
    """

    def __init__(
        self, config: str, name: str, system: System, seed: int, elsewhere: Sequence[str], others: Sequence[str]
    ) -> None:
        self.task, self.name, self.seed = Path(config).stem, name, seed
        self.elsewhere, self.others = list(elsewhere), list(others)
        said = read_config(config)
        model, same = said.get("model") or {}, said.get("method", DEFAULT) == system.method
        shared = (*SHARED, *READS.get(system.method, ()))
        kept = model if same else {option: value for option, value in model.items() if option in shared}
        self.config = {
            "method": system.method,
            "model": {**kept, **system.options},
            "data": {**(said.get("data") or {}), "seed": seed},
            "trainer": said.get("trainer") or {},
        }
        text = json.dumps([self.config, self.others, *map(read_config, self.elsewhere)], sort_keys=True)
        self.settings = sha256(text.encode()).hexdigest()[:16]

    def folder(self, out: Path) -> Path:
        """Where it is kept, below the comparison's folder."""
        return out / "cells" / self.task / f"{self.name}-{self.seed}"

    def finished(self, out: Path) -> Cell | None:
        """The finished cell; None if there is none, or if it was measured with other options."""
        cell = Cell.read(self.folder(out))
        return cell if cell is not None and cell.settings == self.settings else None


def measure(plan: Plan, out: Path, code: str, machine: str) -> Cell:
    """Fit and test a system, and keep what came of it; a system that cannot be fitted on the task says why.

    Raises:
        NotAnOption: An argument is none of the method's.
        UserError: A test cannot be run.
        SIGTERMException: The process was told to end.
    """
    folder = plan.folder(out)
    known: dict[str, Any] = {"task": plan.task, "system": plan.name, "seed": plan.seed, "settings": plan.settings}
    known |= {"commit": code, "machine": machine}
    config = _written(folder / "system.json", plan.config)
    always = [
        f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false", "--trainer.logger=false",
        *plan.others,
    ]  # fmt: skip
    started = time.monotonic()
    try:
        fit = _silently(["fit", "--config", config, *always])
    except NotAnOption:
        raise
    except UserError as error:
        cell = Cell(**known, refused=str(error))
    else:
        seconds = time.monotonic() - started
        test = ["test", f"--ckpt_path={folder / 'last.ckpt'}", "--config"]
        tested = _silently([*test, config, *always], OWN)
        names = {Path(path).stem: path for path in plan.elsewhere if Path(path).stem != plan.task}
        others = {name: _written(folder / f"{name}.json", _on(plan, path)) for name, path in names.items()}
        elsewhere = {name: _silently([*test, path, *always], name).metrics for name, path in others.items()}
        cell = Cell(
            **known, metrics=tested.metrics, elsewhere=elsewhere, size=tested.size, examples=fit.learnt_from,
            seconds=seconds, cost=extra_cost(tested),
        )  # fmt: skip
    cell.write(folder)
    return cell


def _on(plan: Plan, path: str) -> dict[str, Any]:
    """The configuration of a test on another task, with the system's own options."""
    # With defaults, for a test of the same task would take from the fit what it is not told.
    defaults = {name: option.default for name, option in inspect.signature(TaskDataModule).parameters.items()}
    return {"model": plan.config["model"], "data": {**defaults, **(read_config(path).get("data") or {})}}


def _written(path: Path, config: dict[str, Any]) -> str:
    write_json(path, config)
    return str(path)


def _silently(args: list[str], tag: str | None = None) -> Any:
    """The method of a stage that has run; its tables are not shown, and a test's results are named after its tag."""
    args = [*args, f"--results.tag={MARK}{tag}"] if tag else args
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = run_among_others(args, given_options(args))
    for found in (Path(cli.trainer.default_root_dir) / "test").glob(f"*-{MARK}{tag}") if tag else ():
        target = found.with_name(str(tag))
        target.mkdir(exist_ok=True)
        for file in found.iterdir():
            file.replace(target / file.name)
        found.rmdir()
    return cli.model


@torch.no_grad()
def extra_cost(method: Any) -> float:
    """Extra time to answer some prompts of the test with the change, as a share: the fastest of several tries each."""
    data = method.datamodule
    batch = data.batch_of("test", range(min(TIMED, len(data.examples["test"])))).to(method.device)
    times: list[list[float]] = [[], []]
    for _ in range(REPEATS + 1):
        for changed, some in enumerate(times):
            started = time.perf_counter()
            method.answers(batch, bool(changed))
            some.append(time.perf_counter() - started)
    # The first ones warm up.
    before, after = (min(some[1:]) for some in times)
    return after / before - 1


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether no other process measures a cell, which then none else does within the context."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    if _is_stale(lock):
        lock.unlink(missing_ok=True)
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(f"{os.uname().nodename} {os.getpid()}")
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        lock.unlink(missing_ok=True)


def _is_stale(lock: Path) -> bool:
    """Whether a lock is of a process on this machine that is no more."""
    try:
        node, pid = lock.read_text(encoding="utf-8").split()
        if node == os.uname().nodename:
            os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False
