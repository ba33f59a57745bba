"""Pairs and groups of a round, seen from the controller: rosters out, reports in; it is in nobody's way. Pure.

`PairBook` supplies the roster of each round, writes down what committed, and answers whoever is in doubt. It decides
nothing that members could decide among themselves, with one exception: an exchange whose leader is fenced did not
happen, once nobody else can have heard otherwise.

What closes an exchange (each leaves no way for the opposite):

- a report that it is committed;
- a report of anybody that it will never be (the leader's word, or a follower's that did not say `Ready`);
- the leader is fenced, every other member is fenced or has asked (a member that asks listens to nobody else), and no
  fenced member of it is in an open exchange of a later round: there it may have handed a commit of this one on.

Members go on while the controller is away: they have rosters of `ROUNDS_AHEAD` rounds, and what they report names all
commits that it rests on, which come on the record before it, also those of members that died before they could report.

Leases of a fenced member are settled when it is in no open exchange: until then somebody may report a commit that its
work is in. Everything that is told follows from rows that are written before (`Write` precedes `Send`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from workers.pair import MOST_UNRECORDED, Asked, Commitment, Gone, PairId, Query, Recorded, Report
from workers.records import MemberId

ROUNDS_AHEAD = MOST_UNRECORDED
"""Rounds whose rosters members have, the present one among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The samples `[since, upto)` of a member's consumption order."""

    member: MemberId
    since: int
    upto: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRecord:
    """A row of the journal: a group averaged, and these samples are in."""

    round_: int
    spans: tuple[Span, ...]

    @property
    def pair(self) -> PairId:
        """Whose exchange it was."""
        return PairId(round_=self.round_, members=tuple(span.member for span in self.spans))


