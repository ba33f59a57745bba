"""Pair commits in virtual time: real `PairMachine`s, a real `PairBook`, a network that loses, doubles and re-orders.

Members train on while they exchange, die, are cut off, and come back as new incarnations; the controller crashes at any
row, for a moment or for several rounds, and reads its journal again. Invariants, checked when something happens and
once more after a drain:

1. All or none: of the members of an exchange that are neither dead nor fenced, none applied what another one skipped,
   or what the record says did not happen.
2. The ledger is exact: no sample is committed twice or after it was given back, and what a dead member loses is what it
   did since the last commit it is in.
3. Nobody waits longer than the pair timeout before it is bound by its `Ready`, and nobody has more commits that are
   not on the record than it may.
4. When faults stop every doubt ends, everybody commits again, and no exchange of a dead member stays open.
"""

from __future__ import annotations

import random
from collections import Counter

from faults.virtual import VirtualNetwork, VirtualTime
from orchestrator.pairing import Command as BookCommand
from orchestrator.pairing import (
    Fenced,
    FenceWanted,
    Joined,
    LedgerContradiction,
    PairBook,
    PairRecord,
    Publish,
    Row,
    Send,
    Settled,
    Write,
)
from orchestrator.simulation.pair_scenario import FAULTS, Exchange, Ledger, PairResult, PairScenario
from orchestrator.simulation.symbols import Violation, must
from workers import pair as p
from workers.pair_plan import PairPlan
from workers.records import MemberId

HEAD = "head"
HEARTBEAT_S, SUSPECT_S, LIMBO_S = 0.5, 3.0, 12.0
SAMPLES_A_ROUND = 4


class Worker:
    """A process: trains all the time, begins an exchange at each send point if a newer roster names it."""

    def __init__(self, world: PairWorld, me: MemberId) -> None:
        self.world, self.me = world, me
        self.machine = world.scenario.machine(me=me)
        self.alive, self.fenced = True, False
        self.plan = PairPlan()
        self.consumed = self.watermark = 0
        self.began_s = 0.0
        self.doubted = False
        self.outcomes: dict[p.PairId, bool] = {}

    @property
    def counts(self) -> bool:
        """Whether what it does counts: neither dead nor fenced."""
        return self.alive and self.me not in self.world.fenced

    def send_point(self) -> None:
        """A round's steps are made."""
        if not self.alive:
            return
        self.world.ledger.lease(self.me, SAMPLES_A_ROUND) if self.counts else None
        self.consumed += SAMPLES_A_ROUND
        ahead = self.plan.next(self.machine)
        if ahead is None:
            return
        round_, pair = ahead
        if pair is None:
            self.plan.sit_out(round_)
            return
        if self.machine.may_begin(pair):
            self.began_s, self.doubted = self.world.time.now, False
        self.handle(p.Begin(pair=pair, since=self.watermark, upto=self.consumed, digest=f"{self.me}/{round_}"))

    def handle(self, event: p.Event) -> None:
        """An event for the machine, and its commands."""
        if not self.alive:
            return
        before = self.machine.state
        commands = self.machine.handle(event)
        self.machine.validate()
        self.doubted |= self.machine.state == "doubt"
        self.world.most_unrecorded = max(self.world.most_unrecorded, self.machine.num_unrecorded)
        for command in commands:
            self._obey(command, before)

    def _obey(self, command: p.Command, before: str) -> None:
        world = self.world
        match command:
            case p.Say(to=to, message=message):
                world.to_member(self.me.name, to, message)
            case p.Tell(message=message):
                world.network.send(self.me.name, HEAD, world.controller_hears, message)
            case p.FetchPayload(offer=offer):
                world.fetch(self, offer)
            case p.KeepTime(pair=pair):
                world.time.after(world.scenario.timeout_s, self.handle, p.TimedOut(pair=pair))
            case p.Apply(pair=pair, offers=offers):
                for offer in offers:
                    if offer.sender == self.me:
                        self.watermark = offer.upto
                self._over(pair, True, before)
            case p.Skip(pair=pair):
                self._over(pair, False, before)

    def retry(self) -> None:
        """A part of the timeout is over."""
        if self.alive:
            if self.machine.is_waiting:
                self.handle(p.RetryDue())
            self.world.time.after(self.world.scenario.timeout_s / p.RETRIES_PER_TIMEOUT, self.retry)

    def _over(self, pair: p.PairId, committed: bool, before: str) -> None:
        world = self.world
        must(pair not in self.outcomes, 1, f"{self.me} applied or skipped {pair} twice")
        self.outcomes[pair] = committed
        world.check_outcome(self, pair, committed)
        world.counts["applied" if committed else "skipped"] += 1
        if committed and world.book is None:
            world.counts["commits without a controller"] += 1
        seconds = world.time.now - self.began_s
        if before == "collecting":
            must(seconds <= world.scenario.timeout_s + 1e-9, 3, f"{self.me} waited {seconds:.2f} s, bound by nothing")
        world.exchanges.append(
            Exchange(
                round_=pair.round_, member=self.me.name, seconds=seconds, committed=committed, doubted=self.doubted,
                partners=tuple(m.name for m in pair.members if m != self.me),
            )
        )  # fmt: skip


