"""The page of results, in plain words."""

from collections.abc import Sequence
from typing import Any

from corrsteer_pl.evaluation.tables import percent
from corrsteer_pl.results.cells import RANDOM, SHUFFLED, UNSTEERED, Cell
from corrsteer_pl.results.plan import Plan
from corrsteer_pl.results.tables import NOTE, table

# From this reward on, or up to one minus it, a task leaves no room to judge by.
FULL = 0.99
# A difference with a smaller p-value is called significant.
LEVEL = 0.05


def page(plan: Plan, found: dict[str, Any], cells: Sequence[Cell], saes: dict[str, Any] | None, picture: str) -> str:
    """The page of results; ``picture`` is where its picture is, seen from the page."""
    rule = plan.rules[0]
    lines = [f"# Results on {plan.title}\n"]
    missing, wanted = len(plan.cells()) - len(cells), len(plan.cells())
    unfinished = f" {missing} of {wanted} pairs of task and seed are not measured yet." if missing else ""
    lines.append(
        f"Measured at commit {found['commit']} on {found['machine']}, {found['dtype']}, with "
        f"at most {found['peak_mib']:.0f} MiB of memory, by "
        f"`python -m corrsteer_pl.results --config results/{plan.name}.yaml`.{unfinished} "
        f"Nothing was chosen on test prompts. Significant: the paired test over all seeds has p below {LEVEL:g}.\n"
    )
    said = {name: f"- {verdict(name, task, rule, plan.tasks[name].note)}" for name, task in found["tasks"].items()}
    lines += ["## What came out\n", *(line for name, line in said.items() if not plan.tasks[name].model)]
    if tried := [line for name, line in said.items() if plan.tasks[name].model]:
        lines += ["\n## What else was tried\n", *tried]
    lines.append(f"\n![differences from the unsteered model]({picture})\n")
    lines.append(table(found) + NOTE)
    if any(task["refusing"] for task in found["tasks"].values()):
        lines.append(_second_judge(found))
    lines.append(_features(found, cells))
    lines.append(_answers(cells))
    if saes:
        lines.append(_saes(saes))
    lines.append(_times(found))
    return "\n".join(lines)


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
    words.append(_significance("the unsteered model", m))
    selected, seeds = m["seeds_selected"], len(m["vectors"])
    if selected < seeds:
        words.append(f"{selected} of {seeds} seeds selected anything")
    if above := task["above_random"]:
        beaten, count = "above all" if any(above) else "not above all", sum(above) or "any"
        times = "" if len(above) == 1 else f" in {count} of {len(above)} seeds"
        words.append(
            f"{beaten} draws of random features{times} (highest {percent(task['systems'][RANDOM]['highest'])} %)"
        )
    if m["harmless"] is not None:
        words.append(f"harmless requests {100 * m['harmless']:+.1f} points")
    shuffled = task["systems"][SHUFFLED]["reward"]
    words.append(f"{100 * (m['reward'] - shuffled):+.1f} points against shuffled rewards")
    for way, comparison in task["against"].items():
        words.append(
            f"{way} instead: {_significance('steering', comparison)} ({100 * comparison['difference']:+.1f} points)"
        )
    return "; ".join(words) + "."


def _significance(reference: str, m: dict[str, Any]) -> str:
    """Whether a difference from a reference is significant, over all seeds."""
    if m["p_value"] >= LEVEL:
        return f"not significantly different from {reference}"
    return f"significantly {'better' if m['difference'] > 0 else 'worse'} than {reference}"


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
    judged = [(name, system, m) for name, task in found["tasks"].items() for system, m in task["refusing"].items()]
    name, system, m = min(judged, key=lambda one: one[2]["agreement"])
    by_words = found["tasks"][name]["systems"][system]["reward"]
    return text + (
        f"\nThey disagree most on {name} under {system}: on {percent(1 - m['agreement'])} % of the answers. There the "
        f"words find {percent(by_words)} % right, the first token {percent(m['reward'])} %.\n"
    )


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
        f"## The SAEs\n\nTopK, {o['d_sae']} features of which {o['k']} are active, trained on "
        f"{saes['tokens'] // o['reuse']:,} tokens, each {o['reuse']} times, of {saes['texts']} texts and "
        f"{saes['prompts']} prompts with the model's own answers, in {saes['seconds'] / 60:.0f} minutes, seed "
        f"{o['seed']}, {o['dtype']}. What tasks gave are prompts of their fit splits at seed 0, without rewards; where "
        "splits are drawn, other seeds test on some of them, and their test splits overlap. "
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
    parts = list(dict.fromkeys(part for task in found["tasks"].values() for part in task["seconds"]))
    text = (
        "## How long it took\n\nWall-clock time of all seeds of a task together. Several processes may have shared the "
        f"machine, and then each took longer.\n\n| task | {' | '.join(parts)}"
    )
    text += " |\n|" + "---|" * (len(parts) + 1) + "\n"
    for name, task in found["tasks"].items():
        text += f"| {name} | " + " | ".join(f"{task['seconds'].get(part, 0):.0f} s" for part in parts) + " |\n"
    return text


def _code(token: str) -> str:
    return token.replace("`", "'").replace("\n", "\\n").replace("|", "\\|")


def _quoted(text: str, most: int = 160) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    return line if len(line) <= most else f"{line[:most]}…"
