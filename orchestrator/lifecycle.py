"""Who is a member: joining, re-attaching, fences, settlement, replacement, and what samples members are given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from faults.recovery import GIVEN_UP, Kind
from orchestrator import events as ev
from orchestrator import exchange as ex
from orchestrator import leaving
from orchestrator.closing import closing_of
from orchestrator.desk import RunPlan
from orchestrator.granting import Granting
from orchestrator.membership import Process, Roll, Verdict, process_of
from orchestrator.run_state import Membership, RunState
from workers import messages as msg
from workers.records import (
    HUNG,
    LEFT,
    DropRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    MemberId,
    RefusalRecord,
    Row,
    SettleRecord,
    Term,
)

LOST_AFTER_S = 2.0
RESTORE_AGAIN_S = 5.0
PEERS_AT_ONCE, PEERS_S_PER_MEMBER = 32, 1e-3
"""More members than this are told of each other at most so often: each such message has an entry for each of them."""


def may_speak(entry: Membership | None, nonce: str) -> bool:
    """Only the process of a live incarnation is listened to: the work of a fenced one is refused (C4)."""
    return entry is not None and entry.live and entry.nonce == nonce


def ended_members(state: RunState, roll: Roll) -> list[MemberId]:
    """Whose leases go back: only a fence ends an incarnation; a suspect one keeps them, however long (C4)."""
    return list(state.unsettled)


def may_settle(member: MemberId, exchanges: Sequence[ex.FragmentExchange]) -> bool:
    """A fenced incarnation's samples get their fate only when it is in no open roster (C3)."""
    return not any(exchange.holds(member) for exchange in exchanges)


def state_is_lost(processes: Collection[Process], num_fragments: int, *, all_live: bool) -> bool:
    """Whether there is a history, and no process has any state of some fragment of it."""
    if not (num_fragments and processes and all_live):
        return False
    if any(process.holds_state for process in processes):  # the first one, mostly
        return False
    reports = [process.hello.fragments for process in processes if process.hello is not None]
    if len(reports) < len(processes):
        return False
    return any(all(report[fragment].n < 0 for report in reports) for fragment in range(num_fragments))


def outlived(successor: Process | None, asked_s: float) -> bool:
    """A process whose place was given away is sent away only if its successor is well: it may hold the last state.

    The successor must have been heard after the old one first asked: what was heard before may be of the dead.
    """
    well = successor is not None and successor.ready() and successor.status != "suspect"
    return well and successor is not None and successor.heard_s > asked_s


