"""The summary as Markdown tables: all of it, and one line a task."""

from typing import Any

from corrsteer_pl.evaluation.tables import percent
from corrsteer_pl.results.cells import RANDOM, SHOTS, SHUFFLED, SYSTEM, UNSTEERED
from corrsteer_pl.results.plan import Plan

HEADER = (
    "| task | system | seeds | n | reward | difference [95 %] | p | SER | vectors | harmless | text loss |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def table(found: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        _line(name, system, task, m) for name, task in found["tasks"].items() for system, m in task["systems"].items()
    ]
    return HEADER + "".join(lines)


def _line(name: str, system: str, task: dict[str, Any], m: dict[str, Any]) -> str:
    reward = percent(m["reward"])
    if system == RANDOM:
        reward = _spread(m)
    elif m["deviation"] is not None:
        reward += f" ± {percent(m['deviation'])}"
    plain = system == UNSTEERED
    difference = "" if plain else _difference(m)
    p = "" if plain or system == RANDOM else ", ".join(f"{p:.1g}" for p in m["p_values"])
    ratio = "" if m["side_effect_ratio"] is None else f"{m['side_effect_ratio']:.2f}"
    vectors = ", ".join(str(v) for v in m["vectors"]) if m["vectors"] and any(m["vectors"]) else ""
    harmless = "" if m["harmless"] is None else f"{100 * m['harmless']:+.1f}"
    loss = "" if m["text_loss"] is None else f"{m['text_loss']:+.2f}"
    cells = (name, system, len(task["seeds"]), m["n"], reward, difference, p, ratio, vectors, harmless, loss)
    return f"| {' | '.join(map(str, cells))} |\n"


NOTE = (
    "\nReward in percent of the test prompts, mean over seeds ± deviation; the difference from the unsteered model "
    "with the mean of the paired 95 % intervals; p of every seed. Random features: mean (range) over all draws, with "
    "the coefficients and layers of the first rule's selection. Shuffled rewards: the same fit with the rewards of all "
    "prompts permuted, validated on true ones. SER: share of changed rewards that fell. Harmless: change of the "
    "reward on harmless requests. Text loss: change in nats per token on plain text, steered at every position.\n"
)


SHORT = (
    "| task | seeds | n | unsteered | steered | difference [95 %] | SER | random features | shuffled rewards "
    "| system prompt | shots |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
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
            name, len(task["seeds"]), m["n"], percent(systems[UNSTEERED]["reward"]), percent(m["reward"]),
            _difference(m), ratio, random, *(percent(reward) for reward in others),
        )  # fmt: skip
        text += f"| {' | '.join(map(str, cells))} |\n"
    return text + (
        f"\n{plan.title}, rule `{plan.rules[0]}`, reward in percent, mean over the seeds. "
        f"Measured at commit {found['commit']} on {found['machine']}, {found['dtype']}, by "
        f"`python -m corrsteer_pl.results --config results/{plan.name}.yaml`.\n"
    )


def _difference(m: dict[str, Any]) -> str:
    return f"{100 * m['difference']:+.1f} [{percent(m['ci_low'])}, {percent(m['ci_high'])}]"


def _spread(m: dict[str, Any]) -> str:
    return f"{percent(m['reward'])} ({percent(m['lowest'])} to {percent(m['highest'])})"
