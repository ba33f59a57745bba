"""Curves and timeline of a run for a window of time, in as many columns as a chart has, JSON-ready."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.dashboard.book import RunBook, fault_moment
from orchestrator.dashboard.columns import Floats, Window
from orchestrator.metrics import PHASES, decimate

FEW = 12
"""Up to so many members each has a curve; beyond, a band shows all of them and curves those that are picked."""

MOST_PICKED = 8
MOST_POINTS = 1200
LETTERS = "csedaxw"
"""One letter for each of `PHASES`; `.`: nothing is known."""


def run_series(book: RunBook, window: Window, picked: Sequence[str] = ()) -> dict[str, Any]:
    """All curves over `window`; `picked`: members that get a curve of their own among many."""
    x_s = window.middles()
    loss = book.steps.means("loss", window, len(book.members)) if book.members else np.empty((0, window.num_bins))
    low, high = book.steps.extremes("loss", window)
    ordered = book.in_order()
    shown = [item for item in ordered if len(ordered) <= FEW or item[0] in picked[:MOST_PICKED]]
    return {
        "version": book.version,
        "from_s": window.start_s,
        "to_s": window.end_s,
        "x": _numbers(x_s, 4),
        "loss": {name: _numbers(loss[place], 4) for name, place in shown},
        "band": _band(loss, low, high),
        "anchor": _points([(row.t_s, row.val_loss) for row in book.evals if row.val_loss is not None], window),
        "rate": _numbers(_rate(book, window), 1),
        "capacity": _numbers(_capacity(book, window), 1),
        "utilization": _numbers(_utilization(book, window), 4),
        "bytes": _bytes_curves(book, window),
        "exchange_s": _points([(row.t_s, row.seconds) for row in book.exchanges], window),
        "faults": _faults(book, window),
    }


def _numbers(values: Floats, digits: int) -> list[float | None]:
    """Rounded for the wire; None for what is not known."""
    return [None if math.isnan(value) else value for value in np.round(values, digits).tolist()]


def _points(points: Sequence[tuple[float, float | None]], window: Window) -> list[list[float]]:
    inside = [(t, y) for t, y in points if y is not None and window.start_s <= t <= window.end_s]
    return [[round(t, 3), round(y, 5)] for t, y in decimate(inside, max_points=MOST_POINTS)]


def _band(loss: Floats, low: Floats, high: Floats) -> dict[str, Any]:
    """Extremes of single rows, and quantiles over members of their means: what many curves would show."""
    curves: dict[str, Any] = {"low": _numbers(low, 4), "high": _numbers(high, 4)}
    if len(loss) > FEW:  # fewer have a curve each
        rows = column_quantiles(loss, (0.1, 0.5, 0.9))
        curves |= {name: _numbers(row, 4) for name, row in zip(("p10", "p50", "p90"), rows, strict=True)}
    return curves


def column_quantiles(values: Floats, shares: Sequence[float]) -> list[Floats]:
    """`numpy.nanquantile(values, shares, axis=0)`, in one sort: that goes through the columns one by one in Python."""
    ordered, column = np.sort(values, axis=0), np.arange(values.shape[1])  # NaN comes last
    last = np.maximum(np.isfinite(values).sum(axis=0) - 1, 0)
    found = []
    for share in shares:
        at = share * last
        below = np.floor(at).astype(np.int64)
        above = np.minimum(below + 1, last)
        low, high = ordered[below, column], ordered[above, column]
        found.append(low + (high - low) * (at - below))
    return found


def _committed(book: RunBook, at_s: Floats) -> tuple[Floats, Floats]:
    """Tokens and bytes behind the last commit before each moment."""
    times = np.array([0.0, *(row.t_s for row in book.exchanges)])
    tokens = np.array([0.0, *(row.tokens_committed for row in book.exchanges)])
    sent = np.array([0.0, *np.cumsum([float(row.bytes) for row in book.exchanges])])
    place = np.searchsorted(times, at_s, side="right") - 1
    place = np.clip(place, 0, None)
    return tokens[place], sent[place]


def _rate(book: RunBook, window: Window) -> Floats:
    """Committed tokens per second: the slope between the commits around each bin, over at least one round."""
    if len(book.exchanges) < 2:
        return np.full(window.num_bins, np.nan)
    times = np.array([row.t_s for row in book.exchanges])
    tokens = np.array([float(row.tokens_committed) for row in book.exchanges])
    x_s = window.middles()
    reach_s = max(window.width_s, (times[-1] - times[0]) / 60)
    last = np.clip(np.searchsorted(times, x_s + reach_s / 2, side="right") - 1, 1, len(times) - 1)
    first = np.clip(np.searchsorted(times, x_s - reach_s / 2, side="left") - 1, 0, last - 1)
    slope = (tokens[last] - tokens[first]) / np.maximum(times[last] - times[first], 1e-9)
    inside = (x_s >= times[0]) & (x_s <= times[-1])
    return np.where(inside, slope, np.nan)


def _capacity(book: RunBook, window: Window) -> Floats:
    """What the members that made steps would do together without waiting: their speeds inside steps, added up."""
    if not book.members:
        return np.full(window.num_bins, np.nan)
    coarse = _coarse(book, window)
    speed = book.steps.means("tokens_per_s", coarse, len(book.members))
    total = np.nansum(_held(speed, most=3), axis=0)
    return _spread(np.where(total > 0, total, np.nan), coarse, window)


def _held(values: Floats, *, most: int) -> Floats:
    """Gaps of up to `most` bins keep the value before them: a round can be longer than a bin."""
    known = np.isfinite(values)
    place = np.where(known, np.arange(values.shape[1]), -1)
    place = np.maximum.accumulate(place, axis=1)
    age = np.arange(values.shape[1]) - place
    held = np.take_along_axis(values, np.maximum(place, 0), axis=1)
    return np.where((place >= 0) & (age <= most), held, np.nan)


def _utilization(book: RunBook, window: Window) -> Floats:
    """Share of the members' time that was spent computing, over bins of at least a sixtieth of the window."""
    if not book.members:
        return np.full(window.num_bins, np.nan)
    coarse = _coarse(book, window)
    shares = book.spans.shares(coarse, len(book.members), len(PHASES)).sum(axis=0)
    there = shares.sum(axis=0) - shares[PHASES.index("away")]
    share = np.where(there > 0, shares[PHASES.index("compute")] / np.maximum(there, 1e-9), np.nan)
    return _spread(share, coarse, window)


