"""The controller's part in keeping local states twice: it says who keeps what of whom, and tells a newcomer who has
what the one before it left. What of it is used is decided by the newcomer, from the journal (`workers/copies.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.buddies import Buddies
from orchestrator.desk import RunPlan
from orchestrator.fault_book import FaultBook
from workers import messages as msg
from workers.records import MemberId, Row, Term


class Redundancy(FaultBook):
    """Copies of what only one island has."""

    def __init__(self, plan: RunPlan, rows: Sequence[Row], term: Term, *, now: float, started_s: float = 0.0) -> None:
        """See `Desk`."""
        super().__init__(plan, rows, term, now=now, started_s=started_s)
        self.buddies = Buddies()
        self.leaving: dict[str, str] = {}

    def _welcome(self, member: MemberId) -> None:
        """It is a member now; in the same batch it hears who has what its predecessor left."""
        welcome = msg.Welcome(incarnation=member.incarnation)
        if not self.plan.keeps_copies or member.incarnation == 1:
            self._tell(member, welcome)
            return
        sources = [
            (copy, process.info.address)
            for copy, holder in self.buddies.copies_of(member.name)
            if (process := self.roll.processes.get(holder)) is not None
            and process.status != "suspect"
            and copy.member < member
        ]
        if sources:
            copy, holder = max(self.buddies.copies_of(member.name), key=lambda entry: sum(entry[0].versions))
            self._say(f"{holder} has the local state of {copy.member} for {member}", member=member.name)
        else:
            self._say(f"nobody has a local state for {member}: its inner optimizer is new", member=member.name)
        self._tell(member, welcome, msg.Inherit(sources=tuple(sources)))

    def _inherited(self, member: MemberId, body: msg.Inherited) -> None:
        what = f"{member} goes on with the inner optimizer of {body.member} after its step {body.steps}"
        self._say(what, member=member.name)
        self._copy_row(member.name, member.incarnation, "restored", str(body.member), 0, 0)

    def _heard_of_copies(self, member: MemberId, hello: msg.Hello) -> None:
        if not self.plan.keeps_copies:
            return
        news = self.buddies.heard(member, hello.copy, hello.kept)
        if news is None:
            return
        for copy in news:
            made_by = copy.member
            self._copy_row(made_by.name, made_by.incarnation, "kept", str(member), max(copy.versions), copy.num_bytes)
        self._keep_copies()

    def _copy_row(self, name: str, incarnation: int, what: str, other: str, version: int, num_bytes: int) -> None:
        self._metric(
            kind="copy", t_s=self.seconds(), member=name, incarnation=incarnation, what=what, other=other,
            version=version, num_bytes=num_bytes,
        )  # fmt: skip

    def _keep_copies(self) -> None:
        """Say who keeps what: after news and on each tick, nothing where nothing has changed."""
        if not self.plan.keeps_copies:
            return
        places = {
            member: self.state.members[member].node
            for member, process in self.roll.processes.items()
            if process.ready() and member.name not in self.leaving
        }
        before = dict(self.buddies.of)
        self.buddies.place(places)
        for ward, buddy in sorted(self.buddies.of.items()):
            if before.get(ward) != buddy:
                self._say(f"{buddy} keeps the local state of {ward}", member=ward.name)
        for member, body in self.buddies.orders(self.now).items():
            if member in self.roll.processes:
                self._tell(member, body)
