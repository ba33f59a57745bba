"""Small networks, and patience for a machine that others use too."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from faults.lab.topology import Topology

T = TypeVar("T")
ATTEMPTS = 8


def pair(*, congestion: str | None = None, line: dict[str, Any] | None = None, **link: float) -> Topology:
    """Nodes a and b with a link between them."""
    regions = {"pair": {"nodes": ["a", "b"], **(line or {})}}
    return Topology.model_validate(
        {"congestion": congestion, "regions": regions, "links": {"a:b": link} if link else {}}
    )


def python(code: str, *arguments: object) -> list[str]:
    """A command that runs Python code."""
    return [sys.executable, "-c", code, *map(str, arguments)]


def first_good(measure: Callable[[], T], is_good: Callable[[T], bool]) -> T:
    """Measure until it is good, a few times: another process may take the CPU during one. The last one otherwise."""
    for _ in range(ATTEMPTS - 1):
        if is_good(found := measure()):
            return found
    return measure()


def wait_for(condition: Callable[[], T], *, what: str, timeout_s: float = 20.0) -> T:
    """Wait until a condition is true and return its value."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.01)
    return found
