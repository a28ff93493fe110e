"""Points with intervals as an SVG, in rows, sorted within each task."""

from collections.abc import Iterable
from dataclasses import dataclass
from xml.sax.saxutils import escape

ROW, LEFT, WIDTH, RIGHT, TOP = 18, 240, 520, 30, 30
CONTROLS = ("random features", "shuffled rewards")


@dataclass(frozen=True)
class Point:
    """A value with its interval, in percentage points."""

    group: str
    name: str
    value: float
    low: float
    high: float


def draw(points: Iterable[Point], caption: str) -> str:
    """The picture: groups in their order, each with its largest value first; controls in grey."""
    some = list(points)
    groups = list(dict.fromkeys(point.group for point in some))
    low = min([0.0, *(point.low for point in some)])
    high = max([0.0, *(point.high for point in some)])
    scale = WIDTH / ((high - low) or 1.0)

    def x(value: float) -> float:
        return LEFT + (value - low) * scale

    parts, y = [], TOP
    for group in groups:
        y += ROW
        parts.append(_text(10, y, group, "font-weight='bold'"))
        for point in sorted((p for p in some if p.group == group), key=lambda p: -p.value):
            y += ROW
            colour = "#999999" if point.name in CONTROLS else "#1f5fa8"
            parts.append(_text(24, y, f"{point.name} ({point.value:+.1f})", f"fill='{colour}'"))
            parts.append(
                f"<line x1='{x(point.low):.1f}' x2='{x(point.high):.1f}' y1='{y - 4}' y2='{y - 4}' stroke='{colour}'/>"
                f"<circle cx='{x(point.value):.1f}' cy='{y - 4}' r='3.5' fill='{colour}'/>"
            )
    zero = f"<line x1='{x(0):.1f}' x2='{x(0):.1f}' y1='{TOP}' y2='{y + 4}' stroke='#cccccc'/>"
    size = f"width='{LEFT + WIDTH + RIGHT}' height='{y + 2 * ROW}'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {size} font-family='sans-serif' font-size='12'>"
    ground = "<rect width='100%' height='100%' fill='white'/>"
    return "\n".join([head, ground, _text(10, 18, caption), zero, *parts, "</svg>\n"])


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f"<text x='{x}' y='{y}' {style}>{escape(text)}</text>"
