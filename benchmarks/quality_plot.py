"""The gap to data parallel over tokens as a hand-written SVG: a line for each row, its spread over seeds behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 440, 58, 290, 40, 46
# Seven colours that differ in lightness too (after Okabe and Ito); they are legible on white and on dark grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#8c8c8c", "#cc79a7", "#e69f00", "#56b4e9")
LABEL_GAP = 17.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Gap at a share of the tokens: mean, least and largest over the seeds."""

    share: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One row's gap over tokens."""

    label: str
    points: tuple[Point, ...]


def plot(curves: Sequence[Curve]) -> str:
    """Return the SVG; without a point a sentence."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return _svg(['<text x="40" y="60">Nothing is finished yet.</text>'])
    low = min(0.0, *(point.low for curve in curves for point in curve.points))
    high = max(0.01, *(point.high for curve in curves for point in curve.points))

    def x(share: float) -> float:
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(gap: float) -> float:
        return HEIGHT - BOTTOM - (gap - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    parts = ['<text x="12" y="22" class="title">Validation loss over that of data parallel training</text>']
    step = tick_step(high - low)
    tick = round(low / step) * step
    while tick <= high + 1e-9:
        if tick >= low - 1e-9:
            at, css = f"{y(tick):.1f}", "zero" if abs(tick) < 1e-9 else "grid"
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}" class="{css}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{at}" dy="0.32em" text-anchor="end">{100 * tick:+.0f} %</text>')
        tick += step
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(f'<text x="{x(share):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{share:.0%}</text>')
    parts.append(f'<text x="{x(0.5):.1f}" y="{HEIGHT - 8}" text-anchor="middle">share of the tokens</text>')
    labels = spread_labels([y(curve.points[-1].mean) for curve in curves], low=TOP, high=HEIGHT - BOTTOM)
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        upper = [f"{x(p.share):.1f},{y(p.high):.1f}" for p in curve.points]
        lower = [f"{x(p.share):.1f},{y(p.low):.1f}" for p in reversed(curve.points)]
        means = " ".join(f"{x(p.share):.1f},{y(p.mean):.1f}" for p in curve.points)
        last = curve.points[-1]
        parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" opacity="0.15"/>')
        parts.append(f'<polyline points="{means}" stroke="{colour}" fill="none" stroke-width="2"/>')
        from_x, to_x = x(last.share), WIDTH - RIGHT + 14
        parts.append(
            f'<line x1="{from_x:.1f}" y1="{y(last.mean):.1f}" x2="{to_x}" y2="{labels[number]:.1f}" stroke="{colour}"/>'
        )
        text = f"{100 * last.mean:+.1f} %  {escape(curve.label)}"
        parts.append(f'<text x="{to_x + 4}" y="{labels[number]:.1f}" dy="0.32em" fill="{colour}">{text}</text>')
    return _svg(parts)


def tick_step(span: float) -> float:
    """A round distance that gives four to ten ticks."""
    return next((step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if span / step <= 10), 1.0)


def spread_labels(wanted: Sequence[float], *, low: float, high: float) -> list[float]:
    """Heights near the `wanted` ones, at least `LABEL_GAP` apart and, where there is room, between the limits."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + LABEL_GAP
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - LABEL_GAP
    return placed


def _svg(parts: Sequence[str]) -> str:
    style = (
        "text{font:13px system-ui,sans-serif;fill:#444}text[fill]{fill:attr(fill)}.title{font-weight:600}"
        ".grid{stroke:#8884;stroke-width:1}.zero{stroke:#444;stroke-width:1}"
        "@media(prefers-color-scheme:dark){text{fill:#ccc}.zero{stroke:#ccc}}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
    head += 'aria-label="Gap of validation loss to data parallel training over the share of the tokens">'
    return "\n".join([head, f"<style>{style}</style>", *parts, "</svg>", ""])
