"""The controller's part in leases: who is looked at for them when, and what is told of it; how many is in `leases`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator import leases
from orchestrator.desk import RunPlan
from orchestrator.membership import Process
from orchestrator.standing import Standings
from workers import messages as msg
from workers.records import AbandonRecord, MemberId, Row, ScopeRecord, Term
from workers.shares import round_steps

SAY_AGAIN_S = 60.0


class Granting(Standings):
    """Samples for those who lack some."""

    def __init__(self, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float, started_s: float = 0.0) -> None:
        """See `Desk`."""
        super().__init__(plan, rows, term, now=now, started_s=started_s)
        self.tail = False
        self.granted_at = -1  # rows of the journal when leases were last granted, and the plan then
        self.granted_to_all = (-1, -1)  # and the event in which everybody was last looked at for it
        self.lease_plan: leases.Plan | None = None
        self.tails: dict[MemberId, bool] = {}
        self.scopes = plan.scopes()
        self.told_waits, self.waits_said_s = "", float("-inf")
        self.only_own_since: float | None = None  # since when nothing is left but what waits for its owners
        self.given_up: dict[str, str] = {}

    def _lease_plan(self) -> leases.Plan:
        return leases.Plan(
            total_samples=self.plan.total_samples,
            inner_steps=self.longest_round(),
            bound_rounds=self.plan.exchange.bound_rounds,
        )

    def _grant(self, only: MemberId | None = None) -> None:
        """Lease what members lack; `only`: it alone may lack something since the others were looked at."""
        if not self.started or self.stopping is not None:
            return
        if only is None and self.granted_to_all == (self.num_events, len(self.rows)):
            return
        plan, by_speed, processes = self._lease_plan(), self.state.shares, self.roll.processes
        self.lease_plan = plan
        asked = self.state.live() if only is None else [only]  # in member order, as leases are granted
        if leases.left_to_issue(self.state, plan) == 0 and not self.state.scopes.own:
            asked = []  # nobody can be given any
        bans = self.state.bans
        members = {
            m: (p.info.batch_size, p.consumed)
            for m in asked
            if (p := processes.get(m)) is not None
            and p.holds_state
            and not (p.silence or p.hanging)
            and m.name not in self.leaving
            and (not bans.entries or bans.may_contribute(m.name))
        }
        steps = {m: round_steps(by_speed, str(m), plan.inner_steps) for m in members} if by_speed is not None else {}
        records = leases.grant(self.state, members, plan, steps)
        for record in records:
            self._log(record)
            member = MemberId(name=record.member, incarnation=record.incarnation)
            self._tell(member, msg.LeaseGrant(index=record.index, ranges=record.ranges))
        tail = leases.left_to_issue(self.state, plan) == 0
        changed, self.tail = tail != self.tail, tail
        if self.state.scopes.own:
            owners = [self.state.current[name] for name in self.state.scopes.own if name in self.state.current]
            self._tell_tails(self.state.live() if changed else owners)
        elif changed:
            self._tell_all(msg.Tail(active=tail))
        self.granted_at = len(self.rows)
        if only is None:
            self.granted_to_all = (self.num_events, len(self.rows))

    def _in_tail(self, name: str) -> bool:
        """Whether a member is given nothing more for now: neither of what is shared nor of its own."""
        return self.tail and (not self.state.scopes.own or leases.own_left(self.state, name) == 0)

    def _tell_tails(self, members: Iterable[MemberId]) -> None:
        """Where members have samples of their own, each hears for itself that there are no more."""
        for member in members:
            tail = self._in_tail(member.name)
            if member in self.roll.processes and self.tails.get(member, False) != tail:
                self.tails[member] = tail
                self._tell(member, msg.Tail(active=tail))

    def _own_it(self) -> None:
        """Before the first lease: whose the samples of each pack are that never leaves its machine."""
        own = self.scopes.own
        if own and not self.state.scopes.own:
            self._log(ScopeRecord(members=tuple(own), ranges=tuple(own.values())))

    def _check_scopes(self) -> None:
        """A run that is resumed has the owners that it had: what was leased to all cannot become one member's own."""
        if self.state.num_fragments and self.state.scopes != self.scopes:
            then, now = (", ".join(sorted(scopes.own)) or "nobody" for scopes in (self.state.scopes, self.scopes))
            why = f"data.per_island was changed: {then} had samples alone when the run began, now {now}, or other ones"
            self._end("failed", f"{why}; resume it with the settings that it had, or begin another run")

    def _tell_who_is_waited_for(self) -> None:
        """Samples that nobody else may have wait for whoever has their text: once a minute who, and what to do."""
        waits = leases.waiting(self.state) if self.state.scopes.own and self.started else {}
        waits = self._without_abandoned(waits)
        told = "; ".join(
            f"{num} samples of {name}'s own pack wait for it ({self._why_away(name)})" for name, num in waits.items()
        )
        if told != self.told_waits:
            self.told_waits = told
            self.waits_said_s = float("-inf")
        if told and self.now - self.waits_said_s >= SAY_AGAIN_S:
            self.waits_said_s = self.now
            after = f"the end of the run waits {self.plan.own_wait_s:g} s for it (data.own_wait_s)"
            self._say(f"{told}: nobody else may have them. Bring it back; {after}", level="warning")

    def _without_abandoned(self, waits: dict[str, int]) -> dict[str, int]:
        """Once nothing else is left, owners that are away are waited for so long, those given up not at all.

        The rest of theirs is dropped then, so that the run can end; what is left of `waits`.
        """
        rest = sum(waits.values())
        if not waits or self.stopping is not None or self.state.samples_accounted() + rest < self.plan.total_samples:
            self.only_own_since = None
            return waits
        self.only_own_since = self.now if self.only_own_since is None else self.only_own_since
        over = self.now - self.only_own_since >= self.plan.own_wait_s
        for name in [name for name in waits if over or name in self.given_up]:
            num = waits.pop(name)
            why = f"{self._why_away(name)}, and nothing else was left to do"
            self._log(AbandonRecord(member=name, ranges=leases.rest_of(self.state, name), why=why))
            told = f"{num} samples of {name}'s own pack are dropped: nobody else may have them, and it is not back"
            self._say(f"{told} after {self.now - self.only_own_since:.0f} s ({why})", member=name, level="warning")
        return waits

    def _why_away(self, name: str) -> str:
        if name in self.given_up:
            return "given up"
        return "it left" if name in self.away_since else "not here"

    def _may_want(self, process: Process) -> bool:
        """Whether a member may have to be given samples; most often it is seen at once that it has enough."""
        if self.granted_at != len(self.rows):
            return True
        # The journal is as it was when leases were last granted.
        if not process.holds_state or self._in_tail(process.id.name):
            return False
        if self.lease_plan is None or self.state.shares is not None:
            return True
        return leases.wanted(process.entry, process.info.batch_size, process.consumed, self.lease_plan) > 0
