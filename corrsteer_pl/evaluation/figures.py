"""Figures as SVG: points with intervals, in the colours of the page that they stand in."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import Any
from zlib import crc32

# Written into the SVG, and then replaced by the page's own colours, which are others in the dark.
INK, MUTED, ACCENT, ALTERNATIVE = "#010203", "#040506", "#070809", "#0a0b0c"
# Colours of a figure that stands alone, on white.
ALONE = {"var(--ink)": "#1d1d1f", "var(--muted)": "#6e6e73", "var(--accent)": "#0b5cad", "var(--second)": "#a14f00"}
COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", ACCENT: "var(--accent)", ALTERNATIVE: "var(--second)"}
WIDTH = 7.2  # inches of 72 points
ABOVE: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "borderaxespad": 0}
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "corrsteer_pl", "font.family": "sans-serif", "font.size": 9.5,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A value with its interval, in percentage points or as a correlation.

    Attributes:
        label: What it is of.
        value: The value.
        low, high: Ends of the 95 % interval; None if there is none.
        marked: Whether it is one of those that were selected.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    marked: bool = False


def _styled(draw: Callable[..., str]) -> Callable[..., str]:
    """Draw in the style of the page, whatever the user's own settings are."""

    @wraps(draw)
    def styled(*args: Any) -> str:
        import matplotlib as mpl  # slow to import, and not needed by any other command

        with mpl.rc_context(STYLE):
            return draw(*args)

    return styled


def alone(svg: str) -> str:
    """A figure as a file of its own: with colours, which on a page are the page's, and a white ground."""
    for name, colour in ALONE.items():
        svg = svg.replace(name, colour)
    head, end, rest = svg.partition(">")
    return f'{head}{end}<rect width="100%" height="100%" fill="white"/>{rest}'


@_styled
def points(some: Sequence[Point], label: str, zero: str) -> str:
    """Points in rows, in their order from the top, with a line at 0 that is called ``zero``."""
    figure, axes = _figure(max(1.2, 0.8 + 0.24 * len(some)))
    for marked, colour in ((True, ACCENT), (False, MUTED)):
        rows = [(i, p) for i, p in enumerate(some) if p.marked == marked]
        for i, p in rows:
            if p.low is not None and p.high is not None:
                axes.plot([p.low, p.high], [i, i], color=colour, linewidth=1.6, solid_capstyle="round")
        axes.scatter([p.value for _, p in rows], [i for i, _ in rows], color=colour, s=26, zorder=3)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(some)), [p.label for p in some])
    axes.set_ylim(len(some) - 0.5, -0.5)
    axes.set_xlabel(f"{label} (0: {zero})")
    axes.tick_params(axis="y", length=0)
    return _svg(figure, label)


@_styled
def by_layer(layers: Sequence[int], some: Sequence[Point], limit: float | None) -> str:
    """Correlations of candidates by layer; between the dashed lines lies what chance finds."""
    figure, axes = _figure(2.8)
    for chosen, colour, label in ((True, ACCENT, "selected"), (False, MUTED, "not selected")):
        places = [(layer, p.value) for layer, p in zip(layers, some, strict=True) if p.marked == chosen]
        axes.scatter([x for x, _ in places], [y for _, y in places], color=colour, s=26, label=label, zorder=3)
    axes.axhline(0, color=INK, linewidth=0.8)
    for line in (limit, -limit) if limit is not None else ():
        axes.axhline(line, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xticks(sorted(set(layers)))
    axes.set_xlabel("layer")
    axes.set_ylabel("correlation r")
    axes.legend(**ABOVE)
    return _svg(figure, "correlation of candidates by layer")


@_styled
def curve(x: Sequence[float], series: Mapping[str, Sequence[float | None]], xlabel: str, ylabel: str) -> str:
    """Values over something that has an order and a distance."""
    figure, axes = _figure(2.8)
    for (name, values), colour in zip(series.items(), (ACCENT, MUTED, ALTERNATIVE), strict=False):
        pairs = [(a, b) for a, b in zip(x, values, strict=True) if b is not None]
        axes.plot(*zip(*pairs, strict=True), color=colour, marker="o", markersize=4, linewidth=1.4, label=name)
    if all(isinstance(value, int) for value in x):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if len(series) > 1:
        axes.legend(**ABOVE)
    return _svg(figure, f"{ylabel} over {xlabel}")


@_styled
def against_chance(maxima: Sequence[float], candidates: Sequence[Point]) -> str:
    """The largest |r| of each permutation, and each candidate's."""
    figure, axes = _figure(1.5)
    axes.scatter(maxima, [1] * len(maxima), color=MUTED, s=22, alpha=0.8)
    for marked, colour in ((False, MUTED), (True, ACCENT)):
        some = [abs(p.value) for p in candidates if p.marked == marked]
        axes.scatter(some, [0] * len(some), color=colour, s=26, zorder=3)
    axes.set_yticks([0, 1], ["candidates", "permutations"])
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("|r|: of each candidate, and the largest under each permutation of the rewards")
    return _svg(figure, "correlations against those that chance finds")


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any, label: str) -> str:
    """The figure as an element of a page."""
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for sentinel, colour in COLOURS.items():
        svg = svg.replace(sentinel, colour)
    # Several figures share a page, so their names have to differ.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>f{crc32(svg.encode()):08x}-", svg)
    box = svg.partition('viewBox="')[2].partition('"')[0]
    head = f'<svg class="figure" role="img" aria-label="{escape(label)}" viewBox="{box}" {NAMESPACES}>'
    return head + svg.partition(">")[2]
