"""Pairs and groups of a round, seen from the controller: rosters out, reports in; it is in nobody's way. Pure.

`PairBook` supplies the roster of each round, writes down what committed, and answers whoever is in doubt. It decides
nothing that members could decide among themselves, with one exception: an exchange whose leader is fenced did not
happen, once nobody else can have heard otherwise.

What closes an exchange (each leaves no way for the opposite):

- a report that it is committed;
- a report of anybody that it will never be (the leader's word, or a follower's that did not say `Ready`);
- the leader is fenced, and every other member is fenced or has asked (a member that asks listens to nobody else).

Leases of a fenced member are settled when it is in no open exchange: until then a living partner may report a commit
that its work is in. Everything that is told follows from rows that are written before (`Write` precedes `Send`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from workers.pair import Asked, Gone, PairId, Query, Recorded, Report
from workers.records import MemberId


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
    """Tell everybody the roster of a round; each takes the newest that it knows when it is at its send point."""

    round_: int
    pairs: tuple[PairId, ...]


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
    live: dict[str, MemberId] = field(default_factory=dict)
    fenced: set[MemberId] = field(default_factory=set)
    suspect: set[MemberId] = field(default_factory=set)
    watermarks: dict[MemberId, int] = field(default_factory=dict)
    open: dict[PairId, set[MemberId]] = field(default_factory=dict)
    """Exchanges without an outcome, and who has asked."""
    outcomes: dict[PairId, bool] = field(default_factory=dict)
    newest: dict[MemberId, int] = field(default_factory=dict)
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
        """Fix the roster of the next round, of the members that are live and not suspect now."""
        names = sorted(name for name, member in self.live.items() if member not in self.suspect)
        round_ = self.round_ + 1
        groups = self.topology(names, round_) if len(names) > 1 else ()
        pairs = tuple(PairId(round_=round_, members=tuple(self.live[name] for name in group)) for group in groups)
        self._write(RosterRecord(round_=round_, pairs=pairs))
        self.out.append(Publish(round_=round_, pairs=pairs))
        self._close_what_was_left()
        self._forget()
        return self._done()

    def suspected(self, member: MemberId, suspect: bool) -> None:
        """The detector's verdict, which may be taken back; it keeps a member out of rosters."""
        (self.suspect.add if suspect else self.suspect.discard)(member)

    def fence(self, member: MemberId) -> list[Command]:
        """Final: nothing that this incarnation says from now on counts. Its partners need not wait for it."""
        if member in self.fenced or self.live.get(member.name) != member:
            return []
        self._write(Fenced(member=member))
        for pair in [pair for pair in self.open if member in pair.members]:
            for other in self._living(pair):
                self.out.append(Send(to=other, message=Gone(member=member)))
            self._try_to_close(pair)
        self._settle()
        return self._done()

    # ------------------------------------------------------------ what members say

    def report(self, report: Report) -> list[Command]:
        """An outcome. Raises LedgerContradiction if it cannot be true."""
        pair, sender = report.pair, report.sender
        if not self._may_speak(pair, sender):
            return []
        if report.done_before:
            self.newest[sender] = max(self.newest.get(sender, -1), pair.round_)
        known = self.outcomes.get(pair)
        if known is None:
            if report.committed:
                self._record(report)
            self._close(pair, report.committed)
        elif known != report.committed:
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
        self._try_to_close(pair)
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

    def _record(self, report: Report) -> None:
        if tuple(offer.sender for offer in report.offers) != report.pair.members:
            raise LedgerContradiction(f"{report.pair}: the report has offers of other members: {report.offers}")
        for offer in report.offers:
            if offer.since != self.watermarks[offer.sender] or offer.upto < offer.since:
                raise LedgerContradiction(
                    f"{report.pair}: {offer.sender} offered samples [{offer.since}, {offer.upto}), and is committed up "
                    f"to {self.watermarks[offer.sender]}"
                )
        spans = tuple(Span(member=o.sender, since=o.since, upto=o.upto) for o in report.offers)
        self._write(PairRecord(round_=report.pair.round_, spans=spans))

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
                for span in spans:
                    self.watermarks[span.member] = span.upto
                    # Whoever is in a commit had nothing open when it began.
                    self.newest[span.member] = max(self.newest.get(span.member, -1), pair.round_)
            case Settled(member=member):
                self.unsettled.discard(member)

    def _try_to_close(self, pair: PairId) -> None:
        if pair.leader in self.fenced and set(self._living(pair)) <= self.open[pair]:
            self._close(pair, False)

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
        for pair in [pair for pair in self.open if self._has_been_left(pair)]:
            self._close(pair, False)

    def _forget(self) -> None:
        for pair in [pair for pair in self.outcomes if self._has_been_left(pair)]:
            del self.outcomes[pair]

    def _has_been_left(self, pair: PairId) -> bool:
        """Whether nobody can ask or tell any more: everybody is fenced, or has spoken of a later exchange."""
        return all(m in self.fenced or self.newest.get(m, -1) > pair.round_ for m in pair.members)

    def _living(self, pair: PairId) -> list[MemberId]:
        return [member for member in pair.members if member not in self.fenced]

    def _done(self) -> list[Command]:
        out, self.out = self.out, []
        return out
