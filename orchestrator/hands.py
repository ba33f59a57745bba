"""What the controller's actor does with processes: it starts them, lets them wait, and ends those that hang.

The hands of `ControllerActor`, in a file of their own; which process takes which place is decided by `StandbyPool`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from faults.recovery import Kind
from orchestrator import places
from orchestrator.actor_tools import must_not_fail
from orchestrator.arriving import not_arriving
from orchestrator.build import OWN_PACK_LABEL, island_index, island_spec, machine_labels
from orchestrator.config import RunConfig
from orchestrator.ending import make_sure, whereabouts
from orchestrator.events import Event, ProcessDied
from orchestrator.host import Host
from orchestrator.island_actor import ContextWrapper, IslandActor
from orchestrator.processes import NAMESPACE, WORKER_RESOURCE, draining_nodes, find_islands, island_actor_name
from orchestrator.standby import StandbyPool, is_standby
from workers.context import IslandSpec
from workers.messages import News
from workers.records import HUNG, FenceRecord, JoinRecord

WATCH_S = 60.0
STACK_TIMEOUT_S = 12.0
STANDBY_AGAIN_S = 5.0
STANDBY_LOOK_S = 10.0
GONE_S = 5.0  # at the end of a run, for those that did not end by themselves
DRAIN_LOOK_S = 1.0

log = logging.getLogger("atoll.controller")


class Hands:
    """Processes of one run: those of islands and those that wait."""

    config: RunConfig
    run_dir: Path
    run_id: str
    token: str
    pack: Path | None
    resumes: bool
    wrap: ContextWrapper | None
    host: Host
    pool: StandbyPool
    handles: dict[str, ActorHandle]
    nonce_of: dict[str, str]
    spoke: set[str]
    place_of: dict[str, str]
    log_of: dict[str, Path]
    unplaced: list[str]
    leaving_nodes: set[str]
    watches: dict[str, asyncio.Task[None]]
    started_as: dict[str, str]
    pids: dict[str, tuple[int, str]]
    concluding: bool

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        raise NotImplementedError

    def _adopt(self, name: str, nonce: str, handle: ActorHandle) -> None:
        raise NotImplementedError

    def _end(self, name: str, nonce: str, save_stack: bool = False) -> None:
        raise NotImplementedError

    def _do(self, event: Event) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------ processes

    def _spec(self, name: str) -> tuple[IslandSpec, str]:
        """What the next process of an island is told, and where it writes its log."""
        spec = island_spec(
            self.config,
            island_index(name),
            run_id=self.run_id,
            run_dir=self.run_dir,
            pack=self.pack,
            resume=self.resumes,
        )
        life = self.host.coordinator.state.last_incarnation.get(name, 0) + 1
        return spec, str(self.run_dir / "logs" / f"{name}-{life}.log")

    def _start(self, name: str, nonce: str, spec: IslandSpec, log_file: str, strategy: Any) -> ActorHandle:
        return IslandActor.options(
            name=island_actor_name(self.run_id, name, nonce),
            namespace=NAMESPACE,
            lifetime="detached",
            resources={WORKER_RESOURCE: 1},
            scheduling_strategy=strategy,
            label_selector=machine_labels(self.config, name) if strategy is None else None,
        ).remote(spec, nonce, self.token, log_file, self.wrap)

    def _process(self, started_as: str, nonce: str) -> ActorHandle:
        return ray.get_actor(island_actor_name(self.run_id, started_as, nonce), namespace=NAMESPACE)

    def _name_of(self, started_as: str, nonce: str) -> str | None:
        """Whose process it is; None for one that is to be ended: who waits for a place (others are started), or hung.

        A process that hung was fenced for it, and a controller died before it could be ended.
        """
        records = [row.record for row in self.host.journal.rows]
        mine = [r for r in records if isinstance(r, JoinRecord) and r.nonce.split("+")[0] == nonce]
        if not mine:
            return None if is_standby(started_as) else started_as
        last = (mine[-1].member, mine[-1].incarnation)
        fences = [r for r in records if isinstance(r, FenceRecord) and (r.member, r.incarnation) == last]
        return None if any(fence.why.startswith(HUNG) for fence in fences) else mine[-1].member

    def _find_islands(self) -> None:
        """After a restart: adopt each island's newest process, end older ones, replace those that are gone."""
        found: dict[str, list[str]] = {}
        for started_as, nonce in find_islands(self.run_id):
            handle, name = self._process(started_as, nonce), self._name_of(started_as, nonce)
            where = whereabouts(handle)
            if where is not None:  # one that is stopped cannot be asked
                self.pids[nonce] = where
            if name is None:
                self._kill(started_as, nonce, handle)
            else:
                found.setdefault(name, []).append(nonce)
                self.started_as[nonce] = started_as
        expected = () if self.config.run.elastic else self.host.plan.islands
        for name in {*expected, *found, *self.host.coordinator.state.current}:
            newest = max(found.get(name, []), default=None)
            for nonce in found.get(name, ()):
                handle = self._process(self.started_as[nonce], nonce)
                if nonce == newest:
                    self._adopt(name, nonce, handle)
                else:
                    self._kill(name, nonce, handle)
            if newest is None:
                self.host.handle(ProcessDied(name=name, nonce=None, why="it was gone when the controller came back"))

    def _kill(self, name: str, nonce: str, handle: ActorHandle) -> None:
        """End a process that may be stopped, and could not do it by itself then."""
        ray.kill(handle)
        where = self.pids.pop(nonce, None)
        if where is not None:
            self._task(make_sure(name, *where))

    async def _kill_all(self) -> None:
        """The run is over: end what is left. Of who said goodbye nobody has to make sure."""
        left = [nonce for nonce in self.handles if (watch := self.watches.get(nonce)) is not None and not watch.done()]
        sure = [make_sure(nonce, *self.pids[nonce], timeout_s=GONE_S) for nonce in left if nonce in self.pids]
        for handle in self.handles.values():
            ray.kill(handle)
        await asyncio.gather(*sure)

    async def _end_after_stack(self, name: str, nonce: str, handle: ActorHandle) -> None:
        """A process that hangs: what it hangs in is kept, then it is ended."""
        path = self.run_dir / "logs" / f"{name}.stack.txt"
        try:
            await asyncio.wait_for(handle.save_stack.remote(str(path)), STACK_TIMEOUT_S)
            log.info("where the threads of %s were is in %s", name, path)
        except (TimeoutError, RayActorError, RayTaskError) as error:
            log.warning("the stack of %s could not be saved: %s", name, error or "no answer")
        self._kill(name, nonce, handle)

    async def _watch_arrival(self, name: str, nonce: str, handle: ActorHandle) -> None:
        """A process that does not join is ended, and another one takes its place: no heartbeats tell of it yet."""

        def is_awaited() -> bool:
            is_over = self.host.finished is not None or self.host.died is not None
            return not is_over and nonce not in self.spoke and self.nonce_of.get(name) == nonce

        waited = nonce in self.pids and is_standby(self.started_as.get(nonce, ""))
        verdict = await self._not_arriving(nonce, handle, is_awaited, waited=waited)
        if verdict is not None:
            hung, why = verdict[0] == "hung", verdict[1]
            self._end(name, nonce, save_stack=hung)
            self._do(ProcessDied(name=name, nonce=None, why=why, hung=hung, taken="" if hung else "lost"))

    async def _not_arriving(
        self, nonce: str, handle: ActorHandle, is_awaited: Callable[[], bool], *, waited: bool = False
    ) -> tuple[Kind, str] | None:
        """See `not_arriving`; where the process is is known from the first look on, so that it can be ended."""
        return await not_arriving(
            handle,
            is_awaited=is_awaited,
            seen=lambda where: self.pids.setdefault(nonce, where),
            patience_s=self.config.exchange.limbo_s,
            waited=waited,
        )

    # ------------------------------------------------------------ nodes that go

    def _let_leave(self, name: str, why: str, at_once: bool) -> None:
        """An island is asked to leave, or (`at_once`) ended."""
        raise NotImplementedError

    def _node_leaves(self, node: str, why: str, at_once: bool = False) -> list[str]:
        """The islands of a node leave, and no new ones come there. May be said again; returns who is still there."""
        self.leaving_nodes.add(node)
        names = sorted(name for name, place in self.place_of.items() if place == node)
        if self.host.finished is None and self.host.died is None:
            for name in names:
                if not is_standby(name):
                    self._let_leave(name, why, at_once)
        return names

    async def _heed_drains(self) -> None:
        """Notices of pre-emption, which reach Ray as drains of nodes: the same path as `atoll leave` there."""
        look = asyncio.get_running_loop().run_in_executor
        while self.host.finished is None and self.host.died is None:
            await asyncio.sleep(DRAIN_LOOK_S)
            draining = await look(None, draining_nodes)
            with must_not_fail():
                for node in sorted(draining):
                    if node not in self.leaving_nodes:
                        log.warning("Ray drains node %s: its islands leave", node[:8])
                    self._node_leaves(node, "Ray drains its machine")

    # ------------------------------------------------------------ standbys

    def _start_standbys(self, node: str | None = None) -> None:
        """Processes that wait, as many as are lacking; once the islands have the start behind them."""
        if not self.host.coordinator.started or self.concluding or self.host.coordinator.stopping is not None:
            return
        for _ in range(self.pool.lacking() if node is None else 1):
            nonce = new_nonce()
            name = self.pool.start(nonce)
            spec = replace(self._spec("island-0")[0], name=name, resume=False)
            strategy = NodeAffinitySchedulingStrategy(node, soft=False) if node is not None else None
            handle = self._start(name, nonce, spec, str(self.run_dir / "logs" / f"{name}.log"), strategy)
            self.handles[nonce] = handle
            self.started_as[nonce] = name
            if node is not None:
                self.place_of[name] = node
            self.watches[nonce] = self._task(self._watch_standby(name, nonce, handle))

    def _place_standbys(self, nodes: dict[str, int], owner_at: dict[str, str]) -> None:
        """In an elastic run a standby takes a place like an island; the first place is an island's."""
        for _ in range(self.pool.lacking()):
            free = places.free_places(nodes, self.place_of, self.leaving_nodes)
            free.subtract(places.kept_for(nodes, self.place_of, self.leaving_nodes, owner_at).values())
            node = places.choose(free)
            if node is None or not any(not is_standby(name) for name in self.place_of):
                return
            self._start_standbys(node)

    async def _watch_standby(self, name: str, nonce: str, handle: ActorHandle) -> None:
        """One that waits has died, failed, or stands still: another one is started in its stead, not at once."""
        limbo_s = self.config.exchange.limbo_s
        try:
            node = await self._comes_up(name, nonce, handle)
            self.pool.here(name, node)
            self.pids[nonce] = await asyncio.wait_for(handle.pid.remote(), limbo_s), node
            why = None
            while why is None and name in self.pool.nonces:
                why = await asyncio.wait_for(handle.wait.remote(STANDBY_LOOK_S), STANDBY_LOOK_S + limbo_s)
        except (RayActorError, RayTaskError, ActorUnschedulableError) as error:
            why = reason_of(error)
        except TimeoutError as error:
            why = str(error) or f"silent for {limbo_s:g} s, limbo is over"
        if name not in self.pool.nonces or self.host.finished is not None:
            return
        log.warning("%s is gone: %s", name, why)
        self._kill(name, nonce, handle)
        self.handles.pop(nonce, None)
        await asyncio.sleep(STANDBY_AGAIN_S)
        self.pool.gone(name)
        self.place_of.pop(name, None)

    async def _comes_up(self, name: str, nonce: str, handle: ActorHandle) -> str:
        """The node of a process once it waits there; TimeoutError with the verdict on one that never does."""
        waits = asyncio.ensure_future(_answer(handle.stand_by.remote()))
        looks = asyncio.ensure_future(
            self._not_arriving(nonce, handle, lambda: name in self.pool.nonces and not waits.done())
        )
        try:
            await asyncio.wait((waits, looks), return_when=asyncio.FIRST_COMPLETED)
            if looks.done() and (verdict := looks.result()) is not None:
                raise TimeoutError(verdict[1])
            return await waits
        finally:
            waits.cancel()
            looks.cancel()

    def _let_standby(self, name: str, why: str, node: str | None) -> bool:
        """Whether a process that waits takes the island's place."""
        if OWN_PACK_LABEL in machine_labels(self.config, name):
            return False  # who waits may be on any machine
        taken = self.pool.take(self.place_of.get(name), self.leaving_nodes) if node is None else None
        if taken is None or taken[1] not in self.handles:
            return False
        waited_as, nonce, where = taken
        log.info("%s becomes %s (%s)", waited_as, name, why)
        self.place_of.pop(waited_as, None)
        if where is not None:
            self.place_of[name] = where
        if name in self.unplaced:
            self.unplaced.remove(name)
        handle = self.handles[nonce]
        spec, log_file = self._spec(name)
        self.log_of[nonce] = Path(log_file)
        handle.take_place.remote(spec, log_file)
        self._adopt(name, nonce, handle)
        return True

    def news_for(self, nonce: str, held: int, ready: bool) -> News:
        """A process that waits asks for what it lacks of the journal, and who holds which versions."""
        if ready:
            self.pool.holds(nonce)
        coordinator = self.host.coordinator
        held = min(held, coordinator.flushed + 1)
        rows = tuple(coordinator.rows[held : coordinator.flushed + 1])
        return News(rows_from=held, rows=rows, peers=coordinator.peers())


async def _answer(ref: Any) -> str:
    return str(await ref)


def new_nonce() -> str:
    """Names a process; in order of their starts."""
    return f"{time.time_ns():016x}{uuid.uuid4().hex[:16]}"


def reason_of(error: RayActorError | RayTaskError | ActorUnschedulableError) -> str:
    """What happened to an island, in one line: the exception that was raised there, or how its process ended."""
    raised = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    text = str(raised).strip().splitlines()
    return f"{type(raised).__name__}: {text[0] if text else ''}"
