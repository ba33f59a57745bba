"""TensorBoard and experiment trackers: rows of `metrics.jsonl` as curves, written on a thread of their own.

A tracker may be slow, or raise whatever it likes: the controller hands rows over without waiting, a queue that is full
drops them (counted), and an error ends the tracker, not the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.errors import UserError
from orchestrator.metrics import EvalRow, ExchangeRow, FaultEvent, Row, StepRow

if TYPE_CHECKING:
    from orchestrator.settings import MetricsConfig

log = logging.getLogger("atoll.controller")

MAX_WAITING = 10_000
END_TIMEOUT_S = 20.0
# Key of `[metrics]` -> module that it needs, extra that brings it.
NEEDS = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb", "wandb"), "trackio": ("trackio", "trackio")}


class Tracker(Protocol):
    """Where curves go."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to some curves; `step`: tokens committed by then."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def wanted(config: MetricsConfig) -> list[str]:
    """Names of the trackers that a configuration asks for."""
    return ["tensorboard"] * config.tensorboard + ([config.tracker] if config.tracker is not None else [])


def check_installed(config: MetricsConfig) -> None:
    """Raise UserError for a tracker whose package is not there."""
    for name in wanted(config):
        module, extra = NEEDS[name]
        if importlib.util.find_spec(module) is None:
            key = "metrics.tensorboard = true" if name == "tensorboard" else f"metrics.tracker = {name!r}"
            message = f"{key} needs the package {module}, which is not installed"
            raise UserError(message, place="metrics", remedy=f"pip install 'atoll[{extra}]'")


def points(row: Row) -> Iterator[tuple[str, float]]:
    """The curves of one row."""
    match row:
        case StepRow():
            for name in ("loss", "tokens_per_s", "step_ms", "lr", "grad_norm", "mfu"):
                value = getattr(row, name)
                if value is not None:
                    yield f"{row.member}/{name}", value
        case EvalRow() if row.val_loss is not None:
            yield "run/val_loss", row.val_loss
        case ExchangeRow():
            yield f"fragment-{row.fragment}/exchange_s", row.seconds
            yield f"fragment-{row.fragment}/bytes", row.bytes
            yield f"fragment-{row.fragment}/members", len(row.roster)
        case FaultEvent():
            yield f"{row.member}/fault_at_s", row.t_s
        case _:
            return


class TensorBoard:
    """Event files in `<run directory>/tensorboard`."""

    def __init__(self, run_dir: Path) -> None:
        """Opens the event file."""
        module: Any = importlib.import_module("tensorboardX")
        self._writer = module.SummaryWriter(logdir=str(run_dir / "tensorboard"))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.write`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()


class Experiment:
    """A module with the interface of W&B: `init`, a run's `log` and `finish`. `trackio` has the same."""

    def __init__(self, module: str, *, project: str, run: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        """Begins a run there. Where it is stored, and as whom, the module reads from its own environment."""
        tracker: Any = importlib.import_module(module)
        # Both would sample this machine, which is not where training is, and trackio would open a page in a notebook.
        trackio: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        wandb: dict[str, Any] = {"dir": str(run_dir), "settings": {"x_disable_stats": True, "console": "off"}}
        options = wandb if module == "wandb" else trackio
        self._run = tracker.init(project=project, name=run, config=dict(settings), **options)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.write`."""
        self._run.log({**values, "tokens": step})

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()


def open_tracker(name: str, config: MetricsConfig, run_dir: Path, settings: Mapping[str, Any]) -> Tracker:
    """Build the tracker that a configuration names."""
    if name == "tensorboard":
        return TensorBoard(run_dir)
    return Experiment(name, project=config.project, run=run_dir.name, run_dir=run_dir, settings=settings)


class TrackerThread:
    """One tracker behind a queue."""

    def __init__(self, name: str, config: MetricsConfig, run_dir: Path, settings: Mapping[str, Any]) -> None:
        """Nothing is opened before `start`."""
        self.name, self._arguments = name, (config, run_dir, settings)
        self._queue: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self.dropped = 0
        self.failed = False

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def note(self, values: Mapping[str, float], tokens: int) -> None:
        """Hand points of some curves over; never waits."""
        if not values or self.failed:
            return
        try:
            self._queue.put_nowait((dict(values), tokens))
        except queue.Full:
            self.dropped += 1

    def stop(self) -> None:
        """Write what waits, within `END_TIMEOUT_S`."""
        if not self.failed:
            try:
                self._queue.put(None, timeout=END_TIMEOUT_S)
            except queue.Full:
                log.warning("%s does not take its rows: %d are lost", self.name, self._queue.qsize())
        self._thread.join(END_TIMEOUT_S)
        if self.dropped:
            log.warning("%s was too slow: %d rows are not in it", self.name, self.dropped)

    def _run(self) -> None:
        done = False
        try:
            tracker = open_tracker(self.name, *self._arguments)
            while (item := self._queue.get()) is not None:
                tracker.write(*item)
            tracker.close()
            done = True
        finally:
            if not done:
                self.failed = True
                log.exception("%s ends; the run goes on without it", self.name)
