"""The summary as Markdown tables: all of it, and one line a task."""

from typing import Any

from corrsteer_pl.evaluation.tables import percent
from corrsteer_pl.results.cells import RANDOM, SHOTS, SHUFFLED, SYSTEM, UNSTEERED
from corrsteer_pl.results.plan import Plan

COLUMNS = (
    "task", "system", "seeds", "n", "reward", "difference [95 %]", "over seeds", "p", "SER", "selected", "harmless",
    "text loss",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"


def table(found: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        _line(name, system, task, m) for name, task in found["tasks"].items() for system, m in task["systems"].items()
    ]
    return HEADER + "".join(lines)


def _line(name: str, system: str, task: dict[str, Any], m: dict[str, Any]) -> str:
    unsteered = system == UNSTEERED
    seeds = len(task["seeds"])
    reward = _spread(m) if system == RANDOM else percent(m["reward"])
    difference = "" if unsteered else _difference(m)
    deviation = "" if unsteered else _deviation(m)
    p = "" if unsteered else f"{m['p_value']:.1g}"
    ratio = "" if m["side_effect_ratio"] is None else f"{m['side_effect_ratio']:.2f}"
    selected = "" if not m["seeds_selected"] else f"{m['seeds_selected']} of {seeds}"
    harmless = "" if m["harmless"] is None else f"{100 * m['harmless']:+.1f}"
    loss = "" if m["text_loss"] is None else f"{m['text_loss']:+.2f}"
    cells = (name, system, seeds, m["n"], reward, difference, deviation, p, ratio, selected, harmless, loss)
    return f"| {' | '.join(map(str, cells))} |\n"


NOTE = (
    "\nReward: percent, mean over the seeds. n: test examples of all seeds, each counted once. Difference: from the "
    "unsteered model, in percentage points, each test example averaged over the seeds that tested it, with the 95 % "
    "interval over test examples. Over seeds: standard deviation of the difference. p: Wilcoxon's signed-rank test of "
    "the averaged differences. SER: share of changed rewards that fell, pooled over the seeds. Selected: seeds that "
    "selected any feature. Random features: mean (range) over all draws, with the coefficients and layers of the first "
    "rule's selection. Shuffled rewards: the same fit with the rewards of all prompts permuted, validated on true "
    "ones. Harmless: change of the reward on harmless requests. Text loss: change in nats per token on plain text, "
    "steered at every position.\n"
)


SHORT = (
    "| task | seeds (selected) | n | unsteered | steered | difference [95 %] | over seeds | SER | random features "
    "| shuffled rewards | system prompt | shots |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def short_table(plan: Plan, found: dict[str, Any]) -> str:
    """One line a task, for a README: the first rule against the controls and against prompting.

    Tasks with options of their own for the method are left to the page.
    """
    text = SHORT
    for name, task in found["tasks"].items():
        if plan.tasks[name].model:
            continue
        systems, shots = task["systems"], plan.tasks[name].shots
        m, drawn = systems[plan.rules[0]], systems.get(RANDOM)
        random = _spread(drawn) if drawn else ""
        others = [systems[key]["reward"] if key in systems else None for key in (SHUFFLED, SYSTEM, f"{shots} {SHOTS}")]
        ratio = "" if m["side_effect_ratio"] is None else f"{m['side_effect_ratio']:.2f}"
        cells = (
            name, f"{len(task['seeds'])} ({m['seeds_selected']})", m["n"], percent(systems[UNSTEERED]["reward"]),
            percent(m["reward"]), _difference(m), _deviation(m), ratio, random, *(percent(reward) for reward in others),
        )  # fmt: skip
        text += f"| {' | '.join(map(str, cells))} |\n"
    return text + (
        f"\n{plan.title}, rule `{plan.rules[0]}`, reward in percent, mean over the seeds. Selected: seeds that "
        "selected any feature. Over seeds: standard deviation of the difference. SER: share of changed rewards that "
        "fell. "
        f"Measured at commit {found['commit']} on {found['machine']}, {found['dtype']}, by "
        f"`python -m corrsteer_pl.results --config results/{plan.name}.yaml`.\n"
    )


def _difference(m: dict[str, Any]) -> str:
    return f"{100 * m['difference']:+.1f} [{percent(m['ci_low'])}, {percent(m['ci_high'])}]"


def _deviation(m: dict[str, Any]) -> str:
    return "" if m["deviation"] is None else f"± {percent(m['deviation'])}"


def _spread(m: dict[str, Any]) -> str:
    return f"{percent(m['reward'])} ({percent(m['lowest'])} to {percent(m['highest'])})"
