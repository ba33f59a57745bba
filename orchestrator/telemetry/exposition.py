"""Samples as text in Prometheus' exposition format, version 0.0.4. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from orchestrator.telemetry.catalogue import ALL, Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(samples: Iterable[Sample]) -> str:
    """All samples, those of one metric together, each metric with its help and kind."""
    of: dict[str, list[Sample]] = {}
    for one in samples:
        of.setdefault(one.metric.name, []).append(one)
    lines: list[str] = []
    for metric in ALL:
        if metric.name in of:
            lines.append(f"# HELP {metric.name} {_escape(metric.help)}")
            lines.append(f"# TYPE {metric.name} {metric.kind}")
            lines.extend(map(_line, of[metric.name]))
    return "\n".join(lines) + "\n"


def _line(one: Sample) -> str:
    pairs = zip(one.metric.labels, one.labels, strict=True)
    labels = ",".join(f'{name}="{_escape(value, quotes=True)}"' for name, value in pairs)
    return f"{one.metric.name}{{{labels}}} {_number(one.value)}"


def _escape(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
