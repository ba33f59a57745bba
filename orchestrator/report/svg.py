"""What every chart shares: the card around it, the grid, the keys of its legend.

Colours come from the style sheet by class, so that one drawing serves light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.report.html import Child, Markup, data_block, el, join
from orchestrator.report.scale import Axis, Scale

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 640, 54, 26, 26, 40


def empty_chart(title: str, why: str) -> Markup:
    """A card that says what is missing."""
    return el(
        "figure",
        el("figcaption", el("h3", title)),
        el("p", why, class_="nothing"),
        class_="card chart-empty",
    )


def figure(
    chart_id: str,
    title: str,
    note: str,
    *,
    svg: Markup,
    legend: Sequence[Child],
    values: dict[str, Any],
    wide: bool = False,
) -> Markup:
    """The card of a chart: title, legend, drawing, and `values` for its tooltips (see report.js)."""
    return el(
        "figure",
        el("figcaption", el("h3", title), el("p", note)),
        el("div", *legend, class_="legend") if legend else None,
        el("div", svg, class_="plot wide" if wide else "plot"),
        data_block(values),
        class_="card chart",
        id=chart_id,
    )


def drawing(label: str, *children: Child, height: int, width: int = WIDTH) -> Markup:
    """The drawing itself, reachable by keyboard; `label` says in words what it shows."""
    return el(
        "svg",
        *children,
        viewBox=f"0 0 {width} {height}",
        role="img",
        tabindex="0",
        aria_label=f"{label} Arrow keys read the values.",
    )


def y_grid(y: Axis, scale: Scale) -> Markup:
    """Horizontal lines with their labels, and the base line."""
    parts: list[Child] = []
    for value, label in y.ticks(scale.low, scale.high, target=5):
        at = f"{scale(value):.1f}"
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(el("text", label, x=LEFT - 8, y=at, dy="0.32em", class_="tick end"))
    parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=scale.start_px, y2=scale.start_px, class_="base"))
    return join(parts)


def key(label: str, css: str, *, number: int | None = None) -> Markup:
    """A legend entry; with the `number` of a series it is a button that hides it."""
    swatch = el("span", class_="swatch")
    if number is None:
        return el("span", swatch, label, class_=f"key {css}")
    return el("button", swatch, label, type="button", class_=f"key {css}", data_series=number, aria_pressed="true")


def short(value: float) -> float:
    """`value` with as many digits as a tooltip can use."""
    return float(f"{value:.6g}")
