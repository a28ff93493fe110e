"""Tables of results for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from corrsteer_pl.selection import Selection, Strength

# What scores of vectors that are no features mean.
MEANINGS = {
    "difference": "difference: distance of the means of right and wrong answers",
    "length": "length: Euclidean norm of the vector",
    "separation": "index: position from the end of the prompt; separation: squared distance of the means of both "
    "classes, in units of the squared distance from them; coefficient: strength in units of model.unit",
}


def percent(value: float | None) -> str:
    """A reward or a difference, as percent."""
    return "-" if value is None else f"{100 * value:.1f}"


def permutation_p_value(value: float | None, permutations: int) -> str:
    """A p-value of a permutation test; as an upper bound if no permutation reached what was observed.

    Example:
        >>> permutation_p_value(1 / 33, 32), permutation_p_value(2 / 33, 32)
        ('≤ 0.03 (32 permutations)', '0.061')
    """
    if value is None:
        return "-"
    at_floor = permutations > 0 and value <= (1 + 1e-9) / (permutations + 1)
    return f"≤ {value:.2g} ({permutations} permutations)" if at_floor else f"{value:.2g}"


def selection_table(selection: Selection) -> Table:
    """The tested candidates of a fit, the selected ones marked."""
    control = "" if selection.control == "none" else f", control {selection.control}"
    table = Table(
        title=f"Candidates after {selection.samples} samples, rule {selection.rule}{control}",
        caption=("" if selection.features else "Nothing improved on the baseline: the selection is empty.\n")
        + f"{_columns(selection)}; validation: reward of each alone\n"
        f"validation reward of the unsteered model: {percent(selection.baseline_reward)} %{_searched(selection)}",
    )
    if selection.joint_reward is not None and len(selection.features) > 1:
        table.caption = (
            f"{table.caption}\nall {len(selection.features)} selected features together: "
            f"{percent(selection.joint_reward)} %"
        )
    if selection.strengths:
        tried = ", ".join(f"{one.scale:g}: {_strength(one)}" for one in selection.strengths)
        table.caption = f"{table.caption}\nstrength {selection.scale:g} was chosen; {tried}"
    for sentence in selection.doubts:
        table.caption = f"{table.caption}\n{sentence}"
    if selection.left_out:
        lacking = ", ".join(f"{count} of layer {layer}" for layer, count in selection.left_out.items())
        table.caption = f"{table.caption}\nleft out, for activations that are not finite: {lacking}"
    correlated = selection.null_max_correlation is not None
    evidence = ("r", "p", "again") if correlated else (selection.score,)
    for heading in ("site", "index", *evidence, "coefficient", "validation %", "selected"):
        table.add_column(heading, justify="left" if heading == "site" else "right", no_wrap=True)
    for f in selection.candidates:
        selected = ("yes, like chance" if f.like_chance else "yes") if f in selection.features else ""
        p_value = permutation_p_value(f.search_p_value, len(selection.null_maxima))
        values = _signed(f.correlation), p_value, _shown(f.stability)
        shown = values if correlated else (f"{f.score:.3g}",)
        table.add_row(
            f.site, str(f.index), *shown, f"{f.coefficient:+.3f}", percent(f.validation_reward), selected
        )  # fmt: skip
    return table


def whole_table(selection: Selection) -> Table:
    """What validation said of a change that was not chosen among others."""
    table = Table(title=f"Validation after {selection.samples} samples")
    for heading in ("unchanged %", f"{selection.score} %"):
        table.add_column(heading, justify="right")
    table.add_row(percent(selection.baseline_reward), percent(selection.joint_reward))
    return table


def _columns(selection: Selection) -> str:
    """What the columns of a table of candidates mean."""
    if selection.null_max_correlation is None:
        return MEANINGS[selection.score]
    return (
        "r: correlation with the reward; p: how often chance finds such a |r| in a search of all layers; again: share "
        "of the halves of the samples in which the feature is a candidate"
    )


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _shown(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f}"


def _searched(selection: Selection) -> str:
    """What theory and permutations say of the search."""
    if selection.null_max_correlation is None:
        return ""
    text = f"; |r| that chance alone reaches in a layer: about {selection.null_max_correlation:.2f}"
    maxima = sorted(selection.null_maxima)
    if not maxima:
        return text
    text += f"; in all of them, by {len(maxima)} permutations: {maxima[len(maxima) // 2]:.2f}, at most {maxima[-1]:.2f}"
    if selection.is_like_chance:
        text += "\nNo candidate correlates more than chance would have it (p > 0.05)."
    return text


def _strength(strength: Strength) -> str:
    """What a strength does, and what it costs."""
    costs = [f"KL {strength.kl:.3f}"] if strength.kl is not None else []
    costs += [f"loss {percent(strength.loss)}"] if strength.loss is not None else []
    return " ".join([f"{percent(strength.reward)} %", *([f"({', '.join(costs)})"] if costs else [])])


def metrics_table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    """Unsteered against steered, in a line for each of several metrics by name."""
    tests = dict.fromkeys(m["test"] for m in rows.values())
    corrected = any("p_value_corrected" in m for m in rows.values())
    table = Table(
        title=title,
        caption=(
            f"reward in percent; interval: 95 %, paired; p: {' or '.join(tests)}"
            + (", of groups corrected by Benjamini and Hochberg" if corrected else "")
            + "; SER: share of changed rewards that fell, with Wilson's 95 % interval"
        ),
    )
    for heading in ("", "n", "unsteered", "steered", "difference", "interval", "p", "better", "worse", "SER"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, m in rows.items():
        table.add_row(
            name, str(m["n"]), percent(m["reward_baseline"]), percent(m["reward_steered"]), percent(m["difference"]),
            f"{percent(m['ci_low'])} .. {percent(m['ci_high'])}", f"{m.get('p_value_corrected', m['p_value']):.2g}",
            str(m["better"]), str(m["worse"]), ratio(m),
        )  # fmt: skip
        if noise := m.get("noise_floor"):
            table.caption = (
                f"{table.caption}\nnoise floor: unsteered once more in other batches, {noise['flips']} of {noise['n']} "
                f"answers read otherwise, {noise['better']} are better, {noise['worse']} worse, SER {ratio(noise)}"
            )
    return table


def ratio(m: Mapping[str, Any], to: str = "..") -> str:
    """A side-effect ratio with its interval."""
    found = m["side_effect_ratio"]
    return "-" if found is None else f"{found:.2f} ({m['ser_low']:.2f}{to}{m['ser_high']:.2f})"


def measures_table(measures: dict[str, dict[str, float | None]]) -> Table:
    """The task's own measures, unsteered and steered."""
    table = Table(title="Measures of the task")
    for heading in ("", "unsteered", "steered"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in measures.items():
        table.add_row(name, *("-" if v is None else f"{v:.3f}" for v in (values["baseline"], values["steered"])))
    return table


def show(*items: Table | Text | str) -> None:
    """Print to standard output, at least wide enough for a table when it is no terminal."""
    width = None if Console().is_terminal else 120
    for item in items:
        # No markup: names given by users may contain brackets.
        console = Console(width=width, markup=False, emoji=False, highlight=False)
        # A command that stands in a sentence has to stay in one line.
        console.print(item, soft_wrap=isinstance(item, str))