class PairWorld:
    """Members, controller, network and clock of one run."""

    def __init__(self, scenario: PairScenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(f"pairs {scenario.seed}")
        self.time = VirtualTime()
        self.network = VirtualNetwork(self.time, self.rng, scenario.link)
        self.names = [f"m{i:04d}" for i in range(scenario.num_members)]
        self.workers: dict[str, Worker] = {}
        self.incarnations: Counter[str] = Counter()
        self.rows: list[Row] = []
        self.records: dict[p.PairId, PairRecord] = {}
        self.fenced: set[MemberId] = set()
        self.ledger = Ledger()
        self.book: PairBook | None = None
        self.heard_s: dict[str, float] = {}
        self.dead: set[MemberId] = set()
        self.busy_until_s = 0.0
        self.crash_at_row = False
        self.counts: Counter[str] = Counter()
        self.exchanges: list[Exchange] = []
        self.most_unrecorded = 0
        self.faulty = scenario.fault_gap_s is not None

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """All rounds, then the drain, then the last checks."""
        s = self.scenario
        self.start_controller()
        for name in self.names:
            self.spawn(name)
            self.time.after(HEARTBEAT_S * self.rng.random(), self.heartbeat, name)
        for round_ in range(s.rounds + s.drain_rounds):
            self.time.after((round_ + 0.5) * s.inner_s, self.next_round)
            for name in self.names:
                self.time.after((round_ + 1) * s.inner_s + s.jitter_s * self.rng.random(), self._send_point, name)
        for at_s, name in s.kills:
            self.time.after(at_s, self.kill, name)
        if s.fault_gap_s is not None:
            self.time.after(self.rng.expovariate(1 / s.fault_gap_s), self.fault)
        end_s = (s.rounds + 0.9) * s.inner_s
        while self.time.now < end_s:
            self.time.run_next()
        self.heal()
        before = {name: worker.watermark for name, worker in self.workers.items()}
        end_s = (s.rounds + s.drain_rounds + 0.9) * s.inner_s
        while self.time.now < end_s:
            self.time.run_next()
        self.check_end(before)

    def heal(self) -> None:
        """No more faults."""
        self.faulty = self.crash_at_row = False
        self.network.heal()
        if self.book is None:
            self.start_controller()

    def fault(self) -> None:
        """One fault, and the next one later."""
        if not self.faulty or self.scenario.fault_gap_s is None:
            return
        kind, name, other = (
            self.rng.choice(self.scenario.faults),
            self.rng.choice(self.names),
            self.rng.choice(self.names),
        )
        self.counts[kind] += 1
        lasts_s = self.rng.expovariate(1 / 5.0)
        match kind:
            case "kill":
                self.kill(name)
            case "crash":
                self.crash()
            case "away":
                self.crash(self.rng.uniform(1.0, p.MOST_UNRECORDED + 2.0) * self.scenario.inner_s)
            case "crash_at_row":
                self.crash_at_row = True
            case "cut":
                self._cut([(name, o) for o in [*self.names, HEAD]], lasts_s)
            case "cut_pair":
                self._cut([(name, other)], lasts_s)
            case _:
                self._cut([(name, HEAD)], lasts_s)
        self.time.after(self.rng.expovariate(1 / self.scenario.fault_gap_s), self.fault)

    def _cut(self, links: list[tuple[str, str]], lasts_s: float) -> None:
        one_way = self.rng.random() < 0.3
        directions = [d for a, b in links for d in ([(a, b)] if one_way else [(a, b), (b, a)])]
        for source, target in directions:
            self.network.block(source, target)
            self.time.after(lasts_s, self.network.unblock, source, target)

    # ------------------------------------------------------------ members

    def spawn(self, name: str) -> None:
        """A new process; it is a member when the controller knows it."""
        worker = self.workers.get(name)
        if worker is not None and worker.alive:
            return
        if self.book is None or name in self.book.live:
            self.time.after(1.0, self.spawn, name)
            return
        self.incarnations[name] += 1
        me = MemberId(name=name, incarnation=self.incarnations[name])
        self.workers[name] = Worker(self, me)
        self.workers[name].retry()
        self.heard_s[name] = self.time.now
        self.obey(self.book.join(me))

    def kill(self, name: str) -> None:
        """The process dies; Ray tells the controller soon."""
        worker = self.workers[name]
        if worker.alive:
            worker.alive = False
            self.dead.add(worker.me)
            self.time.after(self.scenario.told_s + 0.2 * self.rng.random(), self._told_of_death, worker.me)
            self.time.after(1.0 + 2.0 * self.rng.random(), self.spawn, name)

    def _told_of_death(self, member: MemberId) -> None:
        self._fence(member)

    def _fence(self, member: MemberId) -> None:
        if self.book is not None:
            self.obey(self.book.fence(member))
        if self.book is not None:  # which may have crashed at a row
            self.obey(self.book.plan_anew())

    def _send_point(self, name: str) -> None:
        self.workers[name].send_point()

    def heartbeat(self, name: str) -> None:
        """A living process says so."""
        worker = self.workers[name]
        if worker.alive:
            self.network.send(name, HEAD, self._heard, worker.me)
        self.time.after(HEARTBEAT_S, self.heartbeat, name)

    def _heard(self, member: MemberId) -> None:
        if self.book is None:
            return
        if self.book.live.get(member.name) == member:
            self.heard_s[member.name] = self.time.now
            self.book.suspected(member, False)
        elif member in self.fenced:
            self.network.send(HEAD, member.name, self._told_it_is_fenced, member)

    def _told_it_is_fenced(self, member: MemberId) -> None:
        worker = self.workers[member.name]
        if worker.me == member and worker.alive:
            worker.alive = False
            self.counts["fenced alive"] += 1
            self.spawn(member.name)

    def to_member(self, source: str, to: MemberId, message: p.Event) -> None:
        """Send to a process."""
        self.network.send(source, to.name, self._deliver, to, message)

    def _deliver(self, to: MemberId, message: p.Event) -> None:
        worker = self.workers[to.name]
        if worker.me == to:
            worker.handle(message)

    def fetch(self, reader: Worker, offer: p.Offer) -> None:
        """A payload crosses the lines of its maker and its reader; the others of a group share them."""
        readers = len(offer.pair.members) - 1
        lasts_s = self.network.delay_s() + readers * self.scenario.payload_bytes / self.scenario.line_bytes_per_s
        self.time.after(lasts_s, self._fetched, reader, offer)

    def _fetched(self, reader: Worker, offer: p.Offer) -> None:
        maker = self.workers[offer.sender.name]
        there = maker.me == offer.sender and maker.alive and maker.machine.pair == offer.pair
        if there and self.network.linked(reader.me.name, offer.sender.name):
            reader.handle(p.Fetched(pair=offer.pair, member=offer.sender))
        else:
            reader.handle(p.FetchFailed(pair=offer.pair, member=offer.sender))

    # ------------------------------------------------------------ controller

    def start_controller(self) -> None:
        """A new life reads the journal, and is told who is dead."""
        book = self.book = self.scenario.book(topology=self.scenario.topology())
        book.replay(self.rows)
        for name in self.names:
            self.heard_s[name] = self.time.now
        for member in sorted(self.dead - self.fenced):
            if self.book is book:
                self.obey(book.fence(member))
        self.time.after(HEARTBEAT_S, self.watch, book)

    def crash(self, away_s: float | None = None) -> None:
        """The controller's process ends; what it had not sent is lost, its journal is not."""
        if self.book is not None:
            self.book = None
            self.time.after(0.5 + 3.0 * self.rng.random() if away_s is None else away_s, self._restart)

    def _restart(self) -> None:
        if self.book is None:
            self.start_controller()

    def watch(self, book: PairBook) -> None:
        """Look for silence."""
        if book is not self.book:
            return
        for name, member in sorted(book.live.items()):
            silence_s = self.time.now - self.heard_s[name]
            book.suspected(member, silence_s > SUSPECT_S)
            if silence_s > LIMBO_S and book is self.book:
                self._fence(member)
        self.time.after(HEARTBEAT_S, self.watch, book)

    def next_round(self) -> None:
        """A new roster."""
        if self.book is not None:
            self.obey(self.book.next_round())

    def controller_hears(self, message: p.Report | p.Query) -> None:
        """Messages are handled one after the other."""
        self.busy_until_s = max(self.busy_until_s, self.time.now) + self.scenario.service_s
        self.time.after(self.busy_until_s - self.time.now, self._controller_handles, message)

    def _controller_handles(self, message: p.Report | p.Query) -> None:
        if self.book is not None:
            self.obey(self.book.report(message) if isinstance(message, p.Report) else self.book.query(message))

    def obey(self, commands: list[BookCommand]) -> None:
        """What the book wants done, in order; a crash may come before a row, or between it and what is told of it."""
        book = self.book
        for command in commands:
            if book is not self.book:
                return
            match command:
                case Write(row=row):
                    crashes = self.crash_at_row and not isinstance(row, Joined)
                    if not crashes or self.rng.random() < 0.5:
                        self._write(row)
                    if crashes:
                        self.crash_at_row = False
                        self.crash()
                case Send(to=to, message=message):
                    self.to_member(HEAD, to, message)
                case Publish(rounds=rounds):
                    groups = [(r, {m.name: pair for pair in pairs for m in pair.members}) for r, pairs in rounds]
                    for name in self.names:
                        mine = tuple((round_, of.get(name)) for round_, of in groups)
                        self.network.send(HEAD, name, self._rosters, name, mine)
                case FenceWanted(member=member):
                    self.counts["fenced for a doubt"] += 1
                    self._fence(member)

    def _rosters(self, name: str, rounds: tuple[tuple[int, p.PairId | None], ...]) -> None:
        self.workers[name].plan.learn(rounds)

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        match row:
            case Fenced(member=member):
                self.fenced.add(member)
            case Settled():
                self.ledger.settle(row)
            case PairRecord(pair=pair):
                self.ledger.commit(row)
                self.records[pair] = row
                self.counts["commits"] += 1
                for member in pair.members:
                    worker = self.workers[member.name]
                    if worker.me == member and worker.counts:
                        must(worker.outcomes.get(pair, True), 1, f"{pair} is recorded, and {member} skipped it")

    # ------------------------------------------------------------ checks

    def check_outcome(self, worker: Worker, pair: p.PairId, committed: bool) -> None:
        """Invariant 1, when a member applies or skips."""
        if not worker.counts:
            return
        what = "applied" if committed else "skipped"
        must(committed or pair not in self.records, 1, f"{worker.me} {what} {pair}, which is recorded")
        for member in pair.members:
            other = self.workers[member.name]
            if other.me == member and other.counts and pair in other.outcomes:
                must(other.outcomes[pair] == committed, 1, f"{worker.me} {what} {pair}, {member} did not")

    def check_end(self, before: dict[str, int]) -> None:
        """Invariants 2 and 4, and 1 against the record."""
        self.ledger.check()
        assert self.book is not None
        for name, worker in self.workers.items():
            must(worker.counts and worker.machine.state == "idle", 4, f"{worker.me} is stuck")
            must(worker.watermark > before[name] or worker.me.incarnation > 1, 4, f"{name} commits no more")
            must(worker.watermark > 0, 4, f"{worker.me} never committed")
            for pair, committed in worker.outcomes.items():
                last = pair in worker.machine.untold
                must(last or committed == (pair in self.records), 1, f"{worker.me}, {pair}: {committed}, not on record")
        must(not self.book.unsettled, 4, f"never settled: {sorted(self.book.unsettled)}")


def simulate_pairs(scenario: PairScenario) -> PairResult:
    """Run one seed to its end; whatever goes wrong is in the result."""
    world = PairWorld(scenario)
    problem, invariant = "", 0
    try:
        world.run()
    except Violation as violation:
        problem, invariant = violation.story, violation.number
    except (p.PairContradiction, LedgerContradiction, AssertionError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
    world.counts["most unrecorded"] = world.most_unrecorded
    return PairResult(
        seed=scenario.seed, problem=problem, invariant=invariant, num_events=world.time.num_events,
        num_faults=sum(world.counts[kind] for kind in FAULTS), counts=dict(sorted(world.counts.items())),
        exchanges=tuple(world.exchanges),
    )  # fmt: skip
