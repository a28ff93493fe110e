"""Cells brought together: every figure by task and system, over the seeds that are there."""

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from corrsteer_pl.evaluation.paired import average_over_seeds, side_effect_ratio
from corrsteer_pl.results.cells import RANDOM, SHOTS, SYSTEM, UNSTEERED, Cell
from corrsteer_pl.results.picture import Point
from corrsteer_pl.results.plan import Plan


def summary(plan: Plan, cells: Sequence[Cell]) -> dict[str, Any]:
    """All figures by task and system, over the seeds that are there, with the machine and the commit."""
    tasks = {}
    for name in plan.tasks:
        if some := [cell for cell in cells if cell.task == name]:
            tasks[name] = {
                "seeds": [cell.seed for cell in some],
                "counts": some[0].counts,
                "systems": {system: _over_seeds(some, system) for system in _systems(some)},
                "fit_rewards": [cell.fit_reward for cell in some],
                "refusing": {
                    key: _means([cell.refusing[key] for cell in some if key in cell.refusing])
                    for key in _keys(cell.refusing for cell in some)
                },
                "against": {name: _against(some, name, plan.rules[0]) for name in _prompted(some)},
                "above_random": [_above_random(cell, plan.rules[0]) for cell in some if cell.random],
                "seconds": {
                    part: sum(cell.seconds.get(part, 0.0) for cell in some)
                    for part in _keys(cell.seconds for cell in some)
                },
            }
    return {
        "title": plan.title,
        "commit": _all(cell.commit for cell in cells),
        "machine": _all(cell.machine for cell in cells),
        "dtype": plan.dtype,
        "peak_mib": max((cell.peak for cell in cells), default=0.0),
        "tasks": tasks,
    }


def _all(values: Iterable[str]) -> str:
    """What was said, each once."""
    return "; ".join(sorted(set(values)))


def _systems(cells: Sequence[Cell]) -> list[str]:
    names = _keys(cell.systems for cell in cells)
    return [*names, RANDOM] if any(cell.random for cell in cells) else names


def _keys(some: Iterable[dict[str, Any]]) -> list[str]:
    """The keys of several, in order; a seed without a selection lacks what the others have of theirs."""
    return list(dict.fromkeys(key for one in some for key in one))


def _over_seeds(cells: Sequence[Cell], system: str) -> dict[str, Any]:
    """One system over all seeds, random features over all draws as well.

    A seed without a selection leaves the model unsteered under every system that is made of a selection.
    """
    metrics = [m for cell in cells for m in _measured(cell, system)]
    rewards = [m["reward_steered"] for m in metrics]
    by_seed = [m["difference"] for m in metrics]
    average = average_over_seeds([by_id for cell in cells for by_id in _differences(cell, system)])
    harmless, losses = _damage(cells, system)
    vectors = [m.get("vectors") for m in metrics] if system != RANDOM else None
    return {
        "n": average.n,
        "reward": mean(rewards),
        "lowest": min(rewards),
        "highest": max(rewards),
        "difference": average.difference,
        "ci_low": average.ci_low,
        "ci_high": average.ci_high,
        "p_value": average.p_value,
        "deviation": stdev(by_seed) if len(by_seed) > 1 else None,
        "differences": by_seed,
        "side_effect_ratio": side_effect_ratio(sum(m["worse"] for m in metrics), sum(m["better"] for m in metrics)),
        "vectors": vectors,
        "seeds_selected": sum(map(bool, vectors)) if vectors is not None else None,
        "harmless": mean(harmless) if harmless else None,
        "text_loss": mean(losses) if losses else None,
    }


def _measured(cell: Cell, system: str) -> list[dict[str, Any]]:
    unsteered = cell.systems[UNSTEERED]
    return cell.random or [unsteered] if system == RANDOM else [cell.systems.get(system, unsteered)]


def _differences(cell: Cell, system: str, baseline: str = UNSTEERED) -> list[dict[str, float]]:
    """Paired differences by test example, one dictionary for a system, one for each draw of random features."""
    unsteered = cell.rewards[UNSTEERED]
    before = cell.rewards.get(baseline, unsteered)
    after: Sequence[Sequence[float | None]] = (
        cell.random_rewards or [unsteered] if system == RANDOM else [cell.rewards.get(system, unsteered)]
    )
    return [
        {
            id: steered - plain
            for id, plain, steered in zip(cell.examples, before, rewards, strict=True)
            if plain is not None and steered is not None
        }
        for rewards in after
    ]


def _prompted(cells: Sequence[Cell]) -> list[str]:
    """The systems that change the prompt instead of steering."""
    return [name for name in _keys(cell.rewards for cell in cells) if name == SYSTEM or name.endswith(f" {SHOTS}")]


def _against(cells: Sequence[Cell], system: str, rule: str) -> dict[str, Any]:
    """A way of prompting compared with the first rule on the same test examples: prompting minus steering."""
    average = average_over_seeds([by_id for cell in cells for by_id in _differences(cell, system, rule)])
    return {"difference": average.difference, "p_value": average.p_value}


def _above_random(cell: Cell, rule: str) -> bool:
    return cell.systems[rule]["reward_steered"] > max(m["reward_steered"] for m in cell.random)


def _damage(cells: Sequence[Cell], system: str) -> tuple[list[float], list[float]]:
    """Change of the reward on harmless requests, and of the loss on plain text, of every seed, if it was measured."""
    if system == UNSTEERED or not any(system in cell.damage for cell in cells):
        return [], []
    some = [(cell.damage.get(system), cell.damage.get(UNSTEERED, {}).get("text_loss")) for cell in cells]
    harmless = [d["harmless"]["difference"] if d else 0.0 for d, _ in some if not d or d["harmless"]]
    losses = [d["text_loss"] - plain if d else 0.0 for d, plain in some if plain is not None]
    return harmless if any(d and d["harmless"] for d, _ in some) else [], losses


def _means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: mean(one[key] for one in found) for key in found[0]}


def points(found: dict[str, Any]) -> Iterable[Point]:
    """What the picture shows: every system of every task as a difference from the unsteered model."""
    for name, task in found["tasks"].items():
        for system, m in task["systems"].items():
            if system != UNSTEERED:
                bounds = (m["difference"] if m[bound] is None else m[bound] for bound in ("ci_low", "ci_high"))
                yield Point(name, system, 100 * m["difference"], *(100 * bound for bound in bounds))
