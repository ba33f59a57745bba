"""Line charts as inline SVG, with the data that the tooltips read beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.report import format as fmt
from orchestrator.report.html import Child, Markup, el, join
from orchestrator.report.scale import Axis, Scale
from orchestrator.report.series import Point, Segments
from orchestrator.report.svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, drawing, empty_chart, figure, key, short, y_grid


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One curve. `faint` is drawn pale behind it; `hold`: between points the last one counts (evaluations)."""

    label: str
    css: str
    segments: Segments
    faint: Segments = field(default_factory=list)
    dots: bool = False
    hold: bool = False
    keyed: bool = True

    @property
    def points(self) -> list[Point]:
        """All points, the segments joined."""
        return [point for segment in self.segments for point in segment]


@dataclass(frozen=True, kw_only=True, slots=True)
class Marker:
    """A moment worth a vertical line."""

    x: float
    label: str


def line_chart(
    *,
    chart_id: str,
    title: str,
    note: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    empty: str,
    markers: Sequence[Marker] = (),
    height: int = 290,
) -> Markup:
    """Curves over a common axis; without a single point a sentence (`empty`) instead of an empty plot."""
    series = [one for one in series if one.points]
    if not series:
        return empty_chart(title, empty)
    floor = height - BOTTOM
    x_scale = _scale(x, [px for one in series for px, _ in one.points], LEFT, WIDTH - RIGHT)
    y_scale = _scale(y, _values_to_show(series), floor, TOP)
    drawn = el("g", *(_draw(one, i, x_scale, y_scale) for i, one in enumerate(series)), clip_path=f"url(#{chart_id}-c)")
    clip = el(
        "clipPath",
        el("rect", x=LEFT - 6, y=TOP - 8, width=WIDTH - LEFT - RIGHT + 14, height=floor - TOP + 14),
        id=f"{chart_id}-c",
    )
    hover = el(
        "g",
        el("line", class_="cross", x1=0, x2=0, y1=TOP, y2=floor),
        *(el("circle", class_=f"spot {one.css}", r=4) for one in series),
        class_="hover",
        visibility="hidden",
    )
    marks = join(_draw_marker(marker, x_scale, floor) for marker in markers)
    values = {
        "kind": "lines",
        "x": _axis_data(x, x_scale),
        "y": _axis_data(y, y_scale),
        "series": [_series_data(one) for one in series],
        "markers": [[short(marker.x), marker.label] for marker in markers],
    }
    label = f"{title}: {note} " + "; ".join(_in_words(one, y) for one in series[:9])
    return figure(
        chart_id,
        title,
        note,
        svg=drawing(
            label, el("defs", clip), y_grid(y, y_scale), _x_axis(x, x_scale, floor), marks, drawn, hover, height=height
        ),
        legend=_legend(series),
        values=values,
    )


def _scale(axis: Axis, values: Sequence[float], start_px: float, end_px: float) -> Scale:
    low, high = axis.limits(values)
    return Scale(low=low, high=high, start_px=start_px, end_px=end_px, log=axis.log)


def _x_axis(x: Axis, scale: Scale, floor: float) -> Markup:
    ticks = [
        el("text", label, x=f"{scale(value):.1f}", y=floor + 17, class_="tick mid")
        for value, label in x.ticks(scale.low, scale.high, target=7)
    ]
    return join([*ticks, el("text", x.title, x=WIDTH - RIGHT, y=floor + BOTTOM - 6, class_="axis end")])


def _values_to_show(series: Sequence[Series]) -> list[float]:
    """Every point of the curves, and the faint ones without their outermost hundredths (they are clipped)."""
    values = [value for one in series for _, value in one.points]
    faint = sorted(value for one in series for segment in one.faint for _, value in segment)
    edge = len(faint) // 100
    return values + faint[edge : len(faint) - edge]


def _draw(one: Series, number: int, x_scale: Scale, y_scale: Scale) -> Markup:
    parts: list[Child] = []
    if one.faint:
        parts.append(el("path", d=_path(one.faint, x_scale, y_scale), class_="faint"))
    parts.append(el("path", d=_path(one.segments, x_scale, y_scale), class_="curve"))
    if one.dots and len(one.points) <= 80:
        parts += [
            el("circle", cx=f"{x_scale(px):.1f}", cy=f"{y_scale(py):.1f}", r=3.2, class_="dot") for px, py in one.points
        ]
    return el("g", *parts, class_=f"series {one.css}", data_series=number)


def _path(segments: Segments, x_scale: Scale, y_scale: Scale) -> str:
    """Path data; a segment of one point becomes a dot (a line of no length with round ends)."""
    text = ""
    for segment in segments:
        pixels = [f"{x_scale(px):.1f} {y_scale(py):.1f}" for px, py in segment]
        text += "M" + "L".join(pixels) + ("h.01" if len(pixels) == 1 else "")
    return text


def _draw_marker(marker: Marker, x_scale: Scale, floor: float) -> Markup:
    at = x_scale(marker.x)
    near_end = at > WIDTH - RIGHT - 90
    return el(
        "g",
        el("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=TOP - 6, y2=floor),
        el(
            "text",
            marker.label,
            x=f"{at + (-5 if near_end else 5):.1f}",
            y=TOP - 2,
            class_="end" if near_end else None,
        ),
        class_="fault-mark",
    )


def _legend(series: Sequence[Series]) -> list[Child]:
    """One button per curve; a crowd of islands shares one plain key."""
    if len(series) < 2:
        return []
    keys: list[Child] = [key(one.label, one.css, number=i) for i, one in enumerate(series) if one.keyed]
    crowd = [one for one in series if not one.keyed]
    if crowd:
        keys.append(key(f"{len(crowd)} islands", crowd[0].css))
    return keys


def _axis_data(axis: Axis, scale: Scale) -> dict[str, Any]:
    return {
        "low": scale.low,
        "high": scale.high,
        "start": scale.start_px,
        "end": scale.end_px,
        "log": scale.log,
        "unit": axis.unit,
        "title": axis.title,
    }


def _series_data(one: Series) -> dict[str, Any]:
    points = one.points
    return {
        "name": one.label,
        "css": one.css,
        "hold": one.hold,
        "x": [short(px) for px, _ in points],
        "y": [short(py) for _, py in points],
    }


def _in_words(one: Series, y: Axis) -> str:
    points = one.points
    return f"{one.label} from {_spoken(points[0][1], y)} to {_spoken(points[-1][1], y)}"


def _spoken(value: float, axis: Axis) -> str:
    return axis.label(value).replace(fmt.NBSP, " ")
