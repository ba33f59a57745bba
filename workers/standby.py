"""A process that waits for an island's place, with everything slow behind it: torch imported, the model built, the
codec compiled, a recent state of every fragment at hand.

It follows the journal and fetches a state now and then, at most for `SHARE` of the time, so that it is no burden on the
links. Nobody counts on it: it is no member, and what it holds counts for nothing until it has joined. When it is told
whose place it takes it joins with that state, and what was committed since it fetches as every member does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from workers.context import IslandContext
from workers.jobs import Jobs, MemberStore
from workers.loops import BuiltinLoop, load_loop, run_user_loop
from workers.messages import News
from workers.record_log import RecordLog
from workers.replica import StateChunk
from workers.state_fetch import fetch_state
from workers.transport.errors import TransportError
from workers.variants import follow_settings

log = logging.getLogger("atoll.island")

LOOK_S = 0.5
SHARE = 0.05


Follow = Callable[[int, bool], News | None]
"""Asks for news: `(rows held, whether it is ready)`; None where the controller does not answer."""


class Standby:
    """One waiting process. `prepare`, then `wait` on the thread that is going to train."""

    def __init__(self, context: IslandContext, follow: Follow) -> None:
        """Builds the model of the built-in loop; of a loop of one's own only its module is imported. Raises what these
        raise.
        """
        self.context, self.follow = context, follow
        self.log = RecordLog()
        self.states: dict[int, list[StateChunk]] = {}
        self.told = threading.Event()
        self.fetched_s = float("-inf")
        self.rest_s = 0.0
        self.loop: BuiltinLoop | None = None
        self.jobs: Jobs | None = None
        loop = context.spec.train.loop
        if loop is not None:
            load_loop(loop)
            return
        self.loop = BuiltinLoop(context)
        replica = self.loop.island.build_replica()
        follow_settings(replica, context.spec, lambda: self.log)
        assert isinstance(context.store, MemberStore)
        self.jobs = Jobs(
            replica=replica, store=context.store, transport=context.transport, log=lambda: self.log,
            lock=threading.RLock(), timeout_s=context.spec.timeout_s, threaded=True,
        )  # fmt: skip

    @property
    def ready(self) -> bool:
        """Whether it has everything that it can have before it knows whose place it takes."""
        return self.loop is None or (self.log.genesis is not None and len(self.states) == len(self.log.genesis.digests))

    def take_over(self) -> None:
        """It is known whose place it takes (any thread)."""
        self.told.set()

    def wait(self) -> None:
        """Keep a recent state until `take_over`."""
        while not self.told.is_set():
            self.look()
            self.told.wait(LOOK_S)

    def look(self) -> None:
        """Ask for news once, and fetch what is worth it."""
        news = self.follow(len(self.log), self.ready)
        if news is not None and self.log.extend(news.rows_from, news.rows, rewrite=True) is not None:
            self._refresh(news)

    def _refresh(self, news: News) -> None:
        """Fetch the state of fragments that have moved on, unless the last fetch was too recent for its length."""
        if self.jobs is None or self.context.clock() - self.fetched_s < self.rest_s:
            return
        began = self.context.clock()
        for fragment in range(len(self.jobs.replica.specs)):
            held = self.states[fragment][0].n if fragment in self.states else -1
            newer = [(name, at) for name, at, n in news.peers if len(n) > fragment and n[fragment] > held]
            if newer and self.log.head(fragment) > held and not self.told.is_set():
                self._fetch(fragment, newer)
        self.fetched_s = self.context.clock()
        self.rest_s = (self.fetched_s - began) * (1 - SHARE) / SHARE

    def _fetch(self, fragment: int, donors: Sequence[tuple[str, str]]) -> None:
        assert self.jobs is not None
        try:
            self.states[fragment] = fetch_state(self.jobs, fragment, donors)
        except TransportError as error:
            log.info("no fresher state of fragment %d for now: %s", fragment, error)

    def train(self, context: IslandContext) -> None:
        """Be the island of `context` to the end of the run: from the state at hand, if the journal still has it."""
        if self.loop is None:
            run_user_loop(context)
        else:
            self.become(context).run()

    def become(self, context: IslandContext) -> BuiltinLoop:
        """The built-in loop of the island of `context`, ready to run."""
        assert self.loop is not None
        spec = context.spec
        same = spec.train == self.context.spec.train and spec.name not in spec.data.per_island
        loop = self.loop if same else BuiltinLoop(context)  # another batch size, own data, ...: the imports are done
        loop.island.move_to(context)
        whole = self.ready and all(self.log.on_path(f, chunks[0].chain) for f, chunks in self.states.items())
        if whole:
            loop.island.begin_with(self.log, self.states)
        self.jobs = None
        return loop
