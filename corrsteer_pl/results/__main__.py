"""``python -m corrsteer_pl.results --config results/smollm2.yaml``."""

import argparse
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from corrsteer_pl.cli.lightning import quieten_lightning
from corrsteer_pl.commands.train_saes import RECORD
from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.tables import percent, show
from corrsteer_pl.files import write_json, write_utf8
from corrsteer_pl.results.cells import UNSTEERED, Bench, Cell
from corrsteer_pl.results.picture import draw
from corrsteer_pl.results.plan import Plan
from corrsteer_pl.results.report import page, points, summary, table
from corrsteer_pl.results.saes import make_saes


def main(args: list[str]) -> int:
    """Train SAEs if there are none, measure the cells that are missing, and write table, picture and page."""
    parser = argparse.ArgumentParser(prog="python -m corrsteer_pl.results", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the plan, a YAML file")
    parser.add_argument("--out", type=Path, help="folder of the results; beside the plan, of its name, if left out")
    parser.add_argument("--cells", type=Path, help="folder of finished cells; checkpoints/results/NAME if left out")
    options = parser.parse_args(args)
    quieten_lightning()
    warnings.filterwarnings("ignore")
    try:
        plan = Plan.read(options.config)
        run(
            plan,
            options.out or options.config.with_suffix(""),
            options.cells or Path("checkpoints/results") / plan.name,
        )
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def run(plan: Plan, out: Path, kept: Path) -> None:
    """Measure what is missing of a plan; seed by seed, so that an interrupted run has whole tables of fewer seeds."""
    wanted = [
        (name, seed)
        for seed in sorted({s for task in plan.tasks.values() for s in task.seeds or plan.seeds})
        for name, task in plan.tasks.items()
        if seed in (task.seeds or plan.seeds)
    ]
    files = {(name, seed): kept / f"{name}-{seed}.json" for name, seed in wanted}
    missing = [pair for pair, file in files.items() if not file.exists()]
    show(
        f"{len(wanted) - len(missing)} of {len(wanted)} cells are finished. On 2 cores a cell takes minutes to an hour."
    )
    make_saes(plan)
    bench = Bench(plan) if missing else None
    for name, seed in missing:
        if bench is not None:
            cell = bench.measure(name, seed)
            write_json(files[name, seed], asdict(cell))
            show(
                f"{name}, seed {seed}: "
                + ", ".join(f"{s} {percent(m['reward_steered'])}" for s, m in cell.systems.items())
            )
            write(plan, out, list(files.values()))
    write(plan, out, list(files.values()))


def write(plan: Plan, out: Path, files: list[Path]) -> None:
    """Write table, picture and page from the finished cells."""
    cells = [Cell(**json.loads(file.read_text(encoding="utf-8"))) for file in files if file.exists()]
    found = summary(plan, cells)
    record = Path(plan.saes) / RECORD
    saes = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
    texts = {
        out / "table.md": table(found),
        out / "differences.svg": draw(
            points(found), f"{plan.title}: difference from {UNSTEERED}, percentage points, 95 %"
        ),
    }
    if plan.page is not None:
        texts[Path(plan.page)] = page(plan, found, cells, saes)
    for path, text in texts.items():
        write_utf8(path, text)
    write_json(out / "table.json", {**found, "saes": saes})


if __name__ == "__main__":
    # Prompts are tokenised in batches of a few; forking after that would make the tokenizer warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
