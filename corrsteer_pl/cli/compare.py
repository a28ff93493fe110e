"""``compare``: every system under one evaluation, on the same questions, with several seeds."""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from corrsteer_pl.cli.arguments import read_config, split_options
from corrsteer_pl.cli.lightning import guarded
from corrsteer_pl.cli.measuring import Plan, System, claimed, measure
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.evaluation.comparison import EXPLAINED, OWN, Cell, comma_separated, lines, markdown, picture
from corrsteer_pl.evaluation.tables import show
from corrsteer_pl.files import check_writable, write_between, write_json, write_utf8
from corrsteer_pl.methods.registry import method_class, method_path
from corrsteer_pl.version import commit, machine

SYSTEMS: dict[str, System] = {
    "corrsteer": System("corrsteer", {}),
    "corrsteer_global": System("corrsteer", {"rule": "global"}),
    "corrsteer_all": System("corrsteer", {"rule": "all"}),
    "corrsteer_greedy": System("corrsteer", {"rule": "greedy"}),
    "mutual_information": System("corrsteer", {"score": "mutual_information"}),
    "fisher": System("corrsteer", {"score": "fisher"}),
    "auroc": System("corrsteer", {"score": "auroc"}),
    "feature_difference": System("corrsteer", {"score": "mean_difference"}),
    "raw": System("corrsteer", {"raw": True}),
    "contrastive": System("mean_difference", {}),
    "rosi": System("rosi", {}),
    "rosi_projection": System("rosi", {"form": "projection"}),
    "crisp": System("crisp", {}),
    "finetune": System("finetune", {}),
    "finetune_lora": System("finetune", {"adapter": "lora"}),
    "few_shot": System("prompting", {"examples": 4}),
}
OPTIONS = ("--out", "--seeds", "--systems", "--readme")


def run(args: list[str]) -> int:
    """Compare systems on the task of each configuration; the exit status.

    Raises:
        UserError: A mistake of the user.
    """
    return guarded(_compare, args, "finished cells are kept, and the same command goes on")


def _compare(args: list[str], given: dict[str, Any]) -> None:
    configs, others = split_options(args[1:], ("--config", "-c"))
    elsewhere, others = split_options(others, ("--elsewhere",))
    names, others = _split_lists(others, "--methods")
    _, others = split_options(others, OPTIONS)
    if any(argument.partition("=")[0] == "--method" for argument in others):
        raise UserError("compare takes several methods. Name systems with --methods.")
    if not configs:
        raise UserError("compare needs tasks. Name the configuration of each: --config demo.yaml.")
    _check_names(configs, elsewhere)
    systems = _chosen(names, {**SYSTEMS, **dict(_more(given.get("systems")))})
    _check_others(others, systems)
    out = Path(str(given.get("out", "checkpoints/compare")))
    check_writable(out, "--out")
    plans = [
        Plan(config, name, system, seed, elsewhere, others)
        for seed in range(_count(str(given.get("seeds", 3)))) for config in configs for name, system in systems.items()
    ]  # fmt: skip
    code, computer = commit(), machine()
    for plan in plans:
        with claimed(plan.folder(out)) as free:
            if free and plan.finished(out) is None:
                show(_told(measure(plan, out, code, computer)))
                _write(plans, out, given)
    _write(plans, out, given)


