"""A run inside the process of a script or a notebook: the production controller on a thread, islands beside it.

What differs from a run on Ray is who starts islands (nobody: the caller's thread is one) and how messages travel (a
queue, and the loopback transport). Journal, ledger, metrics, snapshots and summary are the same.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.build import island_name, island_spec, num_islands, run_plan
from orchestrator.config import RunConfig
from orchestrator.errors import RunFailed, UserError
from orchestrator.events import ProcessDied, StopRequested
from orchestrator.finish import build_summary
from orchestrator.host import Host
from orchestrator.notify import notifying
from orchestrator.rundir import RunDir
from orchestrator.summary import Summary, save_summary
from orchestrator.telemetry.telemetry import Telemetry
from orchestrator.telemetry.trackers import check_installed
from workers.context import IslandContext
from workers.messages import Batch

if TYPE_CHECKING:
    from workers.transport.loopback import LoopbackTransport

TICK_S = 0.1
# Longer than a controller waits for the local states of islands that it asked to stop.
END_TIMEOUT_S = 90.0
JOBS_PER_ISLAND = 2
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"

log = logging.getLogger("atoll.controller")


class InlineRun:
    """One run in this process. `start`, then one `context` for each island's thread, then `finish`."""

    def __init__(self, config: RunConfig, run_dir: RunDir, *, pack: Path | None, resume: bool = False) -> None:
        """`config`: resolved, every island is a thread of this process; `pack`: its tokens, if it has any."""
        from workers.transport.loopback import LoopbackNetwork

        self.config, self.run_dir, self.pack, self.resume = config, run_dir, pack, resume
        self.run_id = run_dir.path.resolve().name
        self.network = LoopbackNetwork()
        self.contexts: dict[str, IslandContext] = {}
        self.transports: list[LoopbackTransport] = []
        self.failure: BaseException | None = None
        self.over = threading.Event()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._control, name="atoll-controller", daemon=True)
        self._held = ExitStack()
        self.telemetry = Telemetry(config, run_dir.path)
        # Nobody can put a new process in the place of a dead one here.
        plan = replace(
            run_plan(config, run_id=self.run_id, pack=pack), replace_dead=True, max_restarts=0, judges_hangs=False
        )
        self.host = Host(
            plan=plan,
            run_dir=run_dir.path,
            controller=f"inline-{uuid.uuid4().hex[:12]}",
            clock=time.monotonic,
            deliver=self._deliver,
            spawn=lambda name, why: None,
            end=lambda name, nonce, save_stack: None,
        )

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Lock the directory, take over the journal, begin to serve. Raises RunDirInUse, JournalError, UserError."""
        check_installed(self.config.metrics)
        if self.config.metrics.ray:
            message = "metrics.ray = true, but this run is in one process, without Ray"
            raise UserError(message, place="metrics.ray", remedy="metrics.port, or `atoll train`")
        with ExitStack() as stack:
            stack.enter_context(self.run_dir.lock())
            self.run_dir.record(self.config.to_toml())
            self.host.open()
            life = self.host.coordinator.state.last_incarnation.get(island_name(0), 0) + 1
            self._log_to(stack, "atoll.controller", self.run_dir.logs / "controller.log")
            self._log_to(stack, "atoll.island", self.run_dir.log(island_name(0), life))
            stack.callback(self.telemetry.stop)
            self.telemetry.start(self.host)
            num = len(self.host.plan.islands)
            stack.enter_context(notifying(self.host, self.config.notify, run_id=self.run_id, num_islands=num))
            self._held = stack.pop_all()
        self._thread.start()

    def context(self, index: int = 0) -> IslandContext:
        """What island number `index` is given; to be entered on the thread that trains it."""
        from workers.jobs import MemberStore
        from workers.transport.loopback import LoopbackTransport

        spec = island_spec(
            self.config, index, run_id=self.run_id, run_dir=self.run_dir.path, pack=self.pack, resume=self.resume
        )
        nonce = uuid.uuid4().hex
        store = MemberStore()
        transport = LoopbackTransport(self.network, f"{spec.name}-{nonce[:8]}", store)
        transport.start()
        executor = ThreadPoolExecutor(max_workers=JOBS_PER_ISLAND, thread_name_prefix=f"sync-{spec.name}")
        self.transports.append(transport)
        self._held.callback(executor.shutdown, wait=True)
        self._held.callback(transport.stop)
        context = IslandContext(
            spec=spec,
            nonce=nonce,
            node="this process",
            store=store,
            transport=transport,
            post=lambda envelope: self._jobs.put(lambda: self.host.receive(envelope)),
            clock=time.monotonic,
            executor=executor,
            num_sharing=num_islands(self.config),
        )
        self.contexts[spec.name] = context
        return context

    def stop(self, *, save: bool) -> None:
        """Ask the run to stop, resumable with `save`; may be called from any thread and from a signal handler."""
        self._jobs.put(lambda: self.host.handle(StopRequested(save=save)))

    def fail(self, context: IslandContext, error: BaseException) -> None:
        """The loop of an island ended with an error; when it was the last island, the run has failed."""
        name, why = context.spec.name, f"{type(error).__name__}: {error}"
        last = num_islands(self.config) == 1
        self._jobs.put(lambda: self.host.handle(ProcessDied(name=name, nonce=None, why=why, hopeless=last)))

    def finish(self) -> Summary:
        """Wait for the run's end, write the summary, release everything. Raises RunFailed if the controller failed."""
        with self._held:
            ended = self.over.wait(END_TIMEOUT_S)
            self._jobs.put(None)
            self._thread.join(END_TIMEOUT_S)
            if self.failure is not None or not ended:
                self.host.close()
                cause = self.failure or f"it did not end within {END_TIMEOUT_S:g} s of its islands"
                raise RunFailed(
                    f"the run's controller failed: {cause}",
                    place=str(self.run_dir.path),
                    remedy=f"the end of {self.run_dir.logs / 'controller.log'}",
                ) from self.failure
            summary = build_summary(self.host, self.config)
            save_summary(summary, self.run_dir.path)
            self.host.close()
        return summary

    # ------------------------------------------------------------ the controller's thread

    def _control(self) -> None:
        done = False
        try:
            self._serve()
            done = True
        finally:
            if not done:
                self.failure = sys.exc_info()[1]
                self._abort_islands()
            self.over.set()

    def _serve(self) -> None:
        """Carry out jobs and ticks until `finish`; after the run's end only late measurements arrive."""
        due_s = time.monotonic() + TICK_S
        while True:
            job: Callable[[], None] | None = self.host.tick
            try:
                job = self._jobs.get(timeout=max(due_s - time.monotonic(), 0.001))
            except queue.Empty:
                due_s = time.monotonic() + TICK_S
            if job is None:
                return
            job()
            self.telemetry.tick(self.host)
            if self.host.died is not None:
                raise RunFailed(
                    self.host.died.why,
                    place=str(self.run_dir.path),
                    remedy=f"the end of {self.run_dir.logs / 'controller.log'}",
                )
            if self.host.finished is not None:
                self.over.set()

    def _deliver(self, batch: Batch) -> None:
        context = self.contexts.get(batch.name)
        if context is not None and context.deliver is not None:
            context.deliver(batch)

    def _abort_islands(self) -> None:
        for context in self.contexts.values():
            if context.abort is not None:
                context.abort(
                    RunFailed(
                        f"the run's controller failed: {self.failure}",
                        place=str(self.run_dir.path),
                        remedy=f"the end of {self.run_dir.logs / 'controller.log'}",
                    )
                )

    @staticmethod
    def _log_to(stack: ExitStack, name: str, path: Path) -> None:
        """Let a logger write into the run directory until the run is over; elsewhere it says what it said before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        logger, file = logging.getLogger(name), logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter(LOG_FORMAT))
        onwards = _Onwards(logger.getEffectiveLevel(), logger.parent if logger.propagate else None)
        for handler in (file, onwards):
            stack.callback(handler.close)
            stack.callback(logger.removeHandler, handler)
            logger.addHandler(handler)
        stack.callback(setattr, logger, "propagate", logger.propagate)
        stack.callback(logger.setLevel, logger.level)
        logger.propagate = False
        logger.setLevel(logging.INFO)


class _Onwards(logging.Handler):
    """Hands records of a level to another logger's handlers."""

    def __init__(self, level: int, to: logging.Logger | None) -> None:
        super().__init__(level)
        self._to = to

    def emit(self, record: logging.LogRecord) -> None:
        if self._to is not None:
            self._to.handle(record)
