"""A pipeline under kills, cuts, lost messages and joins, in virtual time: the production machines on symbols.

`Microbatches` with its `Router` (two trainers), an `Accumulator` a peer, `Rebalancer` and `decide` at the controller;
instead of gradients each peer holds how often it has added each microbatch. Asserted at every commit and event:

    1 once per stage     the sums that enter a commit hold every microbatch of the step exactly once
    2 never empty        no move of the rebalancer leaves a stage without a peer, nor below its minimum
    3 progress resumes   when the faults stop, all steps are committed in every stage in bounded time

What stands in for parts that are not built: a stage whose last peer died is restored from its buddy by whoever comes,
and gathering offers takes no time (the exchange inside a stage has its own simulator).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from orchestrator.rebalance import PeerPower, Rebalancer, StageNeed, decide
from workers.pipeline.accumulator import Accumulator, Begin, cover
from workers.pipeline.calls import Call
from workers.pipeline.microbatches import (
    Announced,
    AskFence,
    Command,
    Committed,
    Event,
    Fenced,
    Microbatches,
    Refused,
    Release,
    Replied,
    Send,
    StageDone,
    StepOpened,
    Tick,
    Unreachable,
    Withdraw,
    Withdrawn,
)
from workers.pipeline.router import Router

FORWARD_TIMEOUT_S, BACKWARD_TIMEOUT_S = 3.0, 6.0
ANNOUNCE_S, REBALANCE_S, SILENCE_S = 2.0, 5.0, 8.0
HEAL_WITHIN_S = 600.0
MAX_EVENTS = 100_000


class Broken(Exception):
    """An invariant does not hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SwarmResult:
    """What came of a seed; `problem` is empty if all invariants held."""

    seed: int
    problem: str
    seconds: float
    num_events: int
    counts: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether all invariants held."""
        return not self.problem


@dataclass(kw_only=True, slots=True)
class _Peer:
    name: str
    stage: int
    speed: float
    accumulator: Accumulator
    sums: dict[int, Counter[int]] = field(default_factory=dict)  # step -> how often each microbatch was added
    announcement: int = 0
    free_at_s: float = 0.0
    alive: bool = True
    cut_until_s: float = 0.0
    moving: int = 0  # number of the claim
    # Newest request for the same work that is in the queue: repeating a call must not make the queue longer.
    queued: dict[tuple[int, int, str], Call] = field(default_factory=dict)


class SwarmWorld:
    """One seed. Everything happens in `_at` callbacks on one heap."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.num_stages = self.random.choice((2, 3, 3, 4))
        self.num_steps, self.num_microbatches = self.random.choice((4, 6)), self.random.choice((4, 6, 8))
        self.fault_rate = self.random.choice((0.1, 0.25, 0.5))
        self.loss = self.random.choice((0.0, 0.02, 0.08))
        self.fault_until_s = self.random.uniform(20, 60)
        self.now_s, self.num_events, self.serial, self.names = 0.0, 0, 0, 0
        self.counts: Counter[str] = Counter()
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.peers: dict[str, _Peer] = {}
        self.versions = [0] * self.num_stages
        self.fenced: set[tuple[str, int]] = set()
        # (step, stage) -> trainer -> where its microbatches are counted
        self.done: dict[tuple[int, int], dict[int, StageDone]] = {}
        self.rebalancer = Rebalancer(minimum=1, move_timeout_s=20.0)
        self.wake_s = [0.0, 0.0]
        self.trainers = [
            Microbatches(
                num_stages=self.num_stages,
                router=Router(trainer=str(number)),
                max_in_flight=3,
                forward_timeout_s=FORWARD_TIMEOUT_S,
                backward_timeout_s=BACKWARD_TIMEOUT_S,
            )
            for number in range(2)
        ]

    # ------------------------------------------------------------ time

    def _at(self, delay_s: float, what: Callable[[], None]) -> None:
        self.serial += 1
        heapq.heappush(self.heap, (self.now_s + delay_s, self.serial, what))

    def _message(self, peer: _Peer, what: Callable[[], None]) -> None:
        """To or from a peer: late, sometimes twice, sometimes never; nothing through a cut."""
        faulty = self.now_s < self.fault_until_s
        if peer.cut_until_s > self.now_s or (faulty and self.random.random() < self.loss):
            self.counts["messages lost"] += 1
            return
        self._at(self.random.uniform(0.01, 0.1), what)
        if faulty and self.random.random() < self.loss:
            self.counts["messages doubled"] += 1
            # Long after the timeouts: a request may come when its trainer has long gone elsewhere.
            self._at(self.random.uniform(0.1, 15.0), what)

    def run(self) -> None:
        """Until all steps are committed. Raises Broken."""
        for index in range(self.num_stages * 2):
            self._join(index % self.num_stages)
        self._open(0)
        self._at(1.0, self._fault)
        self._at(REBALANCE_S, self._rebalance)
        self._at(ANNOUNCE_S, self._announce)
        while min(self.versions) < self.num_steps:
            if self.now_s > self.fault_until_s + HEAL_WITHIN_S:
                raise Broken(f"3 progress resumes: versions {self.versions} of {self.num_steps} at {self.now_s:.0f} s")
            if self.num_events > MAX_EVENTS:
                raise Broken(f"3 progress resumes: {self.num_events} events by {self.now_s:.0f} s, in circles")
            self.now_s, _, what = heapq.heappop(self.heap)
            self.num_events += 1
            what()

    # ------------------------------------------------------------ trainers

    def _open(self, step: int) -> None:
        for number in range(len(self.trainers)):
            mine = tuple(range(number, self.num_microbatches, len(self.trainers)))
            self._tell(number, StepOpened(step=step, microbatches=mine))

    def _tell(self, trainer: int, event: Event) -> None:
        machine = self.trainers[trainer]
        for command in machine.handle(event, self.now_s):
            self._obey(trainer, command)
        deadline_s = machine.next_deadline_s()
        if deadline_s is not None and not self.now_s < self.wake_s[trainer] <= deadline_s:
            self.wake_s[trainer] = max(deadline_s, self.now_s) + 0.001
            self._at(self.wake_s[trainer] - self.now_s, lambda: self._tick(trainer))

    def _tick(self, trainer: int) -> None:
        deadline_s = self.trainers[trainer].next_deadline_s()
        if deadline_s is not None and self.wake_s[trainer] <= self.now_s:
            self._tell(trainer, Tick())

    def _obey(self, trainer: int, command: Command) -> None:
        match command:
            case Send(call=call):
                self._to_peer(trainer, call, self._serve)
            case Withdraw(call=call):
                self._to_peer(trainer, call, self._withdraw)
            case AskFence(peer=name, step=step):
                self.counts["fences asked"] += 1
                self._at(0.05, lambda: self._fence(name, step))
            case StageDone(step=step, stage=stage):
                self.done.setdefault((step, stage), {})[trainer] = command
                self._at(0.05, lambda: self._commit(step, stage))
            case Release():
                self.counts["releases"] += 1

    def _to_peer(self, trainer: int, call: Call, what: Callable[[int, Call, _Peer], None]) -> None:
        peer = self.peers[call.peer]
        if not peer.alive:
            self._at(0.02, lambda: self._tell(trainer, Unreachable(call=call, reason="it is dead")))
        else:
            self._message(peer, lambda: what(trainer, call, peer))

    # ------------------------------------------------------------ peers

    def _serve(self, trainer: int, call: Call, peer: _Peer) -> None:
        """A request arrived: queue it."""
        if not peer.alive:
            return
        if call.stage != peer.stage:
            self._message(peer, lambda: self._tell(trainer, Refused(call=call, reason="other stage", lasting=True)))
            return
        if call.direction == "backward":
            begin = peer.accumulator.begin(call.step, call.microbatch, call.attempt)
            if begin is Begin.RUNNING:
                return
            if begin is Begin.DONE:
                self._message(peer, lambda: self._tell(trainer, Replied(call=call, seconds=1.0)))
                return
            if begin is not Begin.RUN:
                self._message(peer, lambda: self._tell(trainer, Refused(call=call, reason=begin.value)))
                return
        work = (call.step, call.microbatch, call.direction)
        if work in peer.queued:
            peer.queued[work] = call
            return
        peer.queued[work] = call
        seconds = call.size * 0.1 / peer.speed
        peer.free_at_s = max(peer.free_at_s, self.now_s) + seconds
        self._at(peer.free_at_s - self.now_s, lambda: self._finished(trainer, call, peer, seconds))

    def _finished(self, trainer: int, call: Call, peer: _Peer, seconds: float) -> None:
        if not peer.alive:
            return
        call = peer.queued.pop((call.step, call.microbatch, call.direction))
        if call.direction == "backward":
            if not peer.accumulator.finish(call.step, call.microbatch):
                return
            peer.sums.setdefault(call.step, Counter())[call.microbatch] += 1
        self._message(peer, lambda: self._tell(trainer, Replied(call=call, seconds=seconds)))

    def _withdraw(self, trainer: int, call: Call, peer: _Peer) -> None:
        if peer.alive and call.stage == peer.stage:
            done = peer.accumulator.withdraw(call.step, call.microbatch, call.attempt)
            self._message(peer, lambda: self._tell(trainer, Withdrawn(call=call, done=done)))

    # ------------------------------------------------------------ the controller

    def _live(self, stage: int) -> list[_Peer]:
        return [peer for peer in self.peers.values() if peer.alive and peer.stage == stage]

    def _join(self, stage: int) -> None:
        self.names += 1
        name = f"peer-{self.names}"
        peer = _Peer(
            name=name,
            stage=stage,
            speed=self.random.choice((0.5, 1.0, 2.0, 4.0)),
            accumulator=Accumulator(version=self.versions[stage]),
            free_at_s=self.now_s,
        )
        self.peers[name] = peer
        self.rebalancer.changed()
        self._announce_one(peer)

    def _announce(self) -> None:
        """Every so often: who lives says so, and hears what it has missed."""
        self._at(ANNOUNCE_S, self._announce)
        for peer in list(self.peers.values()):
            if peer.alive and peer.cut_until_s <= self.now_s:
                self._catch_up(peer)
                self._announce_one(peer)

    def _announce_one(self, peer: _Peer) -> None:
        peer.announcement += 1
        event = Announced(peer=peer.name, stage=peer.stage, announcement=peer.announcement)
        for trainer in range(len(self.trainers)):
            self._tell(trainer, event)

    def _catch_up(self, peer: _Peer) -> None:
        step = peer.accumulator.version
        while step < self.versions[peer.stage]:
            peer.accumulator.commit(step)
            peer.sums.pop(step, None)
            step += 1
        if (peer.name, step) in self.fenced:
            # Given up for a step that is still open: it begins anew as another incarnation, without sums.
            self._end(peer)
            self._join(peer.stage)
            self.counts["new incarnations"] += 1

    def _end(self, peer: _Peer) -> None:
        peer.alive = False
        self.rebalancer.changed()
        if peer.moving:
            self.rebalancer.give_up(peer.moving, "it died")
        step = self.versions[peer.stage]
        self._at(0.2, lambda: self._fence(peer.name, step))

    def _fence(self, name: str, step: int) -> None:
        peer = self.peers[name]
        if step < self.versions[peer.stage]:
            return
        if (name, step) not in self.fenced:
            self.fenced.add((name, step))
            self.counts["fences"] += 1
        for trainer in range(len(self.trainers)):
            self._tell(trainer, Fenced(peer=name, step=step))
        # What it counted is not in the commit, whether it hears of it or not.
        if peer.alive:
            self._message(peer, lambda: self._hear_fence(peer, step))

    def _hear_fence(self, peer: _Peer, step: int) -> None:
        if peer.alive and step >= peer.accumulator.version:
            peer.accumulator.fence(step)
            peer.sums.pop(step, None)

    def _commit(self, step: int, stage: int) -> None:
        done = self.done.get((step, stage), {})
        if self.versions[stage] != step or len(done) < len(self.trainers):
            return
        roster = [peer for peer in self._live(stage) if (peer.name, step) not in self.fenced]
        holders = {holder for report in done.values() for _, holder in report.counted}
        if not holders <= {peer.name for peer in roster}:
            return  # one of them was lost; its trainer will report again
        offers = {peer.name: peer.accumulator.offer(step) for peer in roster}
        lacks = cover(offers, range(self.num_microbatches))
        if lacks.doubled or lacks.foreign:
            raise Broken(f"1 once per stage: step {step} of stage {stage}: {lacks} of {offers}")
        if lacks.missing:
            self.counts["commits put off"] += 1
            return
        total: Counter[int] = Counter()
        for peer in roster:
            total.update(peer.sums.get(step, Counter()))
        if total != Counter(range(self.num_microbatches)):
            raise Broken(f"1 once per stage: step {step} of stage {stage} sums {dict(total)}")
        self.versions[stage] = step + 1
        self.counts["commits"] += 1
        for peer in roster:
            self._message(peer, lambda peer=peer: self._catch_up(peer) if peer.alive else None)  # type: ignore[misc]
        for trainer in range(len(self.trainers)):
            self._tell(trainer, Committed(stage=stage, step=step))
        if min(self.versions) == step + 1 < self.num_steps:
            self._open(step + 1)

    # ------------------------------------------------------------ moves

    def _rebalance(self) -> None:
        self._at(REBALANCE_S, self._rebalance)
        if (late := self.rebalancer.expire(self.now_s)) is not None:
            self._stay(self.peers[late.move.peer])
        stages = [StageNeed(work=1.0, bytes=1)] * self.num_stages
        live = [peer for peer in self.peers.values() if peer.alive]
        powers = [PeerPower(name=peer.name, speed=peer.speed, memory_bytes=1) for peer in live]
        view = self.rebalancer.view
        decision = decide(stages, powers, {peer.name: peer.stage for peer in live})
        claim = self.rebalancer.claim(decision, view=view, now_s=self.now_s)
        if claim is not None:
            self.counts["moves claimed"] += 1
            peer = self.peers[claim.move.peer]
            peer.moving = claim.number
            self._message(peer, lambda: self._drain(peer, claim.number))

    def _drain(self, peer: _Peer, number: int) -> None:
        """The mover takes nothing new; when nothing of it waits for a commit, it pulls the new stage's state."""
        if not peer.alive or peer.moving != number or self.rebalancer.open is None:
            return
        peer.accumulator.drain()
        if peer.accumulator.is_empty:
            self._at(self.random.uniform(0.5, 3.0), lambda: self._arrive(peer, number))
        else:
            self._at(0.5, lambda: self._drain(peer, number))

    def _arrive(self, peer: _Peer, number: int) -> None:
        if not peer.alive or peer.moving != number:
            return
        source = peer.stage
        target = self.rebalancer.open.move.target if self.rebalancer.open else source
        assignment = {other.name: other.stage for other in self.peers.values() if other.alive}
        if not self.rebalancer.join(number, assignment):
            self._stay(peer)
            return
        # A new stage is a new incarnation: calls for the old one do not reach it.
        peer.alive = False
        self._join(target)
        self.counts["moves"] += 1
        if not self._live(source):
            raise Broken(f"2 never empty: a move left stage {source} with nobody")

    def _stay(self, peer: _Peer) -> None:
        self.counts["moves given up"] += 1
        peer.moving = 0
        peer.accumulator.drain(False)

    # ------------------------------------------------------------ faults

    def _fault(self) -> None:
        if self.now_s > self.fault_until_s:
            for stage in range(self.num_stages):
                if not self._live(stage):
                    self._join(stage)  # the buddy, at the latest now
            return
        self._at(self.random.expovariate(self.fault_rate), self._fault)
        live = [peer for peer in self.peers.values() if peer.alive]
        kind = self.random.choice(("kill", "kill", "join", "join", "cut", "slow", "kill a third"))
        self.counts[f"fault {kind}"] += 1
        if kind == "join" or len(live) < 3:
            # Also what an empty stage waits for: somebody who takes its state from the buddy.
            empty = [stage for stage in range(self.num_stages) if not self._live(stage)]
            self._join(empty[0] if empty else self.random.randrange(self.num_stages))
            return
        peer = self.random.choice(live)
        if kind == "kill":
            self._end(peer)
        elif kind == "kill a third":
            for one in self.random.sample(live, len(live) // 3):
                self._end(one)
        elif kind == "cut":
            peer.cut_until_s = self.now_s + self.random.uniform(1.0, 12.0)
        else:
            peer.speed *= 0.25


def simulate_swarm(seed: int) -> SwarmResult:
    """Run one seed to its end."""
    world = SwarmWorld(seed)
    problem = ""
    try:
        world.run()
    except Broken as broken:
        problem = str(broken)
    except (AssertionError, KeyError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    for machine in world.trainers:
        world.counts.update(machine.counts)
    return SwarmResult(
        seed=seed, problem=problem, seconds=world.now_s, num_events=world.num_events, counts=dict(world.counts)
    )
