"""The report of two runs that were tested on the same questions."""

from dataclasses import replace
from typing import Any

from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.again import options_of_test
from corrsteer_pl.evaluation.paired import Outcome, compare_outcomes
from corrsteer_pl.evaluation.report import LEVEL, SHOWN, Comparison, compared, control, figures_of, percentage
from corrsteer_pl.evaluation.run import Run, Test


def context_of_two(one: Run, other: Run, name: str | None = None) -> dict[str, Any]:
    """All that the templates show of two runs on the same questions.

    Raises:
        UserError: They are the same, one has no test, or they were not tested on the same questions.
    """
    if one.folder.resolve() == other.folder.resolve():
        raise UserError(f"{one.folder} is given twice. Give two runs to compare, or one to report on.")
    name = name or _common(one, other)
    first, second = (_tested(run, name) for run in (one, other))
    mine, theirs = ({o.id: o for o in test.outcomes} for test in (first, second))
    shared = [
        key
        for key in mine
        if key in theirs and (theirs[key].prompt, theirs[key].gold) == (mine[key].prompt, mine[key].gold)
    ]
    if not shared or len(shared) < max(len(mine), len(theirs)):
        raise UserError(
            f"{one.folder} was tested on {len(mine)} questions of {first.name}, {other.folder} on {len(theirs)} of "
            f"{second.name}, and {len(shared)} are the same. Test both on the same task, splits and prompts."
        )
    outcomes = [_steered_pair(mine[key], theirs[key]) for key in shared]
    same = one.name == other.name
    names = (str(one.folder), str(other.folder)) if same else (one.name, other.name)
    comparison = compared(outcomes, compare_outcomes(outcomes), names)
    tests = [(f"{n}: {test.name}", test.metrics) for n, test in zip(names, (first, second), strict=True)]
    return {
        "title": f"{names[1]} against {names[0]}",
        "verdict": f"{verdict_of_two(comparison)}{control(one)}{control(other)}",
        "comparison": comparison,
        "against_unsteered": tests,
        "differing": _differing((one, first), (other, second)),
        "shown": SHOWN,
    }


def verdict_of_two(comparison: Comparison) -> str:
    """What came out, in one plain sentence."""
    m, (one, other) = comparison.metrics, comparison.names
    change = f"from {percentage(m['reward_baseline'])} to {percentage(m['reward_steered'])}"
    if m["p_value"] >= LEVEL:
        return f"{other} cannot be told from {one} on the same questions, {change}: {figures_of(m)}."
    return f"{other} is {'better' if m['difference'] > 0 else 'worse'} than {one}, {change}: {figures_of(m)}."


def _steered_pair(one: Outcome, other: Outcome) -> Outcome:
    """The steered answers of two runs to one question, the first in the place of the unsteered one."""
    return replace(
        one,
        answer_baseline=one.answer_steered,
        answer_steered=other.answer_steered,
        reward_baseline=one.reward_steered,
        reward_steered=other.reward_steered,
    )


def _common(one: Run, other: Run) -> str | None:
    """A test that both runs have: that of the first one's own task, or else its latest."""
    shared = [name for name in one.tests if name in other.tests]
    own = one.test()
    return own.name if own and own.name in shared else next(iter(shared), None)


def _tested(run: Run, name: str | None) -> Test:
    test = run.test(name)
    if test is None:
        raise UserError(
            f"{run.folder} has no test yet. Run: python -m corrsteer_pl test --ckpt_path {run.place}/last.ckpt"
        )
    return test


def _differing(*tested: tuple[Run, Test]) -> list[tuple[str, Any, Any]]:
    """Options that the runs have otherwise, those of their tests included."""
    options = []
    for run, test in tested:
        of_fit = {f"{part}.{name}": value for part in ("model", "data") for name, value in run.options(part).items()}
        options.append({**of_fit, **options_of_test(run, test.metrics)})
    mine, theirs = options
    return [(k, mine.get(k), theirs.get(k)) for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]
