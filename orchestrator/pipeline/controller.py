"""The controller of a pipeline as a Ray actor: a shell of `PipelineBrain` that decides nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError

from faults.lab.schedule import LinkChange
from faults.plan import PlannedFault
from faults.process import JumpClock
from orchestrator.actor_tools import must_not_fail, through_cuts
from orchestrator.alarms import Alarm, Alarms
from orchestrator.config import RunConfig
from orchestrator.ending import make_sure
from orchestrator.events import FaultNoticed, LeaveRequested
from orchestrator.hands import new_nonce, reason_of
from orchestrator.island_actor import log_to
from orchestrator.journal import open_segment
from orchestrator.pipeline.actors import StagePeerActor, TrainerActor
from orchestrator.pipeline.brain import PipelineBrain
from orchestrator.pipeline.commands import (
    Answered,
    Command,
    Died,
    End,
    Event,
    Failed,
    Finish,
    GoBack,
    Heard,
    Joined,
    Order,
    Rebalance,
    Sealed,
    Start,
    StepDone,
    Stop,
    Tell,
    Tick,
    Write,
)
from orchestrator.pipeline.controls import PipelineControls
from orchestrator.pipeline.figures import Figures, seconds_so_far
from orchestrator.pipeline.keeper import FITS_NO_STAGE
from orchestrator.pipeline.plan import pipeline_plan, pipeline_spec
from orchestrator.pipeline.replay import PipelineHistory, replay, seal, set_aside
from orchestrator.pipeline.rounds import resumed_brain
from orchestrator.pipeline.site import PipelineInjector, PipelineSite
from orchestrator.pipeline.telemetry import PipelineAlarms, PipelineTelemetry
from orchestrator.processes import NAMESPACE, WORKER_RESOURCE, find_islands, island_actor_name
from orchestrator.rundir import RunDir, RunDirInUse
from orchestrator.summary import save_summary
from workers.data.index import load_index
from workers.pipeline.messages import FromTrainer, Ping, Probe, Reduce, Spread, TakeStage
from workers.records import FaultRecord, Record

TICK_S = 0.1
WATCH_S = 30.0
FIGURES_S = 5.0
LINGER_S = 300.0
BEGIN_AGAIN_S = 1.0

log = logging.getLogger("atoll.controller")


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class PipelineActor(PipelineControls):
    """One run's controller: an event loop around a `PipelineBrain` and its journal."""

    def __init__(
        self,
        config_tables: dict[str, Any],
        run_id: str,
        run_dir: str,
        pack: str,
        token: str,
        faults: list[PlannedFault | LinkChange],
        resume: bool,
    ) -> None:
        """Keeps the arguments; `begin` does the work. Runs again after a restart by Ray, with the same arguments."""
        self.run_dir, self.run_id, self.token, self.resumes = Path(run_dir), run_id, token, resume
        log_to(self.run_dir / "logs" / "controller.log")
        log.info("the controller of %s is process %d on %s", run_id, os.getpid(), platform.node())
        self.config = RunConfig.model_validate(config_tables)
        self.pack = Path(pack)
        self.spec = pipeline_spec(self.config, run_id=run_id, run_dir=self.run_dir, pack=self.pack)
        self.planned = faults
        self.handles = {}  # process -> nonce, actor
        self.pids, self.nodes, self.labels, self.log_of = {}, {}, {}, {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.over = asyncio.Event()
        self.began = False
        self.here: set[str] = set()  # processes that have begun
        self.failure = ""
        self.finished = None
        seq_len = load_index(self.pack).seq_len
        self.figures = Figures(self.config, self.spec, RunDir(self.run_dir), seq_len)
        self.telemetry = PipelineTelemetry(self.config, self.run_dir, self.figures, seq_len=seq_len)
        self.alarms: PipelineAlarms | None = None
        self.tell: Callable[[Alarm], None] = lambda alarm: None
        self.clock = JumpClock(time.monotonic)
        self.started_s = self.clock() - seconds_so_far(self.run_dir)
        self.own = ExitStack()

    # ------------------------------------------------------------ beginning

    async def begin(self) -> None:
        """Open the journal and start the processes, or find them again; idempotent."""
        if self.began:
            return
        self.began = True
        reborn = ray.get_runtime_context().was_current_actor_reconstructed
        self._own_directory()
        try:
            self.journal = open_segment(self.run_dir, controller=uuid.uuid4().hex[:12])
            history = replay(row.record for row in self.journal.rows)
            self.brain = self._make_brain(history, reborn=reborn)
        except (ValueError, OSError) as error:
            log.error("the journal cannot be taken over: %s", error)
            self.failure = str(error)
            self.over.set()
            raise
        with must_not_fail():
            self.injector = PipelineInjector(
                self.planned,
                PipelineSite(lambda: self.brain, self.journal, self._now_s, self._do),
                self.clock,
                self._actors,
                lambda: str(ray.get_runtime_context().gcs_address),
                addresses=lambda: self.brain.roster.at(),
            )
            self.injector.resume()
            self.telemetry.open()
            starts = self.brain.begin(self._now_s())
            found = dict(sorted(find_islands(self.run_id)))  # of several processes of one name, the newest
            handles = {
                process: ray.get_actor(island_actor_name(self.run_id, process, nonce), namespace=NAMESPACE)
                for process, nonce in found.items()
            }
            if history.goes_back_to is not None:  # what they hold is of versions that are no more
                for handle in handles.values():
                    ray.kill(handle)
                handles = {}
            for process, handle in handles.items():
                self._adopt(process, found[process], handle)
            self._obey(start for start in starts if isinstance(start, Start) and start.process not in handles)
            if reborn:
                why = "it has taken over its journal"
                self._do(FaultNoticed(fault="controller_restarted", member="controller", detail=why))
        self._task(self._pulse())
        self._task(self._ask_figures())

    def _own_directory(self) -> None:
        try:
            self.own.enter_context(RunDir(self.run_dir).lock(RunDir(self.run_dir).controller_lock))
        except RunDirInUse as error:
            log.warning("%s", error)
        if self.config.notify.command is not None:
            self.alarms = PipelineAlarms(Alarms(self.config.notify, num_islands=0))
            self.tell = self._notifier(self.config.notify).tell

    def _actors(self) -> dict[str, ActorHandle]:
        """Processes that have begun."""
        return {process: handle for process, (_, handle) in self.handles.items() if process in self.here}

    def _make_brain(self, history: PipelineHistory, *, reborn: bool) -> PipelineBrain:
        plan = pipeline_plan(self.config, self.spec, self.run_dir)
        if history.goes_back_to is not None:
            set_aside(plan.snapshots, history.version)
        if reborn:
            log.info("took over the journal at version %d", history.version)
        return resumed_brain(plan, history, reborn=reborn)

    def _now_s(self) -> float:
        return self.clock() - self.started_s

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _pulse(self) -> None:
        while self.finished is None:
            await asyncio.sleep(TICK_S)
            self._do(Tick())
            with must_not_fail():
                if self.finished is None:
                    self.injector.tick()
                    self.telemetry.tick(self.brain, self._now_s())
                    if self.alarms is not None:
                        self._alarm(self.alarms.on_time(self.brain, self._now_s()))

    async def _ask_figures(self) -> None:
        while self.finished is None:
            await asyncio.sleep(FIGURES_S)
            await self._collect_figures()

    # ------------------------------------------------------------ events

    def _do(self, event: Event) -> None:
        if self.finished is not None:
            return
        with must_not_fail():
            self._obey(self.brain.handle(event, self._now_s()))

    async def hear(self, process: str, nonce: str, message: FromTrainer) -> None:
        """A trainer says something."""
        await self.begin()
        self._do(Heard(process=process, nonce=nonce, message=message))

    async def stop(self, save: bool = True) -> None:
        """The user wants the run to stop."""
        await self.begin()
        if self.brain.stopping is None or not save:
            self._do(Stop(save=save))

    async def leave(
        self, members: list[str] | str, node: str | None = None, at_once: bool = False
    ) -> dict[str, list[str]]:
        """Let processes go: `members` by name, and all of a node. Call until `leaving` is empty.

        They finish the step and hand over; `at_once`: they are killed, and others take their work over. Returns
        `leaving`, those that are still there, and `unknown`, names that this run does not have.
        """
        await self.begin()
        members = [members] if isinstance(members, str) else members
        plan = self.brain.plan
        known = {*plan.peers, *plan.trainers}
        names = [name for name in members if name in known]
        if node is not None and self._can_do_without(node):
            names += [name for name, at in self.nodes.items() if at == node and name not in names]
        for name in names:
            if name in self.handles:
                self._do(LeaveRequested(name=name, why="asked to" if name in members else "its machine leaves"))
                if at_once and name in self.handles:
                    ray.kill(self.handles[name][1])
        if waiting := {name: why for name, why in self.brain.waiting.items() if name in names}:
            log.info("still to leave: %s", waiting)
        return {
            "leaving": sorted(name for name in names if name in self.handles and self.finished is None),
            "unknown": [name for name in members if name not in known],
        }

    def _can_do_without(self, node: str) -> bool:
        """Whether processes elsewhere could serve every stage; else what is on a machine ends with it, unasked."""
        rest = [name for name in self.handles if self.nodes.get(name) != node]
        peers = [name for name in rest if name in self.brain.plan.peers]
        if can := len(peers) >= self.brain.layout.num_stages and len(rest) > len(peers):
            return can
        log.warning("nobody elsewhere could take over what is on node %s: it ends with it", node)
        return False

    async def rebalance(self) -> dict[str, Any]:
        """Look at the loads now; returns the newest reason, and the move if one is under way."""
        await self.begin()
        self._do(Rebalance())
        claim = self.brain.rebalancer.open
        return {"reason": self.brain.why_no_move, "move": None if claim is None else claim.move.peer}

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
        finished = self.finished if self.over.is_set() else None
        told = self.figures.status(self.brain, self._now_s())
        return {
            **told,
            "over": self.over.is_set(),
            "reason": finished.reason if finished else None,
            "detail": finished.detail if finished else "",
            "run": self.run_id,
            "run_dir": str(self.run_dir),
            "pids": dict(self.pids),
            "unfired": self.injector.unfired(),
            "metrics": self.telemetry.told,
        }

    # ------------------------------------------------------------ commands

    def _obey(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case Write(records=records):
                    self.journal.append(records)
                    self._written(records)
                case Start(process=process, why=why):
                    self._start(process, why)
                case End(process=process, nonce=nonce):
                    self._end_for_good(process, nonce)
                case Order():
                    self._task(self._order(command))
                case Tell(process=process, nonce=nonce, message=message):
                    if self._is(process, nonce):
                        self.handles[process][1].deliver.remote(message)
                case StepDone():
                    self.figures.step_done(command, self.brain, self._now_s())
                    self.telemetry.step_done(command, self.brain)
                    if self.alarms is not None:
                        self._alarm(self.alarms.on_step(command, self._now_s()))
                case Sealed():
                    seal(command, keep=self.config.run.keep_anchors)
                case GoBack():
                    self._go_back()
                case Finish():
                    self.finished = command
                    for fault in self.injector.unfired():
                        log.warning("%s did not happen: the run was over before", fault)
                    self._task(self._conclude(command))

    def _written(self, records: Sequence[Record]) -> None:
        """Rows are durable: whoever wants to be told is told."""
        self.telemetry.records(records, self.brain)
        for record in records:
            if isinstance(record, FaultRecord) and record.fault == FITS_NO_STAGE:
                log.warning("%s: %s", record.member, record.detail)
            if isinstance(record, FaultRecord) and record.injected and record.member in self.handles:
                self.figures.injected(record.fault, record.member, self._now_s())
        if self.alarms is not None:
            self._alarm(self.alarms.on_records(records, self._now_s()))

    def _alarm(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self.tell(alarm)

    def _go_back(self) -> None:
        """A rollback is on the record: other processes begin at its snapshot."""
        for process, (nonce, _) in list(self.handles.items()):
            self._end_for_good(process, nonce)
        history = replay(row.record for row in self.journal.rows)
        log.warning("the run goes back to %s", history.goes_back_to)
        self.brain = self._make_brain(history, reborn=False)
        self._obey(self.brain.begin(self._now_s()))

    def _is(self, process: str, nonce: str) -> bool:
        return process in self.handles and self.handles[process][0] == nonce

    def _start(self, process: str, why: str) -> None:
        nonce = new_nonce()
        kind = TrainerActor if process.startswith("trainer-") else StagePeerActor
        life = self.brain.roster.incarnations.get(process, 0) + 1
        log_file = self.run_dir / "logs" / f"{process}-{life}.log"
        log.info("starting %s (%s)", process, why)
        handle = kind.options(  # type: ignore[attr-defined]
            name=island_actor_name(self.run_id, process, nonce),
            namespace=NAMESPACE,
            lifetime="detached",
            resources={WORKER_RESOURCE: 1},
            label_selector=dict(self.config.run.labels),
        ).remote(self.spec, process, nonce, self.token, str(log_file))
        self._adopt(process, nonce, handle)

    def _adopt(self, process: str, nonce: str, handle: ActorHandle) -> None:
        self.handles[process] = (nonce, handle)
        self._task(self._watch(process, nonce, handle))

    async def _watch(self, process: str, nonce: str, handle: ActorHandle) -> None:
        """Learn of a process's death within milliseconds: its pending call fails."""
        try:
            present = await through_cuts(handle.begin.remote, None, process)
            if not self._is(process, nonce):
                return
            self.figures.joined(self._now_s())
            self.pids[process], written = present.pop("pid"), Path(present.pop("log"))
            name, _, life = written.stem.rpartition("-")
            self.labels[process], self.log_of[nonce] = f"{name}.{life}", self.run_dir / "logs" / written
            self.here.add(process)
            self._do(Joined(**present))
            self.injector.greet(process)
            self._task(self._collect_log(nonce, handle))
            node = self.nodes[process] = present["node"]
            damage = ""
            while self._is(process, nonce) and not damage:
                damage = await through_cuts(lambda: handle.wait.remote(WATCH_S), node, process)
            if not damage:
                return
            why = damage
        except (RayActorError, RayTaskError, ActorUnschedulableError) as error:
            why, damage = reason_of(error), ""
        if not self._is(process, nonce) or self.finished is not None:
            return
        ray.kill(handle)
        self._forget(process)
        self.figures.died(process, self._now_s())
        log.warning("%s is gone: %s", process, why)
        self._do(Died(process=process, nonce=nonce, why=why, damaged=bool(damage)))

    def _forget(self, process: str) -> ActorHandle:
        self.here.discard(process)
        return self.handles.pop(process)[1]

    def _end(self, process: str, nonce: str) -> None:
        if self._is(process, nonce):
            ray.kill(self._forget(process))
            self.figures.gone(process)

    def _end_for_good(self, process: str, nonce: str) -> None:
        """End a process that hangs: it may be stopped, and would keep its memory for ever."""
        if self._is(process, nonce):
            self._end(process, nonce)
            if process in self.nodes:
                self._task(make_sure(process, self.pids[process], self.nodes[process]))

    async def _order(self, command: Order) -> None:
        """Have a peer obey; an answer that never comes is no matter: the process is dead, and the controller hears."""
        if not self._is(command.process, command.nonce):
            return
        handle, brain = self.handles[command.process][1], self.brain
        call = handle.work if isinstance(command.order, Probe | TakeStage | Reduce | Spread) else handle.obey
        try:
            answer = await (handle.ping.remote() if isinstance(command.order, Ping) else call.remote(command.order))
        except (RayActorError, RayTaskError) as error:
            why = reason_of(error)
            log.info("%s did not obey %s: %s", command.process, type(command.order).__name__, why)
            event: Event = Failed(ticket=command.ticket, why=why)
        else:
            event = Answered(ticket=command.ticket, answer=answer)
        if self.brain is brain:  # the tickets of the one before a rollback are others
            self._do(event)

    async def _conclude(self, finish: Finish) -> None:
        """The run is over: summary, journal, processes."""
        with must_not_fail():
            await self._collect_figures()
            rows = self.journal.rows
            history = replay(row.record for row in rows)
            summary = self.figures.summary(
                self.brain,
                finish,
                self._now_s(),
                run_id=self.run_id,
                history=history,
                num_rows=len(rows),
                last_hash=rows[-1].hash,
            )
            await asyncio.get_running_loop().run_in_executor(None, self.telemetry.stop)
            save_summary(summary, self.run_dir)
            self.journal.close(merge=True)
            for process, (nonce, _) in list(self.handles.items()):
                self._end(process, nonce)
            # What is left to be told is told by then: whoever watches ends this process.
            await asyncio.get_running_loop().run_in_executor(None, self.own.close)
            self.over.set()
        await asyncio.sleep(LINGER_S)  # whoever watches ends this process before
        ray.kill(ray.get_runtime_context().current_actor)

    async def _collect_figures(self) -> None:
        calls = {
            process: handle.figures.remote()
            for process, (_, handle) in self.handles.items()
            if not process.startswith("trainer-")
        }
        for process, call in calls.items():
            try:
                self.figures.of_peer(process, await asyncio.wait_for(call, 5.0))
            except (RayActorError, RayTaskError, TimeoutError) as error:
                log.info("no figures of %s: %s", process, error)
