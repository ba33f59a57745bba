"""The Ray actors of a pipeline's workers: thin shells of `PeerHost` and `TrainerHost`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from faults.plan import PlannedFault
from orchestrator.island_actor import _logged, log_to, own_run_dir
from orchestrator.log_shipping import read_piece
from orchestrator.processes import NAMESPACE, controller_name, island_actor_name
from workers.pipeline.calls import Call
from workers.pipeline.memory import resident_bytes
from workers.pipeline.messages import FromPeer, FromTrainer, PeerPlace, Ping, ToPeer, ToTrainer
from workers.pipeline.spec import PipelineSpec
from workers.stack import allow_dumps

if TYPE_CHECKING:
    from faults.links import Line, Links
    from faults.stage import ProcessChaos, StageChaos
    from workers.pipeline.host import PeerHost
    from workers.pipeline.peer import Reply, Request
    from workers.pipeline.trainer import TrainerHost
    from workers.store import BlobStore
    from workers.transport.base import Transport
    from workers.transport.flight import FlightTransport

TICK_S = 0.1
HEARTBEAT_S = 1.0
FETCH_THREADS = 8

log = logging.getLogger("atoll.pipeline")

T = TypeVar("T")
Present = dict[str, Any]
"""What a process says of itself when it has begun: fields of `Joined`, its id, and the name of its log."""


class _Process:
    """What peers and trainers have in common: a log, a transport, and somebody who waits for their end."""

    def __init__(self, spec: PipelineSpec, process: str, nonce: str, token: str, log_file: str) -> None:
        """Keeps the arguments; `begin` does the work."""
        self.spec = replace(spec, run_dir=own_run_dir(spec.run_dir))
        self.process, self.nonce, self.token = process, nonce, token
        self.log_file = str(self.spec.run_dir / "logs" / Path(log_file).name)
        self.transport: FlightTransport | None = None

    def _settle_in(self, links: Links) -> tuple[BlobStore, Transport]:
        log_to(Path(self.log_file))
        allow_dumps()
        log.info("%s is process %d", self.process, os.getpid())
        import torch

        from faults.links import LinkedTransport
        from workers.data.fetch import is_uri, local_pack
        from workers.store import BlobStore
        from workers.transport.flight import FlightTransport

        torch.set_num_threads(self.spec.train.threads)
        data = self.spec.data
        if data.path is not None and is_uri(data.path):
            self.spec = replace(self.spec, pack=local_pack(data.path, digest=data.digest))
        store = BlobStore()
        transport = FlightTransport(
            store, host=ray.util.get_node_ip_address(), token=self.token, num_connections=self.spec.connections
        )
        transport.start()
        self.transport = transport
        return store, cast("Transport", LinkedTransport(transport, links))

    def _has_log_at(self, probe: str) -> bool:
        Path(probe).touch()
        return True

    def _present(self) -> Present:
        assert self.transport is not None, "begin() comes first"
        return {
            "process": self.process,
            "nonce": self.nonce,
            "address": self.transport.address,
            "node": str(ray.get_runtime_context().get_node_id()),
            "pid": os.getpid(),
            "log": Path(self.log_file).name,
        }


GROUPS = {"calls": 3, "book": 2, "orders": 1, "work": 6, "signs": 2, "watch": 16}


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups=GROUPS)
class StagePeerActor(_Process):
    """One stage peer's process."""

    host: PeerHost | None = None
    chaos: StageChaos | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ends, self.damage = threading.Event(), ""

    @ray.method(concurrency_group="watch")
    def begin(self) -> Present:
        """Open the log and serve; what this process is, and what it holds. Idempotent."""
        if self.host is None:
            with _logged("the peer did not start"):
                from faults.links import Links
                from faults.stage import StageChaos
                from workers.pipeline.local_host import build_host

                links = Links(self.process)
                store, transport = self._settle_in(links)
                self.host = build_host(self.spec, self.process, store, transport)
                self.chaos = StageChaos(self.host, links)
        return {**self._present(), **self.host.present()}

    @ray.method(concurrency_group="calls")
    def call(self, request: Request) -> Reply:
        """See `PeerHost.call`; calls wait here for their turn, while the next one's tensors are fetched."""
        with self._links_hold() as host, self._ends_if_damaged():
            return host.call(request)

    @ray.method(concurrency_group="book")
    def withdraw(self, call: Call, round_: int) -> Reply | None:
        """See `PeerHost.withdraw`."""
        with self._links_hold() as host:
            return host.withdraw(call, round_)

    @ray.method(concurrency_group="orders")
    def obey(self, order: ToPeer) -> FromPeer:
        """Orders that come one after the other."""
        with self._links_hold() as host, self._ends_if_damaged():
            return host.do(order)

    @ray.method(concurrency_group="work")
    def work(self, order: ToPeer) -> FromPeer:
        """Orders that fetch and compute: beside each other."""
        with self._links_hold() as host, self._ends_if_damaged():
            return host.do(order)

    @ray.method(concurrency_group="signs")
    def ping(self) -> FromPeer:
        """See `Ping`: answered whatever else goes on."""
        with self._links_hold() as host:
            return host.do(Ping())

    @contextmanager
    def _links_hold(self) -> Iterator[PeerHost]:
        """What comes, and what goes back, passes the links, which may be cut or slow on purpose."""
        assert self.host is not None and self.chaos is not None, "begin() comes first"
        self.chaos.links.hold()
        try:
            yield self.host
        finally:
            self.chaos.links.hold()

    @contextmanager
    def _ends_if_damaged(self) -> Iterator[None]:
        """Whoever waits for this process is told why it is of no use any more, and ends it."""
        from workers.pipeline.host import Damaged

        try:
            yield
        except Damaged as error:
            log.error("this process is of no use any more: %s", error)
            self.damage = str(error)
            self.ends.set()
            raise

    @ray.method(concurrency_group="watch")
    def wait(self, timeout_s: float) -> str:
        """ "" after a while, or as soon as it is known why this process must end.

        A caller learns of the process's death by this call.
        """
        self.ends.wait(timeout_s)
        return self.damage

    @ray.method(concurrency_group="watch")
    def has_log_at(self, probe: str) -> bool:
        """Leave a mark beside this process's log: who finds it shares the directory."""
        return self._has_log_at(probe)

    @ray.method(concurrency_group="watch")
    def afflict(self, fault: PlannedFault) -> None:
        """Injected fault: it begins now, and ends by itself if it has a length."""
        if self.chaos is not None:
            self.chaos.apply(fault)

    @ray.method(concurrency_group="watch")
    def meet(self, addresses: dict[str, str]) -> None:
        """Whose transport is at which address, for links that are cut."""
        if self.chaos is not None:
            self.chaos.links.addresses.update(addresses)

    @ray.method(concurrency_group="watch")
    def figures(self) -> dict[str, float]:
        """Seconds inside calls and bytes on the wire so far, and memory now."""
        assert self.host is not None and self.transport is not None, "begin() comes first"
        return {
            "busy_s": self.host.busy_s,
            "memory_bytes": float(resident_bytes()),
            "bytes_sent": float(self.transport.bytes_sent),
            "bytes_received": float(self.transport.bytes_received),
        }

    @ray.method(concurrency_group="watch")
    def die(self, signal_number: int = signal.SIGKILL) -> None:
        """Injected fault: this process sends itself a signal."""
        os.kill(os.getpid(), signal_number)

    @ray.method(concurrency_group="watch")
    def read_log(self, offset: int, num_bytes: int) -> bytes:
        """What this process's log has at an offset."""
        return read_piece(Path(self.log_file), offset, num_bytes)


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=1000)
class TrainerActor(_Process):
    """One trainer's process: an event loop around a `TrainerHost`."""

    host: TrainerHost | None = None
    chaos: ProcessChaos | None = None
    links: Links
    into: Line[ToTrainer]
    out: Line[FromTrainer]

    async def begin(self) -> Present:
        """Open the log and the data, and serve. Idempotent."""
        if self.host is None:
            with _logged("the trainer did not start"):
                from faults.links import Links
                from faults.stage import ProcessChaos
                from workers.pipeline.trainer import TrainerHost

                loop = asyncio.get_running_loop()
                self.links = Links(self.process)
                # In their order, whatever a fault holds back: always by the loop's queue, also where nothing does.
                self.into = self.links.line(lambda one: _soon(loop, self._hear, one), name="in")
                self.out = self.links.line(lambda one: _soon(loop, self._say, one), name="out")
                store, transport = self._settle_in(self.links)
                self.controller = ray.get_actor(controller_name(self.spec.run_id), namespace=NAMESPACE)
                self.peers: dict[str, ActorHandle] = {}
                self.fetching = ThreadPoolExecutor(max_workers=FETCH_THREADS, thread_name_prefix="fetch")
                self.tasks: set[asyncio.Task[None]] = set()
                self.host = TrainerHost(self.spec, self.process, store, transport, self, time.monotonic)
                self.chaos = ProcessChaos(self.links)
                self._task(self._tick())
        return {**self._present(), "memory_bytes": 0}

    async def deliver(self, message: ToTrainer) -> None:
        """A message of the controller."""
        assert self.host is not None, "begin() comes first"
        self.into.put(message)

    def _hear(self, message: ToTrainer) -> None:
        assert self.host is not None, "begin() comes first"
        with _logged("the trainer failed"):
            self.host.handle(message)

    async def wait(self, timeout_s: float) -> str:
        """ "" after a while: a caller learns of the process's death by this call."""
        await asyncio.sleep(timeout_s)
        return ""

    async def has_log_at(self, probe: str) -> bool:
        """Leave a mark beside this process's log: who finds it shares the directory."""
        return self._has_log_at(probe)

    async def die(self, signal_number: int = signal.SIGKILL) -> None:
        """Injected fault: this process sends itself a signal."""
        os.kill(os.getpid(), signal_number)

    async def afflict(self, fault: PlannedFault) -> None:
        """Injected fault: it begins now, and ends by itself if it has a length."""
        if self.chaos is not None:
            self.chaos.apply(fault)

    async def meet(self, addresses: dict[str, str]) -> None:
        """Whose transport is at which address, for links that are cut."""
        self.links.addresses.update(addresses)

    async def read_log(self, offset: int, num_bytes: int) -> bytes:
        """What this process's log has at an offset."""
        return read_piece(Path(self.log_file), offset, num_bytes)

    async def _tick(self) -> None:
        beat_s = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            if time.monotonic() >= beat_s and self.host is not None:
                beat_s = time.monotonic() + HEARTBEAT_S
                self.tell(self.host.heartbeat())
            assert self.host is not None, "it ticks after it began"
            with _logged("the trainer failed"):
                self.host.tick()

    def _task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # ------------------------------------------------------------ workers.pipeline.trainer.Hands

    def send(self, place: PeerPlace, request: Request) -> None:
        """See `workers.pipeline.trainer.Hands.send`."""
        self._task(self._send(place, request))

    def withdraw(self, place: PeerPlace, call: Call, round_: int) -> None:
        """See `workers.pipeline.trainer.Hands.withdraw`."""
        self._task(self._withdraw(place, call, round_))

    def tell(self, message: FromTrainer) -> None:
        """See `workers.pipeline.trainer.Hands.tell`."""
        self.out.put(message)

    def _say(self, message: FromTrainer) -> None:
        self._task(self._tell(message))

    async def _tell(self, message: FromTrainer) -> None:
        # A controller that is just coming back hears of everything anew: it begins the step in a higher round.
        try:
            await self.controller.hear.remote(self.process, self.nonce, message)
        except RayActorError as error:
            log.info("the controller does not hear: %s", error)

    def _peer(self, place: PeerPlace) -> ActorHandle:
        if place.nonce not in self.peers:
            name = island_actor_name(self.spec.run_id, place.process, place.nonce)
            self.peers[place.nonce] = ray.get_actor(name, namespace=NAMESPACE)
        return self.peers[place.nonce]

    async def _ask(self, place: PeerPlace, ask: Callable[[ActorHandle], Awaitable[T]]) -> T:
        """Call a peer: what goes there and what comes back passes the links."""
        await self.links.hold_async(place.process)
        try:
            return await ask(self._peer(place))
        finally:
            await self.links.hold_async(place.process)

    async def _send(self, place: PeerPlace, request: Request) -> None:
        from workers.transport.errors import TransportError

        host, call, round_ = self.host, request.call, request.round_
        assert host is not None, "it sends after it began"
        try:
            reply = await self._ask(place, lambda peer: peer.call.remote(request))
            loop = asyncio.get_running_loop()
            reply, data = await loop.run_in_executor(self.fetching, host.fetch_timed, place, reply)
        except RayTaskError as error:
            host.failed(call, round_, _first_line(error))
        except (RayActorError, TransportError, ValueError, GetTimeoutError) as error:
            host.unreachable(call, round_, _first_line(error))
        else:
            with _logged("the trainer failed"):
                host.replied(call, round_, reply, data)

    async def _withdraw(self, place: PeerPlace, call: Call, round_: int) -> None:
        from workers.transport.errors import TransportError

        host = self.host
        assert host is not None, "it withdraws after it began"
        try:
            reply = await self._ask(place, lambda peer: peer.withdraw.remote(call, round_))
            data = None
            if reply is not None:
                data = await asyncio.get_running_loop().run_in_executor(self.fetching, host.fetch, place, reply)
        except (RayActorError, RayTaskError, TransportError, ValueError) as error:
            host.unreachable(call, round_, _first_line(error))
        else:
            host.withdrawn(call, round_, reply, data)


def _soon(loop: asyncio.AbstractEventLoop, what: Callable[[T], None], one: T) -> None:
    loop.call_soon_threadsafe(what, one)


def _first_line(error: BaseException) -> str:
    raised = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    return f"{type(raised).__name__}: {next(iter(str(raised).strip().splitlines()), '')}"
