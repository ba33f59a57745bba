"""The same samples through `ray.util.metrics`: Ray's agent on the controller's node exports them as `ray_atoll_*`.

Ray wants every declared tag with every value, and has no way to take a value back: a worker that is gone keeps its last
one until the run's controller ends. The tag `worker` tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from orchestrator.telemetry.catalogue import ALL, Sample


class RayMetrics:
    """Records samples; needs a process that is connected to Ray."""

    def __init__(self) -> None:
        """Declares all metrics of the catalogue."""
        from ray.util.metrics import Counter, Gauge

        kinds: dict[str, Any] = {"gauge": Gauge, "counter": Counter}
        self._handles = {m.name: kinds[m.kind](m.name, description=m.help, tag_keys=m.labels) for m in ALL}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}

    def publish(self, samples: Iterable[Sample]) -> None:
        """Record the newest values; counters by what they have grown."""
        for one in samples:
            tags = dict(zip(one.metric.labels, one.labels, strict=True))
            handle = self._handles[one.metric.name]
            if one.metric.kind == "gauge":
                handle.set(one.value, tags=tags)
                continue
            key = (one.metric.name, one.labels)
            grown = one.value - self._told.get(key, 0.0)
            self._told[key] = one.value
            if grown > 0:
                handle.inc(grown, tags=tags)
