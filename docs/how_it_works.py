"""Draw how it works: ``python docs/how_it_works.py`` writes ``docs/how_it_works.svg``."""

from html import escape
from pathlib import Path

INK, MUTED, ACCENT, SOFT, GOOD, BAD = "#1a1d21", "#56606a", "#0b5cad", "#e9eff6", "#2e7d46", "#b3372f"
COLUMN, HEIGHT = 300, 300


def text(
    x: float, y: float, words: str, size: int = 13, colour: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str = SOFT, edge: str = MUTED) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{edge}"/>'


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str = MUTED) -> str:
    return (
        f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{colour}" stroke-width="1.4" marker-end="url(#tip)"/>'
    )


def blocks(x: float, y: float, names: list[str], inward: bool = False) -> list[str]:
    """Decoder blocks, one above the other, with what is read from each or added to it written beside."""
    parts = []
    for i, name in enumerate(names):
        parts += [
            box(x, y + 34 * i, 74, 24),
            text(x + 37, y + 34 * i + 16, f"block {len(names) - i}", 12, anchor="middle"),
        ]
        parts += [arrow(x + 37, y + 34 * i, x + 37, y + 34 * i - 9)] if i else []
        parts.append(text(x + 112, y + 34 * i + 16, name, 12, ACCENT))
        ends = (x + 106, x + 78) if inward else (x + 78, x + 106)
        parts += [arrow(ends[0], y + 34 * i + 12, ends[1], y + 34 * i + 12)] if name else []
    return parts


def fit(x: float) -> list[str]:
    """What a fit does."""
    parts = [text(x, 30, "1  Fit: correlate", 16, bold=True)]
    parts += blocks(x, 62, ["SAE: feature activations", "SAE: feature activations", "SAE: feature activations"])
    parts.append(text(x, 186, "prompt, and the model's own answers:", 12, MUTED))
    for i, (answer, reward) in enumerate((("B", 1), ("the red one", 0), ("A", 1))):
        colour = GOOD if reward else BAD
        parts.append(text(x + 8, 206 + 18 * i, f"“{answer}”", 12))
        parts.append(text(x + 112, 206 + 18 * i, f"reward {reward}", 12, colour))
    parts.append(text(x, 272, "r = corr(activation, reward), from running", 12))
    parts.append(text(x, 288, "sums, whatever the number of samples", 12))
    return parts


def validate(x: float) -> list[str]:
    """What a validation does."""
    parts = [text(x, 30, "2  Validate: try each", 16, bold=True)]
    rows = [("unsteered", 90, MUTED), ("layer 1, r > 0", 140, GOOD), ("layer 1, r < 0", 82, BAD),
            ("layer 2, r > 0", 160, GOOD), ("layer 2, r < 0", 90, MUTED), ("together", 186, ACCENT)]  # fmt: skip
    for i, (name, width, colour) in enumerate(rows):
        y = 62 + 30 * i
        parts.append(text(x, y + 13, name, 12))
        parts.append(f'<rect x="{x + 92}" y="{y}" width="{width}" height="18" fill="{colour}"/>')
    parts.append(f'<line x1="{x + 182}" y1="54" x2="{x + 182}" y2="236" stroke="{INK}" stroke-dasharray="4 3"/>')
    parts.append(text(x, 272, "kept: candidates that beat the unsteered", 12))
    parts.append(text(x, 288, "model on held-out questions", 12))
    return parts


def steer(x: float) -> list[str]:
    """What steering does."""
    parts = [text(x, 30, "3  Steer: add one vector", 16, bold=True)]
    parts += blocks(x, 62, ["", "+ c · decoder row", "+ c · decoder row"], inward=True)
    parts.append(text(x, 186, "at the last prompt token and at every", 12, MUTED))
    parts.append(text(x, 202, "generated one; no weight changes", 12, MUTED))
    parts.append(text(x, 232, "“the red one”", 12, BAD))
    parts.append(arrow(x + 88, 228, x + 116, 228))
    parts.append(text(x + 124, 232, "“A”", 12, GOOD))
    parts.append(text(x, 272, "test: both models on the same questions,", 12))
    parts.append(text(x, 288, "what got better and what got worse", 12))
    return parts


def draw() -> str:
    """The whole drawing."""
    at = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    tip = f'<marker id="tip" {at}><path d="M0 0L8 4L0 8z" fill="{MUTED}"/></marker>'
    parts = [*fit(20), *validate(20 + COLUMN + 20), *steer(20 + 2 * COLUMN + 40)]
    names = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" role="img" aria-label="How CorrSteer works"'
    size = f'width="{3 * COLUMN + 60}" height="{HEIGHT + 10}" viewBox="0 0 {3 * COLUMN + 60} {HEIGHT + 10}"'
    return "\n".join([
        f'<svg {names} {size}>',
        f'<defs>{tip}</defs><rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n",
    ])  # fmt: skip


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
