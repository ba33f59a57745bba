"""Numbers as people read them. A no-break space joins a number to its unit; `-` stands for "not known"."""

from __future__ import annotations

import math

NBSP = "\u00a0"
TIMES = "\u00d7"
MINUS = "\u2212"
UNKNOWN = "\u2013"


def _three_digits(value: float) -> str:
    """Three significant digits, no exponent, no trailing zeros behind the point."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _scaled(value: float, units: tuple[str, ...]) -> str:
    size, unit = abs(value), 0
    while size >= 999.5 and unit < len(units) - 1:
        size, unit = size / 1000, unit + 1
    text = _three_digits(math.copysign(size, value)).replace("-", MINUS)
    return f"{text}{NBSP}{units[unit]}" if units[unit] else text


def count(value: float | None) -> str:
    """12345 -> '12.3 k' (k, M, G, T)."""
    return UNKNOWN if value is None else _scaled(value, ("", "k", "M", "G", "T"))


def num_bytes(value: float | None) -> str:
    """12345 -> '12.3 kB' (decimal units)."""
    return UNKNOWN if value is None else _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def loss(value: float | None) -> str:
    """1.61803 -> '1.618'; large ones with three digits."""
    if value is None:
        return UNKNOWN
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """0.934 -> '93.4 %'."""
    return UNKNOWN if share is None else f"{100 * share:.1f}{NBSP}%".replace("-", MINUS)


def ratio(value: float | None) -> str:
    """0.52 -> '0.52x', 98.3 -> '98x' (with the multiplication sign)."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.0f}{TIMES}".replace(",", NBSP) if value >= 100 else f"{_three_digits(value)}{TIMES}"


def duration(seconds: float | None) -> str:
    """0.0312 -> '31 ms', 4.25 -> '4.25 s', 92 -> '1 min 32 s', 7500 -> '2 h 05 min'."""
    if seconds is None:
        return UNKNOWN
    if abs(seconds) < 0.9995:
        return f"{_three_digits(1000 * seconds)}{NBSP}ms"
    if abs(seconds) < 59.95:
        return f"{_three_digits(seconds)}{NBSP}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{NBSP}min{NBSP}{whole % 60:02d}{NBSP}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}{NBSP}h{NBSP}{whole % 3600 // 60:02d}{NBSP}min"
    return f"{whole // 86400}{NBSP}d{NBSP}{whole % 86400 // 3600}{NBSP}h"


def clock(seconds: float | None) -> str:
    """A moment of the run: 92.4 -> '1:32.4', 7500 -> '2:05:00'."""
    if seconds is None:
        return UNKNOWN
    if seconds < 3600:
        minutes, rest = divmod(round(seconds, 1), 60)
        return f"{int(minutes)}:{rest:04.1f}"
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def plural(number: int, word: str) -> str:
    """1, 'fault' -> '1 fault'; 2, 'fault' -> '2 faults'."""
    return f"{number:,}{NBSP}{word}{'' if number == 1 else 's'}".replace(",", NBSP)