class Lifecycle(Granting):
    """The lives of incarnations."""

    def __init__(self, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float, started_s: float = 0.0) -> None:
        """See `Desk`."""
        super().__init__(plan, rows, term, now=now, started_s=started_s)
        self.exchanges: list[ex.FragmentExchange] = []
        self.begun_s = now
        self.outlived_asked_s: dict[str, float] = {}
        self.genesis_asked: tuple[MemberId, float] | None = None
        self.first_joins: dict[str, float] = {}
        self.refusals: dict[str, int] = defaultdict(int)
        self.consumed_at_end: dict[MemberId, int] = {}
        self.lost_since: float | None = None
        self.restore_asked_s = float("-inf")
        self.without_snapshot: dict[str, str] = {}
        self.silent_since: dict[MemberId, float] = {}
        self.fenced_s: dict[str, float] = {}  # whose process was told so, and is to begin a new incarnation by itself
        self.peers_due, self.peers_told_s = False, float("-inf")
        self.peers_made: tuple[float, msg.Peers] | None = None
        self.start_waits_for = ""

    # ------------------------------------------------------------ joining

    def _sender(self, envelope: msg.Envelope) -> MemberId | None:
        """The live incarnation behind an envelope whose process is not here; a fenced one is told so."""
        if envelope.incarnation is None:
            return None
        member = MemberId(envelope.name, envelope.incarnation)
        entry = self.state.members.get(member)
        if may_speak(entry, envelope.nonce):
            return member  # who lived before this controller, and was not heard by it yet
        self.stale_messages += 1
        self.nonces[envelope.nonce] = (envelope.name, member)
        if not any(isinstance(body, msg.Join) for body in envelope.bodies):
            self._tell(envelope.nonce, msg.Fenced(why="this incarnation is not a live member of the run"))
        return None

    def _join(self, envelope: msg.Envelope, body: msg.Join) -> None:
        if envelope.name in self.given_up:
            self.nonces[envelope.nonce] = (envelope.name, None)
            self._tell(envelope.nonce, msg.Stop(save=False))
            return
        known = self.state.nonces.get(envelope.nonce)
        if known is not None:
            if not self.state.members[known].live:
                self.nonces[envelope.nonce] = (envelope.name, None)
                self._tell(envelope.nonce, msg.Rejoin())
                return
            self._attach_process(known, envelope.nonce, body.info)
            self._welcome(known)
            self._after_join()
            return
        previous = self.state.current.get(envelope.name)
        if previous is not None:
            if not self._takes_place(previous, envelope, body):
                return
            self._log_fence(previous, "a new process took its place", refused=False)
        incarnation = self.state.last_incarnation.get(envelope.name, 0) + 1
        member = MemberId(name=envelope.name, incarnation=incarnation)
        self._log(JoinRecord(member=envelope.name, incarnation=incarnation, nonce=envelope.nonce, node=body.info.node))
        self._attach_process(member, envelope.nonce, body.info)
        self.fenced_s.pop(envelope.name, None)
        if incarnation == 1:
            self.first_joins[envelope.name] = self.seconds()
        self._end_gap(envelope.name)
        self._say(f"{member} joined on {body.info.node}", member=envelope.name)
        self._welcome(member)
        if previous is not None:
            self._after_fence(previous)
        self._after_join()

    def _takes_place(self, current: MemberId, envelope: msg.Envelope, body: msg.Join) -> bool:
        """Whether a process takes the place of a live incarnation of its name; an outlived one is sent away."""
        process, base = self.roll.processes.get(current), process_of(envelope.nonce)
        known = any(process_of(nonce) == base for nonce in self.state.nonces)
        if base == process_of(self.state.members[current].nonce) or not known:
            return True
        if outlived(process, self.outlived_asked_s.setdefault(base, self.now)):
            why = f"{current} has its place"
            self._say(f"process {base} of {envelope.name} is sent away: {why}", member=envelope.name)
            self.nonces[envelope.nonce] = (envelope.name, None)
            self._tell(envelope.nonce, msg.Stop(save=False))
            self.commands.append(ev.End(name=envelope.name, nonce=envelope.nonce, why=why))
            return False
        return body.ready and process is not None and not process.ready()

    def _attach_process(self, member: MemberId, nonce: str, info: msg.ProcessInfo) -> None:
        if member in self.roll.processes:
            self.roll.processes[member].rows_sent = 0
            return
        entry = self.state.members[member]
        self.roll.add(Process(id=member, entry=entry, nonce=nonce, info=info, joined_s=self.now, heard_s=self.now))
        self.nonces[nonce] = (member.name, member)

    def _after_join(self) -> None:
        self._peers()
        self._ask_genesis()

    def _peers(self) -> None:
        """Everybody hears who is here: at once, or with a later tick where many come and go."""
        self.peers_due = True
        self._tell_peers()

    def _tell_peers(self) -> None:
        if self.peers_due and self.now - self.peers_told_s >= self._peers_gap_s():
            self.peers_due, self.peers_told_s, self.peers_made = False, self.now, None
            self._tell_all(self._peers_now())

    def _peers_gap_s(self) -> float:
        num = len(self.roll.processes)
        return PEERS_S_PER_MEMBER * num if num > PEERS_AT_ONCE else 0.0

    def _peers_now(self) -> msg.Peers:
        """Who is here; one message for all who ask within a short while, since it is as long as the fleet."""
        made = self.peers_made
        if made is None or self.now - made[0] >= self._peers_gap_s():
            made = self.peers_made = (self.now, msg.Peers(peers=self.peers()))
        return made[1]

    def peers(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Who is here, at which address, with which version of each fragment."""
        return tuple(
            (str(m), p.info.address, tuple(f.n for f in p.hello.fragments) if p.hello else ())
            for m, p in sorted(self.roll.processes.items())
        )

    # ------------------------------------------------------------ genesis and start

    def _ask_genesis(self) -> None:
        """One member makes version 0. Who does not answer is asked again, or another one; the first answer counts."""
        asked = self.genesis_asked
        if self.state.num_fragments or (
            asked is not None and asked[0] in self.roll.processes and self.now - asked[1] < self.ask_again_s
        ):
            return
        live = [m for m, p in sorted(self.roll.processes.items()) if p.status != "suspect"]
        if live:
            self.genesis_asked = (live[0], self.now)
            self._tell(live[0], msg.MakeGenesis())

    def _genesis_made(self, member: MemberId, body: msg.GenesisMade) -> None:
        if self.state.num_fragments:
            return
        self._log(
            GenesisRecord(
                maker=str(member), digests=body.digests, num_params=body.num_params, num_chunks=body.num_chunks
            )
        )
        self._own_it()
        self._open_exchanges()
        self._tell_all()
        self._tell(member, msg.Save(name="genesis", local=False))
        self._peers()

    def _open_exchanges(self) -> None:
        if self.state.num_fragments and not self.exchanges:
            self.exchanges = [
                ex.FragmentExchange(
                    fragment=f,
                    num_chunks=n,
                    config=self.exchange_at(f),
                    term=self.term,
                    closing=closing_of(self.strategy_at(f)),
                    robust=self.plan.robust,
                )
                for f, n in enumerate(self.state.num_chunks)
            ]

    def _restore_if_lost(self) -> None:
        """Every living member is here and none holds a state: what is left of the model is the snapshots on disk."""
        processes = self.roll.processes
        if not state_is_lost(processes.values(), len(self.state.heads), all_live=self._all_here()):
            self.lost_since = None
            self.without_snapshot.clear()
            return
        self.lost_since = self.now if self.lost_since is None else self.lost_since
        if self.now - self.lost_since < LOST_AFTER_S:
            return  # who has just made or fetched a state may not have said so yet
        if set(self.without_snapshot) >= {member.name for member in processes}:
            why = next(iter(self.without_snapshot.values()))
            self._end("failed", f"no living member holds the model, and no snapshot can be loaded: {why}")
        elif self.now - self.restore_asked_s >= RESTORE_AGAIN_S:
            self.restore_asked_s = self.now
            why = "no living member holds the model: the newest snapshot is loaded"
            self._fault("state_lost", "", why, injected=False)
            self._tell_all(msg.Restore())

    def _all_here(self) -> bool:
        return len(self.roll.processes) == len(self.state.live())

    def _start_if_ready(self) -> None:
        if self.started or not self.state.num_fragments:
            return
        late = self.now - self.begun_s > self.plan.start_timeout_s
        absent = {*self.leaving, *self.away_since, *self.given_up}
        if not late and self.start_waits_for not in absent and self._still_starts(self.start_waits_for):
            return
        ready = {m.name for m, p in self.roll.processes.items() if p.ready()}
        expected = set(self.plan.islands) - absent
        self.start_waits_for = max(expected - ready, default="")
        if ready and (ready >= expected or late):
            self.started = True
            if not ready >= expected:
                why = f"started without {sorted(expected - ready)}: run.start_timeout_s is over"
                self._say(why, level="warning")
            self._ask_evaluation(0)
            self._grant()

    def _still_starts(self, name: str) -> bool:
        """Whether the start would have to wait for this island: one that is known saves a look at all of them."""
        member = self.state.current.get(name)
        process = self.roll.processes.get(member) if member is not None else None
        return bool(name) and (process is None or not process.ready())

    # ------------------------------------------------------------ fences

    def _drop(self, member: MemberId, upto: int, why: str) -> None:
        entry = self.state.members[member]
        upto = max([upto, *entry.watermarks])
        if min(entry.watermarks, default=0) >= upto:  # asked twice
            self._sync(member)
            return
        if not entry.live or upto > entry.num_leased or any(exchange.holds(member) for exchange in self.exchanges):
            return  # in a fixed roster: its commit comes first; the member asks again
        self._log(DropRecord(member=member.name, incarnation=member.incarnation, upto=upto, why=why))
        self._say(f"work of {member} up to sample {upto} is dropped: {why}", member=member.name, level="warning")
        self._sync(member)
        self._gone(member)
        self._grant()
        self._finish_if_done()

    def _fence(self, member: MemberId, why: str, *, refused: bool) -> None:
        entry = self.state.members.get(member)
        if entry is not None and entry.live:
            self._log_fence(member, why, refused=refused)
            self._after_fence(member)

    def _log_fence(self, member: MemberId, why: str, *, refused: bool) -> None:
        self._log(FenceRecord(member=member.name, incarnation=member.incarnation, why=why, refused=refused))
        left = why == LEFT
        if left or why.startswith(HUNG):
            self.after_flush.append((self._last_seq(), self.rows[-1].record))
        self._say(
            f"{member} has left" if left else f"{member} is fenced: {why}",
            member=member.name,
            level="info" if left else "warning",
        )
        self._end_silence(member)
        process = self.roll.remove(member)
        if process is not None:
            trained = process.trained_by(self.now, self.plan.exchange.heartbeat_s)
            self.consumed_at_end[member] = min(trained, self.state.members[member].num_leased)
            self._tell(process.nonce, msg.Fenced(why=why))
            if not left:
                self.fenced_s[member.name] = self.now

    def _after_fence(self, member: MemberId) -> None:
        self._gone(member)
        self._ask_genesis()
        if self.eval_asked and self.eval_asked[0] == member:
            self._ask_evaluation(self.eval_asked[1])
        if self.save_asked and self.save_asked[0] == member:
            self.save_asked = None
        self._settle_all()
        self._peers()

    def _gone(self, member: MemberId) -> None:
        """An incarnation was fenced or its work dropped: the open exchanges hear of it."""
        raise NotImplementedError

    def _effects(self, exchange: ex.FragmentExchange, effects: Sequence[ex.Effect]) -> None:
        """Carry out what an exchange asks for."""
        raise NotImplementedError

    def _settle_all(self) -> None:
        for member in ended_members(self.state, self.roll):
            entry = self.state.members[member]
            if not entry.settled and may_settle(member, self.exchanges) and not self._in_open_pair(member):
                trained = self.consumed_at_end.get(member, 0)
                lost = max(trained - max(entry.watermarks, default=0), 0)
                self._log(SettleRecord(member=member.name, incarnation=member.incarnation, lost=lost))
        self._grant()
        self._finish_if_done()

    def _give_up(self, name: str, verdict: str) -> None:
        """No process of this name is started or admitted any more; the run goes on without it."""
        self.given_up[name] = verdict
        self._say(verdict, member=name, level="error")
        self._fault(GIVEN_UP, name, verdict, injected=False)

    def _refuse(self, member: MemberId, why: str) -> None:
        """An update that must not count: the incarnation ends, its samples go back; who does it again and again goes.

        Its process begins a new incarnation from the anchor by itself.
        """
        entry = self.state.members.get(member)
        if entry is None or not entry.live:
            return
        name = member.name
        self._log(RefusalRecord(member=name, incarnation=member.incarnation, why=why))
        self.refusals[name] += 1
        if self.refusals[name] >= self.plan.max_refusals and not self.plan.robust.watches:
            self._give_up(name, f"{name} is given up after {self.refusals[name]} refused updates in a row: {why}")
        self._lose(member, "refused", why)
        self._fence(member, why, refused=True)
        if name in self.given_up and not self.state.live():
            self._end("failed", self.given_up[name])

    def _in_open_pair(self, member: MemberId) -> bool:
        """Whether a partner may yet report a commit that this member's work is in."""
        raise NotImplementedError

    def _replace(self, name: str, kind: Kind, why: str, *, stepped: bool) -> None:
        """The process of a member ended: another one, or the verdict that it is given up."""
        raise NotImplementedError

    def _verdict(self, verdict: Verdict | None) -> None:
        """The judgement on a member changed."""
        raise NotImplementedError

    # ------------------------------------------------------------ leaving

    def _leave_requested(self, name: str, why: str) -> None:
        """It is told with each of its heartbeats until it has gone; asking twice changes nothing."""
        if self.stopping is not None or self.ended or name in self.leaving or name not in self.state.current:
            return
        self.leaving[name] = why
        self._say(f"{name} is asked to leave: {why}", member=name)
        process = self.roll.processes.get(self.state.current[name])
        if process is not None:
            process.draining = why
            self.roll.changed[process.id] = None
        self._tell(self.state.current[name], msg.Leave())
        self._let_go()

    def _let_go(self) -> None:
        """Who was asked to leave and has handed over everything goes."""
        for name in list(self.leaving):
            member = self.state.current.get(name)
            process = self.roll.processes.get(member) if member is not None else None
            if member is None:
                del self.leaving[name]
            elif process is not None and self._may_go(process):
                del self.leaving[name]
                self.away_since[name] = self.seconds()
                self._fence(member, LEFT, refused=False)

    def _may_go(self, process: Process) -> bool:
        heads = [head.version for head in self.state.heads]
        if not heads:
            return True  # there is no version 0 yet, and nobody trains
        if process.ready() and not leaving.has_handed_over(process, self.state.members[process.id], self.exchanges):
            return False
        staying = [p for m, p in self.roll.processes.items() if m.name not in self.leaving and p.status != "suspect"]
        if staying:
            return leaving.is_held(heads, staying)
        if self.saved_versions == tuple(head.n for head in heads):
            return True
        if self.save_asked is None:  # nobody stays: what they hold is kept on disk
            self._ask_save(f"v{max(head.n for head in heads)}")
        return False

    def _end_silence(self, member: MemberId) -> None:
        """It was heard again, or given up: how long it was cut off is in the timeline."""
        since = self.silent_since.pop(member, None)
        if since is not None:
            self._metric(
                kind="silence", member=member.name, incarnation=member.incarnation, start_s=since, end_s=self.seconds()
            )
