"""Steps and spans of a run by column, and their reduction to what a screen can show.

A long run has millions of both; a chart has some hundred columns of pixels. Everything here is one pass of NumPy over
the rows, so that a page which asks every second costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FIRST_CAPACITY = 1024


class Columns:
    """Rows of floats that grow at the end; `column(name)` is a view of what is there."""

    def __init__(self, *names: str) -> None:
        """No rows."""
        self._place = {name: place for place, name in enumerate(names)}
        self._data = np.empty((len(names), FIRST_CAPACITY), dtype=np.float64)
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def append(self, *values: float) -> None:
        """One row, a value for each column."""
        if self._num == self._data.shape[1]:
            grown = np.empty((len(self._place), 2 * self._num), dtype=np.float64)
            grown[:, : self._num] = self._data
            self._data = grown
        self._data[:, self._num] = values
        self._num += 1

    def column(self, name: str) -> Floats:
        """All values of a column."""
        view: Floats = self._data[self._place[name], : self._num]
        return view


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """From `start_s` to `end_s` of the run in `num_bins` equal bins."""

    start_s: float
    end_s: float
    num_bins: int

    @property
    def width_s(self) -> float:
        """Seconds of one bin."""
        return max(self.end_s - self.start_s, 1e-9) / self.num_bins

    def middles(self) -> Floats:
        """The middle of each bin, seconds."""
        return np.asarray(self.start_s + (np.arange(self.num_bins) + 0.5) * self.width_s, dtype=np.float64)

    def bins(self, at_s: Floats) -> NDArray[np.int64]:
        """The bin of each moment; moments outside have bins outside of `0 <= bin < num_bins`."""
        found: NDArray[np.int64] = np.floor((at_s - self.start_s) / self.width_s).astype(np.int64)
        # The last moment belongs to the last bin: a window usually ends with the newest row.
        found[(at_s <= self.end_s) & (found == self.num_bins)] = self.num_bins - 1
        return found


class Steps:
    """What every island's rows said of its inner steps. `member` is a place in the list of members."""

    def __init__(self) -> None:
        """No rows."""
        self.columns = Columns("t_s", "member", "loss", "tokens_per_s", "compute_s", "step_num")

    def append(
        self, *, t_s: float, member: int, loss: float, tokens_per_s: float, compute_s: float, num_steps: int
    ) -> None:
        """One row; a loss that is not known is NaN."""
        self.columns.append(t_s, member, loss, tokens_per_s, compute_s, num_steps)

    def means(self, what: str, window: Window, num_members: int) -> Floats:
        """`(member, bin)` mean of a column, NaN where a member has no row."""
        place, value = self._inside(what, window)
        size = num_members * window.num_bins
        count = np.bincount(place, minlength=size)[:size]
        total = np.bincount(place, weights=value, minlength=size)[:size]
        with np.errstate(invalid="ignore"):
            means: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return means.reshape(num_members, window.num_bins)

    def extremes(self, what: str, window: Window) -> tuple[Floats, Floats]:
        """Smallest and largest value of a column in each bin over all members, NaN where there is none."""
        place, value = self._inside(what, window)
        bins = place % window.num_bins
        low, high = np.full(window.num_bins, np.inf), np.full(window.num_bins, -np.inf)
        np.minimum.at(low, bins, value)
        np.maximum.at(high, bins, value)
        return np.where(np.isfinite(low), low, np.nan), np.where(np.isfinite(high), high, np.nan)

    def sums(self, what: str, window: Window) -> Floats:
        """Sum of a column over all members in each bin."""
        place, value = self._inside(what, window)
        total = np.bincount(place % window.num_bins, weights=value, minlength=window.num_bins)
        return total.astype(np.float64)

    def total(self, what: str, until_s: float) -> float:
        """Sum of a column over all rows up to a moment."""
        return float(self.columns.column(what)[self.columns.column("t_s") <= until_s].sum())

    def num_bad(self, until_s: float) -> int:
        """Rows whose loss was not finite."""
        there = self.columns.column("t_s") <= until_s
        return int((there & ~np.isfinite(self.columns.column("loss"))).sum())

    def medians(self, what: str, until_s: float, num_members: int, outside: Sequence[tuple[float, float]]) -> Floats:
        """Median of a column for each member over its rows up to a moment that lie in none of some intervals."""
        t_s, member = self.columns.column("t_s"), self.columns.column("member")
        keep = t_s <= until_s
        for start_s, end_s in outside:
            keep &= (t_s < start_s) | (t_s > end_s)
        value, whose = self.columns.column(what)[keep], member[keep].astype(np.int64)
        medians = np.full(num_members, np.nan)
        order = np.argsort(whose, kind="stable")
        found, starts = np.unique(whose[order], return_index=True)
        for name, rows in zip(found, np.split(value[order], starts[1:]), strict=False):
            medians[name] = np.median(rows)
        return medians

    def newest(self, until_s: float, num_members: int) -> NDArray[np.int64]:
        """The place of each member's newest row up to a moment, -1 where there is none."""
        newest = np.full(num_members, -1, dtype=np.int64)
        there = np.flatnonzero(self.columns.column("t_s") <= until_s)
        newest[self.columns.column("member")[there].astype(np.int64)] = there  # the last one counts
        return newest

    def _inside(self, what: str, window: Window) -> tuple[NDArray[np.int64], Floats]:
        """`member * num_bins + bin` and the value, of rows inside the window whose value is finite."""
        bins, value = window.bins(self.columns.column("t_s")), self.columns.column(what)
        keep = (bins >= 0) & (bins < window.num_bins) & np.isfinite(value)
        member = self.columns.column("member")[keep].astype(np.int64)
        return member * window.num_bins + bins[keep], value[keep]


