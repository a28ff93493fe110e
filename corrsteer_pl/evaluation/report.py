"""The report of a run, as a page and as Markdown: what came out, how far to believe it, and how to do it again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation import figures
from corrsteer_pl.evaluation.figures import Point
from corrsteer_pl.evaluation.paired import Z_95, Outcome, paired_metrics
from corrsteer_pl.evaluation.run import Run, Test
from corrsteer_pl.evaluation.words import Piece, differing_words
from corrsteer_pl.selection import Feature, Selection
from corrsteer_pl.stats import TOLERANCE

# Answers shown each way; p-values below which a difference is told from chance, and below which none is spelt out.
SHOWN, LEVEL, SMALL = 100, 0.05, 0.001


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


def verdict(run: Run, test: Test | None) -> str:
    """What came out, in one plain sentence."""
    count, selection = len(run.selection.features), run.selection
    if not count:
        return (
            f"No feature beat the unsteered model on validation, so nothing is steered "
            f"({_percent(selection.baseline_reward)} there)."
        )
    what = f"Steering {selection.llm.get('name', 'the model')} with {count} feature{'s' * (count != 1)}"
    if test is None:
        joint = selection.joint_reward
        gained = f" took the reward on validation from {_percent(selection.baseline_reward)} to {_percent(joint)}"
        said = gained if joint is not None else " was selected"
        return f"{what}{said}; it has not been tested yet, and validation flatters what was chosen by it."
    m = test.metrics
    change = f"from {_percent(m['reward_baseline'])} to {_percent(m['reward_steered'])}"
    if m["p_value"] >= LEVEL:
        said = f"changes the reward on {test.name} {change}, which cannot be told from no effect"
    else:
        said = f"{'raises' if m['difference'] > 0 else 'lowers'} the reward on {test.name} {change}"
    control = "" if selection.control == "none" else f" This is a control: {selection.control}."
    return f"{what} {said}: {_figures(m)}.{control}"


def verdict_of_two(comparison: Comparison) -> str:
    """The same of two runs."""
    m, (one, other) = comparison.metrics, comparison.names
    change = f"from {_percent(m['reward_baseline'])} to {_percent(m['reward_steered'])}"
    if m["p_value"] >= LEVEL:
        return f"{other} cannot be told from {one} on the same questions, {change}: {_figures(m)}."
    return f"{other} is {'better' if m['difference'] > 0 else 'worse'} than {one}, {change}: {_figures(m)}."


def _figures(m: Mapping[str, Any]) -> str:
    interval = "" if m["ci_low"] is None else f", 95 % interval {100 * m['ci_low']:+.1f} to {100 * m['ci_high']:+.1f}"
    p_value = f"p = {m['p_value']:.2g}" if m["p_value"] >= SMALL else f"p < {SMALL:g}"
    return f"{100 * m['difference']:+.1f} points{interval}, {m['n']} questions, {p_value}"


def _percent(value: float | None) -> str:
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
        "missing": _missing(run, test),
        "comparison": test and compared(test.outcomes, test.metrics, ("unsteered", "steered")),
        "pictures": _pictures(run, test),
        "groups": _groups(test),
        "others": [(name, metrics) for name, metrics in run.tests.items() if test and name != test.name],
        "features": [(f, run.cards.get(f.name)) for f in selection.features],
        "settings": _settings(run),
        "record": record,
        "shown": SHOWN,
    }


def _missing(run: Run, test: Test | None) -> list[tuple[str, str]]:
    """What has not been done, and the command that does it."""
    found, checkpoint = [], f"{run.folder}/last.ckpt"
    command = "python -m corrsteer_pl"
    if test is None:
        found.append(("The test has not been done", f"{command} test --ckpt_path {checkpoint}"))
    elif "noise_floor" not in test.metrics:
        again = f"{command} test --ckpt_path {checkpoint} --model.noise_floor true"
        found.append(("How many answers rounding alone changes was not measured", again))
    if run.selection.control == "none":
        for control in ("shuffled_rewards", "random_features"):
            options = f"--model.control {control} --trainer.default_root_dir {run.folder}_{control}"
            again = f"{command} fit --config {run.folder}/config.yaml {options}"
            found.append((f"The control {control} is a fit of its own, to be tested and compared", again))
    if not run.selection.null_maxima:
        found.append(("The rewards were not permuted, so there are no p-values", "fit with model.permutations above 0"))
    return found


def _pictures(run: Run, test: Test | None) -> dict[str, str | None]:
    selection = run.selection
    candidates = selection.candidates
    tested = [f for f in candidates if f.validation_reward is not None]
    marked = [f in selection.features for f in candidates]
    maxima = selection.null_maxima
    limit = sorted(maxima)[int(0.95 * len(maxima))] if maxima else None
    correlations = [Point(f.name, f.correlation, marked=chosen) for f, chosen in zip(candidates, marked, strict=True)]
    percentages = [100 * reward for reward in selection.steps]
    base = 100 * (selection.baseline_reward or 0.0)
    return {
        "candidates": figures.points(_gains(tested, selection), "change of the validation reward, points", "unsteered")
        if tested else None,
        "steps": figures.curve(
            range(len(percentages) + 1), {"joint reward": [base, *percentages]},
            "features that steer together, in the order in which they were added", "validation reward, %",
        ) if percentages else None,
        "strengths": _strengths(selection),
        "layers": figures.by_layer([f.layer for f in candidates], [f.correlation for f in candidates], marked, limit)
        if candidates else None,
        "chance": figures.against_chance(maxima, correlations) if maxima and candidates else None,
        "convergence": _convergence(run.snapshots),
        "groups": figures.points(_group_points(test), "change of the test reward, points", "unsteered")
        if _group_points(test) else None,
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
        points.append(Point(f"{name} (n {m['n']})", 100 * m["difference"], low, high, marked))
    return points


def _settings(run: Run) -> dict[str, Any]:
    """Options of the fit that a reader asks for."""
    wanted = {
        "model": ("llm", "saes", "rule", "sign", "pool", "coefficient", "score", "scale", "positions", "control"),
        "data": ("task", "path", "train_size", "val_size", "chat_template", "shots", "restrict", "seed"),
    }
    return {f"{part}.{name}": run.option(part, name) for part, names in wanted.items() for name in names}


# ---------------------------------------------------------------- of two runs


def context_of_two(one: Run, other: Run, name: str | None = None) -> dict[str, Any]:
    """All that the templates show of two runs on the same questions.

    Raises:
        UserError: One has no test, or they were not tested on the same questions.
    """
    first, second = (_tested(run, name) for run in (one, other))
    mine, theirs = ({o.id: o for o in test.outcomes} for test in (first, second))
    shared = [key for key in mine if key in theirs and theirs[key].prompt == mine[key].prompt]
    if not shared or len(shared) < max(len(mine), len(theirs)):
        raise UserError(
            f"{one.folder} was tested on {len(mine)} questions of {first.name}, {other.folder} on {len(theirs)} of "
            f"{second.name}, and {len(shared)} are the same. Test both on the same task, splits and prompts."
        )
    pairs = [(mine[key], theirs[key]) for key in shared]
    outcomes = [
        Outcome(
            a.id, a.prompt, a.gold, a.groups, a.answer_steered, b.answer_steered, a.reward_steered, b.reward_steered
        )
        for a, b in pairs
    ]
    rewards = torch.tensor([(o.reward_baseline, o.reward_steered) for o in outcomes], dtype=torch.float64)
    names = _told_apart(one, other)
    comparison = compared(outcomes, paired_metrics(rewards[:, 0], rewards[:, 1]), names)
    return {
        "title": f"{names[1]} against {names[0]}",
        "verdict": verdict_of_two(comparison),
        "comparison": comparison,
        "against_unsteered": [(n, test.metrics) for n, test in zip(names, (first, second), strict=True)],
        "differing": _differing(one, other),
        "shown": SHOWN,
    }


def _steered_pair(one: Outcome, other: Outcome) -> Outcome:
    """The steered answers of two runs to one question, the first in the place of the unsteered one."""
    return replace(
        one,
        answer_baseline=one.answer_steered,
        answer_steered=other.answer_steered,
        reward_baseline=one.reward_steered,
        reward_steered=other.reward_steered,
    )


def _tested(run: Run, name: str | None) -> Test:
    test = run.test(name)
    if test is None:
        raise UserError(
            f"{run.folder} has no test yet. Run: python -m corrsteer_pl test --ckpt_path {run.folder}/last.ckpt"
        )
    return test


def _told_apart(one: Run, other: Run) -> tuple[str, str]:
    same = one.name == other.name
    return (str(one.folder), str(other.folder)) if same else (one.name, other.name)


def _differing(one: Run, other: Run) -> list[tuple[str, Any, Any]]:
    """Options that the fits have otherwise."""
    found = []
    for part in ("model", "data"):
        some = [run.settings.get(part) or {} for run in (one, other)]
        mine, theirs = (s.get("init_args", s) for s in some)
        found += [
            (f"{part}.{k}", mine.get(k), theirs.get(k)) for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)
        ]
    return found
