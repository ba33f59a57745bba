"""Axes: from data to pixels, and where the ticks go."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from orchestrator.report import format as fmt

Unit = Literal["progress", "time", "count", "bytes", "loss", "seconds", "rate", "index"]
# Steps between time ticks that people expect: seconds, minutes, hours, days.
_TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Maps data from `low` to `high` onto pixels from `start_px` to `end_px`, linearly or by logarithm."""

    low: float
    high: float
    start_px: float
    end_px: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of `value`; values outside the range lie outside the pixels."""
        if self.log:
            value = max(value, self.low * 1e-3)
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start_px + share * (self.end_px - self.start_px)


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """What an axis shows: its title, the unit that formats its values, and what its range must hold."""

    title: str
    unit: Unit
    log: bool = False
    from_zero: bool = False
    low: float | None = None
    high: float | None = None

    def limits(self, values: Iterable[float]) -> tuple[float, float]:
        """Lowest and highest value to show for data `values`; never equal, so that it can be divided by."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not self.log)]
        low = self.low if self.low is not None else min(known, default=1.0 if self.log else 0.0)
        high = self.high if self.high is not None else max(known, default=low + 1.0)
        if self.log:
            return (low / 1.5, high * 1.5)
        low = min(low, 0.0) if self.from_zero else low
        if high <= low:
            return (low, low + (abs(low) or 1.0))
        room = 0.06 * (high - low)
        bottom = low if self.low is not None or (self.from_zero and low == 0) else low - room
        return (bottom, high if self.high is not None else high + room)

    def ticks(self, low: float, high: float, *, target: int) -> list[tuple[float, str]]:
        """About `target` tick values between `low` and `high` with their labels."""
        if self.log:
            return [(value, self.label(value)) for value in _log_ticks(low, high)]
        if self.unit == "time":
            step_s = next((s for s in _TIME_STEPS_S if (high - low) / s <= target), 86400 * math.ceil(high / 86400 / 8))
            return [(value, _clock_tick(value, step_s)) for value in _multiples(low, high, step_s)]
        step = _nice_step((high - low) / target)
        if self.unit in ("count", "index", "bytes"):
            step = max(step, 1.0)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(value, self.label(value, digits=digits)) for value in _multiples(low, high, step)]

    def label(self, value: float, *, digits: int = 2) -> str:
        """The tick label of `value`."""
        if self.unit == "progress":
            return f"{100 * value:.0f}{fmt.NBSP}%"
        if self.unit == "bytes":
            return fmt.num_bytes(value)
        if self.unit in ("count", "rate"):
            return fmt.count(value)
        if self.unit == "seconds":
            return fmt.duration(value) if value else "0"
        if self.unit == "index":
            return f"{value:.0f}"
        return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.0e}"


def _nice_step(raw: float) -> float:
    """The smallest of 1, 2, 5, 10 times a power of ten that is at least `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * (1 - 1e-9))


def _multiples(low: float, high: float, step: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / 5))
    powers = [10.0**exponent for exponent in range(first, last + 1, every)]
    if len(powers) >= 3:
        return powers
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [factor * 10.0**exponent for exponent in exponents for factor in (1, 2, 5)]
    return [value for value in values if low <= value <= high]


def _clock_tick(seconds: float, step: float) -> str:
    whole = round(seconds)
    if step < 3600 and whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if step < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d}{fmt.NBSP}h"
    return f"{whole // 86400}{fmt.NBSP}d"