def _split_lists(args: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """The values of an option that takes several, separated by spaces or commas, and all arguments but these.

    Example:
        >>> _split_lists(["--methods", "a", "b,c", "--seeds", "2"], "--methods")
        (['a', 'b', 'c'], ['--seeds', '2'])
    """
    words: list[str] = []
    others: list[str] = []
    taking = False
    for argument in args:
        if argument.startswith("-"):
            option, _, value = argument.partition("=")
            taking = option == name
            words += [value] if taking and value else []
            others += [] if taking else [argument]
        else:
            (words if taking else others).append(argument)
    return [word for some in words for word in some.strip("[]").replace(",", " ").split()], others


def _check_names(configs: Sequence[str], elsewhere: Sequence[str]) -> None:
    """Refuse tasks whose results would be kept in one place.

    Raises:
        UserError: Two configurations have one name, or one has a name that is taken.
    """
    for option, paths in (("--config", configs), ("--elsewhere", elsewhere)):
        stems = [Path(path).stem for path in paths]
        if twice := [stem for stem in stems if stems.count(stem) > 1]:
            raise UserError(f"{option} names two configurations called {twice[0]!r}, by which tasks are called.")
        if OWN in stems:
            raise UserError(f"{option} names a configuration called {OWN!r}, as the task of a fit is. Rename it.")


def _check_others(others: Sequence[str], systems: Mapping[str, System]) -> None:
    """Refuse arguments that a system does not have, before the first is fitted.

    Raises:
        UserError: There are such.
    """
    for argument in others:
        option = argument.partition("=")[0]
        if not option.startswith("--model."):
            continue
        first = option.removeprefix("--model.").partition(".")[0]
        for name, system in systems.items():
            known = inspect.signature(method_class(system.method)).parameters
            if first not in known:
                raise UserError(
                    f"{option} is no option of the system {name}. Choose systems that have it with --methods, or "
                    "give it to some in a file for --systems."
                )


def _chosen(names: Sequence[str], known: Mapping[str, System]) -> dict[str, System]:
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"the system {unknown[0]!r} is not known; choose among {choices(known)}.")
    return {name: known[name] for name in names or known}


def _more(path: str | None) -> Iterator[tuple[str, System]]:
    """Systems of a file: a method and options of its own for each name; those of known names take their place."""
    for name, said in read_config(path).items() if path else ():
        if not isinstance(said, dict) or "method" not in said:
            raise UserError(f"{path} names no method for {name}. Give it one: {name}: {{method: finetune, lr: 0.001}}.")
        options = {option: value for option, value in said.items() if option != "method"}
        method_path(str(said["method"]))
        yield name, System(str(said["method"]), options)


def _count(seeds: str) -> int:
    if not (seeds.isdecimal() and int(seeds) >= 1):
        raise UserError(f"--seeds is {seeds}; it is a number of seeds, at least 1.")
    return int(seeds)


def _told(cell: Cell) -> str:
    if cell.metrics is None:
        return f"{cell.task}, {cell.system}, seed {cell.seed}: {cell.refused}"
    before, after = (100 * cell.metrics[f"reward_{which}"] for which in ("baseline", "steered"))
    return (
        f"{cell.task}, {cell.system}, seed {cell.seed}: {before:.1f} to {after:.1f} %, fit in {cell.seconds:.0f} s"
    )  # fmt: skip


def _write(plans: Sequence[Plan], out: Path, given: Mapping[str, Any]) -> None:
    """Write table and figure of all finished cells, whichever process measured them."""
    found = [(plan.folder(out), cell) for plan in plans if (cell := plan.finished(out))]
    if not found:
        return
    table = lines(found)
    commits, machines = ("; ".join(dict.fromkeys(getattr(c, n) for _, c in found)) for n in ("commit", "machine"))
    command = " ".join(["python -m corrsteer_pl", *map(_shown, sys.argv[1:])])
    note = f"{EXPLAINED}\n\nMeasured at commit {commits} on {machines}, by `{command}`.\n"
    write_json(out / "table.json", {"lines": [asdict(line) for line in table], "commit": commits, "machine": machines})
    write_utf8(out / "table.md", markdown(table, note))
    write_utf8(out / "table.csv", comma_separated(table))
    if any(line.refused is None for line in table):
        write_utf8(out / "table.svg", picture(table))
    if "readme" in given:
        write_between(Path(str(given["readme"])), f"{out.name} comparison", markdown(table, note))


def _shown(argument: str) -> str:
    """An argument without what belongs to one machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument
