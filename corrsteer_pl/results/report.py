"""Cells brought together: the table, the page in plain words, and the picture."""

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from corrsteer_pl.evaluation.tables import percent
from corrsteer_pl.results.cells import RANDOM, SHOTS, SHUFFLED, SYSTEM, UNSTEERED, Cell
from corrsteer_pl.results.picture import Point
from corrsteer_pl.results.plan import Plan

HEADER = (
    "| task | system | seeds | n | reward | difference [95 %] | p | SER | vectors | harmless | text loss |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)
# From this reward on, or up to one minus it, a task leaves no room to judge by.
FULL = 0.99


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
                "against": {key: [cell.against[key] for cell in some] for key in some[0].against},
                "seconds": {part: sum(cell.seconds.get(part, 0.0) for cell in some) for part in some[0].seconds},
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
    """Means over the seeds that have the system; of random features over all draws of all seeds, with their range."""
    having = [cell for cell in cells if system == RANDOM or system in cell.systems]
    found = [m for cell in having for m in (cell.random if system == RANDOM else [cell.systems[system]])]
    rewards = [m["reward_steered"] for m in found]
    ratios = [m["side_effect_ratio"] for m in found if m["side_effect_ratio"] is not None]
    damage = [cell.damage[system] for cell in cells if system in cell.damage]
    harmless = [d["harmless"]["difference"] for d in damage if d["harmless"]]
    losses = [
        cell.damage[system]["text_loss"] - cell.damage[UNSTEERED]["text_loss"]
        for cell in cells
        if system in cell.damage and cell.damage[UNSTEERED]["text_loss"] is not None
    ]
    return {
        "n": found[0]["n"],
        "reward": mean(rewards),
        "deviation": stdev(rewards) if len(rewards) > 1 else None,
        "lowest": min(rewards),
        "highest": max(rewards),
        "difference": mean(m["difference"] for m in found),
        "ci_low": mean(m["ci_low"] for m in found),
        "ci_high": mean(m["ci_high"] for m in found),
        "p_values": [m["p_value"] for m in found],
        "side_effect_ratio": mean(ratios) if ratios else None,
        "vectors": [m.get("vectors") for m in found] if system != RANDOM else None,
        "harmless": mean(harmless) if harmless else None,
        "text_loss": mean(losses) if losses else None,
    }


def _means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: mean(one[key] for one in found) for key in found[0]}


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
    harmless = "" if m["harmless"] is None or plain else f"{100 * m['harmless']:+.1f}"
    loss = "" if m["text_loss"] is None or plain else f"{m['text_loss']:+.2f}"
    cells = (name, system, len(task["seeds"]), m["n"], reward, difference, p, ratio, vectors, harmless, loss)
    return f"| {' | '.join(map(str, cells))} |\n"


