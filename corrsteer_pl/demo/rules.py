"""Which rule of selection gains most on the embedded world: ``python -m corrsteer_pl.demo.rules``.

Each seed of each task has one fit. All rules choose among its candidates, by the same validation, and all selections
are tested on the same questions.
"""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from corrsteer_pl.demo.results import SIZES, fit_demo, how, measure
from corrsteer_pl.evaluation.paired import paired_metrics
from corrsteer_pl.methods.corrsteer import CorrSteer
from corrsteer_pl.results.controls import answers_under
from corrsteer_pl.selection import Feature, reselect

SEEDS = (0, 1, 2, 3, 4)
SCALES = [0.25, 0.5, 1, 1.5, 2]
HEADER = "| task | rule | gain, mean ± deviation | lowest | SER | vectors |\n|---|---|---|---|---|---|\n"
CALIBRATED = "greedy, strength chosen"


def run(task: str, seed: int) -> dict[str, dict[str, Any]]:
    """The paired metrics of each rule's selection, with the number of its ``vectors``."""
    module = CorrSteer("demo", "demo", rule="greedy", scale=SCALES)
    data = fit_demo(module, task, seed)
    selection = module.selection
    if selection is None:
        raise RuntimeError("the fit has selected nothing")
    chosen: dict[str, Sequence[Feature]] = {
        rule: reselect(selection, rule, "both", None).features for rule in ("foreach", "global", "all", "greedy")
    }
    variants = {rule: module.vectors_of(features) for rule, features in chosen.items()}
    variants[CALIBRATED] = module.steering_vectors()
    data.setup("test")
    _, (unsteered, *steered) = answers_under(module, data, [{}, *variants.values()])
    pairs = zip(variants.items(), steered, strict=True)
    return {rule: {**paired_metrics(unsteered, some), "vectors": len(vectors)} for (rule, vectors), some in pairs}


def table(found: dict[str, list[dict[str, dict[str, Any]]]], seconds: float) -> str:
    """Means over seeds as Markdown, with what a reader needs to judge them."""
    lines = []
    for task, runs in found.items():
        for rule in runs[0]:
            gains = [100 * one[rule]["difference"] for one in runs]
            ratios = [one[rule]["side_effect_ratio"] for one in runs]
            changed = [ratio for ratio in ratios if ratio is not None]
            deviation = f" ± {stdev(gains):.1f}" if len(gains) > 1 else ""
            cells = (
                task, rule, f"{mean(gains):+.1f}{deviation}", f"{min(gains):+.1f}",
                f"{mean(changed):.2f}" if changed else "-", f"{mean(one[rule]['vectors'] for one in runs):.1f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |\n")
    seeds = len(next(iter(found.values())))
    note = (
        f"\nPoints of reward gained on the test prompts, mean and deviation over {seeds} seeds of one fit each "
        f"({SIZES['train_size']} prompts to fit, {SIZES['val_size']} to validate). Strengths to choose from: "
        f"{', '.join(f'{scale:g}' for scale in SCALES)}, without a budget.\n"
        f"{how(seconds, 'rules')}"
    )
    return HEADER + "".join(lines) + note


if __name__ == "__main__":
    measure("Rules of selection on the embedded world.", SEEDS, run, table, ("--page", "demo rules"))
