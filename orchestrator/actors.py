"""The two Ray actors: thin shells that move messages between processes and decide nothing.

`ControllerActor` is detached and named; it owns a `Host` and turns Ray calls into events. `IslandActor` trains on a
thread of its own while it answers control calls. Neither depends on its creator's life: a driver may die.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from faults.plan import PlannedFault, due
from orchestrator.build import island_name, island_spec, run_plan
from orchestrator.config import RunConfig
from orchestrator.events import FaultInjected, ProcessDied, StopRequested
from orchestrator.finish import build_summary
from orchestrator.host import Host
from orchestrator.summary import save_summary
from workers.context import IslandContext, IslandSpec, enter
from workers.messages import Batch, Envelope
from workers.records import FaultRecord

NAMESPACE = "atoll"
WORKER_RESOURCE = "atoll_worker"
TICK_S = 0.1
WATCH_S = 60.0
GOODBYE_S = 10.0
LINGER_S = 300.0
# Errors of the user's settings or loop: a replacement would end the same way.
HOPELESS = ("DataError", "LoopError", "ModelError")

# What a fault injector puts around an island: the context comes out with its calls wrapped. None in production.
ContextWrapper = Callable[[IslandContext], IslandContext]

log = logging.getLogger("atoll.controller")
island_log = logging.getLogger("atoll.island")


def controller_name(run_id: str) -> str:
    """Name of a run's controller in the namespace `atoll`."""
    return f"controller/{run_id}"


def island_actor_name(run_id: str, name: str, nonce: str) -> str:
    """Name of an island's process: found again after the controller was restarted."""
    return f"island/{run_id}/{name}/{nonce}"


def find_islands(run_id: str) -> list[tuple[str, str]]:
    """`(name, nonce)` of every process of a run's islands that Ray knows, in no order."""
    prefix = f"island/{run_id}/"
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return [(name.split("/")[-2], name.split("/")[-1]) for name in names if name.startswith(prefix)]


def end_processes(run_id: str) -> None:
    """Kill the controller and then the islands of a run that are left; they outlive whoever started them."""
    _kill(controller_name(run_id))
    for name, nonce in find_islands(run_id):
        _kill(island_actor_name(run_id, name, nonce))


def _kill(actor_name: str) -> None:
    try:
        ray.kill(ray.get_actor(actor_name, namespace=NAMESPACE))
    except ValueError:
        log.debug("%s is gone already", actor_name)


# Batches are delivered on a thread of their own, in order; whoever waits for the end holds a thread while it waits.
@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"control": 1, "watch": 64})
class IslandActor:
    """One island's process."""

    def __init__(
        self, spec: IslandSpec, nonce: str, token: str, log_file: str, wrap: ContextWrapper | None = None
    ) -> None:
        """Keeps the arguments; `begin` does the work."""
        self.spec, self.nonce, self.token, self.log_file, self.wrap = spec, nonce, token, log_file, wrap
        self.ended = threading.Event()
        self.failure: BaseException | None = None
        self.context: IslandContext | None = None

    @ray.method(concurrency_group="control")
    def begin(self) -> int:
        """Open the log, serve, and start the training thread; returns the process id. Idempotent."""
        if self.context is not None:
            return os.getpid()
        _log_to(Path(self.log_file))
        island_log.info("%s is process %d", self.spec.name, os.getpid())
        with _logged("the island did not start"):
            self._start()
        return os.getpid()

    def _start(self) -> None:
        import torch

        from workers.jobs import MemberStore
        from workers.memory import keep_heap
        from workers.transport.flight import FlightTransport

        keep_heap()
        torch.set_num_threads(self.spec.train.threads)
        host = ray.util.get_node_ip_address()
        store = MemberStore()
        transport = FlightTransport(store, host=host, token=self.token, num_connections=self.spec.connections)
        transport.start()
        controller = ray.get_actor(controller_name(self.spec.run_id), namespace=NAMESPACE)
        context = IslandContext(
            spec=self.spec,
            nonce=self.nonce,
            node=ray.get_runtime_context().get_node_id(),
            store=store,
            transport=transport,
            post=lambda envelope: _post(controller, envelope),
            clock=time.monotonic,
            executor=ThreadPoolExecutor(max_workers=4, thread_name_prefix="sync"),
        )
        self.context = self.wrap(context) if self.wrap is not None else context
        threading.Thread(target=self._train, name="train", daemon=True).start()

    def _train(self) -> None:
        assert self.context is not None
        from workers.loops import run_builtin_loop, run_user_loop

        try:
            with _logged("the island failed"), enter(self.context):
                if self.spec.train.loop is not None:
                    run_user_loop(self.context)
                else:
                    run_builtin_loop(self.context)
        finally:
            self.failure = sys.exc_info()[1]
            self.ended.set()

    @ray.method(concurrency_group="control")
    def deliver(self, batch: Batch) -> None:
        """A batch from the controller."""
        if self.context is not None and self.context.deliver is not None:
            self.context.deliver(batch)

    @ray.method(concurrency_group="watch")
    def wait(self, timeout_s: float) -> str | None:
        """How training ended: "" or why it failed; None if it has not after `timeout_s`.

        A caller learns of the process's death by this call.
        """
        if not self.ended.wait(timeout_s):
            return None
        return "" if self.failure is None else f"{type(self.failure).__name__}: {self.failure}"

    @ray.method(concurrency_group="watch")
    def die(self, signal_number: int) -> None:
        """Injected fault: this process sends itself a signal."""
        os.kill(os.getpid(), signal_number)