@dataclass(frozen=True, kw_only=True, slots=True)
class RosterRecord:
    """A row of the journal: who meets whom in a round."""

    round_: int
    pairs: tuple[PairId, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """A row: a new incarnation is live."""

    member: MemberId


@dataclass(frozen=True, kw_only=True, slots=True)
class Fenced:
    """A row: nothing that this incarnation says from now on counts."""

    member: MemberId


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """A row: a fenced member is in no open exchange; what it was leased beyond `watermark` is free."""

    member: MemberId
    watermark: int


Row = Joined | Fenced | RosterRecord | PairRecord | Settled


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """Append to the journal and flush, before anything that follows."""

    row: Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Send:
    """Send to a member."""

    to: MemberId
    message: Recorded | Asked | Gone


@dataclass(frozen=True, kw_only=True, slots=True)
class Publish:
    """Tell everybody the rosters of these rounds, the present one first: what members knew before is void.

    Each begins the first that it has not been in when it is at its send point.
    """

    rounds: tuple[tuple[int, tuple[PairId, ...]], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FenceWanted:
    """Its word is needed, it is suspect, and somebody waits for it: fence it."""

    member: MemberId
    why: str


Command = Write | Send | Publish | FenceWanted
Topology = Callable[[Sequence[str], int], tuple[tuple[str, ...], ...]]
"""Groups of the members' names in a round: one of `strategies.topology` with its settings."""


class LedgerContradiction(Exception):
    """A report that cannot be true beside what is on the record; it names both."""


@dataclass(kw_only=True, slots=True)
class PairBook:
    """Live members, open exchanges, outcomes, and how far each member's samples are committed."""

    topology: Topology
    round_: int = -1
    plan: dict[int, tuple[PairId, ...]] = field(default_factory=dict)
    """Rounds whose rosters are published and may be begun, the present one first."""
    planned_for: tuple[MemberId, ...] = ()
    met: set[int] = field(default_factory=set)
    """Of these rounds, those in which somebody met."""
    live: dict[str, MemberId] = field(default_factory=dict)
    fenced: set[MemberId] = field(default_factory=set)
    suspect: set[MemberId] = field(default_factory=set)
    watermarks: dict[MemberId, int] = field(default_factory=dict)
    open: dict[PairId, set[MemberId]] = field(default_factory=dict)
    """Exchanges without an outcome, and who has asked."""
    outcomes: dict[PairId, bool] = field(default_factory=dict)
    newest: dict[MemberId, int] = field(default_factory=dict)
    confirmed: dict[MemberId, int] = field(default_factory=dict)
    """Up to which round a member has heard what became of what it reported."""
    unsettled: set[MemberId] = field(default_factory=set)
    num_stale: int = 0
    out: list[Command] = field(default_factory=list)

    # ------------------------------------------------------------ members and rounds

    def join(self, member: MemberId) -> list[Command]:
        """A new incarnation; it is in the rosters from the next round on. The one before must have been fenced."""
        assert member not in self.fenced and member.name not in self.live, f"{member} joins twice"
        self._write(Joined(member=member))
        return self._done()

    def next_round(self) -> list[Command]:
        """The present round is over: go on to the next, of the members that are live and not suspect now.

        Where somebody came or went, or nobody could meet in the present round, the rosters ahead are void and fixed
        anew. A round of which nobody has said a word is not over: its rosters are told again.
        """
        self._close_what_was_left()
        present = next(iter(self.plan), None)
        if self._able() != self.planned_for or present is None:
            self.plan = {}
        elif present in self.met or not all(pair in self.open for pair in self.plan[present]):
            self._drop_what_is_over(present)
        self._plan_ahead()
        return self.remind()

    def plan_anew(self) -> list[Command]:
        """Somebody is gone: the present round goes on, those ahead are fixed anew: nobody is to wait for it there."""
        present = next(iter(self.plan), None)
        if present is not None and self._able() != self.planned_for:
            self.plan = {present: self.plan[present]}
            self._plan_ahead()
        return self._done()

    def _able(self) -> tuple[MemberId, ...]:
        return tuple(sorted(member for member in self.live.values() if member not in self.suspect))

    def _plan_ahead(self) -> None:
        self.planned_for = self._able()
        while len(self.plan) < ROUNDS_AHEAD:
            self._fix_roster([member.name for member in self.planned_for])
        self.met &= self.plan.keys()
        self.out.append(Publish(rounds=tuple(self.plan.items())))

    def _drop_what_is_over(self, present: int) -> None:
        if present not in self.met:  # schedules go by rounds in which somebody met
            self.plan = {}
            return
        del self.plan[present]
        while self.plan and (first := next(iter(self.plan))) in self.met and not self.is_open(first):
            del self.plan[first]

    def _fix_roster(self, names: Sequence[str]) -> None:
        round_ = self.round_ + 1
        groups = self.topology(names, round_) if len(names) > 1 else ()
        pairs = tuple(PairId(round_=round_, members=tuple(self.live[name] for name in group)) for group in groups)
        self._write(RosterRecord(round_=round_, pairs=pairs))
        self.plan[round_] = pairs

    def is_open(self, round_: int) -> bool:
        """Whether a group of this round has no outcome yet."""
        return any(pair.round_ == round_ for pair in self.open)

    def remind(self) -> list[Command]:
        """Close what was left, and say again who is fenced to those whose word on an exchange with it is missing."""
        self._close_what_was_left()
        self._forget()
        for pair in self.open:
            for member in pair.members:
                if member in self.fenced:
                    self._say_gone(pair, member)
        return self._done()

    def _say_gone(self, pair: PairId, member: MemberId) -> None:
        self.out += [Send(to=other, message=Gone(pair=pair, member=member)) for other in self._living(pair)]

    def suspected(self, member: MemberId, suspect: bool) -> None:
        """The detector's verdict, which may be taken back; it keeps a member out of rosters."""
        (self.suspect.add if suspect else self.suspect.discard)(member)

    def fence(self, member: MemberId) -> list[Command]:
        """Final: nothing that this incarnation says from now on counts. Its partners need not wait for it."""
        if member in self.fenced or self.live.get(member.name) != member:
            return []
        self._write(Fenced(member=member))
        for pair in [pair for pair in self.open if member in pair.members]:
            self._say_gone(pair, member)
        self._unwind()
        self._settle()
        return self._done()

    # ------------------------------------------------------------ what members say

    def report(self, report: Report) -> list[Command]:
        """An outcome. Raises LedgerContradiction if it cannot be true."""
        pair, sender = report.pair, report.sender
        if not self._may_speak(pair, sender):
            return []
        for before in report.rests_on:
            self._record(before, report)
        if report.done_before:
            self.newest[sender] = max(self.newest.get(sender, -1), pair.round_)
        self.confirmed[sender] = max(self.confirmed.get(sender, -1), report.confirmed)
        known = self.outcomes.get(pair)
        if known is None:
            if report.committed:
                if tuple(offer.sender for offer in report.offers) != pair.members:
                    raise LedgerContradiction(f"{pair}: the report has offers of other members: {report.offers}")
                self._record(report.as_commitment(), report)
            else:
                self._close(pair, False)
            self._unwind()
        elif known != report.committed and report.held:
            raise LedgerContradiction(f"{pair} is recorded as committed = {known}, and {sender} reports {report}")
        else:
            self.out.append(Send(to=sender, message=Recorded(pair=pair, committed=known)))
        return self._done()

    def query(self, query: Query) -> list[Command]:
        """Somebody is in doubt: answer, or get the word of those who can still tell."""
        pair, sender = query.pair, query.sender
        if not self._may_speak(pair, sender):
            return []
        if (known := self.outcomes.get(pair)) is not None:
            self.out.append(Send(to=sender, message=Recorded(pair=pair, committed=known)))
            return self._done()
        asked = self.open[pair]
        asked.add(sender)
        self._unwind()
        if pair in self.open:
            for member in self._living(pair):
                if member in asked:
                    continue
                self.out.append(Send(to=member, message=Asked(pair=pair)))
                if member in self.suspect:
                    self.out.append(
                        FenceWanted(member=member, why=f"silent, and {sender} waits for its word on {pair}")
                    )
        return self._done()

    def replay(self, rows: Iterable[Row]) -> None:
        """Take over what the journal says.

        An exchange that was given up is not in it, and is open again: its members say once more that it will not be,
        or have gone on to a later one.
        """
        for row in rows:
            self._take(row)

    # ------------------------------------------------------------ closing

    def _may_speak(self, pair: PairId, sender: MemberId) -> bool:
        known = sender in pair.members and self.live.get(sender.name) == sender
        # Of a round that all its members have left: a message that comes very late.
        known = known and (pair in self.open or pair in self.outcomes)
        self.num_stale += not known
        return known

    def _record(self, commit: Commitment, report: Report) -> None:
        """Put a commit on the record, unless it is there. Raises LedgerContradiction if it cannot be true."""
        pair = commit.pair
        known = self.outcomes.get(pair, None if pair in self.open else True)  # what is forgotten is on the record
        if known is None:
            for member, (since, upto) in zip(pair.members, commit.spans, strict=True):
                if since != self.watermarks[member] or upto < since:
                    raise LedgerContradiction(
                        f"{pair}: {member} offered samples [{since}, {upto}), and is committed up to "
                        f"{self.watermarks[member]}; {report.sender} reports it with {report.pair}"
                    )
            spans = zip(pair.members, commit.spans, strict=True)
            self._write(
                PairRecord(
                    round_=pair.round_,
                    spans=tuple(Span(member=member, since=since, upto=upto) for member, (since, upto) in spans),
                )
            )
            self._close(pair, True)
        elif not known:
            raise LedgerContradiction(f"{pair} is recorded as not committed, and {report.sender} reports {report}")

    def _write(self, row: Row) -> None:
        self.out.append(Write(row=row))
        self._take(row)

    def _take(self, row: Row) -> None:
        """What a row means: alike when it is written and when it is read again."""
        match row:
            case Joined(member=member):
                self.live[member.name], self.watermarks[member] = member, 0
            case Fenced(member=member):
                del self.live[member.name]
                self.fenced.add(member)
                self.unsettled.add(member)
                self.suspect.discard(member)
            case RosterRecord(round_=round_, pairs=pairs):
                self.round_ = round_
                self.open.update({pair: set() for pair in pairs})
            case PairRecord(pair=pair, spans=spans):
                self.outcomes[pair] = True
                self.open.pop(pair, None)
                self.met.add(pair.round_)
                for span in spans:
                    self.watermarks[span.member] = span.upto
                    # Whoever is in a commit had nothing undecided when it began, and its commits before are recorded.
                    self.newest[span.member] = max(self.newest.get(span.member, -1), pair.round_)
            case Settled(member=member):
                self.unsettled.discard(member)

    def _unwind(self) -> None:
        """Close what nobody is left to tell of, from the latest round on: each may hold earlier ones open."""
        for pair in sorted(self.open, key=lambda pair: -pair.round_):
            self._try_to_close(pair)

    def _try_to_close(self, pair: PairId) -> None:
        silent = pair.leader in self.fenced and set(self._living(pair)) <= self.open[pair]
        if silent and not self._may_be_carried(pair):
            self._close(pair, False)

    def _may_be_carried(self, pair: PairId) -> bool:
        """Whether a fenced member may have committed it and met others since, who then know of it."""
        fenced = {m for m in pair.members if m in self.fenced and self.newest.get(m, -1) <= pair.round_}
        return any(later.round_ > pair.round_ and fenced & set(later.members) for later in self.open)

    def _close(self, pair: PairId, committed: bool) -> None:
        self.open.pop(pair, None)
        self.outcomes[pair] = committed
        for member in self._living(pair):
            self.out.append(Send(to=member, message=Recorded(pair=pair, committed=committed)))
        self._settle()

    def _settle(self) -> None:
        if not self.unsettled:
            return
        busy = {member for pair in self.open for member in pair.members}
        for member in sorted(self.unsettled - busy):
            self._write(Settled(member=member, watermark=self.watermarks[member]))

    def _close_what_was_left(self) -> None:
        """What nobody can ask or tell of any more: everybody is fenced, or has spoken of a later exchange."""
        for pair in sorted(self.open, key=lambda pair: -pair.round_):
            left = all(m in self.fenced or self.newest.get(m, -1) > pair.round_ for m in pair.members)
            if left and not self._may_be_carried(pair):
                self._close(pair, False)

    def _forget(self) -> None:
        """Outcomes that everybody who could ask has heard."""
        for pair in list(self.outcomes):
            if all(m in self.fenced or self.confirmed.get(m, -1) >= pair.round_ for m in pair.members):
                del self.outcomes[pair]

    def _living(self, pair: PairId) -> list[MemberId]:
        return [member for member in pair.members if member not in self.fenced]

    def _done(self) -> list[Command]:
        out, self.out = self.out, []
        return out
