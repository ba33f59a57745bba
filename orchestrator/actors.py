"""The controller as a Ray actor: a thin shell that moves messages between processes and decides nothing.

It is detached and named, owns a `Host` and turns Ray calls into events. Like the islands (`IslandActor`) it does not
depend on its creator's life: a driver may die.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import platform
import time
import uuid
from collections.abc import Coroutine
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from faults.lab.schedule import LinkChange
from faults.plan import FaultPlanError, PlannedFault
from faults.process import JumpClock
from orchestrator import places
from orchestrator.actor_tools import must_not_fail, through_cuts
from orchestrator.build import OWN_PACK_LABEL, run_plan
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.events import Event, FaultNoticed, LeaveRequested, ProcessDied, StopRequested
from orchestrator.fault_plan import own_code_of
from orchestrator.finish import build_summary
from orchestrator.hands import WATCH_S, Hands, new_nonce, reason_of
from orchestrator.host import Host
from orchestrator.injector import Injector, IslandSite
from orchestrator.island_actor import ContextWrapper, log_to
from orchestrator.keeper import Keeper
from orchestrator.lost_journal import JOURNAL_DAMAGED, JOURNAL_LOST, ask_copies, set_aside_damaged
from orchestrator.membership import process_of
from orchestrator.processes import (
    NAMESPACE,
    answering,
    find_islands,
    island_actor_name,
    label_of_nodes,
    worker_nodes,
)
from orchestrator.rundir import RunDir
from orchestrator.segments import JournalError, segment_paths
from orchestrator.standby import StandbyPool, status_of
from orchestrator.summary import save_summary
from orchestrator.telemetry.telemetry import Telemetry
from workers.messages import Batch, Envelope, News

TICK_S = 0.1
LOOK_S = 1.0
GOODBYE_S = 10.0
LINGER_S = 300.0
# Errors of the user's settings or loop: a replacement would end the same way.
HOPELESS = ("DataError", "LoopError", "ModelError")

log = logging.getLogger("atoll.controller")


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class ControllerActor(Hands, Keeper):
    """One run's controller: an event loop around a `Host`."""

    def __init__(
        self,
        config_tables: dict[str, Any],
        run_id: str,
        run_dir: str,
        pack: str | None,
        token: str,
        faults: list[PlannedFault | LinkChange],
        resume: bool,
        wrap: ContextWrapper | None = None,
    ) -> None:
        """Keeps the arguments; `begin` does the work. Runs again after a restart by Ray, with the same arguments."""
        self.run_dir, self.run_id, self.token = Path(run_dir), run_id, token
        self.pack = Path(pack) if pack is not None else None
        log_to(self.run_dir / "logs" / "controller.log")
        log.info("the controller of %s is process %d on %s", run_id, os.getpid(), platform.node())
        self.config = RunConfig.model_validate(config_tables)
        self.clock = JumpClock(time.monotonic)
        self.resumes, self.wrap = resume, wrap
        self.handles: dict[str, ActorHandle] = {}
        self.nonce_of: dict[str, str] = {}
        self.started_as: dict[str, str] = {}  # nonce -> name of the process with Ray, where it is not its island's
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
        self.pool = StandbyPool(wanted=self.config.run.standby)
        self.over = asyncio.Event()
        self.concluding = False
        self.failure = ""
        self.host = Host(
            plan=run_plan(self.config, run_id=run_id, pack=self.pack),
            run_dir=self.run_dir,
            controller=uuid.uuid4().hex[:12],
            clock=self.clock,
            deliver=self._deliver,
            spawn=self._spawn,
            end=self._end,
        )
        site = IslandSite(self.host, own_code_of(self.config))
        self.injector = Injector(
            faults, site, self.clock, self._actors, lambda: str(ray.get_runtime_context().gcs_address)
        )
        self.telemetry = Telemetry(self.config, self.run_dir)
        self.began = self.lost_journal = self.rebuilt = self.damaged = False
        self.lost = ""
        self.own = ExitStack()

    async def begin(self) -> None:
        """Open the journal and start the islands; idempotent. A restarted controller finds them already there.

        Raises what makes the journal unusable (`JournalError`): the run failed; after a restart `recover` may mend it.
        """
        if self.began:
            return
        self.began = True
        reborn = ray.get_runtime_context().was_current_actor_reconstructed
        if reborn and not segment_paths(self.run_dir):
            self._lose_journal(JOURNAL_LOST.format(run_id=self.run_id))
            return
        outage_s = self._outage_s() if reborn else 0.0
        try:
            self._own_directory()
            self.host.open(outage_s=outage_s)
        except (ValueError, OSError) as error:
            if reborn and isinstance(error, JournalError) and error.is_damage:
                self.own.close()
                self._lose_journal(JOURNAL_DAMAGED.format(why=error.what, run_id=self.run_id), damaged=True)
                return
            log.error("the journal cannot be taken over: %s", error)
            self.failure = str(error)
            self.over.set()
            raise
        with must_not_fail():
            self.injector.resume()
            self.telemetry.start(self.host)
            if reborn:
                why = f"it was gone for {outage_s:.1f} s and has taken over its journal"
                self.host.handle(FaultNoticed(fault="controller_restarted", member="controller", detail=why))
                self._find_islands()
            elif not self.config.run.elastic:
                for name in self.host.plan.islands:
                    self._spawn(name, "start")
        self._task(self._pulse())

    def _lose_journal(self, story: str, *, damaged: bool = False) -> None:
        self.lost_journal, self.damaged, self.lost = True, damaged, story
        log.error("%s", story)

    def _outage_s(self) -> float:
        """Seconds for which there was no controller, by when the one before last wrote what islands had measured."""
        metrics = self.host.run_dir.metrics
        return max(time.time() - metrics.stat().st_mtime, 0.0) if metrics.exists() else 0.0

    def _actors(self) -> dict[str, ActorHandle]:
        """The islands' processes that have begun."""
        found = {name: self.handles.get(nonce) for name, nonce in self.nonce_of.items() if nonce in self.begun}
        return {name: handle for name, handle in found.items() if handle is not None}

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _pulse(self) -> None:
        if self.config.run.address is not None:
            self._task(self._heed_drains())
        while self.host.finished is None and self.host.died is None:
            await asyncio.sleep(TICK_S)
            with must_not_fail():
                self.host.tick()
                self.injector.tick()
                self.telemetry.tick(self.host)
                self._conclude_if_over()
                if not self.config.run.elastic:
                    self._start_standbys()
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
        own = self.config.data.per_island
        owner_at = await in_thread(None, label_of_nodes, OWN_PACK_LABEL) if own and free else {}
        owner_at = {node: name for node, name in owner_at.items() if name in own}
        with must_not_fail():
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
            self._place_standbys(there, owner_at)
            for name, node in places.fill(there, self.place_of, self.leaving_nodes, self.unplaced, own, owner_at):
                if name in self.unplaced:
                    self.unplaced.remove(name)
                self._spawn(name, f"node {node[:8]} has a place", node=node)

    # ------------------------------------------------------------ events

    async def receive(self, envelope: Envelope) -> None:
        """An envelope from a member."""
        await self.begin()
        with must_not_fail():
            if not self.over.is_set() and self.host.died is None and not self.lost_journal:
                self.spoke.add(process_of(envelope.nonce))
                self.host.receive(envelope)
                self._conclude_if_over()

    def _do(self, event: Event) -> None:
        with must_not_fail():
            self.host.handle(event)
            self._conclude_if_over()

    async def stop(self, save: bool = True) -> None:
        """The user wants the run to stop."""
        await self.begin()
        with must_not_fail():
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
        with must_not_fail():
            known = {*self.nonce_of, *self.host.coordinator.state.last_incarnation}
            names = [name for name in members if name in known]
            self.sent_away.update(names)
            if self.host.finished is None and self.host.died is None:
                for name in names:
                    self._let_leave(name, "asked to", at_once)
            if node is not None:
                names += [n for n in self._node_leaves(node, "its machine leaves", at_once) if n not in names]
            self._conclude_if_over()
            return {
                "leaving": sorted(name for name in names if name in self.nonce_of and not self.over.is_set()),
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
            self._kill(name, nonce, self.handles[nonce])

    async def recover(self, force: bool) -> int:
        """The journal is gone, or damaged: rebuild it from the members' copies and go on; returns the rows that it has.

        Raises JournalError if too few of them agree; they train on then, up to their bound, and it can be tried again.
        UserError: it is there, and nothing is to be rebuilt.
        """
        await self.begin()
        if not self.lost_journal:
            if not self.rebuilt:
                raise UserError("its journal is there, and nothing is to be rebuilt", remedy="atoll status")
            return len(self.host.journal.rows)
        if self.damaged:
            self.damaged = False
            set_aside_damaged(self.run_dir)
        handles = {
            name: ray.get_actor(island_actor_name(self.run_id, name, nonce), namespace=NAMESPACE)
            for name, nonce in sorted(find_islands(self.run_id))  # of several processes of an island, the newest
        }
        rebuild = functools.partial(self.host.rebuild, functools.partial(ask_copies, handles), force=force)
        journal = await asyncio.get_running_loop().run_in_executor(None, rebuild)
        with must_not_fail():
            RunDir(self.run_dir).record(self.config.to_toml())
            self._own_directory()
            self.host.go_on(journal)
            self.lost_journal, self.rebuilt = False, True
            log.warning("the journal was rebuilt from the members' copies: %d rows", len(journal.rows))
            self.injector.resume()
            self._find_islands()
        self._task(self._pulse())
        return len(journal.rows)

    async def standby_news(self, nonce: str, held: int, ready: bool) -> News:
        """A process that waits asks for what it lacks of the journal, and who holds which versions."""
        await self.begin()
        return self.news_for(nonce, held, ready)

    async def chaos(self, faults: list[str]) -> dict[str, Any]:
        """Cause faults now; returns `done`, as they were journalled, or `error` and nothing was caused."""
        await self.begin()
        if self.lost_journal:
            return {"done": [], "error": "the journal is gone: nothing can be written down before it happens"}
        with must_not_fail():
            if self.host.finished is not None or self.host.died is not None:
                return {"done": [], "error": "the run is over"}
            try:
                return {"done": self.injector.now(faults), "error": None}
            except (FaultPlanError, UserError) as error:
                return {"done": [], "error": getattr(error, "message", str(error)), "try": getattr(error, "remedy", "")}

    async def wait(self, timeout_s: float) -> dict[str, Any]:
        """Status, as soon as the run is over or after `timeout_s`."""
        await self.begin()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), timeout_s)
        return self.status()

    def status(self) -> dict[str, Any]:
        """A small view of the run for whoever watches it."""
        if self.failure:
            return {"over": True, "reason": "failed", "detail": self.failure}
        if self.lost_journal:
            return {"over": False, "reason": None, "lost": self.lost}
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
            "params": coordinator.state.num_params,
            "rounds": coordinator.state.heads[0].version.n if coordinator.state.heads else 0,
            "val_loss": latest,
            "evaluations": len(coordinator.state.evaluations),
            "members": {
                str(member): {
                    "status": process.status,
                    "reason": process.reason,
                    "steps": process.hello.steps if process.hello else 0,
                    "step_s": process.hello.median_step_s if process.hello else 0.0,
                }
                for member, process in sorted(coordinator.roll.processes.items())
            },
            "faults": len(coordinator.faults),
            "quorum": coordinator.short_of,
            "standbys": dict(status_of(self.pool)),
            "left": sorted(coordinator.away_since),
            "run": self.run_id,
            "run_dir": str(self.run_dir),
            "paused": coordinator.state.paused,
            "settings": coordinator.state.settings.newest(),
            "unfired": self.injector.unfired(),
            "metrics": self.telemetry.told,
        }

    # ------------------------------------------------------------ commands

    def _deliver(self, batch: Batch) -> None:
        nonce = self.nonce_of.get(batch.name)
        if nonce is not None:
            self.handles[nonce].deliver.remote(batch)

    def _spawn(self, name: str, why: str, node: str | None = None) -> None:
        """A new process for an island: one that waits, or on `node`, or where Ray likes, or in the next free place."""
        old = self.nonce_of.pop(name, None)
        if old is not None and old in self.handles:
            self._kill(name, old, self.handles.pop(old))
        if self._let_standby(name, why, node):
            return
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
        spec, log_file = self._spec(name)
        nonce = new_nonce()
        self.log_of[nonce] = Path(log_file)
        log.info("starting %s (%s)", name, why)
        self._adopt(name, nonce, self._start(name, nonce, spec, log_file, strategy))

    def _adopt(self, name: str, nonce: str, handle: ActorHandle) -> None:
        self.handles[nonce] = handle
        self.nonce_of[name] = nonce
        self.watches[nonce] = self._task(self._watch(name, nonce, handle))
        self._task(self._watch_arrival(name, nonce, handle))

    async def _watch(self, name: str, nonce: str, handle: ActorHandle) -> None:
        """Learn of a process's death within milliseconds: its pending call fails."""
        try:
            node = await through_cuts(handle.begin.remote, None, name)
            self.begun.add(nonce)
            await self._look_after(name, nonce, handle, node)
            if self.nonce_of.get(name) == nonce:
                self.place_of[name] = node
            self.injector.greet(name)
            why, raised, taken = None, True, ""
            while why is None:
                why = await through_cuts(lambda: handle.wait.remote(WATCH_S), node, name)
        except (RayActorError, RayTaskError, ActorUnschedulableError) as error:
            why, raised, taken = reason_of(error), isinstance(error, RayTaskError), self._taken(name, error)
        if self.nonce_of.get(name) != nonce or self.host.finished is not None or not why:
            return
        if nonce in self.begun:
            ray.kill(handle)  # where training failed, the process is still there
        else:
            self._kill(name, nonce, handle)
        self.nonce_of.pop(name, None)
        self.handles.pop(nonce, None)
        self.pids.pop(nonce, None)
        with must_not_fail():
            hopeless = why.partition(":")[0] in HOPELESS
            self.host.handle(ProcessDied(name=name, nonce=None, why=why, raised=raised, hopeless=hopeless, taken=taken))
            self._conclude_if_over()

    def _taken(self, name: str, error: Exception) -> Literal["", "preempted", "lost"]:
        """Whether its machine was taken away: with notice, or with everything on it."""
        if self.place_of.get(name) in self.leaving_nodes or getattr(error, "preempted", False):
            return "preempted"
        return "lost" if "node" in str(error) and "died" in str(error) and "its node" in str(error) else ""

    def _end(self, name: str, nonce: str, save_stack: bool = False) -> None:
        process = nonce.split("+")[0]
        if self.nonce_of.get(name) == process:
            del self.nonce_of[name]
            if name not in self.sent_away:
                self.place_of.pop(name, None)
        handle = self.handles.pop(process, None)
        if handle is not None and save_stack:
            self._task(self._end_after_stack(name, process, handle))
        elif handle is not None:
            self._kill(name, process, handle)

    def _conclude_if_over(self) -> None:
        if self.host.died is not None:
            log.error("this controller ends: %s", self.host.died.why)
            os._exit(0)
        if self.host.finished is not None and not self.concluding:
            self.concluding = True
            for fault in self.injector.unfired():
                log.warning("%s did not happen: the run was over before", fault)
            self._task(self._conclude())

    async def _conclude(self) -> None:
        """The run is over: let the members finish, write the summary, close the journal."""
        with must_not_fail():
            waits = [self.watches[nonce] for nonce in self.handles if nonce in self.spoke]
            if waits:
                await asyncio.wait(waits, timeout=GOODBYE_S)
            # Before the files are closed: what members still send meanwhile is written as ever.
            await asyncio.get_running_loop().run_in_executor(None, self.telemetry.stop)
            save_summary(build_summary(self.host, self.config), self.run_dir)
            self.host.close()
            await self._kill_all()
            # What is left to be told is told by then: whoever watches ends this process.
            await asyncio.get_running_loop().run_in_executor(None, self.own.close)
            self.over.set()
        await asyncio.sleep(LINGER_S)  # whoever watches ends this process before
        ray.kill(ray.get_runtime_context().current_actor)
