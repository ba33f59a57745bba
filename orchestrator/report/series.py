"""From metrics to curves: smoothing, thinning, timelines. No drawing here."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from orchestrator.metrics import PHASES, Phase, SpanRow, decimate
from orchestrator.report.load import RunData

Point = tuple[float, float]
Segments = list[list[Point]]
_POINTS_PER_CHART = 4000
_MAX_SPANS_PER_ROW = 700


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberCurve:
    """A quantity of one member over time and over progress, one segment per unbroken stretch of one incarnation."""

    member: str
    over_time: Segments
    over_progress: Segments


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over about `window` values around each.

    At the start, where losses fall steeply, over fewer but as many on both sides; at the end over those that are left.
    """
    sums = [0.0, *accumulate(values)]
    half = window // 2
    smoothed = []
    for i in range(len(values)):
        start, end = i - min(half, i), min(i + min(half, i) + 1, len(values))
        smoothed.append((sums[end] - sums[start]) / (end - start))
    return smoothed


def member_curves(run: RunData, quantity: str, *, smoothed: bool) -> list[MemberCurve]:
    """Curves of `quantity` ('loss' or 'tokens_per_s') for every member, thinned to what a chart can show.

    smoothed: a mean over a fortieth of the member's steps, in long runs over 100 steps or a two-hundredth; values that
    are not finite cut the curve.
    """
    curves = []
    budget = max(60, _POINTS_PER_CHART // max(1, len(run.members)))
    for member in run.members:
        mine = [columns for (name, _), columns in sorted(run.steps.items()) if name == member]
        num_steps = sum(len(columns.step) for columns in mine)
        if not num_steps:
            continue
        window = max(1, min(100, num_steps // 40), num_steps // 200) if smoothed else 1
        over_time: Segments = []
        over_progress: Segments = []
        for columns in mine:
            values: array[float] = getattr(columns, quantity)
            for start, end in _finite_runs(values):
                curve = smooth(values[start:end], window)
                share = max(4, budget * (end - start) // num_steps)
                for xs, target in ((columns.t_s, over_time), (columns.progress, over_progress)):
                    target.append(decimate(list(zip(xs[start:end], curve, strict=True)), max_points=share))
        curves.append(MemberCurve(member=member, over_time=over_time, over_progress=over_progress))
    return curves


def _finite_runs(values: Sequence[float]) -> list[tuple[int, int]]:
    """Index ranges in which every value is finite."""
    bounds = [-1, *(i for i, value in enumerate(values) if not math.isfinite(value)), len(values)]
    return [(left + 1, right) for left, right in pairwise(bounds) if right > left + 1]


def num_bad_losses(run: RunData) -> dict[str, int]:
    """Steps whose loss was not finite, per member that had any."""
    counts: dict[str, int] = {}
    for (member, _), columns in run.steps.items():
        bad = sum(1 for value in columns.loss if not math.isfinite(value))
        if bad:
            counts[member] = counts.get(member, 0) + bad
    return counts


def val_curve(run: RunData, x: str) -> list[Point]:
    """(x, validation loss of the anchor) with x one of the fields of EvalRow; evaluations without a value are out."""
    return [(float(getattr(row, x)), row.val_loss) for row in run.evals if row.val_loss is not None]


def committed_rate(run: RunData) -> list[Point]:
    """(t_s, committed tokens per second over the last commits): the slope over a window of a twelfth of the run."""
    begin_s = min((span.start_s for span in run.spans if span.phase == "compute"), default=0.0)
    marks = [(begin_s, 0), *((row.t_s, row.tokens_committed) for row in run.exchanges)]
    times = [t_s for t_s, _ in marks]
    window_s = max(run.end_s / 12, 1e-9)
    rates = []
    for i, (t_s, tokens) in enumerate(marks[1:], start=1):
        start = max(0, min(i - 1, bisect_right(times, t_s - window_s) - 1))
        if t_s > marks[start][0]:
            rates.append((t_s, (tokens - marks[start][1]) / (t_s - marks[start][0])))
    return decimate(rates, max_points=1000) if rates else []


def cumulative_bytes(run: RunData) -> list[Point]:
    """(committed tokens, payload bytes sent so far)."""
    total = 0
    points = []
    for row in run.exchanges:
        total += row.bytes
        points.append((float(row.tokens_committed), float(total)))
    return decimate(points, max_points=1000) if points else []


def value_at(points: Sequence[Point], x: float) -> float | None:
    """The curve at `x`, linear between its points; None outside of them."""
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    right = bisect_right([px for px, _ in points], x)
    if right == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def first_reach(points: Sequence[Point], y: float) -> float | None:
    """The first x at which a falling curve is at or below `y`, linear between its points; None if it never is."""
    previous: Point | None = None
    for x1, y1 in points:
        if y1 <= y:
            if previous is None:
                return x1
            x0, y0 = previous
            return x0 + (x1 - x0) * (y0 - y) / (y0 - y1) if y0 > y1 else x1
        previous = (x1, y1)
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class TimelineRow:
    """One member on the controller's clock: either exact spans, or (`dense`) equal slots with the share of each phase.

    spans: (start_s, end_s, index into PHASES, incarnation); slots: (start_s, end_s, share per phase).
    """

    member: str
    spans: list[tuple[float, float, int, int]]
    slots: list[tuple[float, float, tuple[float, ...]]]
    seconds: dict[Phase, float]


def timeline(run: RunData, *, num_slots: int) -> list[TimelineRow]:
    """The timeline of every member; rows with more spans than a screen can show are given by slots instead."""
    rows = []
    for member in run.members:
        mine = [span for span in run.spans if span.member == member]
        if not mine:
            continue
        seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        for span in mine:
            seconds[span.phase] += span.end_s - span.start_s
        merged = _merge(mine)
        dense = len(merged) > _MAX_SPANS_PER_ROW
        rows.append(
            TimelineRow(
                member=member,
                spans=[] if dense else merged,
                slots=_slots(mine, run.end_s, num_slots) if dense else [],
                seconds=seconds,
            )
        )
    return rows


def _merge(spans: Sequence[SpanRow]) -> list[tuple[float, float, int, int]]:
    """Spans with neighbours of the same phase and incarnation joined."""
    merged: list[tuple[float, float, int, int]] = []
    for span in spans:
        phase = PHASES.index(span.phase)
        if merged:
            start, end, last_phase, incarnation = merged[-1]
            if (last_phase, incarnation) == (phase, span.incarnation) and span.start_s - end < 0.05:
                merged[-1] = (start, max(end, span.end_s), phase, incarnation)
                continue
        merged.append((span.start_s, span.end_s, phase, span.incarnation))
    return merged


def _slots(spans: Sequence[SpanRow], end_s: float, num_slots: int) -> list[tuple[float, float, tuple[float, ...]]]:
    """Equal slots of the run with the share of each phase in them."""
    width_s = end_s / num_slots
    seconds = [[0.0] * len(PHASES) for _ in range(num_slots)]
    for span in spans:
        phase = PHASES.index(span.phase)
        first, last = int(span.start_s / width_s), min(int(span.end_s / width_s), num_slots - 1)
        for slot in range(first, last + 1):
            overlap_s = min(span.end_s, (slot + 1) * width_s) - max(span.start_s, slot * width_s)
            seconds[slot][phase] += max(0.0, overlap_s)
    return [
        (slot * width_s, (slot + 1) * width_s, tuple(value / width_s for value in shares))
        for slot, shares in enumerate(seconds)
    ]
