"""The report of a run, as a page and as Markdown: what came out, how far to believe it, and how to do it again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corrsteer_pl.evaluation import figures
from corrsteer_pl.evaluation.again import commands, missing, settings
from corrsteer_pl.evaluation.figures import Point
from corrsteer_pl.evaluation.paired import Z_95, Outcome
from corrsteer_pl.evaluation.run import Run, Test
from corrsteer_pl.evaluation.words import Piece, differing_words, shortened
from corrsteer_pl.selection import Feature, Selection
from corrsteer_pl.stats import TOLERANCE

# Answers shown each way; p-values below which a difference is told from chance, and below which none is spelt out.
SHOWN, LEVEL, SMALL = 100, 0.05, 0.001
# Characters of a name beside a figure.
LONGEST = 35


@dataclass(frozen=True)
class Changed:
    """Two answers to one question, of which one is better.

    Attributes:
        id: Of the question.
        prompt: The question.
        gold: What is right.
        before, after: The answers, in pieces of which some differ.
        rewards: What both got.
    """

    id: str
    prompt: str
    gold: str
    before: list[Piece]
    after: list[Piece]
    rewards: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same questions.

    Attributes:
        names: What they are called.
        metrics: Their paired metrics; the second system counts as the steered one.
        changed: ``better`` and ``worse``: answers of the second system that differ in reward, as far as shown.
        counts: How many there are of both.
    """

    names: tuple[str, str]
    metrics: dict[str, Any]
    changed: dict[str, list[Changed]]
    counts: dict[str, int]


def compared(outcomes: Sequence[Outcome], metrics: Mapping[str, Any], names: tuple[str, str]) -> Comparison:
    """A comparison, with the answers that changed most first."""
    gains = [o.reward_steered - o.reward_baseline for o in outcomes]
    changed = {}
    for way, sign in (("better", 1), ("worse", -1)):
        order = sorted((i for i, gain in enumerate(gains) if sign * gain > TOLERANCE), key=lambda i: -sign * gains[i])
        changed[way] = [_changed(outcomes[i]) for i in order]
    counts = {way: len(some) for way, some in changed.items()}
    return Comparison(names, dict(metrics), {way: some[:SHOWN] for way, some in changed.items()}, counts)


def _changed(o: Outcome) -> Changed:
    before, after = differing_words(o.answer_baseline, o.answer_steered)
    return Changed(o.id, o.prompt, o.gold, before, after, (o.reward_baseline, o.reward_steered))


@dataclass(frozen=True)
class Words:
    """What is said of a method.

    Attributes:
        what: What was done, with ``{model}`` and ``{number}`` of what was selected.
        noun: What is selected.
        title: Heading of what was selected.
        score: What it was ranked by.
        right, wrong: The two classes that were told apart; empty if there were none.
        selects: Whether there is a choice among some; otherwise the change is one.
    """

    what: str
    noun: str
    title: str = "The features"
    score: str = "score"
    right: str = "right answers"
    wrong: str = "wrong ones"
    selects: bool = True


FEATURES = Words("Steering {model} with {number}", "feature")
WORDS = {
    "mean_difference": Words(
        "Steering {model} with {number}", "contrastive vector", "The vectors", "distance of the means"
    ),
    "vectors": Words("Steering {model} with {number}", "given vector", "The vectors", "length", "", ""),
    "rosi": Words(
        "Editing the weights of {model} along a direction", "edit", "The edit", "separation of the classes",
        "harmful requests", "harmless ones",
    ),
    "crisp": Words(
        "Quietening {number} of {model} by an adapter", "feature", "The salient features", "difference of rates",
        "target tokens", "retain tokens",
    ),
    "finetune": Words("Fine-tuning {model}", "weight", "What was trained", selects=False),
    "prompting": Words("A longer prompt for {model}", "prompt", "What was said", selects=False),
}  # fmt: skip


def words_of(run: Run) -> Words:
    """What is said of a run's method."""
    return WORDS.get(run.method, FEATURES)


def verdict(run: Run, test: Test | None) -> str:
    """What came out, in one plain sentence, and another if it is a control."""
    return f"{_outcome(run, test)}{control(run)}"


def control(run: Run) -> str:
    """A sentence if a run is a control, and what its search found."""
    selection = run.selection
    if selection.control == "none":
        return ""
    nothing = " No candidate correlates more than chance would have it (p > 0.05)." if selection.is_like_chance else ""
    return f" {run.name} is a control, {selection.control}.{nothing}"


def _outcome(run: Run, test: Test | None) -> str:
    count, selection, words = len(run.selection.features), run.selection, words_of(run)
    if not count and words.selects:
        return (
            f"No {words.noun} beat the unsteered model on validation, so nothing is changed "
            f"({percentage(selection.baseline_reward)} there)."
        )
    number = f"{count} {words.noun}{'s' * (count != 1)}"
    what = words.what.format(model=run.model, number=number)
    if test is None:
        joint = selection.joint_reward
        gained = f" took the reward on validation from {percentage(selection.baseline_reward)} to {percentage(joint)}"
        said = gained if joint is not None else " was selected"
        return f"{what}{said}; it has not been tested yet, and validation flatters what was chosen by it."
    m = test.metrics
    change = f"from {percentage(m['reward_baseline'])} to {percentage(m['reward_steered'])}"
    if m["p_value"] >= LEVEL:
        said = f"changes the reward on {test.name} {change}, which cannot be told from no effect"
    else:
        said = f"{'raises' if m['difference'] > 0 else 'lowers'} the reward on {test.name} {change}"
    return f"{what} {said}: {figures_of(m)}."


