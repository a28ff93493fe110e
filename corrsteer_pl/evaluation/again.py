"""The commands that do again what a run did, or what it has not done yet."""

import json
from collections.abc import Mapping
from shlex import quote
from typing import Any

from corrsteer_pl.evaluation.run import Run, Test

PROGRAM = "python -m corrsteer_pl"
# Options of the fit that a reader asks for.
SHOWN = {
    "model": (
        "llm", "saes", "rule", "sign", "pool", "coefficient", "score", "scale", "positions", "control",
        "system_message", "examples",
    ),
    "data": ("task", "path", "train_size", "val_size", "chat_template", "shots", "restrict", "seed"),
}  # fmt: skip


def settings(run: Run) -> dict[str, Any]:
    """The options of a fit that a reader asks for, by dotted name."""
    return {
        f"{part}.{name}": run.option(part, name)
        for part, names in SHOWN.items() for name in names if name in run.options(part)
    }  # fmt: skip


def options_of_test(run: Run, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a test had otherwise than its fit, by dotted name."""
    found = {}
    for part in ("model", "data"):
        given = run.options(part)
        for name in given.keys() & metrics.keys():
            # Without an option, a template is used if there is one.
            settled = name == "chat_template" and given[name] is None
            if given[name] != metrics[name] and not settled:
                found[f"{part}.{name}"] = metrics[name]
    return dict(sorted(found.items()))


def commands(run: Run, test: Test | None) -> list[str]:
    """The fit, and the test that is shown."""
    changed = options_of_test(run, test.metrics) if test else {}
    options = "".join(f" --{name} {_value(value)}" for name, value in changed.items())
    return [
        f"{PROGRAM} fit --config {run.place}/config.yaml",
        f"{PROGRAM} test --ckpt_path {run.place}/last.ckpt{options}",
    ]


def missing(run: Run, test: Test | None, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What has not been done, and the command that does it."""
    fit, tested = commands(run, test)
    found = []
    search = record.get("state", {}).get("search", {})
    if search.get("left") is not None:
        said = f"The fit was stopped after {record['counted']} samples"
        found.append((said, f"{fit} --ckpt_path {run.place}/last.ckpt"))
    if run.stale:
        found.append((f"Of another fit, and not shown: the tests {', '.join(run.stale)}", tested))
    elif test is None:
        found.append(("The test has not been done", tested))
    if test is not None and "noise_floor" not in test.metrics:
        again = f"{tested} --model.noise_floor true"
        found.append(("How many answers rounding alone changes was not measured", again))
    searches = run.selection.null_max_correlation is not None
    if searches and run.selection.control == "none":
        for control in ("shuffled_rewards", "random_features"):
            again = f"{fit} --model.control {control} --trainer.default_root_dir {run.beside(f'_{control}')}"
            found.append((f"The control {control} is a fit of its own, to be tested and compared", again))
    if searches and not run.selection.null_maxima:
        found.append(("The rewards were not permuted, so there are no p-values", f"{fit} --model.permutations 32"))
    return found


def _value(value: Any) -> str:
    return quote(value if isinstance(value, str) else json.dumps(value))
