"""The pair commit: members of a small group average with each other, all or none. Pure: events in, commands out.

The first member of a group leads. Numbered calls of one exchange:

1. `Begin` (the worker, at its send point): say `Offer` to the others; training goes on.
2. `Offer` heard: fetch that member's payload (`FetchPayload`, then `Fetched`).
3. A follower that holds all payloads says `Ready`: from then on it is bound, and only the leader or the controller
   tells it what became of the exchange.
4. The leader decides: with all payloads and everybody's `Ready` it applies, says `Commit`, and reports. Until then it
   may give up, and so may a follower that has not said `Ready`: with `Abort`.
5. Whoever applied, or made sure that nobody will, reports to the controller until that says `Recorded`. Meanwhile it
   may begin further exchanges, up to `MOST_UNRECORDED` commits. Each offer and each report names the commits that it
   rests on and that may not be on the record: so whoever lives reports all that it holds, also of members that died
   before they could, and no commit comes on the record before those that it rests on.

No message is needed but the ones that are repeated: loss costs time, at most the one timeout that the worker's timer
keeps. Without `Ready` said, a timeout ends the exchange. With it the follower is in doubt: it asks the controller and
listens to nobody else any more, which is its promise; the controller gets the leader's word, or fences the leader
(`orchestrator/pairing.py`). So a dead partner costs one timeout, and no guess is ever made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from workers.pair_events import (
    Abort,
    Apply,
    Asked,
    Begin,
    Command,
    Commit,
    Commitment,
    Event,
    Fetched,
    FetchFailed,
    FetchPayload,
    Gone,
    KeepTime,
    Offer,
    PairId,
    Peer,
    Query,
    Ready,
    Recorded,
    Report,
    RetryDue,
    Say,
    Skip,
    Tell,
    TimedOut,
)
from workers.records import MemberId

__all__ = [
    "KEPT_EARLY",
    "KEPT_OUTCOMES",
    "MOST_UNRECORDED",
    "PAIR_TIMEOUT_S",
    "RETRIES_PER_TIMEOUT",
    "Abort",
    "Apply",
    "Asked",
    "Begin",
    "Command",
    "Commit",
    "Commitment",
    "Event",
    "FetchFailed",
    "FetchPayload",
    "Fetched",
    "Gone",
    "KeepTime",
    "Offer",
    "PairContradiction",
    "PairId",
    "PairMachine",
    "Peer",
    "Query",
    "Ready",
    "Recorded",
    "Report",
    "RetryDue",
    "Say",
    "Skip",
    "State",
    "Tell",
    "TimedOut",
]  # fmt: skip

PAIR_TIMEOUT_S = 3.0
RETRIES_PER_TIMEOUT = 6
KEPT_OUTCOMES = 8
KEPT_EARLY = 8
MOST_UNRECORDED = 4
"""Commits of a member that are not on the record; with as many it begins no further exchange."""

State = Literal["idle", "collecting", "ready", "doubt"]


class PairContradiction(Exception):
    """The record says the opposite of what this member did: a bug, or a fenced member that does not know yet."""


@dataclass(kw_only=True, slots=True)
class PairMachine:
    """One member's side; at most one exchange at a time.

    untold    what the controller has not confirmed, in the order of the rounds
    never     exchanges ahead that it has promised not to begin
    early     what others said of exchanges that it has not begun
    """

    me: MemberId
    state: State = "idle"
    pair: PairId | None = None
    last_round: int = -1
    offers: dict[MemberId, Offer] = field(default_factory=dict)
    held: set[MemberId] = field(default_factory=set)
    fetching: set[MemberId] = field(default_factory=set)
    votes: set[MemberId] = field(default_factory=set)
    outcomes: dict[PairId, Report] = field(default_factory=dict)
    untold: dict[PairId, Report] = field(default_factory=dict)
    never: set[PairId] = field(default_factory=set)
    early: dict[PairId, list[Peer]] = field(default_factory=dict)
    num_stale: int = 0
    out: list[Command] = field(default_factory=list)

    def handle(self, event: Event) -> list[Command]:
        """Take one event; what is stale is counted and has no effect."""
        match event:
            case Begin():
                self._begin(event)
            case Gone(pair=pair, member=member):
                self._gone(pair, member)
            case Asked(pair=pair):
                self._asked(pair)
            case RetryDue():
                self._retry()
            case _ if event.pair == self.pair:
                self._current(event)
            case Recorded(pair=pair, committed=committed):
                self._recorded(pair, committed)
            case Offer() | Ready() | Abort() if self._is_ahead(event.pair):
                self._keep_for_later(event)
            case Offer() | Ready():
                self._answer(event)
            case _:
                self.num_stale += 1
        out, self.out = self.out, []
        return out

    @property
    def is_waiting(self) -> bool:
        """Whether anybody owes it an answer."""
        return self.pair is not None or bool(self.untold)

    @property
    def num_unrecorded(self) -> int:
        """Its commits that are not on the record, as far as it knows."""
        return sum(report.committed for report in self.untold.values())

    def may_begin(self, pair: PairId) -> bool:
        """Whether it would take part, and not refuse at once."""
        return self._is_ahead(pair) and self.state == "idle" and self.num_unrecorded < MOST_UNRECORDED

    def _is_ahead(self, pair: PairId) -> bool:
        return pair.round_ > self.last_round and self.me in pair.members and pair not in self.never

    def invited(self) -> PairId | None:
        """The newest exchange that it has not begun and another one has: who waits there waits one timeout long."""
        ahead = [pair for pair, said in self.early.items() if any(isinstance(one, Offer) for one in said)]
        open_ = [pair for pair in ahead if self.may_begin(pair) and not self.is_void(pair)]
        return max(open_, key=lambda pair: pair.round_, default=None)

    def is_void(self, pair: PairId) -> bool:
        """Whether another one has given up an exchange that it has not begun."""
        return any(isinstance(one, Abort) for one in self.early.get(pair, ()))

    def validate(self) -> None:
        """Our invariants, for tests."""
        assert (self.state == "idle") == (self.pair is None), self.state
        if self.pair is not None:
            assert self.me in self.pair.members
            assert self.held <= self.offers.keys() <= set(self.pair.members)
            if self.state in ("ready", "doubt"):
                assert self.pair.leader != self.me and self.held == set(self.pair.members)
        assert len(self.outcomes) <= KEPT_OUTCOMES and len(self.early) <= KEPT_EARLY
        assert self.num_unrecorded <= MOST_UNRECORDED
        assert not self.never & {pair for pair, report in self.untold.items() if report.committed}

    # ------------------------------------------------------------ beginning

    def _begin(self, event: Begin) -> None:
        pair = event.pair
        if not self._is_ahead(pair):
            self.num_stale += 1
            return
        if not self.may_begin(pair):
            # Nobody waits for a third: the others go on at once.
            why = f"round {self.last_round}" if self.state != "idle" else "what the controller has not heard of"
            self._refuse(pair, f"{self.me} is not done with {why}")
            self.out.append(Skip(pair=pair, why=f"still {self.state}"))
            return
        self.state, self.pair, self.last_round = "collecting", pair, pair.round_
        self.held, self.fetching, self.votes = {self.me}, set(), set()
        offer = Offer(
            pair=pair, sender=self.me, since=event.since, upto=event.upto, digest=event.digest, rests_on=self._known()
        )
        self.offers = {self.me: offer}
        self.out.append(KeepTime(pair=pair))
        self._say_to_others(offer)
        waiting = self.early.get(pair, [])
        self.early = {ahead: said for ahead, said in self.early.items() if ahead.round_ > pair.round_}
        self.never = {ahead for ahead in self.never if ahead.round_ > pair.round_}
        for message in waiting:
            if message.pair == self.pair:
                self._current(message)

    def _keep_for_later(self, message: Offer | Ready | Abort) -> None:
        kept = self.early.setdefault(message.pair, [])
        if message not in kept:
            kept.append(message)
        while len(self.early) > KEPT_EARLY:
            del self.early[min(self.early, key=lambda pair: pair.round_)]

    def _refuse(self, pair: PairId, why: str) -> None:
        done = self.state == "idle"
        self._remember(self._never_report(pair, why, done_before=done))
        self.last_round = max(self.last_round, pair.round_)
        self._say_to_others_of(pair, Abort(pair=pair, sender=self.me, why=why))

    # ------------------------------------------------------------ the exchange that is going on

    def _current(self, event: Event) -> None:
        match self.state, event:
            case "doubt" | "ready", Recorded(committed=True):
                self._commit(told=True)
            case "doubt" | "ready", Recorded():
                self._give_up("the controller says so", told=True)
            case "collecting", Recorded(committed=committed):
                assert not committed, f"{event}: {self.me} never agreed to it"
                self._give_up("the controller says so", told=True)
            case "collecting", Offer(sender=sender):
                self._offer(event, sender)
            case "collecting", Fetched(member=member):
                self.fetching.discard(member)
                self.held.add(member)
                self._go_on()
            case "collecting", FetchFailed(member=member):
                self.fetching.discard(member)
            case "collecting", Ready(sender=sender):
                self.votes.add(sender)
                self._go_on()
            case "collecting", Abort(why=why):
                self._give_up(why)
            case "collecting", TimedOut():
                missing = sorted(set(self._members()) - (self.votes if self._leads() else self.held) - {self.me})
                self._give_up(f"{', '.join(map(str, missing))} did not come in time")
            case "ready", Commit(sender=sender) if sender == self._pair().leader:
                self._commit()
            case "ready", Abort(why=why):
                self._give_up(why)
            case "ready", TimedOut():
                self._doubt()
            case _:
                self.num_stale += 1

    def _offer(self, offer: Offer, sender: MemberId) -> None:
        if sender in self._members() and sender not in self.offers:
            self.offers[sender] = offer
            self._fetch(sender)

    def _fetch(self, member: MemberId) -> None:
        self.fetching.add(member)
        self.out.append(FetchPayload(offer=self.offers[member]))

    def _go_on(self) -> None:
        if self.held != set(self._members()):
            return
        pair = self._pair()
        if not self._leads():
            self.state = "ready"
            self.out.append(Say(to=pair.leader, message=Ready(pair=pair, sender=self.me)))
        elif self.votes >= set(self._members()) - {self.me}:
            self._commit()
            self._say_to_others_of(pair, Commit(pair=pair, sender=self.me))

    def _commit(self, *, told: bool = False) -> None:
        pair = self._pair()
        offers = [self.offers[member] for member in pair.members]
        known = _in_order(one for offer in offers for one in offer.rests_on)
        plain = tuple(replace(offer, rests_on=()) for offer in offers)
        self.out.append(Apply(pair=pair, offers=plain))
        report = Report(
            pair=pair, sender=self.me, committed=True, offers=plain, rests_on=known, confirmed=self._confirmed(pair)
        )
        self._end(report, told=told)

    def _give_up(self, why: str, *, told: bool = False) -> None:
        pair = self._pair()
        if self.state == "collecting":
            self._say_to_others(Abort(pair=pair, sender=self.me, why=why))
        self.out.append(Skip(pair=pair, why=why))
        self._end(self._never_report(pair, why), told=told)

    def _end(self, report: Report, *, told: bool) -> None:
        """The exchange is over; the controller hears of it until it says so, unless it was the one that said so."""
        self.state, self.pair = "idle", None
        self._remember(report)
        if not told:
            self.untold[report.pair] = report
            self.out.append(Tell(message=report))

    def _doubt(self) -> None:
        self.state = "doubt"
        self.out.append(Tell(message=Query(pair=self._pair(), sender=self.me)))

    def _retry(self) -> None:
        if self.state == "collecting":
            self._say_to_others(self.offers[self.me])
            for member in sorted(self.offers.keys() - self.held - self.fetching):
                self._fetch(member)
        elif self.state == "ready":
            self.out.append(Say(to=self._pair().leader, message=Ready(pair=self._pair(), sender=self.me)))
            self._say_to_others(self.offers[self.me])
        elif self.state == "doubt":
            self.out.append(Tell(message=Query(pair=self._pair(), sender=self.me)))
        self.out += [Tell(message=report) for report in self.untold.values()]

    # ------------------------------------------------------------ what others want to know

    def _recorded(self, pair: PairId, committed: bool) -> None:
        report = self.untold.pop(pair, None)
        if report is None:
            self.num_stale += 1
        elif report.committed != committed:
            raise PairContradiction(f"{self.me}, {pair}: recorded as committed = {committed}, {report}")

    def _gone(self, pair: PairId, member: MemberId) -> None:
        if pair != self.pair:
            self._asked(pair)
        elif self.state == "collecting":
            self._give_up(f"{member} is gone")
        elif self.state == "ready" and member == pair.leader:
            self._doubt()

    def _asked(self, pair: PairId) -> None:
        known = self.untold.get(pair) or self.outcomes.get(pair)
        if self.me not in pair.members:
            self.num_stale += 1
        elif known is not None:
            self.out.append(Tell(message=known))
        elif pair == self.pair and self.state == "collecting":
            self._give_up("the controller asked")
        elif pair == self.pair:
            self._doubt()
        elif self._is_ahead(pair):
            self._promise_never(pair)
        else:
            report = self._never_report(pair, "it is over", done_before=False)
            self.out.append(Tell(message=replace(report, held=False)))

    def _promise_never(self, pair: PairId) -> None:
        """Never begun, and now it never will be; those of rounds before it may be yet."""
        why = "the controller asked"
        self.never.add(pair)
        self.untold[pair] = self._never_report(pair, why, done_before=False)
        self.out.append(Tell(message=self.untold[pair]))
        self._say_to_others_of(pair, Abort(pair=pair, sender=self.me, why=why))

    def _answer(self, message: Offer | Ready) -> None:
        """Somebody has not heard the outcome. Silence about what is forgotten: it has been on the record for long."""
        report = self.untold.get(message.pair) or self.outcomes.get(message.pair)
        if report is None:
            self.num_stale += 1
        elif not report.committed:
            answer = Abort(pair=message.pair, sender=self.me, why=report.why)
            self.out.append(Say(to=message.sender, message=answer))
        elif message.pair.leader == self.me:
            self.out.append(Say(to=message.sender, message=Commit(pair=message.pair, sender=self.me)))

    # ------------------------------------------------------------ helpers

    def _never_report(self, pair: PairId, why: str, *, done_before: bool = True) -> Report:
        return Report(
            pair=pair, sender=self.me, committed=False, why=why, done_before=done_before, rests_on=self._known(),
            confirmed=self._confirmed(pair),
        )  # fmt: skip

    def _confirmed(self, pair: PairId) -> int:
        """Up to which round nothing is left to be confirmed, beside this exchange."""
        rounds = [open_.round_ for open_ in (pair, self.pair or pair, *self.untold)]
        return min(rounds) - 1

    def _known(self) -> tuple[Commitment, ...]:
        """Commits that its parameters rest on, and that the record may lack."""
        mine = [report for report in self.untold.values() if report.committed]
        before = [one for report in mine for one in report.rests_on]
        return _in_order([*before, *(report.as_commitment() for report in mine)])

    def _remember(self, report: Report) -> None:
        self.outcomes[report.pair] = report
        while len(self.outcomes) > KEPT_OUTCOMES:
            del self.outcomes[next(iter(self.outcomes))]

    def _pair(self) -> PairId:
        assert self.pair is not None
        return self.pair

    def _members(self) -> tuple[MemberId, ...]:
        return self._pair().members

    def _leads(self) -> bool:
        return self._pair().leader == self.me

    def _say_to_others(self, message: Peer) -> None:
        self._say_to_others_of(self._pair(), message)

    def _say_to_others_of(self, pair: PairId, message: Peer) -> None:
        self.out += [Say(to=member, message=message) for member in pair.members if member != self.me]


def _in_order(found: Iterable[Commitment]) -> tuple[Commitment, ...]:
    """Each once, from the oldest round on."""
    by_pair = {one.pair: one for one in found}
    return tuple(by_pair[pair] for pair in sorted(by_pair, key=lambda pair: (pair.round_, pair.members)))
