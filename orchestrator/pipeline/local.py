"""A pipeline run in one thread: the controller, peers and trainers of a real run, a loopback transport, virtual time.

For tests: every run is the same. A peer works through its calls one at a time, at its speed (calls of size 1 a virtual
second); orders and messages take no time. `kill` ends a process at any moment; who is started comes back after a while.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from dataclasses import replace as dc_replace
from typing import Any

from orchestrator.pipeline.commands import (
    Answered,
    Command,
    Died,
    End,
    Failed,
    Finish,
    GoBack,
    Heard,
    Joined,
    Order,
    Sealed,
    Start,
    StepDone,
    Tell,
    Tick,
    Write,
)
from orchestrator.pipeline.commands import Event as BrainEvent
from orchestrator.pipeline.plan import PipelinePlan
from orchestrator.pipeline.replay import replay, seal, set_aside
from orchestrator.pipeline.rounds import make_brain, resumed_brain
from workers.pipeline.calls import Call
from workers.pipeline.host import Damaged, PeerError, PeerHost
from workers.pipeline.local_host import build_host
from workers.pipeline.messages import FromTrainer, PeerPlace
from workers.pipeline.peer import NotFinite, Request
from workers.pipeline.spec import PipelineSpec
from workers.pipeline.trainer import TrainerHost
from workers.records import Record
from workers.store import BlobStore
from workers.transport.errors import TransportError
from workers.transport.loopback import LoopbackNetwork, LoopbackTransport

TICK_S = 0.5


@dataclass(kw_only=True, slots=True)
class _Process:
    name: str
    nonce: str
    transport: LoopbackTransport
    host: PeerHost | TrainerHost
    free_at_s: float = 0.0
    alive: bool = True
    hangs: bool = False


@dataclass(kw_only=True)
class LocalSwarm:
    """See the module. `speeds`: of peers, 1 where it is not given; `memory_of`: bytes of a peer's machine, `node_of`:
    its name, one for all where it is not given; `late_s`: who takes longer to start; `on_order` and `on_call` see what
    is about to be done, and may kill.
    """

    spec: PipelineSpec
    plan: PipelinePlan
    speeds: dict[str, float] = field(default_factory=dict)
    memory_of: dict[str, int] = field(default_factory=dict)
    node_of: dict[str, str] = field(default_factory=dict)
    start_s: float = 2.0
    late_s: dict[str, float] = field(default_factory=dict)
    on_order: Callable[[Order], None] = lambda order: None
    on_call: Callable[[Call], None] = lambda call: None
    now_s: float = 0.0
    records: list[Record] = field(default_factory=list)
    steps: list[StepDone] = field(default_factory=list)
    finished: Finish | None = None

    def __post_init__(self) -> None:
        """Nothing is started before `run`."""
        self.brain = make_brain(self.plan)
        self.processes: dict[str, _Process] = {}
        self._network = LoopbackNetwork()
        self._serial = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._begun = False
        self._life = 0

    # ------------------------------------------------------------ time

    def _at(self, delay_s: float, what: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._serial, what))

    def run(self, until: Callable[[], bool] = lambda: False, *, max_s: float = 100_000.0) -> None:
        """Until the run is over, or `until` says so. Raises RuntimeError after `max_s` virtual seconds."""
        if not self._begun:
            self._begun = True
            self._obey(self.brain.begin(0.0))
            self._at(TICK_S, self._tick)
        while self.finished is None and not until():
            if self.now_s > max_s:
                raise RuntimeError(f"no end after {max_s:g} s: version {self.brain.version}, {self.records[-3:]}")
            self.now_s, _, what = heapq.heappop(self._heap)
            what()

    def _tick(self) -> None:
        self._at(TICK_S, self._tick)
        self._tell_brain(Tick())
        for process in list(self.processes.values()):
            if process.alive and not process.hangs and isinstance(process.host, TrainerHost):
                process.host.tick()
                self.hear(process.name, process.nonce, process.host.heartbeat())

    # ------------------------------------------------------------ processes

    def kill(self, name: str, *, why: str = "killed", damaged: bool = False) -> None:
        """End a process, with everything that it held."""
        process = self.processes[name]
        if not process.alive:
            return
        process.alive = False
        process.transport.stop()
        died = Died(process=name, nonce=process.nonce, why=why, damaged=damaged)
        self._at(0.05, lambda: self._tell_brain(died))

    def hang(self, name: str) -> None:
        """From now on a process answers nothing, and does not end."""
        self.processes[name].hangs = True

    def close(self) -> None:
        """End everything."""
        for process in self.processes.values():
            process.transport.stop()

    def _start(self, name: str) -> None:
        if name in self.processes and self.processes[name].alive:
            return  # a controller that is gone had started it already
        self._serial += 1
        nonce, store = f"{name}-{self._serial}", BlobStore()
        transport = LoopbackTransport(self._network, nonce, store)
        transport.start()
        host: PeerHost | TrainerHost
        if name in self.plan.trainers:
            hands = _Hands(self, name, nonce)
            host = TrainerHost(self.spec, name, store, transport, hands, lambda: self.now_s)
        else:
            host = build_host(self.spec, name, store, transport, clock=lambda: self.now_s, sleep=lambda seconds: None)
        process = _Process(name=name, nonce=nonce, transport=transport, host=host, free_at_s=self.now_s)
        self.processes[name] = process
        self._tell_brain(self._joined(process))

    def _joined(self, process: _Process) -> Joined:
        present: dict[str, Any] = process.host.present() if isinstance(process.host, PeerHost) else {}
        present["memory_bytes"] = self.memory_of.get(process.name, 1 << 40)
        address = process.transport.address
        node = self.node_of.get(process.name, "local")
        return Joined(process=process.name, nonce=process.nonce, address=address, node=node, **present)

    def _is_alive(self, name: str, nonce: str) -> bool:
        process = self.processes.get(name)
        return process is not None and process.alive and process.nonce == nonce

    def restart_controller(self) -> None:
        """The controller dies and comes back: it knows the journal, and asks the processes what they hold."""
        self._life += 1
        self.brain = resumed_brain(self.plan, replay(self.records), reborn=True)
        starts = [one for one in self.brain.begin(self.now_s) if isinstance(one, Start)]
        alive = {name: process for name, process in self.processes.items() if process.alive}
        for _, process in sorted(alive.items()):
            self._tell_brain(self._joined(process))
        self._obey(one for one in starts if one.process not in alive)

    def _go_back(self, command: GoBack) -> None:
        """All processes end, and others begin at the snapshot."""
        self._life += 1
        for process in self.processes.values():
            process.alive = False
            process.transport.stop()
        set_aside(self.plan.snapshots, command.version)
        self.brain = resumed_brain(self.plan, replay(self.records), reborn=True)
        self._obey(self.brain.begin(self.now_s))

    # ------------------------------------------------------------ the controller's hands

    def _tell_brain(self, event: BrainEvent) -> None:
        self._obey(self.brain.handle(event, self.now_s))

    def _obey(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case Write(records=records):
                    self.records += records
                case Start(process=name):
                    self._at(self.late_s.get(name, self.start_s), lambda name=name: self._start(name))  # type: ignore[misc]
                case End(process=name, nonce=nonce):
                    if self._is_alive(name, nonce):
                        self.processes[name].alive = False
                        self.processes[name].transport.stop()
                case Order():
                    life = self._life
                    self._at(0.001, lambda one=command, life=life: self._do(one, life))  # type: ignore[misc]
                case Tell():
                    self._at(0.001, lambda one=command: self._tell(one))  # type: ignore[misc]
                case StepDone():
                    self.steps.append(command)
                case Sealed():
                    seal(command, keep=8)
                case GoBack():
                    self._go_back(command)
                case Finish():
                    self.finished = command

    def _tell(self, command: Tell) -> None:
        if self._is_alive(command.process, command.nonce) and not self.processes[command.process].hangs:
            host = self.processes[command.process].host
            assert isinstance(host, TrainerHost), command
            host.handle(command.message)

    def _do(self, command: Order, life: int) -> None:
        self.on_order(command)
        if not self._is_alive(command.process, command.nonce) or self.processes[command.process].hangs:
            return
        host = self.processes[command.process].host
        assert isinstance(host, PeerHost), command
        event: BrainEvent
        try:
            event = Answered(ticket=command.ticket, answer=host.do(command.order))
        except (PeerError, TransportError, Damaged) as error:
            event = Failed(ticket=command.ticket, why=str(error))
            if isinstance(error, Damaged):
                self.kill(command.process, why=str(error), damaged=True)
        self._at(0.001, lambda: self._tell_brain(event) if life == self._life else None)

    # ------------------------------------------------------------ what trainers ask for

    def call(self, trainer: str, nonce: str, place: PeerPlace, request: Request) -> None:
        """A request is on its way: the peer does it when it has done those before."""
        process = self.processes[place.process]
        speed = self.speeds.get(place.process, 1.0)
        process.free_at_s = max(process.free_at_s, self.now_s) + request.call.size / speed
        peer_nonce = process.nonce
        self._at(
            process.free_at_s - self.now_s,
            lambda: self._serve(trainer, nonce, place, peer_nonce, request),
        )

    def _serve(self, trainer: str, nonce: str, place: PeerPlace, peer_nonce: str, request: Request) -> None:
        self.on_call(request.call)
        if not self._is_alive(trainer, nonce) or self.processes[trainer].hangs:
            return
        host = self.processes[trainer].host
        assert isinstance(host, TrainerHost), trainer
        call, round_ = request.call, request.round_
        if not self._is_alive(place.process, peer_nonce):
            host.unreachable(call, round_, "it died")
            return
        if self.processes[place.process].hangs:
            return
        peer = self.processes[place.process].host
        assert isinstance(peer, PeerHost), place
        try:
            reply = peer.call(request)
            data = host.fetch(place, reply)
        except TransportError as error:
            host.unreachable(call, round_, str(error))
            return
        except (NotFinite, Damaged) as error:
            host.failed(call, round_, str(error))
            if isinstance(error, Damaged):
                self.kill(place.process, why=str(error), damaged=True)
            return
        seconds = call.size / self.speeds.get(place.process, 1.0)
        host.replied(call, round_, dc_replace(reply, seconds=seconds), data)

    def withdraw(self, trainer: str, place: PeerPlace, call: Call, round_: int) -> None:
        """A withdrawal."""
        host, process = self.processes[trainer].host, self.processes[place.process]
        assert isinstance(host, TrainerHost) and isinstance(process.host, PeerHost), trainer
        if not process.alive:
            host.unreachable(call, round_, "it died")
            return
        if process.hangs:
            return
        assert process.nonce == place.nonce, f"{place} was called before"
        reply = process.host.withdraw(call, round_)
        host.withdrawn(call, round_, reply, None if reply is None else host.fetch(place, reply))

    def hear(self, trainer: str, nonce: str, message: FromTrainer) -> None:
        """A trainer tells the controller."""
        self._tell_brain(Heard(process=trainer, nonce=nonce, message=message))

    def later(self, what: Callable[[], None]) -> None:
        """Do something after the present event."""
        self._at(0.001, what)


class _Hands:
    """One trainer's shell."""

    def __init__(self, swarm: LocalSwarm, trainer: str, nonce: str) -> None:
        self._swarm, self._trainer, self._nonce = swarm, trainer, nonce

    def send(self, place: PeerPlace, request: Request) -> None:
        """See `workers.pipeline.trainer.Hands.send`."""
        self._swarm.call(self._trainer, self._nonce, place, request)

    def withdraw(self, place: PeerPlace, call: Call, round_: int) -> None:
        """See `workers.pipeline.trainer.Hands.withdraw`."""
        self._swarm.later(lambda: self._swarm.withdraw(self._trainer, place, call, round_))

    def tell(self, message: FromTrainer) -> None:
        """See `workers.pipeline.trainer.Hands.tell`."""
        self._swarm.later(lambda: self._swarm.hear(self._trainer, self._nonce, message))
