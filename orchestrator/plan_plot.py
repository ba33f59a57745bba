"""Utilisation over bandwidth: as an SVG file and as text for the terminal. Pure: curves in, text out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from orchestrator.planning import SPAN_BIT_PER_S, letters
from orchestrator.quantities import show_rate

Curves = Mapping[str, Sequence[tuple[float, float]]]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 56, 190, 40, 52
COLOURS = ("#3567c4", "#c2571a", "#2c8a57", "#9446a8", "#a8861d", "#1d8fa3", "#b83a5e", "#6a6f7a")
ROWS = 11
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}line{stroke:#ccc}polyline{fill:none;stroke-width:2.2}"
    "@media(prefers-color-scheme:dark){svg{background:#16181d}text{fill:#ddd}line{stroke:#444}}"
)


def svg(curves: Curves, *, title: str, link_bit_per_s: float) -> str:
    """A drawing that stands alone, light and dark, with the asked link as a dashed line."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>',
        f'<text x="{LEFT}" y="22">{escape(title)}</text>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>')
    low, high = (math.log10(end) for end in SPAN_BIT_PER_S)
    for exponent in range(round(low), round(high) + 1):
        x = _x(10.0**exponent)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        label = show_rate(10.0**exponent)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>')
    if SPAN_BIT_PER_S[0] <= link_bit_per_s <= SPAN_BIT_PER_S[1]:
        x = _x(link_bit_per_s)
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
        parts.append(f'<line {line} stroke-dasharray="4 4" style="stroke:#888"/>')
    for number, (name, points) in enumerate(curves.items()):
        colour, dashes = COLOURS[number % len(COLOURS)], "" if number < len(COLOURS) else ' stroke-dasharray="6 4"'
        drawn = " ".join(f"{_x(rate):.1f},{_y(share):.1f}" for rate, share in points)
        parts.append(f'<polyline points="{drawn}" stroke="{colour}"{dashes}><title>{escape(name)}</title></polyline>')
        y = TOP + 16 * number + 8
        parts.append(
            f'<polyline points="{WIDTH - RIGHT + 14},{y} {WIDTH - RIGHT + 36},{y}" stroke="{colour}"{dashes}/>'
        )
        parts.append(f'<text x="{WIDTH - RIGHT + 42}" y="{y + 4}">{escape(name)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">link of each island</text></svg>')
    return "\n".join(parts) + "\n"


def _x(rate: float) -> float:
    low, high = (math.log10(end) for end in SPAN_BIT_PER_S)
    return LEFT + (math.log10(rate) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def terminal(curves: Curves, *, link_bit_per_s: float) -> str:
    """The same in letters: 0 to 100 % upwards, the link to the right by powers of ten, `|` the asked link."""
    names = letters(list(curves))
    width = max((len(points) for points in curves.values()), default=0)
    grid = [[" "] * width for _ in range(ROWS)]
    low, high = (math.log10(end) for end in SPAN_BIT_PER_S)
    asked = round((math.log10(link_bit_per_s) - low) / (high - low) * (width - 1))
    if 0 <= asked < width:
        for line in grid:
            line[asked] = "|"
    for name, points in curves.items():
        for column, (_, share) in enumerate(points):
            grid[ROWS - 1 - round(share * (ROWS - 1))][column] = names[name]
    lines = [f"{100 * (ROWS - 1 - i) // (ROWS - 1):4d} % {''.join(line)}".rstrip() for i, line in enumerate(grid)]
    ruler = [" "] * (width + 12)
    for exponent in range(round(low), round(high) + 1):
        column = round((exponent - low) / (high - low) * (width - 1))
        label = show_rate(10.0**exponent).replace(" ", "").replace("bit/s", "")
        ruler[column : column + len(label)] = label
    lines.append("       " + "".join(ruler).rstrip() + "  bit/s")
    lines.append("       " + "  ".join(f"{letter} {name}" for name, letter in names.items()))
    return "\n".join(lines)
