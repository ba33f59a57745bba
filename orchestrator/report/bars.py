"""Bar charts as inline SVG, with the data that the tooltips read beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.report.html import Markup, el
from orchestrator.report.scale import Axis, Scale
from orchestrator.report.svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, drawing, empty_chart, figure, key, short, y_grid

HEIGHT = 280
FLOOR = HEIGHT - BOTTOM


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bar: the text of its tick, what it is, how high, a line of detail, and whether it stands out."""

    tick: str
    label: str
    value: float
    detail: str
    flagged: bool = False


def bar_chart(
    *, chart_id: str, title: str, note: str, y: Axis, bars: Sequence[Bar], x_title: str, flag: str, empty: str
) -> Markup:
    """Bars in order, from zero; `flag` is the legend's word for flagged ones."""
    if not bars:
        return empty_chart(title, empty)
    low, high = y.limits([bar.value for bar in bars])
    y_scale = Scale(low=low, high=high, start_px=FLOOR, end_px=TOP)
    slot = (WIDTH - LEFT - RIGHT) / len(bars)
    gap = min(2.0, slot / 4) if slot > 3 else 0.0  # thinner gaps would shimmer
    width = min(34.0, slot - gap)
    paths = {False: "", True: ""}
    for i, bar in enumerate(bars):
        x0 = LEFT + i * slot + (slot - width) / 2
        top = min(y_scale(bar.value), FLOOR - 1)
        paths[bar.flagged] += f"M{x0:.1f} {FLOOR}V{top:.1f}h{width:.1f}V{FLOOR}z"
    every = max(1, math.ceil(len(bars) / 8))
    labels = [
        el("text", bar.tick, x=f"{LEFT + (i + 0.5) * slot:.1f}", y=FLOOR + 17, class_="tick mid")
        for i, bar in enumerate(bars)
        if i % every == 0
    ]
    drawn = [
        el("path", d=path, class_="bar flagged" if flagged else "bar", data_series=int(flagged))
        for flagged, path in paths.items()
        if path
    ]
    hover = el("g", el("path", class_="bar-hover", d=""), class_="hover", visibility="hidden")
    values = {
        "kind": "bars",
        "left": LEFT,
        "slot": slot,
        "top": TOP,
        "bottom": FLOOR,
        "unit": y.unit,
        "title": x_title,
        "name": y.title,
        "bars": [[bar.label, short(bar.value), bar.detail] for bar in bars],
    }
    highest = max(bars, key=lambda bar: bar.value)
    label = f"{title}: {note} {len(bars)} bars, highest {y.label(highest.value)} at {highest.label}."
    legend = [key(flag, "flag-key")] if paths[True] else []
    grid = y_grid(y, y_scale)
    x_label = el("text", x_title, x=WIDTH - RIGHT, y=HEIGHT - 6, class_="axis end")
    return figure(
        chart_id,
        title,
        note,
        svg=drawing(label, grid, *labels, x_label, *drawn, hover, height=HEIGHT),
        legend=legend,
        values=values,
    )