def figures_of(m: Mapping[str, Any]) -> str:
    """Difference, interval, number of questions and p-value."""
    interval = "" if m["ci_low"] is None else f", 95 % interval {100 * m['ci_low']:+.1f} to {100 * m['ci_high']:+.1f}"
    p_value = f"p = {m['p_value']:.2g}" if m["p_value"] >= SMALL else f"p < {SMALL:g}"
    return f"{100 * m['difference']:+.1f} points{interval}, {m['n']} questions, {p_value}"


def percentage(value: float | None) -> str:
    """A reward as percent."""
    return "-" if value is None else f"{100 * value:.1f} %"


# ---------------------------------------------------------------- of one run


def context(run: Run, test: Test | None, record: Mapping[str, Any]) -> dict[str, Any]:
    """All that the templates show of a run."""
    selection = run.selection
    return {
        "title": f"{run.name}: {run.task}",
        "run": run,
        "selection": selection,
        "test": test,
        "verdict": verdict(run, test),
        "method": run.method,
        "classes": words_of(run),
        "strength_name": _strength_name(run),
        "searches": selection.null_max_correlation is not None,
        "missing": missing(run, test, record),
        "commands": commands(run, test),
        "comparison": test and compared(test.outcomes, test.metrics, ("unsteered", "steered")),
        "pictures": _pictures(run, test),
        "groups": _groups(test),
        "others": [(name, metrics) for name, metrics in run.tests.items() if test and name != test.name],
        "features": [(f, run.cards.get(f.name)) for f in selection.features],
        "settings": settings(run),
        "record": record,
        "shown": SHOWN,
    }


def _strength_name(run: Run) -> str:
    """What the coefficient of a feature is."""
    if run.method != "rosi":
        return "coefficient"
    return "alpha" if run.edit_unit == "alpha" else "strength, % of the weights"


def _pictures(run: Run, test: Test | None) -> dict[str, str | None]:
    selection = run.selection
    candidates = selection.candidates
    tested = [f for f in candidates if f.validation_reward is not None]
    maxima = selection.null_maxima
    # Above it, so few permutations have a larger |r| that p is at most 0.05.
    rarely = int(LEVEL * (len(maxima) + 1) + 1e-9) - 1
    limit = sorted(maxima, reverse=True)[rarely] if rarely >= 0 else None
    correlated = [(f, f.correlation) for f in candidates if f.correlation is not None]
    correlations = [Point(f.name, r, marked=f in selection.features) for f, r in correlated]
    percentages, groups = [100 * reward for reward in selection.steps], _group_points(test)
    base = 100 * (selection.baseline_reward or 0.0)
    return {
        "candidates": figures.points(_gains(tested, selection), "change of the validation reward, points", "unsteered")
        if tested else None,
        "steps": figures.curve(
            range(len(percentages) + 1), {"joint reward": [base, *percentages]},
            "features that steer together, in the order in which they were added", "validation reward, %",
        ) if percentages else None,
        "strengths": _strengths(selection),
        "layers": figures.by_layer([f.layer for f, _ in correlated], correlations, limit) if correlated else None,
        "chance": figures.against_chance(maxima, correlations) if maxima and correlated else None,
        "convergence": _convergence(run.snapshots),
        "groups": figures.points(groups, "change of the test reward, points", "unsteered") if groups else None,
    }  # fmt: skip


def _gains(tested: Sequence[Feature], selection: Selection) -> list[Point]:
    points = []
    for f in tested:
        gain = 100 * ((f.validation_reward or 0.0) - (selection.baseline_reward or 0.0))
        half = None if f.validation_error is None else 100 * Z_95 * f.validation_error
        low, high = (None, None) if half is None else (gain - half, gain + half)
        points.append(Point(f"{f.name} ({f.sign})", gain, low, high, f in selection.features))
    return sorted(points, key=lambda point: -point.value)


def _strengths(selection: Selection) -> str | None:
    tried = selection.strengths
    if len(tried) < 2:
        return None
    series = {"reward of the whole selection": [100 * one.reward for one in tried]}
    return figures.curve([one.scale for one in tried], series, "strength", "validation reward, %")


def _convergence(snapshots: Sequence[Mapping[str, Any]]) -> str | None:
    if len(snapshots) < 2:
        return None
    names = {"selection": "joint_reward", "best candidate": "best_candidate_reward", "unsteered": "baseline_reward"}
    series = {
        name: [None if s.get(key) is None else 100 * s[key] for s in snapshots] for name, key in names.items()
    }  # fmt: skip
    return figures.curve([s["samples"] for s in snapshots], series, "samples of the fit", "validation reward, %")


def _groups(test: Test | None) -> list[tuple[str, dict[str, Any]]]:
    groups = test.metrics.get("groups", {}) if test else {}
    return sorted(groups.items(), key=lambda item: -item[1]["difference"])


def _group_points(test: Test | None) -> list[Point]:
    points = []
    for name, m in _groups(test):
        low, high = (None if m[end] is None else 100 * m[end] for end in ("ci_low", "ci_high"))
        marked = m["p_value_corrected"] < LEVEL
        points.append(Point(f"{shortened(name, LONGEST)} (n {m['n']})", 100 * m["difference"], low, high, marked))
    return points