def _coarse(book: RunBook, window: Window) -> Window:
    """Bins of at least two rounds, in which every member has computed and waited: for what is added up over members."""
    num = sum(window.start_s <= row.t_s <= window.end_s for row in book.exchanges_until(window.end_s))
    return Window(start_s=window.start_s, end_s=window.end_s, num_bins=min(max(num // 2, 6), 60, window.num_bins))


def _spread(values: Floats, coarse: Window, window: Window) -> Floats:
    """Values of coarse bins on the fine ones: straight lines between the middles, gaps where one is not known."""
    known = np.isfinite(values)
    if not known.any():
        return np.full(window.num_bins, np.nan)
    line = np.interp(window.middles(), coarse.middles()[known], values[known])
    place = np.minimum(np.arange(window.num_bins) * coarse.num_bins // window.num_bins, coarse.num_bins - 1)
    return np.where(known[place], line, np.nan)


def _bytes_curves(book: RunBook, window: Window) -> dict[str, list[float | None]]:
    """Bytes sent so far, and what data parallel would have sent for the same steps."""
    x_s = window.middles()
    _, sent = _committed(book, x_s)
    num = len(book.members)
    instead = np.full(window.num_bins, np.nan)
    if num > 1 and book.state.num_params:
        before = book.steps.total("step_num", window.start_s)
        steps = before + np.cumsum(book.steps.sums("step_num", window))
        instead = 4.0 * book.state.num_params * 2 * (num - 1) / num * steps
    past = x_s <= max(book.end_s, window.start_s)
    return {
        "sent": _numbers(np.where(past & (sent > 0), sent, np.nan), 0),
        "data_parallel": _numbers(np.where(past & (instead > 0), instead, np.nan), 0),
    }


def _faults(book: RunBook, window: Window) -> list[dict[str, Any]]:
    return [
        {"t_s": round(fault_moment(row), 3), "kind": row.fault, "member": row.member, "back_s": row.back_s}
        for row in book.faults_until(window.end_s)
        if fault_moment(row) >= window.start_s
    ]


def run_timeline(book: RunBook, window: Window) -> dict[str, Any]:
    """What each member did: for each column the letter of the longest phase, and in tenths how much was waiting.

    A death wins over whatever else was in its column: it must not vanish between two pixels.
    """
    ordered = book.in_order()
    rows: list[dict[str, Any]] = []
    if ordered:
        shares = book.spans.shares(window, len(book.members), len(PHASES))
        _fill_open_ends(book, window, shares)
        known = shares.sum(axis=1)
        top = shares.argmax(axis=1)
        top = np.where(shares[:, PHASES.index("dead")] > 0.02, PHASES.index("dead"), top)
        waits = shares[:, PHASES.index("sync")] + shares[:, PHASES.index("wait")]
        tenths = np.clip(np.round(10 * waits / np.maximum(known, 1e-9)), 0, 9).astype(np.int64)
        for name, place in ordered:
            letters = np.where(known[place] > 0.05, np.array(list(LETTERS))[top[place]], ".")
            computes = letters == LETTERS[PHASES.index("compute")]
            rows.append(
                {
                    "name": name,
                    "phases": "".join(letters.tolist()),
                    "waits": "".join(np.where(computes, tenths[place], 0).astype("U1").tolist()),
                }
            )
    return {
        "version": book.version,
        "from_s": window.start_s,
        "to_s": window.end_s,
        "rows": rows,
        "silences": [
            [row.member, round(row.start_s, 3), round(row.end_s, 3)]
            for row in book.silences
            if row.end_s >= window.start_s and row.start_s <= window.end_s
        ],
        "commits": _commits(book, window),
        "faults": _faults(book, window),
    }


def _fill_open_ends(book: RunBook, window: Window, shares: Floats) -> None:
    """A death that goes on has no span yet: it is drawn from the moment it was noticed on."""
    current, place_of = book.state.current, dict(book.in_order())
    for fault in book.faults_until(window.end_s):
        member = place_of.get(fault.member)
        gone = fault.back_s is None and fault.member not in current
        if member is None or not gone or book.about.state not in ("running", "interrupted"):
            continue
        first = int(max(0.0, (fault_moment(fault) - window.start_s) / window.width_s))
        last = math.ceil((min(book.end_s, window.end_s) - window.start_s) / window.width_s)
        shares[member, :, first:last] = 0.0
        shares[member, PHASES.index("dead"), first:last] = 1.0


def _commits(book: RunBook, window: Window) -> list[float]:
    times = [row.t_s for row in book.exchanges if window.start_s <= row.t_s <= window.end_s]
    return [round(t, 3) for t in times] if len(times) <= window.num_bins // 3 else []