def _post(controller: ActorHandle, envelope: Envelope) -> None:
    controller.receive.remote(envelope)


def _log_to(path: Path) -> None:
    """Everything this process prints, native code included, goes to the member's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class ControllerActor:
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
        _log_to(self.run_dir / "logs" / "controller.log")
        self.config = RunConfig.model_validate(config_tables)
        self.faults = list(faults)
        self.resume, self.wrap = resume, wrap
        self.handles: dict[str, ActorHandle] = {}
        self.nonce_of: dict[str, str] = {}
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
        self.began = False

    async def begin(self) -> None:
        """Open the journal and start the islands; idempotent. A restarted controller finds them already there.

        Raises what makes the journal unusable (`JournalError`); every later call then says that the run failed.
        """
        if self.began:
            return
        self.began = True
        try:
            self.host.open()
        except (ValueError, OSError) as error:
            log.error("the journal cannot be taken over: %s", error)
            self.failure = str(error)
            self.over.set()
            raise
        with _must_not_fail():
            if ray.get_runtime_context().was_current_actor_reconstructed:
                self._forget_injected()
                self._find_islands()
            else:
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
        for name in self.host.plan.islands:
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

    # ------------------------------------------------------------ events

    async def receive(self, envelope: Envelope) -> None:
        """An envelope from a member."""
        await self.begin()
        with _must_not_fail():
            if not self.over.is_set() and self.host.died is None:
                self.spoke.add(self.nonce_of.get(envelope.name, ""))
                self.host.receive(envelope)
                self._conclude_if_over()

    async def stop(self, save: bool) -> None:
        """The user wants the run to stop."""
        await self.begin()
        with _must_not_fail():
            if self.host.finished is None and self.host.died is None:
                self.host.handle(StopRequested(save=save))
                self._conclude_if_over()

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
        }

    # ------------------------------------------------------------ commands

    def _deliver(self, batch: Batch) -> None:
        nonce = self.nonce_of.get(batch.name)
        if nonce is not None:
            self.handles[nonce].deliver.remote(batch)

    def _spawn(self, name: str, why: str) -> None:
        old = self.nonce_of.pop(name, None)
        if old is not None and old in self.handles:
            ray.kill(self.handles.pop(old))
        index = next(i for i in range(len(self.host.plan.islands)) if island_name(i) == name)
        spec = island_spec(
            self.config, index, run_id=self.run_id, run_dir=self.run_dir, pack=self.pack, resume=self.resume
        )
        nonce = f"{time.time_ns():016x}{uuid.uuid4().hex[:16]}"  # in order of their starts
        life = self.host.coordinator.state.last_incarnation.get(name, 0) + 1
        handle = IslandActor.options(
            name=island_actor_name(self.run_id, name, nonce),
            namespace=NAMESPACE,
            lifetime="detached",
            resources={WORKER_RESOURCE: 1},
        ).remote(spec, nonce, self.token, str(self.run_dir / "logs" / f"{name}-{life}.log"), self.wrap)
        log.info("starting %s (%s)", name, why)
        self._adopt(name, nonce, handle)

    def _adopt(self, name: str, nonce: str, handle: ActorHandle) -> None:
        self.handles[nonce] = handle
        self.nonce_of[name] = nonce
        self.watches[nonce] = self._task(self._watch(name, nonce, handle))

    async def _watch(self, name: str, nonce: str, handle: ActorHandle) -> None:
        """Learn of a process's death within milliseconds: its pending call fails."""
        try:
            await handle.begin.remote()
            why = None
            while why is None:
                why = await handle.wait.remote(WATCH_S)
        except (RayActorError, RayTaskError) as error:
            why = _reason(error)
        if self.nonce_of.get(name) != nonce or self.host.finished is not None or not why:
            return
        ray.kill(handle)  # where training failed, the process is still there
        self.nonce_of.pop(name, None)
        self.handles.pop(nonce, None)
        with _must_not_fail():
            hopeless = why.partition(":")[0] in HOPELESS
            self.host.handle(ProcessDied(name=name, nonce=None, why=why, hopeless=hopeless))
            self._conclude_if_over()

    def _end(self, name: str, nonce: str) -> None:
        process = nonce.split("+")[0]
        if self.nonce_of.get(name) == process:
            del self.nonce_of[name]
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


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """Whatever is raised in here is in the member's log, with its traceback, before it goes on."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            island_log.exception(what)


def _reason(error: RayActorError | RayTaskError) -> str:
    """What happened to an island, in one line: the exception that was raised there, or how its process ended."""
    raised = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    text = str(raised).strip().splitlines()
    return f"{type(raised).__name__}: {text[0] if text else ''}"
