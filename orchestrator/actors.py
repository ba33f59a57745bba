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
from concurrent.futures import ThreadPoolExecutor
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

NAMESPACE = "atoll"
WORKER_RESOURCE = "atoll_worker"
TICK_S = 0.1

log = logging.getLogger("atoll.controller")


def controller_name(run_id: str) -> str:
    """Name of a run's controller in the namespace `atoll`."""
    return f"controller/{run_id}"


def island_actor_name(run_id: str, nonce: str) -> str:
    """Name of an island's process: found again by its nonce after the controller was restarted."""
    return f"island/{run_id}/{nonce}"


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=8)
class IslandActor:
    """One island's process."""

    def __init__(self, spec: IslandSpec, nonce: str, token: str, log_file: str) -> None:
        """Keeps the arguments; `begin` does the work."""
        self.spec, self.nonce, self.token, self.log_file = spec, nonce, token, log_file
        self.ended = threading.Event()
        self.failure: BaseException | None = None
        self.context: IslandContext | None = None
        self.early: list[Batch] = []

    def begin(self) -> int:
        """Open the log, serve, and start the training thread; returns the process id."""
        _log_to(Path(self.log_file))
        import torch

        from workers.jobs import MemberStore
        from workers.transport.flight import FlightTransport

        torch.set_num_threads(self.spec.train.threads)
        host = ray.util.get_node_ip_address()
        store = MemberStore()
        transport = FlightTransport(store, host=host, token=self.token, num_connections=2)
        transport.start()
        controller = ray.get_actor(controller_name(self.spec.run_id), namespace=NAMESPACE)
        self.context = IslandContext(
            spec=self.spec,
            nonce=self.nonce,
            node=ray.get_runtime_context().get_node_id(),
            store=store,
            transport=transport,
            post=lambda envelope: _post(controller, envelope),
            clock=time.monotonic,
            executor=ThreadPoolExecutor(max_workers=4, thread_name_prefix="sync"),
        )
        threading.Thread(target=self._train, name="train", daemon=True).start()
        return os.getpid()

    def _train(self) -> None:
        assert self.context is not None
        from workers.island import load_loop, run_builtin_loop

        done = False
        try:
            with enter(self.context):
                if self.spec.train.loop is not None:
                    load_loop(self.spec.train.loop)()
                else:
                    run_builtin_loop(self.context)
            done = True
        finally:
            if not done:
                logging.getLogger("atoll.island").exception("the island failed")
                self.failure = sys.exc_info()[1]
            self.ended.set()

    def deliver(self, batch: Batch) -> None:
        """A batch from the controller."""
        if self.context is not None and self.context.deliver is not None:
            self.context.deliver(batch)

    def wait(self) -> str:
        """Return when training has ended: "" or why it failed. A caller learns of the process's death by this call."""
        self.ended.wait()
        return "" if self.failure is None else f"{type(self.failure).__name__}: {self.failure}"

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
        pack: str,
        token: str,
        faults: list[PlannedFault],
        resume: bool,
    ) -> None:
        """Takes over the journal; runs again after a restart by Ray, and then finds the islands by their nonces."""
        self.run_dir, self.pack, self.run_id, self.token = Path(run_dir), Path(pack), run_id, token
        _log_to(self.run_dir / "logs" / "controller.log")
        self.config = RunConfig.model_validate(config_tables)
        self.faults = list(faults)
        self.resume = resume
        self.handles: dict[str, ActorHandle] = {}
        self.nonce_of: dict[str, str] = {}
        self.watched: set[str] = set()
        self.spawned: dict[str, int] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.over = asyncio.Event()
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

    async def begin(self) -> bool:
        """Open the journal and start the islands; idempotent. A restarted controller finds them already there."""
        if self.began:
            return False
        self.began = True
        self.host.open()
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self._task(self._pulse())
        for name in self.host.plan.islands:
            if not (restarted and self._find(name)):
                self._spawn(name, "start")
        return True

    def _find(self, name: str) -> bool:
        """After a restart: the process of a live member, by the nonce in the journal."""
        member = self.host.coordinator.state.current.get(name)
        if member is None:
            return False
        nonce = self.host.coordinator.state.members[member].nonce
        try:
            handle = ray.get_actor(island_actor_name(self.run_id, nonce.split("+")[0]), namespace=NAMESPACE)
        except ValueError:
            return False
        self._adopt(name, nonce.split("+")[0], handle)
        return True

    def _task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _pulse(self) -> None:
        while self.host.finished is None and self.host.died is None:
            await asyncio.sleep(TICK_S)
            self.host.tick()
            self._inject()
            self._conclude_if_over()

    # ------------------------------------------------------------ events

    async def receive(self, envelope: Envelope) -> None:
        """An envelope from a member."""
        if not self.began:
            await self.begin()
        if self.host.finished is None and self.host.died is None:
            self.host.receive(envelope)
            self._conclude_if_over()

    async def stop(self, save: bool) -> None:
        """The user wants the run to stop."""
        self.host.handle(StopRequested(save=save))
        self._conclude_if_over()

    async def wait(self, timeout_s: float) -> dict[str, Any]:
        """Status, as soon as the run is over or after `timeout_s`."""
        try:
            await asyncio.wait_for(self.over.wait(), timeout_s)
        except TimeoutError:
            pass
        return self.status()

    def status(self) -> dict[str, Any]:
        """A small view of the run for whoever watches it."""
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
        handle = self.handles.get(batch.nonce.split("+")[0])
        if handle is None:
            return
        handle.deliver.remote(batch)

    def _spawn(self, name: str, why: str) -> None:
        old = self.nonce_of.pop(name, None)
        if old is not None and old in self.handles:
            ray.kill(self.handles.pop(old))
        index = next(i for i in range(len(self.host.plan.islands)) if island_name(i) == name)
        spec = island_spec(
            self.config, index, run_id=self.run_id, run_dir=self.run_dir, pack=self.pack, resume=self.resume
        )
        nonce = uuid.uuid4().hex
        life = self.host.coordinator.state.last_incarnation.get(name, 0) + 1
        handle = IslandActor.options(
            name=island_actor_name(self.run_id, nonce),
            namespace=NAMESPACE,
            lifetime="detached",
            resources={WORKER_RESOURCE: 1},
        ).remote(spec, nonce, self.token, str(self.run_dir / "logs" / f"{name}-{life}.log"))
        log.info("starting %s (%s)", name, why)
        self._adopt(name, nonce, handle)

    def _adopt(self, name: str, nonce: str, handle: ActorHandle) -> None:
        self.handles[nonce] = handle
        self.nonce_of[name] = nonce
        self._task(self._watch(name, nonce, handle))

    async def _watch(self, name: str, nonce: str, handle: ActorHandle) -> None:
        """Learn of a process's death within milliseconds: its pending call fails."""
        try:
            await handle.begin.remote()
            why = await handle.wait.remote()
        except (RayActorError, RayTaskError) as error:
            why = _first_line(error)
        if self.nonce_of.get(name) != nonce or self.host.finished is not None:
            return
        if why:
            self.nonce_of.pop(name, None)
            self.handles.pop(nonce, None)
            state = self.host.coordinator.state
            known = next((n for n in reversed(list(state.nonces)) if n.split("+")[0] == nonce), None)
            self.host.handle(ProcessDied(name=name, nonce=known or nonce, why=why))
            self._conclude_if_over()

    def _end(self, name: str, nonce: str) -> None:
        handle = self.handles.pop(nonce.split("+")[0], None)
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
        if self.over.is_set():
            return
        if self.host.died is not None:
            log.error("this controller ends: %s", self.host.died.why)
            os._exit(0)
        if self.host.finished is not None:
            self._task(self._conclude())

    async def _conclude(self) -> None:
        """The run is over: let the members finish, write the summary, close the journal."""
        if self.over.is_set() or getattr(self, "concluding", False):
            return
        self.concluding = True
        waits = [handle.wait.remote() for handle in self.handles.values()]
        if waits:
            await asyncio.wait([asyncio.wrap_future(ref.future()) for ref in waits], timeout=10.0)
        save_summary(build_summary(self.host, self.config), self.run_dir)
        self.host.close()
        for handle in self.handles.values():
            ray.kill(handle)
        self.over.set()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
