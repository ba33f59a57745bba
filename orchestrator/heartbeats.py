"""What members say of themselves, all the time: heartbeats, and what they measured. Quick, since there are so many.

A heartbeat asks for whatever the member lacks (protocol 1.9): rows, leases, an announcement that was lost. Mostly it
lacks nothing, and then nothing is made, sent or looked through for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator import exchange as ex
from orchestrator import shares
from orchestrator.desk import RunPlan
from orchestrator.exchange_rules import Fleet
from orchestrator.fleet import LiveMembers
from orchestrator.membership import MemberClock, Process, process_of
from orchestrator.pair_desk import PairDesk
from orchestrator.revocation import Revocations
from orchestrator.run_state import Head
from workers import messages as msg
from workers.records import MemberId, Row, Term

TAIL = msg.Tail(active=True)


class Heartbeats(PairDesk):
    """Progress of members, and what they are told again because they seem to have missed it."""

    def __init__(self, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float, started_s: float = 0.0) -> None:
        """See `Desk`."""
        super().__init__(plan, rows, term, now=now, started_s=started_s)
        self.revocations = Revocations()
        self.sent: dict[str, int] = {}
        self.sent_in_all = 0
        self.bytes_counted = 0
        self._members_of: dict[int, LiveMembers] = {}
        self._fleets: dict[int, tuple[int, Fleet]] = {}

    def bytes_sent(self) -> int:
        """Payload bytes that all processes of this run have sent, by their last heartbeats."""
        return self.sent_in_all

    def _fleet(self, fragment: int) -> Fleet:
        """The live members and the head: made anew when the journal has grown, or somebody has come."""
        known = self._members_of.get(fragment)
        if known is None:
            known = self._members_of[fragment] = LiveMembers(self.state, self.roll.processes, self.leaving, fragment)
        views, (at, fleet) = known.views(), self._fleets.get(fragment, (-1, None))
        if fleet is None or at != len(self.rows) or fleet.members is not views:
            fleet = Fleet(
                members=views, head=self.state.heads[fragment].version,
                samples_committed=self.state.samples_committed(), inner_steps=self.inner_steps_of(fragment),
                own_pace=self.plan.strategy.own_pace,
            )  # fmt: skip
            self._fleets[fragment] = (len(self.rows), fleet)
        return fleet

    # ------------------------------------------------------------ heartbeats

    def _hello(self, process: Process, hello: msg.Hello) -> None:
        member, entry = process.id, process.entry
        was_ready, had = process.holds_state, process.hello
        if hello.bytes_sent != process.bytes_before:
            self._count_bytes(process, hello.bytes_sent)
        first_step = self.roll.said(process, hello, self.now)
        if hello.journal_len < process.rows_sent and (had is None or had.journal_len >= hello.journal_len):
            process.rows_sent = hello.journal_len
        if process.rows_sent <= self.flushed:
            self._sync(member)
        if first_step:
            process.first_step_s = self.seconds()
            self.policy.stepped(member.name)
            self._track(member, "back_s")
        if hello.num_leased < entry.num_leased and had is not None and had.num_leased == hello.num_leased:
            rest = self.state.offered_ranges(member, hello.num_leased, entry.num_leased)
            self._tell(member, msg.LeaseGrant(index=hello.num_leased, ranges=rest))
        if not was_ready and process.holds_state:
            self._peers()
            for exchange in self.exchanges:
                self._effects(exchange, exchange.welcome(member))
        heads, behind = self.state.heads, False
        for exchange, report in zip(self.exchanges, hello.fragments, strict=False):
            if exchange.open is not None and exchange.open.state != "open":
                self._repeat(member, exchange, report, had)
            if report.barred is not None:
                self.revocations.release_barred(member, exchange.fragment, report, self._tell)
            behind = behind or report.n < heads[exchange.fragment].version.n
        if behind and had is not None and is_stuck_behind(hello, had, heads):
            self._tell(member, self._peers_now())
        if self.tail and hello.waiting == "leases" and self._in_tail(member.name):
            self._tell(member, TAIL)
        if self.leaving and member.name in self.leaving and hello.waiting != "leaving":
            self._tell(member, msg.Leave())
        if not self.started:
            self._start_if_ready()
        if self.plan.load == "by_speed" and self._lacks_share(member, hello):
            self._plan_shares()
        if self._may_want(process):
            self._grant(member)
        if self.leaving:
            self._let_go()
        if self.plan.keeps_copies:
            self._heard_of_copies(member, hello)

    def _count_bytes(self, process: Process, num_bytes: int) -> None:
        of = process_of(process.nonce)
        self.sent_in_all += num_bytes - self.sent.get(of, 0)
        self.sent[of] = process.bytes_before = num_bytes

    def _lacks_share(self, member: MemberId, hello: msg.Hello) -> bool:
        """Whether a member was measured that the shares in force do not name, and nobody's first speed is awaited."""
        named = self.state.shares is not None and str(member) in self.state.shares.members
        if named or hello.median_step_s <= 0.0:
            return False
        return bool(shares.unmeasured(self.state.shares, self.roll.processes, shares.speeds_of(self.roll.processes)))

    def _plan_shares(self) -> None:
        """Local steps by measured speed: journalled, so that every member and every replay have the same."""
        if self.plan.load != "by_speed" or self.stopping is not None:
            return
        steps = self.longest_round()
        record = shares.new_shares(self.state.shares, shares.speeds_of(self.roll.processes), steps)
        if record is not None:
            self._log(record)
            told = ", ".join(f"{member} {n}" for member, n in zip(record.members, record.steps, strict=True))
            self._say(f"local steps of a round by speed: {told} ({record.why})")
            self._tell_all()

    def _repeat(
        self, member: MemberId, exchange: ex.FragmentExchange, report: msg.FragmentReport | None, had: msg.Hello | None
    ) -> None:
        """Two heartbeats without what the open exchange has told: it was lost, and is told again."""
        if report is None or had is None or not exchange.lacks_news(report):
            return
        before = had.fragments[exchange.fragment] if had.fragments else None
        if before is not None and exchange.lacks_news(before):
            self._effects(exchange, exchange.repeat(member))

    def _mark_consumed(self, member: MemberId, upto: int) -> None:
        """It has trained on that much, whatever its last heartbeat said."""
        process = self.roll.processes[member]
        if process.hello is not None and process.consumed < upto and process.consumed_to(upto, self.now):
            process.first_step_s = self.seconds()
            self._track(member, "back_s")

    def _observed(self, member: MemberId, body: msg.Observed) -> None:
        process = self.roll.processes.get(member)
        clock = process.clock if process is not None else MemberClock()
        to_run_s = clock.offset(body.sent_s, self.now) - self.zero_s
        for at_s, row in body.rows:
            stamped, at = dict(row), at_s + to_run_s
            if stamped.get("kind") == "span":
                length = float(stamped.pop("seconds"))  # type: ignore[arg-type]
                stamped["start_s"], stamped["end_s"] = clock.span(at - length, at)
            else:
                stamped["t_s"] = at
            self._metric(**stamped, member=member.name, incarnation=member.incarnation)


def is_stuck_behind(hello: msg.Hello, had: msg.Hello, heads: Sequence[Head]) -> bool:
    """Whether a member lacked the same version of some fragment at two heartbeats: it may know too few peers."""
    return any(
        now.n < head.version.n and now.n == before.n
        for now, before, head in zip(hello.fragments, had.fragments, heads, strict=False)
    )
