"""The controller as a Ray actor: a thin shell that moves messages between processes and decides nothing.

It is detached and named, owns a `Host` and turns Ray calls into events. Like the islands (`IslandActor`) it does not
depend on its creator's life: a driver may die.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from faults.plan import PlannedFault, due
from orchestrator import places
from orchestrator.build import island_index, island_spec, run_plan
from orchestrator.config import RunConfig
from orchestrator.events import Event, FaultInjected, LeaveRequested, ProcessDied, StopRequested
from orchestrator.finish import build_summary
from orchestrator.host import Host
from orchestrator.island_actor import ContextWrapper, IslandActor, log_to
from orchestrator.keeper import Keeper
from orchestrator.lost_journal import JOURNAL_LOST, ask_copies
from orchestrator.processes import NAMESPACE, WORKER_RESOURCE, answering, find_islands, island_actor_name, worker_nodes
from orchestrator.rundir import RunDir
from orchestrator.segments import segment_paths
from orchestrator.summary import save_summary
from workers.messages import Batch, Envelope
from workers.records import FaultRecord

TICK_S = 0.1
LOOK_S = 1.0
WATCH_S = 60.0
GOODBYE_S = 10.0
LINGER_S = 300.0
# Errors of the user's settings or loop: a replacement would end the same way.
HOPELESS = ("DataError", "LoopError", "ModelError")

log = logging.getLogger("atoll.controller")


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class ControllerActor(Keeper):
    """One run's controller: an event loop around a `Host`."""

    def __init__(
        self,
        config_tables: dict[str, Any],
        run_id: str,
        run_dir: str,
        pack: str | None,
        token: str,
        faults: list[PlannedFault],
        resume: bool,
        wrap: ContextWrapper | None = None,
    ) -> None:
        """Keeps the arguments; `begin` does the work. Runs again after a restart by Ray, with the same arguments."""
        self.run_dir, self.run_id, self.token = Path(run_dir), run_id, token
        self.pack = Path(pack) if pack is not None else None
        log_to(self.run_dir / "logs" / "controller.log")
        self.config = RunConfig.model_validate(config_tables)
        self.faults = list(faults)
        self.resume, self.wrap = resume, wrap
        self.handles: dict[str, ActorHandle] = {}
        self.nonce_of: dict[str, str] = {}
        self.place_of: dict[str, str] = {}  # island -> node
        self.unplaced: list[str] = []  # islands that lost their place, and wait for another
        self.leaving_nodes: set[str] = set()
        self.begun: set[str] = set()
        self.sent_away: set[str] = set()  # islands that were asked to leave by name: nobody takes their places
        self.log_of, self.pids = {}, {}
        self.looked_s = float("-inf")
        self.tasks: set[asyncio.Task[None]] = set()
        self.watches: dict[str, asyncio.Task[None]] = {}
        self.spoke: set[str] = set()
        self.over = asyncio.Event()
        self.concluding = False
        self.failure = ""
        self.host = Host(
            plan=run_plan(self.config, run_id=run_id, pack=self.pack),
            run_dir=self.run_dir,
            controller=uuid.uuid4().hex[:12],
            clock=time.monotonic,
            deliver=self._deliver,
            spawn=self._spawn,
            end=self._end,
        )
        self.began = self.lost_journal = False
        self.own = ExitStack()

    async def begin(self) -> None:
        """Open the journal and start the islands; idempotent. A restarted controller finds them already there.

        Raises what makes the journal unusable (`JournalError`); every later call then says that the run failed.
        """
        if self.began:
            return
        self.began = True
        reborn = ray.get_runtime_context().was_current_actor_reconstructed
        if reborn and not segment_paths(self.run_dir):
            self.lost_journal = True
            log.error("the journal is gone: %s", JOURNAL_LOST.format(run_id=self.run_id))
            return
        try:
            self._own_directory()
            self.host.open()
        except (ValueError, OSError) as error:
            log.error("the journal cannot be taken over: %s", error)
            self.failure = str(error)
            self.over.set()
            raise
        with _must_not_fail():
            if reborn:
                self._forget_injected()
                self._find_islands()
            elif not self.config.run.elastic:
                for name in self.host.plan.islands:
                    self._spawn(name, "start")
        self._task(self._pulse())

    def _forget_injected(self) -> None:
        """Faults that an earlier life injected are not injected again."""
        records = [row.record for row in self.host.journal.rows]
        done = [(r.fault, r.member) for r in records if isinstance(r, FaultRecord) and r.injected]
        for fault in list(self.faults):
            if (fault.kind, fault.member) in done:
                done.remove((fault.kind, fault.member))
                self.faults.remove(fault)

    def _find_islands(self) -> None:
        """After a restart: adopt each island's newest process, end older ones, replace those that are gone."""
        found: dict[str, list[str]] = {}
        for name, nonce in find_islands(self.run_id):
            found.setdefault(name, []).append(nonce)
        expected = () if self.config.run.elastic else self.host.plan.islands
        for name in {*expected, *found, *self.host.coordinator.state.current}:
            newest = max(found.get(name, []), default=None)
            for nonce in found.get(name, ()):
                handle = ray.get_actor(island_actor_name(self.run_id, name, nonce), namespace=NAMESPACE)
                if nonce == newest:
                    self._adopt(name, nonce, handle)
                else:
                    ray.kill(handle)
            if newest is None:
                self.host.handle(ProcessDied(name=name, nonce=None, why="it was gone when the controller came back"))

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _pulse(self) -> None:
        while self.host.finished is None and self.host.died is None:
            await asyncio.sleep(TICK_S)
            with _must_not_fail():
                self.host.tick()
                self._inject()
                self._conclude_if_over()
            if self.config.run.elastic and time.monotonic() - self.looked_s >= LOOK_S:
                self.looked_s = time.monotonic()
                await self._look()

    async def _look(self) -> None:
        """Islands for machines that have come; those whose machine is gone wait for another one."""
        in_thread = asyncio.get_running_loop().run_in_executor
        total, available = await in_thread(None, worker_nodes, self.config.run.labels)
        nodes = places.without_others(total, available, self.place_of)
        free = places.free_places(nodes, self.place_of, self.leaving_nodes)
        silent = set(free) - await in_thread(None, answering, set(free)) if free else set()
        with _must_not_fail():
            if self.concluding or self.host.coordinator.stopping is not None:
                return
            if any(name not in self.place_of for name in self.nonce_of):
                return  # processes found after a restart have not said yet where they are
            for name in places.displaced(self.place_of, total):
                if name not in self.nonce_of:  # given up: its place is not needed any more
                    del self.place_of[name]
                elif self.nonce_of[name] not in self.begun:  # of those that have begun Ray tells when they die
                    self._spawn(name, "its machine went before it began")
            there = {node: num for node, num in nodes.items() if node not in silent}
            for name, node in places.fill(there, self.place_of, self.leaving_nodes, self.unplaced):
                if name in self.unplaced:
                    self.unplaced.remove(name)
                self._spawn(name, f"node {node[:8]} has a place", node=node)

    # ------------------------------------------------------------ events

    async def receive(self, envelope: Envelope) -> None:
        """An envelope from a member."""
        await self.begin()
        with _must_not_fail():
            if not self.over.is_set() and self.host.died is None and not self.lost_journal:
                self.spoke.add(self.nonce_of.get(envelope.name, ""))
                self.host.receive(envelope)
                self._conclude_if_over()

    def _do(self, event: Event) -> None:
        with _must_not_fail():
            self.host.handle(event)
            self._conclude_if_over()

    async def stop(self, save: bool = True) -> None:
        """The user wants the run to stop."""
        await self.begin()
        with _must_not_fail():
            if self.host.finished is None and self.host.died is None and not self.lost_journal:
                self.host.handle(StopRequested(save=save))
                self._conclude_if_over()

    async def leave(
        self, members: list[str] | str, node: str | None = None, at_once: bool = False
    ) -> dict[str, list[str]]:
        """Let islands go: `members` by name, and all of a node, which gets no new ones. Call until `leaving` is empty.

        They finish their step and hand over what they have; `at_once`: they are killed. Returns `leaving`, the names
        that are still there, and `unknown`, names that this run never had.
        """
        await self.begin()
        members = [members] if isinstance(members, str) else members
        if self.lost_journal:
            return {"leaving": [], "unknown": []}
        with _must_not_fail():
            known = {*self.nonce_of, *self.host.coordinator.state.last_incarnation}
            names = [name for name in members if name in known]
            self.sent_away.update(names)
            if node is not None:
                self.leaving_nodes.add(node)
                names += [name for name, place in self.place_of.items() if place == node and name not in names]
            if self.host.finished is None and self.host.died is None:
                for name in names:
                    self._let_leave(name, "its machine leaves" if name not in members else "asked to", at_once)
                self._conclude_if_over()
            return {
                "leaving": sorted(name for name in names if name in self.nonce_of),
                "unknown": [name for name in members if name not in known],
            }

    def _let_leave(self, name: str, why: str, at_once: bool) -> None:
        nonce = self.nonce_of.get(name)
        if nonce is None:
            return
        if name not in self.host.coordinator.state.current:  # it has not joined yet: there is nothing to hand over
            self._end(name, nonce)
            return
        self.host.handle(LeaveRequested(name=name, why=why))
        if at_once and nonce in self.handles:
            ray.kill(self.handles[nonce])

    async def recover(self, force: bool) -> int:
        """The journal is gone: rebuild it from the members' copies and go on; returns the rows that it has.

        Raises JournalError if too few of them agree; they train on then, up to their bound, and it can be tried again.
        """
        await self.begin()
        if not self.lost_journal:
            return len(self.host.journal.rows)
        handles = {
            name: ray.get_actor(island_actor_name(self.run_id, name, nonce), namespace=NAMESPACE)
            for name, nonce in sorted(find_islands(self.run_id))  # of several processes of an island, the newest
        }
        rebuild = functools.partial(self.host.rebuild, functools.partial(ask_copies, handles), force=force)
        journal = await asyncio.get_running_loop().run_in_executor(None, rebuild)
        with _must_not_fail():
            RunDir(self.run_dir).record(self.config.to_toml())
            self._own_directory()
            self.host.go_on(journal)
            self.lost_journal = False
            log.warning("the journal was rebuilt from the members' copies: %d rows", len(journal.rows))
            self._forget_injected()
            self._find_islands()
        self._task(self._pulse())
        return len(journal.rows)

    async def wait(self, timeout_s: float) -> dict[str, Any]:
        """Status, as soon as the run is over or after `timeout_s`."""
        await self.begin()
        try:
            await asyncio.wait_for(self.over.wait(), timeout_s)
        except TimeoutError:
            pass
        return self.status()

    def status(self) -> dict[str, Any]:
        """A small view of the run for whoever watches it."""
        if self.failure:
            return {"over": True, "reason": "failed", "detail": self.failure}
        if self.lost_journal:
            return {"over": False, "reason": None, "lost": JOURNAL_LOST.format(run_id=self.run_id)}
        coordinator = self.host.coordinator
        finished = self.host.finished
        latest = coordinator.state.evaluations[-1].val_loss if coordinator.state.evaluations else None
        return {
            "over": self.over.is_set(),
            "reason": finished.reason if finished else None,
            "detail": finished.detail if finished else "",
            "seconds": coordinator.seconds(),
            "progress": coordinator.progress(),
            "tokens": coordinator.state.samples_committed() * self.host.plan.seq_len,
            "rounds": coordinator.state.heads[0].version.n if coordinator.state.heads else 0,
            "val_loss": latest,
            "evaluations": len(coordinator.state.evaluations),
            "members": {
                str(member): {"status": process.status, "steps": process.hello.steps if process.hello else 0}
                for member, process in sorted(coordinator.roll.processes.items())
            },
            "faults": len(coordinator.faults),
            "left": sorted(coordinator.away_since),
            "run": self.run_id,
            "run_dir": str(self.run_dir),
            "paused": coordinator.state.paused,
            "settings": coordinator.state.settings.newest(),
            "unfired": [str(fault) for fault in self.faults],
        }

    # ------------------------------------------------------------ commands

    def _deliver(self, batch: Batch) -> None:
        nonce = self.nonce_of.get(batch.name)
        if nonce is not None:
            self.handles[nonce].deliver.remote(batch)

    def _spawn(self, name: str, why: str, node: str | None = None) -> None:
        """A new process for an island: on `node`, or where Ray likes; in an elastic run in the next free place."""
        old = self.nonce_of.pop(name, None)
        if old is not None and old in self.handles:
            ray.kill(self.handles.pop(old))
        if self.config.run.elastic and node is None:
            self.place_of.pop(name, None)
            if name not in self.unplaced:
                self.unplaced.append(name)
            self.looked_s = float("-inf")
            log.info("%s needs a place: %s", name, why)
            return
        strategy: Any = None
        if node is not None:
            self.place_of[name] = node
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        spec = island_spec(
            self.config,
            island_index(name),
            run_id=self.run_id,
            run_dir=self.run_dir,
            pack=self.pack,
            resume=self.resume,
        )
        nonce = f"{time.time_ns():016x}{uuid.uuid4().hex[:16]}"  # in order of their starts
        life = self.host.coordinator.state.last_incarnation.get(name, 0) + 1
        self.log_of[nonce] = self.run_dir / "logs" / f"{name}-{life}.log"
        handle = IslandActor.options(
            name=island_actor_name(self.run_id, name, nonce),
            namespace=NAMESPACE,
            lifetime="detached",
            resources={WORKER_RESOURCE: 1},
            scheduling_strategy=strategy,
            label_selector=dict(self.config.run.labels) if node is None else None,
        ).remote(spec, nonce, self.token, str(self.log_of[nonce]), self.wrap)
        log.info("starting %s (%s)", name, why)
        self._adopt(name, nonce, handle)

    def _adopt(self, name: str, nonce: str, handle: ActorHandle) -> None:
        self.handles[nonce] = handle
        self.nonce_of[name] = nonce
        self.watches[nonce] = self._task(self._watch(name, nonce, handle))

    async def _watch(self, name: str, nonce: str, handle: ActorHandle) -> None:
        """Learn of a process's death within milliseconds: its pending call fails."""
        try:
            node = await handle.begin.remote()
            self.begun.add(nonce)
            await self._look_after(nonce, handle)
            if self.nonce_of.get(name) == nonce:
                self.place_of[name] = node
            why, raised = None, True
            while why is None:
                why = await handle.wait.remote(WATCH_S)
        except (RayActorError, RayTaskError, ActorUnschedulableError) as error:
            why, raised = _reason(error), isinstance(error, RayTaskError)
        if self.nonce_of.get(name) != nonce or self.host.finished is not None or not why:
            return
        ray.kill(handle)  # where training failed, the process is still there
        self.nonce_of.pop(name, None)
        self.handles.pop(nonce, None)
        with _must_not_fail():
            hopeless = why.partition(":")[0] in HOPELESS
            self.host.handle(ProcessDied(name=name, nonce=None, why=why, raised=raised, hopeless=hopeless))
            self._conclude_if_over()

    def _end(self, name: str, nonce: str) -> None:
        process = nonce.split("+")[0]
        if self.nonce_of.get(name) == process:
            del self.nonce_of[name]
            if name not in self.sent_away:
                self.place_of.pop(name, None)
        handle = self.handles.pop(process, None)
        if handle is not None:
            ray.kill(handle)

    def _inject(self) -> None:
        heads = self.host.coordinator.state.heads
        if not self.faults or not heads:
            return
        for fault in due(self.faults, heads[0].version.n):
            nonce = self.nonce_of.get(fault.member)
            if nonce is None:
                continue
            self.faults.remove(fault)
            log.warning("injecting %s", fault)
            self.host.handle(FaultInjected(fault=fault.kind, member=fault.member))
            self.handles[nonce].die.remote(int(signal.SIGKILL))

    def _conclude_if_over(self) -> None:
        if self.host.died is not None:
            log.error("this controller ends: %s", self.host.died.why)
            os._exit(0)
        if self.host.finished is not None and not self.concluding:
            self.concluding = True
            self._task(self._conclude())

    async def _conclude(self) -> None:
        """The run is over: let the members finish, write the summary, close the journal."""
        with _must_not_fail():
            waits = [self.watches[nonce] for nonce in self.handles if nonce in self.spoke]
            if waits:
                await asyncio.wait(waits, timeout=GOODBYE_S)
            save_summary(build_summary(self.host, self.config), self.run_dir)
            self.host.close()
            for handle in self.handles.values():
                ray.kill(handle)
            # What is left to be told is told by then: whoever watches ends this process.
            await asyncio.get_running_loop().run_in_executor(None, self.own.close)
            self.over.set()
        await asyncio.sleep(LINGER_S)  # whoever watches ends this process before
        ray.kill(ray.get_runtime_context().current_actor)


@contextmanager
def _must_not_fail() -> Iterator[None]:
    """Whatever goes wrong in here, or a journal that cannot be trusted, ends this process: the next life replays it."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done and not isinstance(sys.exc_info()[1], asyncio.CancelledError):
            log.exception("this controller ends")
            logging.shutdown()
            os._exit(1)


def _reason(error: RayActorError | RayTaskError | ActorUnschedulableError) -> str:
    """What happened to an island, in one line: the exception that was raised there, or how its process ended."""
    raised = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    text = str(raised).strip().splitlines()
    return f"{type(raised).__name__}: {text[0] if text else ''}"
