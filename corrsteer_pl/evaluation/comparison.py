"""Cells of a comparison, each one system on one task with one seed, and the table that they make."""

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.evaluation import figures
from corrsteer_pl.evaluation.figures import Point
from corrsteer_pl.evaluation.paired import average_over_seeds, outcome_rows, side_effect_ratio
from corrsteer_pl.evaluation.tables import percent
from corrsteer_pl.files import write_json

CELL = "cell.json"
# The test on the task of the fit.
OWN = "own"


@dataclass(frozen=True)
class Cell:
    """What a system did on a task with a seed.

    Attributes:
        task: Name of the task's configuration.
        system: Name of the system.
        seed: Seed of the fit.
        settings: A hash of all options.
        commit: Of the code.
        machine: What it was measured on.
        refused: Why the system cannot be fitted on the task; None if it can.
        metrics: Of the test, as in ``metrics.json``.
        elsewhere: The same of tests on other tasks, by name.
        size: Numbers that the change consists of.
        examples: Samples of the fit.
        seconds: Time of the fit.
        cost: Time to answer with the change over time without it, less 1.
    """

    task: str
    system: str
    seed: int
    settings: str
    commit: str
    machine: str
    refused: str | None = None
    metrics: Mapping[str, Any] | None = None
    elsewhere: Mapping[str, Any] | None = None
    size: int = 0
    examples: int = 0
    seconds: float = 0.0
    cost: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> "Cell | None":
        """The finished cell of a folder; None if there is none.

        Raises:
            UserError: Its file is damaged.
        """
        path = folder / CELL
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is no cell of a comparison ({one_line(error)}). Remove it.") from None

    def write(self, folder: Path) -> None:
        """Keep it."""
        write_json(folder / CELL, asdict(self))


@dataclass(frozen=True)
class Line:
    """A line of the table: a system on a task, over its seeds.

    Rewards and differences are in [0, 1]; the interval is that of the mean paired difference over the questions, each
    with its mean over the seeds, and does not contain what another choice of questions for the fit would change; that
    is what the deviation over seeds says. Elsewhere is the mean over other tasks, which are there by name as well.
    Measures are those of the tasks, without the change and with it. Refusals are those of single seeds, which then
    do not count.
    """

    task: str
    system: str
    seeds: int = 0
    n: int = 0
    reward_baseline: float = 0.0
    reward: float = 0.0
    difference: float = 0.0
    ci_low: float | None = None
    ci_high: float | None = None
    deviation: float | None = None
    side_effect_ratio: float | None = None
    elsewhere: float | None = None
    size: float = 0.0
    examples: float = 0.0
    seconds: float = 0.0
    cost: float = 0.0
    refused: str | None = None
    measures: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    elsewhere_by_task: Mapping[str, float] = field(default_factory=dict)
    refusals: Sequence[str] = ()


def lines(cells: Sequence[tuple[Path, Cell]]) -> list[Line]:
    """The table of finished cells with their folders: tasks in their order, the best system of each first."""
    found = []
    for task in dict.fromkeys(cell.task for _, cell in cells):
        mine = [(folder, cell) for folder, cell in cells if cell.task == task]
        systems = dict.fromkeys(cell.system for _, cell in mine)
        some = [_line([pair for pair in mine if pair[1].system == system]) for system in systems]
        found += sorted(some, key=lambda line: (line.refused is not None, -line.difference))
    return found


def _line(all_cells: Sequence[tuple[Path, Cell]]) -> Line:
    refused = [cell for _, cell in all_cells if cell.refused is not None]
    cells = [cell for _, cell in all_cells if cell.refused is None]
    if not cells:
        return Line(refused[0].task, refused[0].system, refused=refused[0].refused)
    average = average_over_seeds([_differences(folder) for folder, cell in all_cells if cell.refused is None])
    metrics = [cell.metrics or {} for cell in cells]
    by_seed = [m["difference"] for m in metrics]
    others = _elsewhere(cells)
    elsewhere = {name: statistics.fmean(m["difference"] for m in some) for name, some in others.items()}
    measures = _measures(metrics)
    for name, some in others.items():
        measures |= {f"{name} {measure}": pair for measure, pair in _measures(some).items()}

    def over(name: str) -> float:
        return statistics.fmean(getattr(cell, name) for cell in cells)

    return Line(
        task=cells[0].task, system=cells[0].system, seeds=len(cells), n=average.n,
        reward_baseline=statistics.fmean(m["reward_baseline"] for m in metrics),
        reward=statistics.fmean(m["reward_steered"] for m in metrics),
        difference=average.difference, ci_low=average.ci_low, ci_high=average.ci_high,
        deviation=statistics.stdev(by_seed) if len(by_seed) > 1 else None,
        side_effect_ratio=side_effect_ratio(sum(m["worse"] for m in metrics), sum(m["better"] for m in metrics)),
        elsewhere=statistics.fmean(elsewhere.values()) if elsewhere else None,
        elsewhere_by_task=elsewhere, measures=measures,
        refusals=[f"seed {cell.seed}: {cell.refused}" for cell in refused],
        size=over("size"), examples=over("examples"), seconds=over("seconds"), cost=over("cost"),
    )  # fmt: skip


