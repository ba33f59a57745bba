"""The brain: `handle(event, now) -> list[Command]`. No Ray, no clock, no files, no randomness.

It replays the journal into a `RunState`, keeps one `FragmentExchange` per fragment and a `Roll` of processes, and
turns every decision into a journal row first: whatever tells a member of a decision waits for `Flushed` (protocol
1.2 rule 3, C10). The shells around it (`controller.py` on Ray, `local.py` in process, the simulator) only move bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator import events as ev
from orchestrator import exchange as ex
from orchestrator.closing import closing_of
from orchestrator.desk import RunPlan
from orchestrator.heartbeats import Heartbeats
from orchestrator.membership import Process
from workers import messages as msg
from workers.apart import Reached
from workers.pair_messages import PairTell
from workers.records import (
    CommitRecord,
    FenceRecord,
    MemberId,
    RollbackRecord,
    Row,
    StopRecord,
    Term,
)

__all__ = ["Coordinator", "RunPlan"]

LOOK_S_PER_MEMBER = 1e-4
"""All members are looked at no more often than this: a thousand with each tick, ten thousand once a second."""

ExchangeBody = msg.Missing | msg.Refused | msg.Reduced | msg.Measured | msg.Have


class Coordinator(Heartbeats):
    """All decisions of one run in one controller life."""

    def __init__(self, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float, started_s: float = 0.0) -> None:
        """`rows`: the journal so far, its last row being this term's; `started_s`: run time that had passed before."""
        super().__init__(plan, rows, term, now=now, started_s=started_s)
        self.verified_s = float("-inf")
        self.looked_s = float("-inf")
        self._open_exchanges()

    # ------------------------------------------------------------ entry

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """One event in, commands out. `now` is the shell's monotonic clock, seconds."""
        self.now = now
        self.commands = []
        self.num_events += 1
        if not self.ended:
            match event:
                case ev.Received(envelope=envelope):
                    self._received(envelope)
                case ev.Flushed(seq=seq):
                    self._flushed(seq)
                case ev.JournalFullNow():
                    self._journal_is_full()
                case ev.ProcessDied():
                    self._process_died(event)
                case ev.FaultInjected():
                    self._fault_injected(event)
                case ev.FaultNoticed(fault=fault, member=member, detail=detail):
                    self._fault(fault, member, detail, injected=False)
                case ev.LeaveRequested(name=name, why=why):
                    self._leave_requested(name, why)
                case ev.Operated():
                    self._operated(event)
                case ev.StopRequested():
                    self._stop_requested(event)
                case ev.SettingsRequested():
                    self._settings_requested(event)
                case ev.PauseRequested():
                    self._pause_requested(event)
                case ev.UnbanRequested(member=name):
                    self._unban_requested(name)
                case ev.SaveRequested():
                    self._save_requested()
                case ev.RollbackRequested():
                    self._rollback_requested(event)
                case ev.Recovered():
                    for incarnation in self.state.live():
                        self._fence(incarnation, "the journal was rebuilt from the members' copies", refused=False)
                case ev.Tick():
                    self._tick()
        elif isinstance(event, ev.Received):
            self._last_rows(event.envelope)
        if self.pending or self.held:  # mostly nothing is
            self._emit()
        return self.commands

    def _last_rows(self, envelope: msg.Envelope) -> None:
        """After the end only what members measured still counts: they hear of the end later and send the rest."""
        if envelope.run_id == self.plan.run_id and envelope.incarnation is not None:
            member = MemberId(name=envelope.name, incarnation=envelope.incarnation)
            for body in envelope.bodies:
                if isinstance(body, msg.Observed) and member in self.state.members:
                    self._observed(member, body)

    def _flushed(self, seq: int) -> None:
        self.flushed = max(self.flushed, seq)
        self.full = False
        done = [record for at, record in self.after_flush if at <= self.flushed]
        self.after_flush = [(at, record) for at, record in self.after_flush if at > self.flushed]
        for record in done:
            if isinstance(record, CommitRecord):
                self._after_commit(record)
            elif isinstance(record, FenceRecord):
                self._fence_flushed(MemberId(name=record.member, incarnation=record.incarnation), record.why)
            elif isinstance(record, RollbackRecord):
                self.commands.append(ev.RolledBack(versions=record.versions))
            elif isinstance(record, StopRecord):
                self.ended = True
                for name in [*self.missing_since, *self.away_since]:
                    self._end_gap(name)
                self.commands.append(ev.Finish(reason=record.reason, detail=record.detail))

    # ------------------------------------------------------------ messages in

    def _received(self, envelope: msg.Envelope) -> None:
        if envelope.run_id != self.plan.run_id:
            self.stale_messages += 1
            self._say(f"message of another run {envelope.run_id!r} from {envelope.name!r} dropped", level="warning")
            return
        term = envelope.term
        if term != self.term and term is not None and term.rank > self.rank:
            self.ended = True
            self.commands.append(
                ev.Die(why=f"{envelope.name} obeys term {envelope.term}, this controller is {self.term}")
            )
            return
        process = self.roll.by_nonce.get(envelope.nonce)
        if process is None or process.id != (envelope.name, envelope.incarnation):  # not here, or not what it says
            self._from_stranger(envelope)
            return
        if (verdict := self.roll.heard(process, self.now)) is not None:
            self._verdict(verdict)
        for body in envelope.bodies:
            if process.here and isinstance(body, msg.Hello):  # most of what there is
                self._hello(process, body)
            elif isinstance(body, msg.Join):
                self._join(envelope, body)
            elif process.here:  # it may have been fenced for what it said before
                self._body(process.id, body)

    def _from_stranger(self, envelope: msg.Envelope) -> None:
        """From a process that is not here: it joins, or outlived an earlier controller, or was fenced."""
        member = self._sender(envelope)
        for body in envelope.bodies:
            here = member is not None and member in self.roll.processes
            if isinstance(body, msg.Join):
                self._join(envelope, body)
            elif here and isinstance(body, msg.Hello):
                self._hello(self.roll.processes[member], body)  # type: ignore[index]
            elif here:
                self._body(member, body)  # type: ignore[arg-type]
            elif member is not None and isinstance(body, msg.Hello) and self.state.members[member].live:
                self._reattach(member, envelope.nonce, body)

    def _reattach(self, member: MemberId, nonce: str, hello: msg.Hello) -> None:
        """A member that outlived the controller's restart: it keeps its incarnation, its leases and its work."""
        self._attach_process(member, nonce, hello.info)
        self.bytes_counted += hello.bytes_sent  # sent in this controller's earlier lives
        self._say(f"{member} re-attached", member=member.name)
        self._hello(self.roll.processes[member], hello)
        self._after_join()

    def _body(self, member: MemberId, body: msg.MemberBody) -> None:
        match body:
            case msg.Offer() if body.fragment < len(self.exchanges):
                self._mark_consumed(member, body.upto)
                exchange = self.exchanges[body.fragment]
                self._effects(exchange, exchange.on_offer(member, body, self._fleet(body.fragment), self.now))
            case msg.Have() | msg.Missing() | msg.Refused() | msg.Reduced() | msg.Measured() if body.fragment < len(
                self.exchanges
            ):
                self._exchange_body(member, body)
            case msg.GenesisMade():
                self._genesis_made(member, body)
            case Reached(member=other):
                for exchange in self.exchanges:
                    exchange.on_reached(member, other)
            case PairTell():
                self._pair_body(member, body)
            case msg.RevokeAnswer():
                self.revocations.answer(member, body)
                self._revocations()
            case msg.Evaluated():
                self._evaluated(member, body)
            case msg.DropRequest():
                self._mark_consumed(member, body.upto)
                self._refuse(member, body.why)
            case msg.Saved():
                self._saved(member, body)
            case msg.Observed():
                self._observed(member, body)
            case msg.Inherited():
                self._inherited(member, body)
            case msg.FaultSeen():
                self._fault(body.fault, member.name, body.detail, injected=False)
                if body.fault == "no_state":
                    self.without_snapshot[member.name] = body.detail
                elif body.fault == msg.SNAPSHOT_FAILED:
                    self._save_failed(member, body.detail)
                elif body.fault == msg.LOCAL_FAILED:
                    self.local_failed.add(member.name)
                    self._stop_if_saved()
                elif body.fault == "unverified_state":
                    self._verify_all()
            case _:
                self.stale_messages += 1

    def _exchange_body(self, member: MemberId, body: ExchangeBody) -> None:
        exchange = self.exchanges[body.fragment]
        if exchange.open is None or exchange.open.id != body.exchange:
            self.stale_messages += 1
            return
        fleet = self._fleet(body.fragment)
        match body:
            case msg.Have():
                effects = exchange.on_have(member, body, fleet, self.now)
            case msg.Missing():
                effects = exchange.on_missing(member, body, fleet, self.now)
            case msg.Refused():
                effects = exchange.on_refused(member, body, fleet, self.now)
            case msg.Reduced():
                effects = exchange.on_reduced(member, body, fleet, self.now)
            case msg.Measured():
                effects = exchange.on_measured(member, body, fleet, self.now)
        self._effects(exchange, effects)

    # ------------------------------------------------------------ exchanges

    def _effects(self, exchange: ex.FragmentExchange, effects: Sequence[ex.Effect]) -> None:
        for effect in effects:
            match effect:
                case ex.ToAll(body=body):
                    self._tell_all(body)
                case ex.ToOne(member=member, body=body):
                    self._tell(member, body) if body is not None else self._sync(member)
                case ex.ToSome(members=members, bodies=bodies):
                    for member in members:
                        self._tell(member, *bodies)
                case ex.Journal(record=record):
                    self._log(record)
                    self.after_flush.append((self._last_seq(), record))
                    if isinstance(record, CommitRecord):
                        self._committed(exchange, record)
                case ex.Fence(member=member, why=why, refused=refused):
                    if refused:
                        self._refuse(member, why)
                        continue
                    self._lose(member, "fenced", why)
                    self._fence(member, why, refused=False)
                case ex.Blame(member=member, why=why):
                    self._blame(member, why)
                case ex.Drop(member=member, upto=upto, why=why):
                    self._drop(member, upto, why)
                case ex.Note(text=text, fault=fault, member=name):
                    self._say(text, member=name)
                    if fault:
                        self._fault(fault, name, text, injected=False)
                    if exchange.disagreements >= 3:
                        self._end("failed", f"fragment {exchange.fragment}: next anchors differed in 3 exchanges")

    def _gone(self, member: MemberId) -> None:
        for exchange in self.exchanges:
            self._effects(exchange, exchange.on_gone(member, self._fleet(exchange.fragment), self.now))

    def _committed(self, exchange: ex.FragmentExchange, record: CommitRecord) -> None:
        done = exchange.committed()
        exchange.config = self.exchange_at(exchange.fragment)
        exchange.closing = closing_of(self.strategy_at(exchange.fragment))
        if done is None:
            return
        self._metric(
            kind="exchange", t_s=self.seconds(), fragment=record.fragment, version=record.n, attempts=done.attempt,
            roster=[entry.member for entry in record.roster], seconds=self.now - done.closed_s,
            opened_s=done.opened_s - self.zero_s, closed_because=done.closed_because,
            bytes=self._bytes_since_last_commit(),
            tokens_committed=self.state.samples_committed() * self.plan.seq_len,
        )  # fmt: skip

    def _bytes_since_last_commit(self) -> int:
        sent, self.bytes_counted = self.bytes_sent() - self.bytes_counted, self.bytes_sent()
        return sent

    def _after_commit(self, record: CommitRecord) -> None:
        """The commit is durable: tell everybody, lease what comes next, evaluate when due, settle the dead."""
        self._tell_all()
        for track in list(self.faults):
            if track.next_commit_s is None:
                self._retrack(track, "next_commit_s")
        for entry in record.roster if self.refusals or self.faults else ():
            self.refusals.pop(entry.member, None)
            self._track(entry.member_id, "contributed_s")
        self._judge_standings()
        self._settle_all()
        self._plan_shares()
        self._grant()
        self._let_go()
        while self.progress() >= self.next_eval - 1e-9 and self.next_eval < 1.0:
            self.next_eval += self.plan.eval_every
            self._ask_evaluation(record.n)
        self._finish_if_done()

    def _verify_all(self) -> None:
        """What somebody fetched was not as sealed: everybody looks at what it holds and serves (1.7)."""
        if self.now - self.verified_s >= self.ask_again_s:
            self.verified_s = self.now
            for exchange in self.exchanges:
                self._tell_all(msg.Verify(fragment=exchange.fragment, exchange=None, attempt=0))

    # ------------------------------------------------------------ stopping

    def _close_nothing_more(self) -> None:
        for exchange in self.exchanges:
            exchange.may_close = False

    def _stop_now(self, event: ev.StopRequested) -> None:
        """Who has not saved its state ends here: what it has not offered goes back. One member writes the anchor."""
        if self.state.stopped is not None:
            return
        self.stopping = event
        for exchange in self.exchanges:
            self._effects(exchange, exchange.discard("the run is stopped at once"))
        processes = sorted(self.roll.processes.items())
        ahead = max((p for _, p in processes if p.ready()), key=num_versions, default=None)
        for _, process in processes:
            save = (msg.Save(name="stop", local=False),) if process is ahead else ()
            self._tell(process.nonce, *save, msg.Stop(save=False))
        for member in self.state.live():
            if member.name not in self.local_saved:
                self._fence(member, "the run was stopped at once", refused=False)
        self._end("stopped", "stopped at once by the user; steps that were not offered are lost")

    # ------------------------------------------------------------ time

    def _tick(self) -> None:
        if self.now - self.looked_s < min(LOOK_S_PER_MEMBER * len(self.roll.processes), self.roll.suspect_s / 4):
            return
        self.looked_s = self.now
        self._tell_peers()
        self._judge()
        self._pair_tick()
        for exchange in self.exchanges:
            self._effects(exchange, exchange.tick(self._fleet(exchange.fragment), self.now))
        if self.exchanges:
            self._watch_quorum(self._fleet(0))
        self._spawn_due()
        self._miss_the_fenced()
        self._ask_genesis()
        self._start_if_ready()
        self._restore_if_lost()
        if self.state.unsettled:
            self._settle_all()
        self._revocations()
        self._let_go()
        self._keep_copies()
        self._check_scopes()
        self._tell_who_is_waited_for()
        if self.eval_asked and self.now - self.eval_asked[2] > self.ask_again_s:
            self._ask_evaluation(self.eval_asked[1])
        if self.save_asked and self.now - self.save_asked[2] > self.ask_again_s:
            self._ask_save(self.save_asked[1])
        elif self.started and not self.save_asked and self.stopping is None and not self.done():
            if self.now - self.last_save_s > self.plan.snapshot_every_s:
                self._ask_save(f"v{max(h.version.n for h in self.state.heads)}")
        self._finish_if_done()
        self._stop_if_saved()
        if self.stopping is not None and self.now - self.begun_stop_s > self.ask_again_s:
            self._end(
                "stopped",
                f"stopped; no local state from {sorted({m.name for m in self.roll.processes} - self.local_saved)}",
            )

    def _revocations(self) -> None:
        if not self.exchanges:
            return
        for fragment, head in enumerate(self.state.heads):
            record = self.revocations.step(
                fragment, head.version, self.roll.processes.values(), self.now, self._tell,
                all_live=self._all_here(),
            )  # fmt: skip
            if record is not None:
                self._effects(self.exchanges[fragment], self.exchanges[fragment].discard("its base was revoked"))
                self._log(record)
                self._fault(
                    "revoked", "", f"version {record.n} of fragment {fragment} is held by nobody", injected=False
                )
                self._tell_all()


def num_versions(process: Process) -> int:
    """How far a process is, over all fragments."""
    return sum(report.n for report in process.hello.fragments) if process.hello is not None else -1
