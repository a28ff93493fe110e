"""``python -m corrsteer_pl.results --config results/smollm2.yaml``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from corrsteer_pl.cli.lightning import quieten_lightning
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.evaluation.tables import percent, show
from corrsteer_pl.files import write_between, write_json, write_utf8
from corrsteer_pl.results.cells import UNSTEERED, Bench, Cell
from corrsteer_pl.results.page import page
from corrsteer_pl.results.picture import draw
from corrsteer_pl.results.plan import Plan
from corrsteer_pl.results.saes import make_saes
from corrsteer_pl.results.store import Store
from corrsteer_pl.results.summary import points, summary
from corrsteer_pl.results.tables import short_table, table


def main(args: list[str]) -> int:
    """Train SAEs if there are none, measure the cells that are missing, and write table, picture and page."""
    parser = argparse.ArgumentParser(prog="python -m corrsteer_pl.results", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the plan, a YAML file")
    parser.add_argument("--out", type=Path, help="folder of the results; beside the plan, of its name, if left out")
    parser.add_argument("--cells", type=Path, help="folder of finished cells; below that of the results if left out")
    parser.add_argument("--only", nargs="+", default=[], metavar="TASK", help="tasks that this process measures")
    parser.add_argument("--readme", type=Path, help="file to write a short table into, between its marks")
    options = parser.parse_args(args)
    quieten_lightning()
    try:
        plan = Plan.read(options.config)
        out = options.out or options.config.with_suffix("")
        run(plan, Store(options.cells or out / "cells"), out, options.only, options.readme)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def run(plan: Plan, store: Store, out: Path, only: Sequence[str] = (), readme: Path | None = None) -> None:
    """Measure what is missing of a plan; seed by seed, so that an interrupted run has whole tables of fewer seeds.

    Raises:
        UserError: A task that alone is to be measured is none of the plan.
    """
    if unknown := [name for name in only if name not in plan.tasks]:
        raise UserError(f"--only names the task {unknown[0]!r}, which is none of {choices(plan.tasks)}.")
    wanted = [pair for pair in plan.cells() if not only or pair[0] in only]
    missing = [pair for pair in wanted if store.find(*pair, plan.settings(pair[0])) is None]
    show(
        f"{len(wanted) - len(missing)} of {len(wanted)} cells are finished; on 2 cores a cell takes minutes to an hour."
    )
    if missing:
        plan.check()
        store.keep_saes(make_saes(plan))
        bench = Bench(plan)
        for pair in missing:
            cell = bench.measure(*pair)
            store.keep(cell)
            show(_line(cell))
            write(plan, store, out, readme)
    write(plan, store, out, readme)


def _line(cell: Cell) -> str:
    rewards = ", ".join(f"{system} {percent(m['reward_steered'])}" for system, m in cell.systems.items())
    return f"{cell.task}, seed {cell.seed}: {rewards}; {sum(cell.seconds.values()):.0f} s"


def write(plan: Plan, store: Store, out: Path, readme: Path | None) -> None:
    """Write table, picture and page from all finished cells, whichever process measured them."""
    cells = [cell for pair in plan.cells() if (cell := store.find(*pair, plan.settings(pair[0])))]
    found = summary(plan, cells)
    saes = store.saes()
    caption = f"{plan.title}: difference from {UNSTEERED}, percentage points, 95 %"
    write_json(out / "table.json", {**found, "saes": saes})
    write_utf8(out / "table.md", table(found))
    picture = out / "differences.svg"
    write_utf8(picture, draw(points(found), caption))
    if plan.page is not None:
        seen = Path(os.path.relpath(picture, Path(plan.page).parent)).as_posix()
        write_utf8(Path(plan.page), page(plan, found, cells, saes, seen))
    if readme is not None:
        write_between(readme, f"{plan.name} results", short_table(plan, found))


if __name__ == "__main__":
    # Prompts are tokenised in batches of a few; forking after that would make the tokenizer warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
