"""What the strategies of the quality table cost on slow links, and which is the best at what (pure).

"Best" is said of means over the seeds; where rows lie within each other's spread, it is said that they do.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.quality_links import LINKS, PARAMS, STEP_S, Link, predicted_s
from benchmarks.quality_plan import BASELINE, NUM_ISLANDS, SLOWEST

if TYPE_CHECKING:
    from benchmarks.quality_report import Line

WAITING_ROWS = ("ddp", "diloco-30-int8")
"""Rows with equal islands that are also shown as if one was as slow as in the rows with unequal ones."""


def sent_mb(line: Line) -> float:
    """Megabytes that an island sent, mean over islands and seeds."""
    return statistics.fmean(record["bytes_sent"] for record in line.runs.values()) / line.row.islands / 1e6


def hours(line: Line, link: Link, *, slowest: float = 1.0) -> float:
    """Predicted hours on a link, mean over the seeds (`quality_links.py` says what is assumed)."""
    found = [predicted_s(r, link, islands=line.row.islands, slowest=slowest) for r in line.runs.values()]
    return statistics.fmean(found) / 3600


def link_table(lines: Sequence[Line]) -> list[str]:
    """Hours on each link beside bytes and loss; strategies with unequal islands beside those that would wait."""
    out = [
        f"A model of {PARAMS / 1e6:.0f} M parameters, {STEP_S:g} s an inner step, as many tokens as above: hours, from "
        "the bytes that each row sent. A prediction, not a measurement.",
        "",
        "| Row | Over data parallel | Bytes, data parallel = 1 | " + " | ".join(link.name for link in LINKS) + " |",
        "|---|---|---|" + "---|" * len(LINKS),
    ]
    base = next((line for line in lines if line.row.name == BASELINE), None)
    equal = [(line, line.row.label, 1.0) for line in lines if not line.row.unequal]
    unequal = [(line, line.row.label, 1.0) for line in lines if line.row.unequal]
    if unequal:
        waiting = [line for line in lines if line.row.name in WAITING_ROWS]
        unequal = [(line, f"{line.row.label}, one island half as fast", SLOWEST) for line in waiting] + unequal
    for line, label, slowest in equal + unequal:
        gap = "" if line.gap is None or line.row.name == BASELINE else f"{100 * line.gap.mean:+.2f} %"
        share = "" if base is None else f"{sent_mb(line) / sent_mb(base):.4f}"
        cells = [f"{hours(line, link, slowest=slowest):.2f}" for link in LINKS]
        out.append(f"| {label} | {gap} | {share} | " + " | ".join(cells) + " |")
    return out


def best_text(lines: Sequence[Line]) -> str:
    """Which row has the lowest loss, the fewest bytes and the least predicted time, beside data parallel."""
    rows = [line for line in lines if line.row.name != BASELINE and line.row.islands == NUM_ISLANDS and line.gap]
    if len(rows) < 2:
        return "Too few rows are finished to name the best."
    loss = min(rows, key=_gap)
    parts = [f"Lowest loss but for data parallel: {loss.row.label} ({100 * _gap(loss):+.2f} %)"]
    close = [line.row.label for line in rows if line is not loss and _overlap(line, loss)]
    if close:
        parts[0] += f"; the spread over the seeds does not tell it from {_and(close)}"
    fewest = min(rows, key=sent_mb)
    parts.append(f"Fewest bytes: {fewest.row.label} ({sent_mb(fewest):.1f} MB, {100 * _gap(fewest):+.2f} %)")
    equal = [line for line in rows if not line.row.unequal]
    for link in LINKS:
        least = min(hours(line, link) for line in equal)
        quick = [line for line in equal if hours(line, link) <= 1.02 * least]
        best = min(quick, key=_gap)
        many = f", one of {len(quick)} within 2 % of the least time" if len(quick) > 1 else ""
        parts.append(
            f"At {link.name}, islands equally fast: {best.row.label} "
            f"({hours(best, link):.2f} h, {100 * _gap(best):+.2f} %{many})"
        )
    return ". ".join(parts) + ". A row with more loss in less time is no better one: it needs more tokens to catch up."


def _gap(line: Line) -> float:
    assert line.gap is not None, f"{line.row.name} has no seed in common with data parallel"
    return line.gap.mean


def _overlap(one: Line, other: Line) -> bool:
    """Whether one row's mean is within what the seeds of the other gave."""
    assert one.gap is not None and other.gap is not None, "rows without a gap are not compared"
    return one.gap.low <= other.gap.high


def _and(labels: Sequence[str]) -> str:
    quoted = [f'"{label}"' for label in labels]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]