NOTE = (
    "\nReward in percent of the test prompts, mean over seeds ± deviation; the difference from the unsteered model "
    "with the mean of the paired 95 % intervals; p of every seed. Random features: mean (range) over all draws, with "
    "the coefficients and layers of the first rule's selection. Shuffled rewards: the same fit with the rewards of all "
    "prompts permuted, validated on true ones. SER: share of changed answers that got worse. Harmless: change of the "
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


def verdict(name: str, task: dict[str, Any], rule: str, note: str | None = None) -> str:
    """What the figures of a task say, in plain words, after what it asks."""
    plain, m = task["systems"][UNSTEERED], task["systems"][rule]
    name = f"**{name}** ({note})" if note else f"**{name}**"
    if min(plain["reward"], m["reward"]) >= FULL or max(plain["reward"], m["reward"]) <= 1 - FULL:
        return f"{name}: with and without steering {percent(plain['reward'])} %, so there is nothing to judge by."
    if set(task["fit_rewards"]) <= {0.0, 1.0}:
        return (
            f"{name}: unsteered {percent(plain['reward'])} %; all answers to the fit prompts were equally right or "
            "wrong, so there was nothing to correlate with."
        )
    if not any(m["vectors"]):
        return (
            f"{name}: unsteered {percent(plain['reward'])} %; no feature beat the unsteered model on validation, "
            "so nothing was selected."
        )
    words = [f"{name}: unsteered {percent(plain['reward'])} %, `{rule}` {percent(m['reward'])} %"]
    words.append(_clear("the unsteered model", m["ci_low"], m["ci_high"]))
    if RANDOM in task["systems"]:
        other = task["systems"][RANDOM]
        beaten = "above all" if m["reward"] > other["highest"] else "not above all"
        words.append(f"{beaten} draws of random features (highest {percent(other['highest'])} %)")
    if m["harmless"] is not None:
        words.append(f"harmless requests {100 * m['harmless']:+.1f} points")
    shuffled = task["systems"][SHUFFLED]["reward"]
    words.append(f"{100 * (m['reward'] - shuffled):+.1f} points against shuffled rewards")
    for way, found in task["against"].items():
        difference, low, high = (mean(one[key] for one in found) for key in ("difference", "ci_low", "ci_high"))
        words.append(f"{way} instead: {_clear('steering', low, high)} ({100 * difference:+.1f} points)")
    return "; ".join(words) + "."


def _clear(what: str, low: float, high: float) -> str:
    if low <= 0 <= high:
        return f"not told apart from {what}"
    return f"clearly {'better' if low > 0 else 'worse'} than {what}"


def points(found: dict[str, Any]) -> Iterable[Point]:
    """What the picture shows: every system of every task as a difference from the unsteered model."""
    for name, task in found["tasks"].items():
        for system, m in task["systems"].items():
            if system != UNSTEERED:
                yield Point(name, system, 100 * m["difference"], 100 * m["ci_low"], 100 * m["ci_high"])


def page(plan: Plan, found: dict[str, Any], cells: Sequence[Cell], saes: dict[str, Any] | None) -> str:
    """The page of results."""
    rule = plan.rules[0]
    lines = [f"# Results on {plan.title}\n"]
    missing = len(plan.tasks) - len(found["tasks"])
    unfinished = f" {missing} of {len(plan.tasks)} tasks are not measured yet." if missing else ""
    lines.append(
        f"Measured at commit {found['commit']} on {found['machine']}, {found['dtype']}, with "
        f"at most {found['peak_mib']:.0f} MiB of memory, by "
        f"`python -m corrsteer_pl.results --config results/{plan.name}.yaml`.{unfinished} "
        "Nothing was chosen on test prompts.\n"
    )
    said = {name: f"- {verdict(name, task, rule, plan.tasks[name].note)}" for name, task in found["tasks"].items()}
    lines += ["## What came out\n", *(line for name, line in said.items() if not plan.tasks[name].model)]
    if tried := [line for name, line in said.items() if plan.tasks[name].model]:
        lines += ["\n## What else was tried\n", *tried]
    lines.append(f"\n![differences from the unsteered model](../results/{plan.name}/differences.svg)\n")
    lines.append(table(found) + NOTE)
    if any(task["refusing"] for task in found["tasks"].values()):
        lines.append(_second_judge(found))
    lines.append(_features(found, cells))
    lines.append(_answers(cells))
    if saes:
        lines.append(_saes(saes))
    lines.append(_times(found))
    return "\n".join(lines)


def _second_judge(found: dict[str, Any]) -> str:
    text = (
        "## Refusals judged twice\n\nBy the first words of the answer, and by the log-odds that its first token is "
        "one that refusals begin with (above 0: refused).\n\n"
        "| task | system | reward by words | by first token | the two agree | mean log-odds |\n"
        "|---|---|---|---|---|---|\n"
    )
    for name, task in found["tasks"].items():
        for system, m in task["refusing"].items():
            by_words = percent(task["systems"][system]["reward"])
            by_token, agree = percent(m["reward"]), percent(m["agreement"])
            text += f"| {name} | {system} | {by_words} | {by_token} | {agree} | {m['log_odds']:+.2f} |\n"
    return text


def _features(found: dict[str, Any], cells: Sequence[Cell]) -> str:
    text = "## What the selected features do\n\nOf each task's first seed.\n"
    for name in found["tasks"]:
        cell = next(cell for cell in cells if cell.task == name)
        text += f"\n### {name}\n\n" + ("" if cell.features else "Nothing was selected.\n")
        for f in cell.features:
            tokens = ", ".join(f"`{_code(token)}`" for token in f["likelier"])
            text += (
                f"- layer {f['layer']}, feature {f['index']} (r {f['correlation']:+.2f}, coefficient "
                f"{f['coefficient']:+.2f}) makes likelier {tokens}; most active at "
                + "; ".join(f"“{_quoted(seen['text'])}”" for seen in f["snippets"])
                + "\n"
            )
    return text


def _answers(cells: Sequence[Cell]) -> str:
    text = "## Answers that changed\n"
    for cell in {cell.task: cell for cell in reversed(cells)}.values():
        for way, some in cell.changed.items():
            for one in some:
                text += (
                    f"\n- {cell.task}, {way}: “{_quoted(one['prompt'])}” — unsteered “{_quoted(one['unsteered'])}”, "
                    f"steered “{_quoted(one['steered'])}”"
                )
    return text + "\n"


def _saes(saes: dict[str, Any]) -> str:
    o = saes["options"]
    text = (
        f"## The SAEs\n\nTopK, {o['d_sae']} features of which {o['k']} are active, {saes['tokens']:,} tokens of "
        f"{saes['texts']} texts and {saes['prompts']} prompts with the model's own answers, {saes['seconds'] / 60:.0f} "
        f"minutes, seed {o['seed']}. What tasks gave are prompts of their fit splits at seed 0, without rewards. "
        f"On held-out texts, where the model's loss is {saes['loss']:.3f} nats:\n\n"
        "| layer | variance explained | L0 | dead | loss | loss recovered |\n|---|---|---|---|---|---|\n"
    )
    for layer, q in saes["layers"].items():
        figures = (
            percent(q["explained"]),
            f"{q['l0']:.0f}",
            percent(q["dead"]),
            f"{q['loss']:.3f}",
            percent(q["recovered"]),
        )
        text += f"| {layer} | {' | '.join(figures)} |\n"
    return text


def _times(found: dict[str, Any]) -> str:
    text = "## How long it took\n\n| task | " + " | ".join(
        parts := list(next(iter(found["tasks"].values()))["seconds"])
    )
    text += " |\n|" + "---|" * (len(parts) + 1) + "\n"
    for name, task in found["tasks"].items():
        text += f"| {name} | " + " | ".join(f"{task['seconds'][part]:.0f} s" for part in parts) + " |\n"
    return text


def _code(token: str) -> str:
    return token.replace("`", "'").replace("\n", "\\n").replace("|", "\\|")


def _quoted(text: str, most: int = 160) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    return line if len(line) <= most else f"{line[:most]}…"
