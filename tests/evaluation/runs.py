"""Folders of runs as fits and tests leave them, made by hand."""

from dataclasses import replace
from pathlib import Path

import yaml

from corrsteer_pl.evaluation.paired import Outcome, compare_outcomes
from corrsteer_pl.files import write_json, write_jsonl, write_utf8
from corrsteer_pl.selection import Feature, Selection, Strength

NASTY = "</pre><script>throw new Error('from a prompt')</script> & | ` <b>bold</b>"


def feature(layer, index, gain=0.1, sign="positive"):
    r = 0.4 if sign == "positive" else -0.3
    return Feature(
        layer, f"blocks.{layer}.hook_resid_post", index, sign, 2.0, r, r, 0.6, 0.1, 3.0, 0.5, 0.4 + gain, 5, 1, 0.02,
        f"https://www.neuronpedia.org/x/{layer}/{index}", 0.03 if layer else 0.4, 0.9,
    )  # fmt: skip


FEATURES = (feature(0, 7), feature(1, 3, 0.2), feature(1, 9, -0.05, "negative"))
CARD = {
    "ci_low": 0.3, "ci_high": 0.5, "likelier": [" A", "\n", NASTY], "unlikelier": [" word"], "cosines": {"1/3": 0.2},
    "snippets": [
        {"value": 3.1, "reward": 1.0, "before": NASTY, "token": ":", "after": " A", "structure": True},
        {"value": 2.0, "reward": 0.0, "before": "the ", "token": "hen", "after": " sat", "structure": False},
    ],
}  # fmt: skip


def selection(**changed):
    whole = Selection(
        "greedy", FEATURES[:2], FEATURES, FEATURES, 0.4, 300, 0.42, 0.2, joint_reward=0.65, steps=(0.6, 0.65),
        strengths=(Strength(0.0, 0.4, 0.0, 0.0), Strength(1.0, 0.6, 0.1, 0.0), Strength(1.5, 0.65, 0.2, 0.0)),
        scale=1.5, null_maxima=tuple(0.1 + 0.002 * i for i in range(32)), overlap={"0": 0.7, "1": 0.8},
        llm={"name": "a-model", "fingerprint": "abc"},
    )  # fmt: skip
    return replace(whole, **changed)


def outcome(i, before, after, text="the hen sat down"):
    group = ("even", "a rather long name of a group of questions") if i % 2 == 0 else ("odd",)
    answers = ("the cat sat", text)
    return Outcome(f"q-{i}", f"Question {i}? {NASTY}", "A", group, *answers, float(before), float(after))


OUTCOMES = [outcome(i, i % 3 == 0, i % 3 != 2 or i % 7 == 0) for i in range(60)]
# Every second one is right.
OTHERS = [outcome(i, i % 3 == 0, i % 2, "a fox ran") for i in range(60)]
NOISE = {"flips": 2, "n": 60, "better": 1, "worse": 1}


def write_run(folder: Path, outcomes=OUTCOMES, chosen=None, task="demo_qa", name="demo_qa", **metrics):
    """A run; without a test if there are no outcomes."""
    snapshots = [
        {"samples": n, "baseline_reward": 0.4, "best_candidate_reward": 0.5 + n / 2000, "joint_reward": joint}
        for n, joint in ((100, None), (200, 0.6), (300, 0.65))
    ]
    chosen = (chosen or selection()).marked()
    write_json(folder / "selection.json", {**chosen.as_dict(), "snapshots": snapshots})
    write_json(folder / "features.json", {"cards": [{"name": f.name, **CARD} for f in FEATURES[:2]]})
    config = {"model": {"llm": "a-model", "rule": "greedy", "scale": [1, 1.5]}, "data": {"task": task, "seed": 0}}
    write_utf8(folder / "config.yaml", yaml.safe_dump(config))
    if outcomes:
        found = {**compare_outcomes(outcomes), "measures": {"bias": {"baseline": 0.1, "steered": None}}, **metrics}
        write_json(folder / "test" / name / "metrics.json", {"task": task, "fit": chosen.mark, **found})
        write_jsonl(folder / "test" / name / "outcomes.jsonl", map(vars, outcomes))
    return folder
