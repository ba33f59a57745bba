"""The brain: `handle(event, now) -> list[Command]`. No Ray, no clock, no files, no randomness.

It replays the journal into a `RunState`, keeps one `FragmentExchange` per fragment and a `Roll` of processes, and
turns every decision into a journal row first: whatever tells a member of a decision waits for `Flushed` (protocol
1.2 rule 3, C10). The shells around it (`controller.py` on Ray, `local.py` in process, the simulator) only move bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator import events as ev
from orchestrator import exchange as ex
from orchestrator import leases
from orchestrator.membership import Process, Roll, Verdict
from orchestrator.revocation import Revocations
from orchestrator.run_state import RunState
from orchestrator.settings import ExchangeConfig
from strategies.config import StrategyConfig
from workers import messages as msg
from workers.records import (
    CommitRecord,
    DropRecord,
    EvaluationRecord,
    FaultRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    MemberId,
    Record,
    Row,
    SettleRecord,
    SnapshotRecord,
    StopRecord,
    Term,
    make_row,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What the coordinator needs to know of the run's configuration."""

    run_id: str
    islands: tuple[str, ...]
    total_samples: int
    seq_len: int
    exchange: ExchangeConfig
    strategy: StrategyConfig
    eval_every: float
    start_timeout_s: float
    snapshot_every_s: float
    replace_dead: bool
    max_restarts: int


