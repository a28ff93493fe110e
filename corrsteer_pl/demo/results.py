"""The table of results on the embedded world: ``python -m corrsteer_pl.demo.results [--page docs/demo.md]``.

For both tasks and several seeds of the fit: the unsteered model, the pruned selection (``foreach``), and two
controls on the same test questions. Random: features drawn uniformly from the same layers, with the same
coefficients. Shuffled: the same fit with ``control: shuffled_rewards``.
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from corrsteer_pl.cli.lightning import quieten_lightning
from corrsteer_pl.data import TaskDataModule
from corrsteer_pl.evaluation.paired import paired_metrics
from corrsteer_pl.evaluation.tables import percent
from corrsteer_pl.files import write_between
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.results.controls import answers_under, random_vectors, shuffled_fit
from corrsteer_pl.version import commit

TASKS = ("demo_qa", "demo_refusal")
SEEDS = (0, 1, 2)
DRAWS = 10
SIZES: dict[str, Any] = {"train_size": 2000, "val_size": 300, "batch_size": 32}
HEADER = (
    "| task | seed | unsteered | steered | difference [95 %] | p | SER | random features | shuffled rewards |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


@dataclass(frozen=True)
class Result:
    """One line of the table; ``random`` and ``shuffled`` are test rewards in [0, 1]."""

    task: str
    seed: int
    metrics: dict[str, Any]
    random: list[float]
    shuffled: float

    def __str__(self) -> str:
        m, ser = self.metrics, self.metrics["side_effect_ratio"]
        mean = sum(self.random) / len(self.random)
        cells = (
            self.task, self.seed, percent(m["reward_baseline"]), percent(m["reward_steered"]),
            f"{100 * m['difference']:+.1f} [{percent(m['ci_low'])}, {percent(m['ci_high'])}]", f"{m['p_value']:.1g}",
            "-" if ser is None else f"{ser:.2f}",
            f"{percent(mean)} ({percent(min(self.random))} to {percent(max(self.random))})", percent(self.shuffled),
        )  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |\n"


def run(task: str, seed: int) -> Result:
    """Fit, draw the controls, and test all of them on the same questions."""
    module = CorrSteer("demo", "demo")
    data = fit_demo(module, task, seed)
    shuffled = shuffled_fit(module)
    fit_demo(shuffled, task, seed)
    features = module.selection.features if module.selection else ()
    draws = [random_vectors(module, features, seed * DRAWS + draw) for draw in range(DRAWS)]
    variants = [{}, module.steering_vectors(), shuffled.steering_vectors(), *draws]
    data.setup("test")
    _, (unsteered, steered, wrong, *others) = answers_under(module, data, variants)
    metrics = paired_metrics(unsteered, steered)
    return Result(task, seed, metrics, [r.mean().item() for r in others], wrong.mean().item())


def fit_demo(module: CorrSteer, task: str, seed: int) -> TaskDataModule:
    """Fit a method on a task of the embedded world; the data that it was fitted on."""
    data = TaskDataModule(task, seed=seed, **SIZES)
    Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)  # fmt: skip
    return data


def table(found: dict[str, list[Result]], seconds: float) -> str:
    """The results of each task as Markdown, with what a reader needs to judge them."""
    results = [result for some in found.values() for result in some]
    n = {result.task: result.metrics["n"] for result in results}
    prompts = " and ".join(f"{count} {task}" for task, count in n.items())
    note = (
        f"\nReward in percent on {prompts} test prompts; {SIZES['train_size']} prompts to fit, {SIZES['val_size']} to "
        "validate. p: McNemar's exact test. SER (side-effect ratio): share of changed rewards that fell. Random "
        f"features: mean (range) of {DRAWS} draws from the same layers with the same coefficients. Shuffled rewards: "
        "the same fit with the rewards permuted among its prompts, validated on true ones.\n"
        f"{how(seconds, 'results')}"
    )
    return HEADER + "".join(map(str, results)) + note


def how(seconds: float, script: str) -> str:
    """On what something was measured, and by which script of this package."""
    return (
        f"Measured at commit {commit()} with {torch.get_num_threads()} threads of {platform.machine()}, "
        f"torch {torch.__version__}, float32, in {seconds:.0f} s, by `python -m corrsteer_pl.demo.{script}`.\n"
    )


def measure(
    about: str,
    seeds: Sequence[int],
    run: Callable[[str, int], Any],
    table: Callable[[dict[str, list[Any]], float], str],
    place: tuple[str, str],
) -> None:
    """Measure each task with each seed, print the table, and write it into a file if one is named.

    Args:
        about: What is measured.
        seeds: Seeds unless others are given.
        run: Measures a task with a seed.
        table: Makes a table of what was measured of each task, and of how many seconds that took.
        place: The option that names the file, and the mark in it.
    """
    option, mark = place
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(option, dest="file", type=Path, help="file to write the table into, between its marks")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    options = parser.parse_args()
    quieten_lightning()
    start = time.monotonic()
    found = {task: [run(task, seed) for seed in options.seeds] for task in TASKS}
    text = table(found, time.monotonic() - start)
    print(text)  # noqa: T201
    if options.file:
        write_between(options.file, mark, text)


if __name__ == "__main__":
    measure("Results on the embedded world, with controls.", SEEDS, run, table, ("--page", "demo results"))
