"""Threads on which a member's jobs run beside training, and the queue that their events come back to."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from workers import member_events as ev

MAX_WAITERS = 1024  # one for each other owner of parts; a thread begins when it is needed

Job = Callable[[], ev.Event | None]


class JobThreads:
    """With an executor; without one every job is done at once, where it is asked for."""

    def __init__(
        self,
        executor: Executor | None,
        events: queue.SimpleQueue[ev.Event | None],
        abort: Callable[[BaseException], None],
    ) -> None:
        """`events`: where a job's event goes; `abort`: what a bug in a job is told to, which must end training."""
        self.executor, self.events, self.abort = executor, events, abort
        self.waiters = ThreadPoolExecutor(MAX_WAITERS, thread_name_prefix="results") if executor is not None else None

    def do(self, job: Job, *, waits: bool = False) -> None:
        """Do a job, on a thread if there are any. `waits`: it waits for what other members do meanwhile.

        Those have threads of their own: with as many waiting jobs as threads nobody would reduce what all wait for.
        """
        pool = self.waiters if waits else self.executor
        if pool is not None:
            pool.submit(job).add_done_callback(self._finished)
        elif (event := job()) is not None:
            self.events.put(event)

    def close(self) -> None:
        """End the threads that wait; the executor is the caller's."""
        if self.waiters is not None:
            self.waiters.shutdown(wait=False, cancel_futures=True)

    def _finished(self, done: Future[ev.Event | None]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is not None:
            self.abort(error)
        elif (event := done.result()) is not None:
            self.events.put(event)