class Coordinator:
    """All decisions of one run in one controller life."""

    def __init__(self, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float, started_s: float = 0.0) -> None:
        """`rows`: the journal so far, its last row being this term's; `started_s`: run time that had passed before."""
        self.plan = plan
        self.term = term
        self.rows: list[Row] = []
        self.state = RunState()
        for row in rows:
            self._replay(row)
        self.flushed = len(self.rows) - 1
        self.zero_s = now - started_s
        self.roll = Roll(suspect_s=plan.exchange.suspect_s, limbo_s=plan.exchange.limbo_s)
        self.exchanges: list[ex.FragmentExchange] = []
        self.revocations = Revocations()
        self.pending: list[Row] = []
        self.held: list[tuple[int, MemberId | str, tuple[msg.ControllerBody, ...]]] = []
        self.after_flush: list[tuple[int, Record]] = []
        self.outbox: dict[str, list[msg.ControllerBody]] = defaultdict(list)
        self.nonces: dict[str, tuple[str, MemberId | None]] = {}
        self.commands: list[ev.Command] = []
        self.now = now
        self.begun_s = now
        self.started = self.state.next_position > 0
        self.genesis_asked: MemberId | None = None
        self.tail = False
        self.restarts: dict[str, int] = defaultdict(int)
        self.missing_since: dict[str, float] = {}
        self.injected: list[tuple[float, str, str]] = []
        self.faults: list[ev.FaultTrack] = []
        self.eval_asked: tuple[MemberId, int, float] | None = None
        self.eval_turn = 0
        self.evals_due: list[int] = []
        self.next_eval = self._first_eval()
        self.save_asked: tuple[MemberId, str, float] | None = None
        self.last_save_s = now
        self.final_saved = False
        self.stopping: ev.StopRequested | None = None
        self.local_saved: set[str] = set()
        self.ended = False
        self.stale_messages = 0
        self.discarded_before = 0
        self.first_joins: dict[str, float] = {}
        self.sent: dict[str, int] = {}
        self.consumed_at_end: dict[MemberId, int] = {}
        self.samples_lost = 0
        self._open_exchanges()

    # ------------------------------------------------------------ entry

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """One event in, commands out. `now` is the shell's monotonic clock, seconds."""
        self.now = now
        self.commands = []
        if not self.ended:
            match event:
                case ev.Received(envelope=envelope):
                    self._received(envelope)
                case ev.Flushed(seq=seq):
                    self._flushed(seq)
                case ev.JournalFullNow():
                    self._say("the journal's disk is full: commits stop until there is space", level="warning")
                case ev.ProcessDied(name=name, nonce=nonce, why=why):
                    self._process_died(name, nonce, why)
                case ev.FaultInjected(fault=fault, member=member):
                    self._fault_injected(fault, member)
                case ev.StopRequested():
                    self._stop_requested(event)
                case ev.Tick():
                    self._tick()
        self._emit()
        return self.commands

    def seconds(self) -> float:
        """Run time: seconds since the run's start on the controller's clock."""
        return self.now - self.zero_s

    def bytes_sent(self) -> int:
        """Payload bytes that all processes of this run have sent, by their last heartbeats."""
        return sum(self.sent.values())

    def progress(self) -> float:
        """Committed share of the run's samples."""
        return min(self.state.samples_committed() / self.plan.total_samples, 1.0)

    # ------------------------------------------------------------ journal and outbox

    def _replay(self, row: Row) -> None:
        self.state.apply(row.record)
        self.rows.append(row)

    def _log(self, *records: Record) -> None:
        for record in records:
            last = self.rows[-1].hash
            row = make_row(len(self.rows), last, record)
            self._replay(row)
            self.pending.append(row)

    def _last_seq(self) -> int:
        return len(self.rows) - 1

    def _tell(self, to: MemberId | str, *bodies: msg.ControllerBody) -> None:
        """Queue bodies for a member (or, for a process without incarnation, a nonce) until all decided is flushed."""
        self.held.append((self._last_seq(), to, bodies))

    def _tell_all(self, *bodies: msg.ControllerBody) -> None:
        for member in self.state.live():
            if member in self.roll.processes:
                self._tell(member, *bodies)

    def _sync(self, member: MemberId) -> None:
        self._tell(member)

    def _flushed(self, seq: int) -> None:
        self.flushed = max(self.flushed, seq)
        done = [record for at, record in self.after_flush if at <= self.flushed]
        self.after_flush = [(at, record) for at, record in self.after_flush if at > self.flushed]
        for record in done:
            if isinstance(record, CommitRecord):
                self._after_commit(record)
            elif isinstance(record, StopRecord):
                self.ended = True
                self.commands.append(ev.Finish(reason=record.reason, detail=record.detail))

    def _emit(self) -> None:
        if self.pending:
            self.commands.append(ev.Append(rows=tuple(self.pending)))
            self.pending = []
        ready = [entry for entry in self.held if entry[0] <= self.flushed]
        self.held = [entry for entry in self.held if entry[0] > self.flushed]
        grouped: dict[MemberId | str, list[msg.ControllerBody]] = {}
        for _, to, bodies in ready:
            grouped.setdefault(to, []).extend(bodies)
        for to, all_bodies in grouped.items():
            self._send(to, tuple(all_bodies))

    def _send(self, to: MemberId | str, bodies: tuple[msg.ControllerBody, ...]) -> None:
        if isinstance(to, str):
            name, member = self.nonces.get(to, ("", None))
            nonce, rows_from, rows = to, 0, ()
        else:
            process = self.roll.processes.get(to)
            if process is None:
                return
            name, member, nonce, rows_from = to.name, to, process.nonce, process.rows_sent
            rows = tuple(self.rows[rows_from : self.flushed + 1])
            process.rows_sent = max(rows_from, self.flushed + 1)
        self.commands.append(
            ev.Send(
                batch=msg.Batch(
                    run_id=self.plan.run_id, term=self.term, name=name,
                    incarnation=member.incarnation if member else None, nonce=nonce,
                    rows_from=rows_from, rows=rows, bodies=bodies,
                )
            )
        )  # fmt: skip

    def _say(self, text: str, *, member: str = "", level: str = "info") -> None:
        self.commands.append(ev.Say(text=text, member=member, level=level))

    def _metric(self, **row: Any) -> None:
        self.commands.append(ev.Metric(row=row))

    # ------------------------------------------------------------ messages in

    def _received(self, envelope: msg.Envelope) -> None:
        if envelope.run_id != self.plan.run_id:
            self.stale_messages += 1
            self._say(f"message of another run {envelope.run_id!r} from {envelope.name!r} dropped", level="warning")
            return
        if envelope.term is not None and envelope.term.rank > self.term.rank:
            self.ended = True
            self.commands.append(
                ev.Die(why=f"{envelope.name} obeys term {envelope.term}, this controller is {self.term}")
            )
            return
        member = self._sender(envelope)
        for body in envelope.bodies:
            if isinstance(body, msg.Join):
                self._join(envelope, body)
            elif member is not None and member in self.roll.processes:
                self._body(member, body)
            elif member is not None and isinstance(body, msg.Hello):
                self._reattach(member, envelope, body)

    def _sender(self, envelope: msg.Envelope) -> MemberId | None:
        """The live incarnation behind an envelope; a fenced one is told so."""
        if envelope.incarnation is None:
            return None
        member = MemberId(name=envelope.name, incarnation=envelope.incarnation)
        entry = self.state.members.get(member)
        if entry is not None and entry.live and entry.nonce == envelope.nonce:
            if member in self.roll.processes:
                self._verdict(self.roll.heard(member, self.now))
            return member
        self.stale_messages += 1
        self.nonces[envelope.nonce] = (envelope.name, member)
        if not any(isinstance(body, msg.Join) for body in envelope.bodies):
            self._tell(envelope.nonce, msg.Fenced(why="this incarnation is not a live member of the run"))
        return None

    def _join(self, envelope: msg.Envelope, body: msg.Join) -> None:
        known = self.state.nonces.get(envelope.nonce)
        if known is not None:
            if not self.state.members[known].live:
                self.nonces[envelope.nonce] = (envelope.name, None)
                self._tell(envelope.nonce, msg.Rejoin())
                return
            self._attach_process(known, envelope.nonce, body.info)
            self._tell(known, msg.Welcome(incarnation=known.incarnation))
            self._after_join()
            return
        previous = self.state.current.get(envelope.name)
        if previous is not None:
            self._fence(previous, "a new process took its place", refused=False)
        incarnation = self.state.last_incarnation.get(envelope.name, 0) + 1
        member = MemberId(name=envelope.name, incarnation=incarnation)
        self._log(JoinRecord(member=envelope.name, incarnation=incarnation, nonce=envelope.nonce, node=body.info.node))
        self._attach_process(member, envelope.nonce, body.info)
        self.first_joins.setdefault(envelope.name, self.seconds())
        self.missing_since.pop(envelope.name, None)
        self._say(f"{member} joined on {body.info.node}", member=envelope.name)
        self._tell(member, msg.Welcome(incarnation=incarnation))
        self._after_join()

    def _attach_process(self, member: MemberId, nonce: str, info: msg.ProcessInfo) -> None:
        if member in self.roll.processes:
            self.roll.processes[member].rows_sent = 0
            return
        self.roll.processes[member] = Process(id=member, nonce=nonce, info=info, joined_s=self.now, heard_s=self.now)
        self.nonces[nonce] = (member.name, member)

    def _reattach(self, member: MemberId, envelope: msg.Envelope, hello: msg.Hello) -> None:
        """A member that outlived the controller's restart: it keeps its incarnation, its leases and its work."""
        self._attach_process(member, envelope.nonce, hello.info)
        self._say(f"{member} re-attached", member=member.name)
        self._hello(member, hello)
        self._after_join()

    def _after_join(self) -> None:
        self._peers()
        self._ask_genesis()

    def _body(self, member: MemberId, body: msg.MemberBody) -> None:
        match body:
            case msg.Hello():
                self._hello(member, body)
            case msg.GenesisMade():
                self._genesis_made(member, body)
            case msg.Offer() if body.fragment < len(self.exchanges):
                self._mark_stepped(member, body)
                exchange = self.exchanges[body.fragment]
                self._effects(exchange, exchange.on_offer(member, body, self._fleet(body.fragment), self.now))
            case msg.Missing() | msg.Refused() | msg.Reduced() | msg.Have() if body.fragment < len(self.exchanges):
                self._exchange_body(member, body)
            case msg.RevokeAnswer():
                self.revocations.answer(member, body)
                self._revocations()
            case msg.Evaluated():
                self._evaluated(member, body)
            case msg.DropRequest():
                self._drop(member, body.upto, body.why)
            case msg.Saved():
                self._saved(member, body)
            case msg.Observed():
                self._observed(member, body)
            case msg.FaultSeen():
                self._fault(body.fault, member.name, body.detail, injected=False)
            case _:
                self.stale_messages += 1

    def _exchange_body(self, member: MemberId, body: msg.Missing | msg.Refused | msg.Reduced | msg.Have) -> None:
        exchange, fleet = self.exchanges[body.fragment], self._fleet(body.fragment)
        if exchange.open is None or exchange.open.id != body.exchange:
            self.stale_messages += 1
            return
        match body:
            case msg.Missing():
                effects = exchange.on_missing(member, body, fleet, self.now)
            case msg.Refused():
                effects = exchange.on_refused(member, body, fleet, self.now)
            case msg.Reduced():
                effects = exchange.on_reduced(member, body, fleet, self.now)
            case msg.Have():
                effects = exchange.on_have(member, body, fleet, self.now)
        self._effects(exchange, effects)

    # ------------------------------------------------------------ heartbeats

    def _hello(self, member: MemberId, hello: msg.Hello) -> None:
        process = self.roll.processes[member]
        first_step = not process.stepped and hello.consumed > 0
        was_ready, had = process.ready(), process.hello
        self.sent[process.nonce.split("+")[0]] = hello.bytes_sent
        process.hello = hello
        if process.status == "joining" and process.ready():
            process.status, process.reason = "healthy", "holds the state"
        if hello.journal_len < process.rows_sent and (had is None or had.journal_len >= hello.journal_len):
            process.rows_sent = hello.journal_len
        if process.rows_sent <= self.flushed:
            self._sync(member)
        if first_step:
            process.first_step_s = self.seconds()
            self._track(member, "back_s")
        entry = self.state.members[member]
        if hello.num_leased < entry.num_leased and had is not None and had.num_leased == hello.num_leased:
            rest = self.state.offered_ranges(member, hello.num_leased, entry.num_leased)
            self._tell(member, msg.LeaseGrant(index=hello.num_leased, ranges=rest))
        if not was_ready and process.ready():
            self._peers()
        for exchange in self.exchanges:
            report = process.report(exchange.fragment)
            if report is not None and had is not None and report.n == self.state.heads[exchange.fragment].version.n:
                if hello.waiting and hello == had:
                    self._effects(exchange, exchange.repeat(member, self._fleet(exchange.fragment)))
            self.revocations.release_barred(member, exchange.fragment, report, self._tell)
        if hello.waiting == "leases" and self.tail:
            self._tell(member, msg.Tail(active=True))
        self._start_if_ready()
        self._grant()

    def _mark_stepped(self, member: MemberId, offer: msg.Offer) -> None:
        process = self.roll.processes[member]
        if process.hello is not None and process.hello.consumed < offer.upto:
            first_step = process.hello.consumed == 0
            process.hello = replace(process.hello, consumed=offer.upto)
            if first_step:
                process.first_step_s = self.seconds()
                self._track(member, "back_s")

    def _peers(self) -> None:
        peers = tuple(
            (str(m), p.info.address, tuple(f.n for f in p.hello.fragments) if p.hello else ())
            for m, p in sorted(self.roll.processes.items())
        )
        self._tell_all(msg.Peers(peers=peers))

    # ------------------------------------------------------------ genesis and start

    def _ask_genesis(self) -> None:
        if self.state.num_fragments or self.genesis_asked in self.roll.processes:
            return
        live = [m for m in self.state.live() if m in self.roll.processes]
        if live:
            self.genesis_asked = live[0]
            self._tell(live[0], msg.MakeGenesis())

    def _genesis_made(self, member: MemberId, body: msg.GenesisMade) -> None:
        if self.state.num_fragments or member != self.genesis_asked:
            return
        self._log(
            GenesisRecord(
                maker=str(member), digests=body.digests, num_params=body.num_params, num_chunks=body.num_chunks
            )
        )
        self._open_exchanges()
        self._tell_all()
        self._tell(member, msg.Save(name="genesis", local=False))
        self._peers()

    def _open_exchanges(self) -> None:
        if self.state.num_fragments and not self.exchanges:
            self.exchanges = [
                ex.FragmentExchange(fragment=f, num_chunks=n, config=self.plan.exchange, term=self.term)
                for f, n in enumerate(self.state.num_chunks)
            ]

    def _start_if_ready(self) -> None:
        if self.started or not self.state.num_fragments:
            return
        ready = {m.name for m, p in self.roll.processes.items() if p.ready()}
        late = self.now - self.begun_s > self.plan.start_timeout_s
        if ready >= set(self.plan.islands) or (late and ready):
            self.started = True
            if late and not ready >= set(self.plan.islands):
                self._say(
                    f"started without {sorted(set(self.plan.islands) - ready)}: run.start_timeout_s is over",
                    level="warning",
                )
            self._ask_evaluation(0)
            self._grant()

    # ------------------------------------------------------------ leases

    def _lease_plan(self) -> leases.Plan:
        return leases.Plan(
            total_samples=self.plan.total_samples,
            inner_steps=self.plan.strategy.inner_steps_at(self.progress()),
            bound_rounds=self.plan.exchange.bound_rounds,
        )

    def _grant(self) -> None:
        if not self.started or self.stopping is not None:
            return
        members = {
            m: (p.info.batch_size, p.consumed)
            for m, p in self.roll.processes.items()
            if p.ready() and p.status != "suspect"
        }
        plan = self._lease_plan()
        records = leases.grant(self.state, members, plan)
        for record in records:
            self._log(record)
            member = MemberId(name=record.member, incarnation=record.incarnation)
            self._tell(member, msg.LeaseGrant(index=record.index, ranges=record.ranges))
        tail = leases.left_to_issue(self.state, plan) == 0
        if tail != self.tail:
            self.tail = tail
            self._tell_all(msg.Tail(active=tail))

    # ------------------------------------------------------------ exchanges

    def _fleet(self, fragment: int) -> ex.Fleet:
        head = self.state.heads[fragment].version
        members: dict[MemberId, ex.MemberView] = {}
        for member in self.state.live():
            entry, process = self.state.members[member], self.roll.processes.get(member)
            members[member] = ex.MemberView(
                id=member, node=entry.node, address=process.info.address if process else "",
                suspect=process is None or process.status == "suspect", ready=process is not None and process.ready(),
                stepped=process is not None and process.stepped, weight=process.info.weight if process else 0,
                watermark=entry.watermarks[fragment], leases=entry.leases,
            )  # fmt: skip
        return ex.Fleet(
            members=members, head=head, samples_committed=self.state.samples_committed(),
            inner_steps=self.plan.strategy.inner_steps_at(self.progress()),
        )  # fmt: skip

    def _effects(self, exchange: ex.FragmentExchange, effects: Sequence[ex.Effect]) -> None:
        for effect in effects:
            match effect:
                case ex.ToAll(body=body):
                    self._tell_all(body)
                case ex.ToOne(member=member, body=body):
                    self._tell(member, body) if body is not None else self._sync(member)
                case ex.Journal(record=record):
                    self._log(record)
                    self.after_flush.append((self._last_seq(), record))
                    if isinstance(record, CommitRecord):
                        self._committed(exchange, record)
                case ex.Fence(member=member, why=why, refused=refused):
                    self._fault("refused" if refused else "fenced", member.name, why, injected=False)
                    self._fence(member, why, refused=refused)
                case ex.Drop(member=member, upto=upto, why=why):
                    self._drop(member, upto, why)
                case ex.Note(text=text, fault=fault, member=name):
                    self._say(text, member=name)
                    if fault:
                        self._fault(fault, name, text, injected=False)
                    if exchange.disagreements >= 3:
                        self._end("failed", f"fragment {exchange.fragment}: next anchors differed in 3 exchanges")

    def _committed(self, exchange: ex.FragmentExchange, record: CommitRecord) -> None:
        done = exchange.committed()
        if done is None:
            return
        self._metric(
            kind="exchange", t_s=self.seconds(), fragment=record.fragment, version=record.n, attempts=done.attempt,
            roster=[entry.member for entry in record.roster], seconds=self.now - done.closed_s,
            opened_s=done.opened_s - self.zero_s, closed_because=done.closed_because,
            bytes=sum(offer.num_bytes for _, offer in done.offers.values()),
            tokens_committed=self.state.samples_committed() * self.plan.seq_len,
        )  # fmt: skip

    def _after_commit(self, record: CommitRecord) -> None:
        """The commit is durable: tell everybody, lease what comes next, evaluate when due, settle the dead."""
        self._tell_all()
        for track in list(self.faults):
            if track.next_commit_s is None:
                self._retrack(track, next_commit_s=self.seconds())
        for entry in record.roster:
            self._track(entry.offer.member, "contributed_s")
        self._settle_all()
        self._grant()
        while self.progress() >= self.next_eval - 1e-9 and self.next_eval < 1.0:
            self.next_eval += self.plan.eval_every
            self._ask_evaluation(record.n)
        self._finish_if_done()

    def _drop(self, member: MemberId, upto: int, why: str) -> None:
        entry = self.state.members[member]
        if not entry.live or upto < max(entry.watermarks, default=0) or upto > entry.num_leased:
            return
        self._log(DropRecord(member=member.name, incarnation=member.incarnation, upto=upto, why=why))
        self._say(f"work of {member} up to sample {upto} is dropped: {why}", member=member.name, level="warning")
        self._sync(member)
        self._grant()
        self._finish_if_done()

    # ------------------------------------------------------------ death and fences

    def _fence(self, member: MemberId, why: str, *, refused: bool) -> None:
        entry = self.state.members.get(member)
        if entry is None or not entry.live:
            return
        self._log(FenceRecord(member=member.name, incarnation=member.incarnation, why=why, refused=refused))
        self._say(f"{member} is fenced: {why}", member=member.name, level="warning")
        process = self.roll.processes.pop(member, None)
        if process is not None:
            self.consumed_at_end[member] = process.consumed
            self._tell(process.nonce, msg.Fenced(why=why))
        for exchange in self.exchanges:
            self._effects(exchange, exchange.on_gone(member, self._fleet(exchange.fragment), self.now))
        if self.genesis_asked == member:
            self.genesis_asked = None
            self._ask_genesis()
        if self.eval_asked and self.eval_asked[0] == member:
            self._ask_evaluation(self.eval_asked[1])
        if self.save_asked and self.save_asked[0] == member:
            self.save_asked = None
        self._settle_all()
        self._peers()

    def _settle_all(self) -> None:
        for member, entry in self.state.members.items():
            if not entry.live and not entry.settled and may_settle(member, self.exchanges):
                self._log(SettleRecord(member=member.name, incarnation=member.incarnation))
                trained = self.consumed_at_end.get(member, 0)
                self.samples_lost += max(trained - max(entry.watermarks, default=0), 0)
        self._grant()
        self._finish_if_done()

    def _process_died(self, name: str, nonce: str | None, why: str) -> None:
        member = self.state.nonces.get(nonce) if nonce else self.state.current.get(name)
        if member is not None and self.state.members[member].live:
            injected = next((t for t, f, m in reversed(self.injected) if m == name), None)
            self.injected = [i for i in self.injected if i[2] != name]
            self.faults.append(
                ev.FaultTrack(fault="kill", member=name, injected_s=injected, detected_s=self.seconds(), victim=member)
            )
            self._fault("died", name, why, injected=False)
            self._dead_span(name, member.incarnation)
            self._fence(member, why, refused=False)
        self._replace(name, why)

    def _replace(self, name: str, why: str) -> None:
        if self.stopping is not None or self.ended or not self.plan.replace_dead:
            return
        self.restarts[name] += 1
        if self.restarts[name] > self.plan.max_restarts:
            text = f"{name} died {self.restarts[name]} times (run.max_restarts is {self.plan.max_restarts}): given up"
            self._say(text, member=name, level="warning")
            if not self.state.live():
                self._end("failed", text)
            return
        self.commands.append(ev.Spawn(name=name, why=why))

    def _dead_span(self, name: str, incarnation: int) -> None:
        self.missing_since.setdefault(name, self.seconds())
        self._metric(kind="death", t_s=self.seconds(), member=name, incarnation=incarnation)

    def _fault_injected(self, fault: str, member: str) -> None:
        self.injected.append((self.seconds(), fault, member))
        self._fault(fault, member, "injected on purpose", injected=True)

    def _fault(self, fault: str, member: str, detail: str, *, injected: bool) -> None:
        self._log(
            FaultRecord(fault=fault, member=member, injected=injected, t_s=round(self.seconds(), 6), detail=detail)
        )

    def _track(self, member: MemberId, what: str) -> None:
        for track in list(self.faults):
            later = track.member == member.name and member.incarnation > track.victim.incarnation
            if later and getattr(track, what) is None:
                self._retrack(track, **{what: self.seconds()})

    def _retrack(self, track: ev.FaultTrack, **changes: float) -> None:
        self.faults[self.faults.index(track)] = replace(track, **changes)

    def _verdict(self, verdict: Verdict | None) -> None:
        if verdict is None:
            return
        self._say(f"{verdict.id} is {verdict.verdict}: {verdict.reason}", member=verdict.id.name)
        if verdict.verdict == "suspect":
            self._fault("suspect", verdict.id.name, verdict.reason, injected=False)
        elif verdict.verdict == "fence":
            self._fault("lost", verdict.id.name, verdict.reason, injected=False)
            self._fence(verdict.id, verdict.reason, refused=False)
            self._replace(verdict.id.name, verdict.reason)

    # ------------------------------------------------------------ evaluation and snapshots

    def _first_eval(self) -> float:
        every, due = self.plan.eval_every, self.plan.eval_every
        while due <= self.progress() + 1e-9:
            due += every
        return due

    def _ask_evaluation(self, version: int) -> None:
        """A living member in rotation evaluates the anchor."""
        able = [m for m, p in sorted(self.roll.processes.items()) if p.ready() and p.status != "suspect"]
        if not able:
            self.eval_asked = None
            return
        member = able[self.eval_turn % len(able)]
        self.eval_turn += 1
        self.eval_asked = (member, version, self.now)
        versions = tuple(head.version.n for head in self.state.heads)
        self._tell(member, msg.Evaluate(versions=versions, samples=self.state.samples_committed()))

    def _evaluated(self, member: MemberId, body: msg.Evaluated) -> None:
        if self.eval_asked and self.eval_asked[0] == member:
            self.eval_asked = None
        if any(e.samples == body.samples for e in self.state.evaluations):
            return
        self._log(
            EvaluationRecord(member=str(member), versions=body.versions, samples=body.samples, val_loss=body.val_loss)
        )
        self._metric(
            kind="eval", t_s=self.seconds(), member=member.name, version=max(body.versions),
            progress=body.samples / self.plan.total_samples, val_loss=body.val_loss,
            tokens_committed=body.samples * self.plan.seq_len,
        )  # fmt: skip
        self._finish_if_done()

    def _ask_save(self, name: str) -> None:
        able = [m for m, p in sorted(self.roll.processes.items()) if p.ready() and p.status != "suspect"]
        if able:
            member = able[-1]
            self.save_asked = (member, name, self.now)
            self.last_save_s = self.now
            self._tell(member, msg.Save(name=name, local=False))

    def _saved(self, member: MemberId, body: msg.Saved) -> None:
        if body.local:
            self.local_saved.add(member.name)
            self._stop_if_saved()
            return
        if self.save_asked and self.save_asked[1] == body.name:
            self.save_asked = None
        self._log(SnapshotRecord(name=body.name, versions=body.versions))
        if body.name == "final" and body.versions == tuple(h.version.n for h in self.state.heads):
            self.final_saved = True
        self._finish_if_done()

    # ------------------------------------------------------------ the end

    def done(self) -> bool:
        """Whether every sample of the run has a final fate."""
        return self.started and self.state.samples_accounted() >= self.plan.total_samples

    def _finish_if_done(self) -> None:
        if not self.done() or self.stopping is not None or self.state.stopped is not None:
            return
        evaluated = any(e.samples == self.state.samples_committed() for e in self.state.evaluations)
        if not evaluated:
            if self.eval_asked is None:
                self._ask_evaluation(self.state.heads[0].version.n)
            elif self.eval_asked[1] != self.state.heads[0].version.n:
                self._ask_evaluation(self.state.heads[0].version.n)
        if not self.final_saved and (self.save_asked is None or self.save_asked[1] != "final"):
            self._ask_save("final")
        if evaluated and self.final_saved:
            self._end("done", "")

    def _end(self, reason: str, detail: str) -> None:
        if self.state.stopped is not None:
            return
        self._log(StopRecord(reason=reason, detail=detail))
        self.after_flush.append((self._last_seq(), self.rows[-1].record))
        self._tell_all(msg.Stop(save=False))

    def _stop_requested(self, event: ev.StopRequested) -> None:
        if not event.save:
            self._end("stopped", "stopped at once by the user; un-offered steps are lost")
            return
        if self.stopping is None:
            self.stopping = event
            self.begun_stop_s = self.now
            self._ask_save("stop")
            self._tell_all(msg.Stop(save=True))
            self._stop_if_saved()

    def _stop_if_saved(self) -> None:
        if self.stopping is not None and {m.name for m in self.roll.processes} <= self.local_saved:
            self._end("stopped", "stopped by the user; local states are saved")

    # ------------------------------------------------------------ observations and time

    def _observed(self, member: MemberId, body: msg.Observed) -> None:
        for age_s, row in body.rows:
            stamped = dict(row)
            at = self.seconds() - age_s
            if stamped.get("kind") == "span":
                length = float(stamped.pop("seconds"))  # type: ignore[arg-type]
                stamped["start_s"], stamped["end_s"] = at - length, at
            else:
                stamped["t_s"] = at
            self._metric(**stamped, member=member.name, incarnation=member.incarnation)

    def _tick(self) -> None:
        for verdict in self.roll.judge(self.now):
            self._verdict(verdict)
        for exchange in self.exchanges:
            self._effects(exchange, exchange.tick(self._fleet(exchange.fragment), self.now))
        self._start_if_ready()
        self._revocations()
        if self.eval_asked and self.now - self.eval_asked[2] > 60.0:
            self._ask_evaluation(self.eval_asked[1])
        if self.save_asked and self.now - self.save_asked[2] > 60.0:
            self._ask_save(self.save_asked[1])
        elif self.started and not self.save_asked and self.stopping is None and not self.done():
            if self.now - self.last_save_s > self.plan.snapshot_every_s:
                self._ask_save(f"v{max(h.version.n for h in self.state.heads)}")
        self._finish_if_done()
        if self.stopping is not None and self.now - self.begun_stop_s > 60.0:
            self._end(
                "stopped",
                f"stopped; no local state from {sorted({m.name for m in self.roll.processes} - self.local_saved)}",
            )

    def _revocations(self) -> None:
        if not self.exchanges:
            return
        for fragment, head in enumerate(self.state.heads):
            record = self.revocations.step(
                fragment, head.version, list(self.roll.processes.values()), self.now, self._tell,
                all_live=len(self.roll.processes) == len(self.state.live()),
            )  # fmt: skip
            if record is not None:
                self._effects(self.exchanges[fragment], self.exchanges[fragment].discard("its base was revoked"))
                self._log(record)
                self._fault(
                    "revoked", "", f"version {record.n} of fragment {fragment} is held by nobody", injected=False
                )
                self._tell_all()


def may_settle(member: MemberId, exchanges: Sequence[ex.FragmentExchange]) -> bool:
    """A fenced incarnation's samples get their fate only when it is in no open roster (C3)."""
    return not any(exchange.holds(member) for exchange in exchanges)
