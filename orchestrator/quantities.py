"""Quantities as people type and read them: counts, link rates, durations, bytes (decimal prefixes throughout)."""

from __future__ import annotations

import math
import re

from orchestrator.errors import UserError

NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]*)\s*")
COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
RATES = {"": 1.0, "bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "B": 8.0, "kB": 8e3, "MB": 8e6, "GB": 8e9}
SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0}


def parse_count(text: str, *, place: str) -> int:
    """`1.2e9`, `350M`, `1.2B`. Raises UserError naming `place`."""
    return round(_parse(text, COUNTS, place=place, example="1.2e9 or 350M"))


def parse_rate(text: str, *, place: str) -> float:
    """`200Mbit`, `1Gbit/s`, `25MB/s` in bits a second. Raises UserError naming `place`."""
    return _parse(text.strip().removesuffix("/s"), RATES, place=place, example="200Mbit or 1Gbit")


def parse_seconds(text: str, *, place: str) -> float:
    """`80ms`, `0.9s`, `2min`; a plain number is seconds. Raises UserError naming `place`."""
    return _parse(text, SECONDS, place=place, example="80ms or 0.9s")


def _parse(text: str, units: dict[str, float], *, place: str, example: str) -> float:
    match = NUMBER.fullmatch(text)
    factor = units.get(match[2]) if match else None
    value = float(match[1]) * factor if match and factor is not None else 0.0
    if not (value > 0 and math.isfinite(value)):
        known = ", ".join(unit for unit in units if unit)
        raise UserError(
            f"{text!r} is not a positive quantity with one of the units {known}", place=place, remedy=example
        )
    return value


def show_bytes(num: float) -> str:
    """25800000 -> '25.8 MB'."""
    return _show(num, ("B", "kB", "MB", "GB", "TB", "PB"))


def show_rate(bits_per_s: float) -> str:
    """2.3e6 -> '2.3 Mbit/s'."""
    return _show(bits_per_s, ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"))


def show_seconds(seconds: float) -> str:
    """0.0123 -> '12.3 ms', 90 -> '90 s', 7200 -> '2 h'."""
    if seconds >= 3600:
        return f"{seconds / 3600:.3g} h"
    if seconds >= 180:
        return f"{seconds / 60:.3g} min"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def show_count(num: float) -> str:
    """1200000000 -> '1.2 G'."""
    return _show(num, ("", "k", "M", "G", "T")).strip()


def _show(value: float, units: tuple[str, ...]) -> str:
    place = 0
    while value >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.3g} {units[place]}"