class Spans:
    """What every member did when. `phase` is a place in the list of phases."""

    def __init__(self) -> None:
        """No rows."""
        self.columns = Columns("start_s", "end_s", "member", "phase", "incarnation")

    def append(self, *, start_s: float, end_s: float, member: int, phase: int, incarnation: int) -> None:
        """One row."""
        self.columns.append(start_s, end_s, member, phase, incarnation)

    def shares(self, window: Window, num_members: int, num_phases: int) -> Floats:
        """`(member, phase, bin)`: the share of each bin that a member spent in a phase."""
        size = (num_members, num_phases, window.num_bins + 1)
        start = np.clip((self.columns.column("start_s") - window.start_s) / window.width_s, 0, window.num_bins)
        end = np.clip((self.columns.column("end_s") - window.start_s) / window.width_s, 0, window.num_bins)
        keep = end > start
        start, end = start[keep], end[keep]
        member = self.columns.column("member")[keep].astype(np.int64)
        phase = self.columns.column("phase")[keep].astype(np.int64)
        row = (member * num_phases + phase) * size[2]
        first, last = np.floor(start).astype(np.int64), np.floor(end).astype(np.int64)
        # A span covers [first, last) whole, less what lies before its start, plus what lies behind its last edge.
        change = np.zeros(num_members * num_phases * size[2] + 1)
        np.add.at(change, row + first, 1.0)
        np.add.at(change, row + last, -1.0)
        edge = np.zeros_like(change)
        np.add.at(edge, row + first, -(start - first))
        np.add.at(edge, row + last, end - last)
        whole = change[:-1].reshape(size).cumsum(axis=2)
        shares: Floats = np.clip(whole + edge[:-1].reshape(size), 0.0, 1.0)[:, :, : window.num_bins]
        return shares

    def at(self, moment_s: float, num_members: int) -> NDArray[np.int64]:
        """The place of each member's span at a moment, or of the last one before it; -1 where there is none."""
        found = np.full(num_members, -1, dtype=np.int64)
        there = np.flatnonzero(self.columns.column("start_s") <= moment_s)
        order = there[np.argsort(self.columns.column("start_s")[there], kind="stable")]
        found[self.columns.column("member")[order].astype(np.int64)] = order
        return found
