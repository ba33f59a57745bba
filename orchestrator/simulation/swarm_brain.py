"""The controller of a pipeline under kills, hangs, slow peers and its own deaths, in virtual time, on symbols.

`PipelineBrain` (or `RoundBrain`), `Microbatches` and `Accumulator` are those of a run; a state of a stage is the
multiset of the microbatches that are in it, with a digest. Asserted at the end, and at every move:

    once per stage     whoever holds a stage at the end has every microbatch of every step once; where peers step on
                       their own: committed, lost with a peer and not committed yet add up to that, in every stage
    one version        all microbatches of a step are made with the same parameters, also where updates are delayed
    never empty        no move of the rebalancer takes a stage's last peer
    progress resumes   when the faults stop the run ends in bounded time; it fails only where nobody holds some stage
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from orchestrator.events import LeaveRequested, PauseRequested
from orchestrator.pipeline.commands import (
    Answered,
    Command,
    Died,
    End,
    Event,
    Failed,
    Finish,
    Heard,
    Joined,
    Layout,
    Order,
    Rebalance,
    Start,
    Tell,
    Tick,
    Write,
)
from orchestrator.pipeline.plan import PipelinePlan
from orchestrator.pipeline.replay import PipelineHistory, replay
from orchestrator.pipeline.rounds import make_brain, resumed_brain
from orchestrator.simulation.swarm import Broken, SwarmResult
from orchestrator.simulation.swarm_symbols import Content, SymbolError, SymbolPeer, SymbolTrainer
from workers.pipeline.calls import Call
from workers.pipeline.config import PipelineConfig
from workers.pipeline.messages import FromTrainer, PeerPlace
from workers.pipeline.records import LeftRecord, ServeRecord
from workers.records import Record

NUM_MICROBATCHES, CALL_S = 4, 0.2
FORWARD_TIMEOUT_S, BACKWARD_TIMEOUT_S, TRAINER_TIMEOUT_S = 6.0, 12.0, 8.0
HEAL_WITHIN_S, MAX_EVENTS = 2000.0, 60_000
FOR_EVER_S = 1e9
LOST = "every process that held stage"


@dataclass(kw_only=True, slots=True)
class _Process:
    name: str
    nonce: str
    body: SymbolPeer | SymbolTrainer
    speed: float
    free_at_s: float = 0.0
    alive: bool = True
    stopped_until_s: float = 0.0
    waiting: list[Callable[[], None]] = field(default_factory=list)


class BrainWorld:
    """One seed. `rounds`: peers step on their own; `streaming`: and synchronise one fragment after the other.

    `delayed`: updates are. With the latter two the run is paused now and then, and of a streaming one processes leave.
    """

    def __init__(self, seed: int, *, rounds: bool, delayed: bool = False, streaming: bool = False) -> None:
        self.random = Random(seed)
        stages = self.random.choice((2, 3))
        peers = tuple(f"peer-{i}" for i in range(stages * 2))
        self.trainer_names = tuple(f"trainer-{i}" for i in range(self.random.choice((1, 2))))
        self.plan = PipelinePlan(
            layout=_layout(stages, tied=self.random.random() < 0.5),
            pipeline=PipelineConfig(
                stages=stages,
                peers=2,
                trainers=len(self.trainer_names),
                microbatches=NUM_MICROBATCHES,
                microbatch_size=1,
                in_flight=3,
                rebalance_s=5.0,
                forward_timeout_s=FORWARD_TIMEOUT_S,
                backward_timeout_s=BACKWARD_TIMEOUT_S,
                trainer_timeout_s=TRAINER_TIMEOUT_S,
                delayed=delayed,
            ),
            peers=peers,
            trainers=self.trainer_names,
            total_steps=self.random.choice((9, 18)),
            copies=2,
            grad_clip=1.0,
            rate=lambda step: 1.0,
            snapshots=Path("nowhere"),
            start_timeout_s=20.0,
            snapshot_every_s=0.0,
            max_restarts=1000,
            sync_steps=3 if rounds else 0,
            eval_every=self.random.choice((0.0, 0.5)),
        )
        self.streaming = streaming
        if streaming:
            parts = self.random.choice((2, 3))
            self.plan = replace(
                self.plan,
                layout=_layout(stages, tied=self.plan.layout.is_tied, parts=parts),
                sync_steps=2 * parts,
                num_fragments=parts,
                overlap_steps=self.random.choice((0, 1)),
                probes=True,
            )
        self.fault_rate = self.random.choice((0.05, 0.1, 0.2))
        self.fault_until_s = self.random.uniform(20, 120)
        self.now_s, self.num_events, self.serial, self.life = 0.0, 0, 0, 0
        self.counts: Counter[str] = Counter()
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.processes: dict[str, _Process] = {}
        self.by_address: dict[str, _Process] = {}
        self.records: list[Record] = []
        self.finished: Finish | None = None
        self.brain = make_brain(self.plan)

    # ------------------------------------------------------------ time

    def at(self, delay_s: float, what: Callable[[], None]) -> None:
        """Do something later."""
        self.serial += 1
        heapq.heappush(self.heap, (self.now_s + delay_s, self.serial, what))

    def run(self) -> None:
        """Until the run is over. Raises Broken."""
        self._obey(self.brain.begin(0.0))
        self.at(0.5, self._tick)
        self.at(5.0, self._fault)
        while self.finished is None:
            if self.now_s > self.fault_until_s + HEAL_WITHIN_S or self.num_events > MAX_EVENTS:
                raise Broken(
                    f"progress resumes: version {self.brain.version} at {self.now_s:.0f} s: {self.records[-3:]}"
                )
            self.now_s, _, what = heapq.heappop(self.heap)
            self.num_events += 1
            what()
        self._look_at_the_end(self.finished)

    def _tick(self) -> None:
        self.at(0.5, self._tick)
        self._tell_brain(Tick())
        for process in list(self.processes.values()):
            if isinstance(process.body, SymbolTrainer):
                self._into(process, process.body.beat)

    def _into(self, process: _Process, what: Callable[[], None]) -> None:
        """Something reaches a process: now, or when it goes on, or never."""
        if not process.alive:
            return
        if process.stopped_until_s > self.now_s:
            process.waiting.append(what)
        else:
            what()

    # ------------------------------------------------------------ the controller's hands

    def _tell_brain(self, event: Event) -> None:
        self._obey(self.brain.handle(event, self.now_s))

    def _obey(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case Write(records=records):
                    self._look_at(records)
                    self.records += records
                case Start(process=name):
                    self.at(2.0, lambda name=name: self._start(name))  # type: ignore[misc]
                case End(process=name, nonce=nonce):
                    if name in self.processes and self.processes[name].nonce == nonce:
                        self.processes[name].alive = False
                        self.counts["ended"] += 1
                case Order():
                    life = self.life  # a controller that has died hears no answer, nor does its successor
                    self.at(0.01, lambda one=command, life=life: self._order(one, life))  # type: ignore[misc]
                case Tell(process=name, nonce=nonce, message=message):
                    process = self.processes.get(name)
                    if process is not None and process.nonce == nonce and isinstance(process.body, SymbolTrainer):
                        body = process.body
                        self.at(0.01, lambda p=process, b=body, m=message: self._into(p, lambda: b.handle(m)))  # type: ignore[misc]
                case Finish():
                    self.finished = command
                case _:
                    pass

    def _start(self, name: str) -> None:
        if name in self.processes and self.processes[name].alive:
            return
        self.serial += 1
        nonce = f"{name}/{self.serial}"
        body: SymbolPeer | SymbolTrainer
        if name in self.trainer_names:
            body = SymbolTrainer(self, name, nonce, self.plan)
        else:
            body = SymbolPeer(self, nonce, self.plan)
        speed = self.random.choice((0.5, 1.0, 2.0))
        self.processes[name] = process = _Process(name=name, nonce=nonce, body=body, speed=speed)
        self.by_address[nonce] = process
        self._tell_brain(self._joined(process))

    def _joined(self, process: _Process) -> Joined:
        known = Joined(process=process.name, nonce=process.nonce, address=process.nonce, node="n", memory_bytes=100)
        if isinstance(process.body, SymbolTrainer):
            return known
        held, has_next, serves = process.body.present()
        return replace(known, held=held, has_next=has_next, serves=serves)

    def _order(self, command: Order, life: int) -> None:
        process = self.processes.get(command.process)
        if process is not None and process.nonce == command.nonce:
            self._into(process, lambda: self._do(process, command, life))

    def _do(self, process: _Process, command: Order, life: int) -> None:
        assert isinstance(process.body, SymbolPeer), command
        event: Event
        try:
            event = Answered(ticket=command.ticket, answer=process.body.do(command.order))
        except SymbolError as error:
            event = Failed(ticket=command.ticket, why=str(error))
        self.at(0.01, lambda: self._tell_brain(event) if life == self.life else None)

    def peer_at(self, address: str) -> SymbolPeer:
        """Who can be fetched from; raises SymbolError."""
        process = self.by_address[address]
        if not process.alive or process.stopped_until_s > self.now_s:
            raise SymbolError(f"{address} does not answer")
        assert isinstance(process.body, SymbolPeer), address
        return process.body

    # ------------------------------------------------------------ what trainers ask for

    def send(self, trainer: SymbolTrainer, place: PeerPlace, call: Call, round_: int, behind: int) -> None:
        """A call goes to a peer, which does one after the other."""
        process = self.by_address[place.nonce]
        process.free_at_s = max(process.free_at_s, self.now_s) + call.size * CALL_S / process.speed
        seconds = call.size * CALL_S / process.speed
        self.at(process.free_at_s - self.now_s, lambda: self._serve(trainer, process, call, round_, behind, seconds))

    def _serve(
        self, trainer: SymbolTrainer, process: _Process, call: Call, round_: int, behind: int, seconds: float
    ) -> None:
        if not process.alive:
            self._back(trainer, lambda: trainer.unreachable(call, round_, "it is dead"))
            return

        def serve() -> None:
            assert isinstance(process.body, SymbolPeer), process.name
            begin = process.body.call(call, round_, behind)
            self.counts["calls ahead"] += behind
            self._back(trainer, lambda: trainer.replied(call, round_, begin, seconds))

        self._into(process, serve)

    def withdraw(self, trainer: SymbolTrainer, place: PeerPlace, call: Call, round_: int) -> None:
        """A withdrawal."""
        process = self.by_address[place.nonce]
        if not process.alive:
            self._back(trainer, lambda: trainer.unreachable(call, round_, "it is dead"))
            return

        def ask() -> None:
            assert isinstance(process.body, SymbolPeer), process.name
            done = process.body.withdraw(call, round_)
            self._back(trainer, lambda: trainer.withdrawn(call, round_, done))

        self.at(0.02, lambda: self._into(process, ask))

    def _back(self, trainer: SymbolTrainer, what: Callable[[], None]) -> None:
        self.at(0.02, lambda: self._into(self.by_address[trainer.nonce], what))

    def hear(self, trainer: SymbolTrainer, message: FromTrainer) -> None:
        """A trainer tells the controller."""
        event = Heard(process=trainer.name, nonce=trainer.nonce, message=message)
        self.at(0.01, lambda: self._tell_brain(event))

    # ------------------------------------------------------------ faults

    def _fault(self) -> None:
        if self.now_s > self.fault_until_s:
            return
        self.at(self.random.expovariate(self.fault_rate), self._fault)
        live = sorted(name for name, process in self.processes.items() if process.alive)
        if len(live) < 4:
            return
        kinds: tuple[str, ...] = ("kill", "kill", "kill", "stop", "stop", "slow", "controller", "kill two", "look")
        if self.plan.delayed or self.streaming:
            kinds = (*kinds, "pause", "leave") if self.streaming else (*kinds, "pause")
        kind = self.random.choice(kinds)
        self.counts[f"fault {kind}"] += 1
        victim = self.processes[self.random.choice(live)]
        match kind:
            case "kill":
                self._kill(victim)
            case "kill two":
                for name in self.random.sample(live, 2):
                    self._kill(self.processes[name])
            case "stop":
                victim.stopped_until_s = self.now_s + self.random.choice((1.0, 5.0, 15.0, FOR_EVER_S))
                self.at(victim.stopped_until_s - self.now_s, lambda: self._go_on(victim))
            case "slow":
                victim.speed *= 0.3
            case "leave":
                self._tell_brain(LeaveRequested(name=victim.name, why="asked to"))
            case "controller":
                self._restart_controller()
            case "pause":
                self._tell_brain(PauseRequested(paused=True, why="asked to"))
                again = PauseRequested(paused=False, why="asked to")
                self.at(self.random.uniform(1, 10), lambda: self._tell_brain(again))
            case _:
                self._tell_brain(Rebalance())

    def _go_on(self, process: _Process) -> None:
        process.stopped_until_s = 0.0
        waiting, process.waiting = process.waiting, []
        for what in waiting:
            if process.alive:
                what()

    def _kill(self, process: _Process) -> None:
        process.alive = False
        died = Died(process=process.name, nonce=process.nonce, why="killed")
        life = self.life
        self.at(0.05, lambda: self._tell_brain(died) if life == self.life else None)

    def _restart_controller(self) -> None:
        self.life += 1
        self.brain = resumed_brain(self.plan, replay(self.records), reborn=True)
        starts = [one for one in self.brain.begin(self.now_s) if isinstance(one, Start)]
        alive = {name: process for name, process in sorted(self.processes.items()) if process.alive}
        for process in alive.values():
            self._tell_brain(self._joined(process))
        self._obey(one for one in starts if one.process not in alive)

    # ------------------------------------------------------------ what must hold

    def _look_at(self, records: tuple[Record, ...]) -> None:
        for record in records:
            if isinstance(record, LeftRecord) and self.processes[record.process].alive:
                self.counts["left"] += 1
                stays = [p.alive for name, p in self.processes.items() if name not in self.brain.left]
                if all(stays) and 0 in self.brain.roster.counts(self.plan.layout.num_stages):
                    raise Broken(f"never empty: {record.process} left a stage with nobody")
            if isinstance(record, ServeRecord) and record.why.startswith("moved") and "has nobody" not in record.why:
                self.counts["moves"] += 1
                left = record.why.removeprefix("moved from stage ").partition(":")[0]
                if left.isdigit() and not self.brain.roster.serving(int(left)):
                    live = [p for p in self.processes.values() if p.alive]
                    if len(live) == len(self.processes):
                        raise Broken(f"never empty: {record.process} left stage {left} with nobody")

    def _look_at_the_end(self, finish: Finish) -> None:
        history = replay(self.records)
        if history.findings:
            raise Broken(f"once per stage: {history.findings[:3]}")
        if finish.reason == "failed":
            if not finish.detail.startswith(LOST):
                raise Broken(f"progress resumes: {finish}")
            stage = int(finish.detail.removeprefix(LOST).split()[0])
            for process in self.processes.values():
                if process.alive and isinstance(process.body, SymbolPeer):
                    held = process.body.held.get(stage)
                    if held is not None and held.version == self.brain.held_version:
                        raise Broken(f"progress resumes: {process.name} holds stage {stage}, and the run failed")
            self.counts["stages lost"] += 1
            return
        if gone := [name for name in history.own if self.brain.roster.by_name(name) is None]:
            raise Broken(f"once per stage: {gone} serve no more, and what they made is not on the record as lost")
        self.counts["microbatches lost"] += sum(history.lost.values())
        self.counts["microbatches partial"] += sum(history.partial.values())
        self.counts["begun again"] += history.num_begun_again
        self.counts["taken back"] += history.num_taken_back
        for stage in range(self.plan.layout.num_stages):
            self._look_at_stage(stage, history)

    def _look_at_stage(self, stage: int, history: PipelineHistory) -> None:
        total = self.plan.total_steps * NUM_MICROBATCHES
        bodies = [p.body for p in self.processes.values() if p.alive and isinstance(p.body, SymbolPeer)]
        held = [body.held[stage] for body in bodies if stage in body.held]
        newest = [state for state in held if state.version == self.plan.total_steps]
        if not newest:
            raise Broken(f"nobody holds stage {stage} at the end")
        lost, partial = history.lost.get(stage, 0), history.partial.get(stage, 0)
        own = history.own_by_stage.get(stage, 0)
        there = [f for unit, f in self.plan.layout.fragment_of.items() if unit.startswith(f"stage-{stage}.")] or [0]
        for state in newest:
            for content in state.contents:
                if any(times != 1 for times in content.values()):
                    raise Broken(f"once per stage: stage {stage} holds {_odd(content)}")
            whole = set.intersection(*(set(state.contents[fragment]) for fragment in there))
            if self.plan.sync_steps and len(whole) != history.committed.get(stage, 0):
                raise Broken(f"once per stage: stage {stage} holds {len(whole)}, committed are {history.committed}")
            if len(whole) + lost + partial + own != total:
                found = f"{len(whole)} + {lost} lost + {partial} partial + {own}"
                raise Broken(f"once per stage: stage {stage}: {found} of {total}")


def _odd(content: Content) -> dict[tuple[int, int], int]:
    return {one: times for one, times in content.items() if times != 1}


def _layout(stages: int, *, tied: bool, parts: int = 1) -> Layout:
    """`parts`: fragments of each stage."""
    names = [
        (f"stage-{stage}" + f".{part}" * (parts > 1), stage, part) for stage in range(stages) for part in range(parts)
    ]
    of: dict[str, tuple[int, ...]] = {name: (stage,) for name, stage, _ in names}
    fragments = {name: part for name, _, part in names}
    if tied:
        of["tied"], fragments["tied"] = (stages - 1, 0), parts - 1
    return Layout(
        num_stages=stages,
        chunks={name: 1 if name == "tied" else 2 for name in of},
        stages_of=of,
        params=(10,) * stages,
        stage_bytes=(1,) * stages,
        is_tied=tied,
        fragment_of=fragments,
    )


def simulate_brain(seed: int, *, rounds: bool, delayed: bool = False, streaming: bool = False) -> SwarmResult:
    """Run one seed to its end."""
    world = BrainWorld(seed, rounds=rounds, delayed=delayed, streaming=streaming)
    problem = ""
    try:
        world.run()
    except Broken as broken:
        problem = str(broken)
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        problem = f"{type(error).__name__}: {error}"
    return SwarmResult(
        seed=seed, problem=problem, seconds=world.now_s, num_events=world.num_events, counts=dict(world.counts)
    )
