"""What went wrong, when, and how long until the member was back: from injection to the next contribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from faults.plan import KINDS
from orchestrator import events as ev
from orchestrator.agenda import Agenda
from orchestrator.desk import RunPlan
from workers.records import MemberId, Row, Term

ENDS = {name: kind.ends for name, kind in KINDS.items()}


class FaultBook(Agenda):
    """Faults that are followed until they are healed, and the times in which members were not there."""

    def __init__(self, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float, started_s: float = 0.0) -> None:
        """See `Desk`."""
        super().__init__(plan, rows, term, now=now, started_s=started_s)
        self.missing_since: dict[str, float] = {}
        self.away_since: dict[str, float] = {}
        self.injected: list[tuple[float, str, str]] = []
        self.faults: list[ev.FaultTrack] = []
        self.full = False

    def _fault_injected(self, event: ev.FaultInjected) -> None:
        self.injected.append((self.seconds(), event.fault, event.member))
        self._fault(event.fault, event.member, event.detail, injected=True)

    def _journal_is_full(self) -> None:
        """Said and journalled once, when there is space again; nothing is committed before."""
        if not self.full:
            self.full = True
            text = "the journal's disk is full: commits stop until there is space"
            self._say(text, level="warning")
            self._fault("journal_full", "controller", text, injected=False)

    def _cause(self, member: MemberId, ended_by: str) -> tuple[float, str] | None:
        """When and what was injected that may have ended an incarnation; what has passed by itself did not."""
        process = self.roll.processes.get(member)
        silent = process is not None and process.status == "suspect"
        mine = [(t_s, fault) for t_s, fault, name in reversed(self.injected) if name == member.name]
        for t_s, fault in mine:
            if silent or ENDS.get(fault, False) or (ended_by, fault) == ("hung", "hang"):
                return t_s, fault
        return None

    def _track(self, member: MemberId, what: str) -> None:
        for track in list(self.faults):
            later = track.member == member.name and member.incarnation > track.victim.incarnation
            if later and getattr(track, what) is None:
                self._retrack(track, what)

    def _retrack(self, track: ev.FaultTrack, what: str) -> None:
        changes: dict[str, Any] = {what: self.seconds()}
        self.faults[self.faults.index(track)] = replace(track, **changes)

    def _lose(self, member: MemberId, fault: str, why: str) -> None:
        """An incarnation ends by a fault: it is recorded, followed until its member is back, and shown as dead time.

        It happened when it was injected, or else (an estimate) when the member was last heard.
        """
        self._fault(fault, member.name, why, injected=False)
        self.missing_since.setdefault(member.name, self.seconds())
        cause = self._cause(member, fault)
        self.injected = [i for i in self.injected if i[2] != member.name]
        process = self.roll.processes.get(member)
        heard = process.heard_s - self.zero_s if process is not None else None
        self.faults.append(
            ev.FaultTrack(
                fault=cause[1] if cause is not None else "kill" if fault == "died" else fault,
                member=member.name,
                injected_s=cause[0] if cause is not None else heard,
                detected_s=self.seconds(),
                victim=member,
                estimated=cause is None,
            )
        )

    def _end_gap(self, name: str) -> None:
        """The member is back (or the run is over): the time since its death, or since it left, is in the timeline."""
        for phase, began in (("dead", self.missing_since), ("away", self.away_since)):
            since = began.pop(name, None)
            if since is not None:
                incarnation = self.state.last_incarnation.get(name, 1)
                self._metric(
                    kind="span", member=name, incarnation=incarnation, phase=phase, start_s=since, end_s=self.seconds()
                )
