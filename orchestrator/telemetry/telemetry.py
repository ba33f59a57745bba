"""What the owner of a `Host` starts beside it: the server, Ray's metrics and the trackers that `[metrics]` asks for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.metrics import Row
from orchestrator.telemetry.catalogue import Sample
from orchestrator.telemetry.collect import Book
from orchestrator.telemetry.ray_metrics import RayMetrics
from orchestrator.telemetry.server import PATH, MetricsServer
from orchestrator.telemetry.trackers import TrackerThread, points, wanted

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.host import Host

log = logging.getLogger("atoll.controller")

PUBLISH_S = 1.0
# Beside the runs, one file for each: Prometheus takes a wildcard in the last part of a path only.
TARGETS = ".prometheus"


class Outlets:
    """Everything that leaves a controller for monitoring. All of its methods are called on the controller's thread."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        """Nothing is opened before `open`."""
        self.config, self.run_dir = config.metrics, run_dir
        self.told = ""
        self.published_s = float("-inf")
        self.server: MetricsServer | None = None
        self.ray: RayMetrics | None = None
        tables = config.to_tables()
        self.trackers = [TrackerThread(name, config.metrics, run_dir, tables) for name in wanted(config.metrics)]

    def open(self) -> None:
        """Begin; what cannot be started is told in `told` and in the log, and training goes on without it."""
        if self.config.port is not None:
            self._listen(self.config.port)
        if self.config.ray:
            self.ray = RayMetrics()
        for tracker in self.trackers:
            tracker.start()

    def _listen(self, port: int) -> None:
        server = MetricsServer(host=self.config.host, port=port)
        try:
            server.start()
        except OSError as error:
            self.told = f"no metrics: cannot listen at {server.target} (metrics.port): {error.strerror or error}"
            log.error("%s", self.told)
            return
        self.server = server
        self.told = f"metrics at http://{server.target}{PATH}"
        log.info("%s", self.told)
        # For `file_sd_configs`: Prometheus finds the runs of a folder by themselves.
        entry = [{"targets": [server.target], "labels": {"run_dir": self.run_dir.name}}]
        file = target_file(self.run_dir)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(entry) + "\n", encoding="utf-8")

    def publish(self, samples: Callable[[], Sequence[Sample]], now_s: float) -> None:
        """Hand out what is known now, at most once in `PUBLISH_S`."""
        if (self.server is None and self.ray is None) or now_s - self.published_s < PUBLISH_S:
            return
        self.published_s = now_s
        found = samples()
        if self.server is not None:
            self.server.publish(found)
        if self.ray is not None:
            self.ray.publish(found)

    def stop(self) -> None:
        """The run is over: close the port, finish the trackers."""
        if self.server is not None:
            target_file(self.run_dir).unlink(missing_ok=True)
            self.server.stop()
        for tracker in self.trackers:
            tracker.stop()


class Telemetry(Outlets):
    """Of a run with islands: the rows of its metrics and the state of its coordinator."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        """Nothing is started before `start`."""
        super().__init__(config, run_dir)
        self.book = Book()

    def start(self, host: Host) -> None:
        """See `open`."""
        host.watchers.append(lambda row: self._note(host, row))
        self.open()

    def _note(self, host: Host, row: Row) -> None:
        self.book.note(row)
        if self.trackers:
            tokens = host.coordinator.state.samples_committed() * host.plan.seq_len
            for tracker in self.trackers:
                tracker.note(dict(points(row)), tokens)

    def tick(self, host: Host) -> None:
        """See `publish`."""
        self.publish(lambda: self.book.samples(host), host.clock())


def target_file(run_dir: Path) -> Path:
    """Where Prometheus finds the address of a run that goes on."""
    run_dir = run_dir.resolve()
    return run_dir.parent / TARGETS / f"{run_dir.name}.json"