def _differences(folder: Path) -> dict[str, float]:
    """The paired difference of every test example of a cell, by its id."""
    rows = outcome_rows(folder / "test" / OWN / "outcomes.jsonl")
    return {row["id"]: row["reward_steered"] - row["reward_baseline"] for row in rows}


def _elsewhere(cells: Sequence[Cell]) -> dict[str, list[Mapping[str, Any]]]:
    """Metrics of each seed on those other tasks that all seeds were tested on, by the name of the task."""
    everywhere = [cell.elsewhere or {} for cell in cells]
    return {name: [e[name] for e in everywhere] for name in everywhere[0] if all(name in e for e in everywhere)}


def _measures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """A task's own measures without and with the change, over the seeds, as far as they are defined in all."""
    found = {}
    for name in metrics[0].get("measures", {}):
        pairs = [tuple(m["measures"][name][which] for which in ("baseline", "steered")) for m in metrics]
        if None not in (value for pair in pairs for value in pair):
            before, after = (statistics.fmean(some) for some in zip(*pairs, strict=True))
            found[name] = before, after
    return found


HEADINGS = (
    "system", "seeds", "reward", "difference [95 %]", "over seeds", "SER", "elsewhere", "numbers", "examples",
    "fit s", "cost %",
)  # fmt: skip


def markdown(table: Sequence[Line], note: str) -> str:
    """The table as Markdown, a part for each task."""
    parts = []
    for task in dict.fromkeys(line.task for line in table):
        mine = [line for line in table if line.task == task]
        fitted = [line for line in mine if line.refused is None]
        unchanged = f"{100 * fitted[0].reward_baseline:.1f} %, {fitted[0].n} questions" if fitted else "not measured"
        rows = "".join(f"| {' | '.join(_cells(line))} |\n" for line in fitted)
        head = f"**{task}** (unchanged model: {unchanged})\n\n| {' | '.join(HEADINGS)} |\n{'|---' * len(HEADINGS)}|\n"
        unfit = {line.system: line.refused or " ".join(line.refusals) for line in mine}
        rows += _listed("Elsewhere", {line.system: _by_task(line) for line in fitted})
        rows += _listed("Measures", {line.system: _measured(line) for line in fitted})
        parts.append(head + rows + _listed("Not for this task", unfit))
    return "\n".join([*parts, note])


def _listed(heading: str, said: Mapping[str, str]) -> str:
    """What is said of each system, as a list; nothing if nothing is."""
    items = "".join(f"- {system}: {text}\n" for system, text in said.items() if text)
    return f"\n{heading}:\n\n{items}" if items else ""


def _by_task(line: Line) -> str:
    """The differences of several tasks elsewhere."""
    several = line.elsewhere_by_task if len(line.elsewhere_by_task) > 1 else {}
    return ", ".join(f"{name} {100 * difference:+.1f}" for name, difference in several.items())


def _measured(line: Line) -> str:
    pairs = line.measures.items()
    return ", ".join(f"{name} from {before:.3f} to {after:.3f}" for name, (before, after) in pairs)


def _cells(line: Line) -> Iterator[str]:
    yield line.system
    yield str(line.seeds)
    yield f"{100 * line.reward:.1f}"
    yield f"{100 * line.difference:+.1f} [{percent(line.ci_low)}, {percent(line.ci_high)}]"
    yield "-" if line.deviation is None else f"± {100 * line.deviation:.1f}"
    yield "-" if line.side_effect_ratio is None else f"{line.side_effect_ratio:.2f}"
    yield "-" if line.elsewhere is None else f"{100 * line.elsewhere:+.1f}"
    yield f"{line.size:,.0f}"
    yield f"{line.examples:,.0f}"
    yield f"{line.seconds:.0f}"
    yield f"{100 * line.cost:+.0f}"


EXPLAINED = (
    "Reward and differences in percent and percentage points; difference: paired, over the questions, each with its "
    "mean over the seeds; over seeds: standard deviation of the difference; SER: share of changed rewards that "
    "fell; elsewhere: difference of the reward on the tasks named by --elsewhere; numbers: how many the change "
    "consists of; cost: extra time to answer, measured on a few prompts."
)


def comma_separated(table: Sequence[Line]) -> str:
    """The table as CSV, with all digits."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(asdict(table[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(line) for line in table)
    return file.getvalue()


def picture(table: Sequence[Line]) -> str:
    """Differences with their intervals, sorted within each task."""
    several = len({line.task for line in table}) > 1
    # A single test example has no interval, and is drawn as a point.
    intervals = [
        (line, line.difference if line.ci_low is None else line.ci_low,
         line.difference if line.ci_high is None else line.ci_high)
        for line in table if line.refused is None
    ]  # fmt: skip
    points = [
        Point(
            f"{line.task}: {line.system}" if several else line.system,
            100 * line.difference, 100 * low, 100 * high, low > 0,
        )
        for line, low, high in intervals
    ]  # fmt: skip
    return figures.alone(figures.points(points, "change of the test reward, points, with 95 % intervals", "unchanged"))
