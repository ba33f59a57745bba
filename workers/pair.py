"""The pair commit: members of a small group average with each other, all or none. Pure: events in, commands out.

The first member of a group leads. Numbered calls of one exchange:

1. `Begin` (the worker, at its send point): say `Offer` to the others; training goes on.
2. `Offer` heard: fetch that member's payload (`FetchPayload`, then `Fetched`).
3. A follower that holds all payloads says `Ready`: from then on it is bound, and only the leader or the controller
   tells it what became of the exchange.
4. The leader decides: with all payloads and everybody's `Ready` it applies, says `Commit`, and reports. Until then it
   may give up, and so may a follower that has not said `Ready`: with `Abort`.
5. Whoever applied reports to the controller until that says `Recorded`; only then may it begin another exchange, so
   that no commit rests on one that the ledger does not have.

No message is needed but the ones that are repeated: loss costs time, at most the one timeout that the worker's timer
keeps. Without `Ready` said, a timeout ends the exchange. With it the follower is in doubt: it asks the controller and
listens to nobody else any more, which is its promise; the controller gets the leader's word, or fences the leader
(`orchestrator/pairing.py`). So a dead partner costs one timeout, and no guess is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from workers.records import MemberId

PAIR_TIMEOUT_S = 3.0
RETRIES_PER_TIMEOUT = 6
KEPT_OUTCOMES = 8

State = Literal["idle", "collecting", "ready", "doubt", "unrecorded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairId:
    """An exchange of a group in a round; the first member leads. A new incarnation is in no old one."""

    round_: int
    members: tuple[MemberId, ...]

    @property
    def leader(self) -> MemberId:
        """Who decides."""
        return self.members[0]

    def __str__(self) -> str:
        """`7: a.1 + b.2`."""
        return f"{self.round_}: {' + '.join(map(str, self.members))}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """`sender` has published its payload, which covers the samples `[since, upto)` of its consumption order."""

    pair: PairId
    sender: MemberId
    since: int
    upto: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """`sender` holds all payloads, can apply, and will do as the leader or the controller says."""

    pair: PairId
    sender: MemberId


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """The leader has applied."""

    pair: PairId
    sender: MemberId


@dataclass(frozen=True, kw_only=True, slots=True)
class Abort:
    """`sender` will never apply, and without it nobody can."""

    pair: PairId
    sender: MemberId
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """To the controller: the exchange is committed, with these offers, or `sender` has made sure that it never is.

    `done_before`: `sender` has nothing open of earlier rounds, and will not begin one.
    """

    pair: PairId
    sender: MemberId
    committed: bool
    offers: tuple[Offer, ...] = ()
    why: str = ""
    done_before: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """To the controller: what became of it? `sender` will do as it says, and hear nobody else."""

    pair: PairId
    sender: MemberId


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """From the controller: the outcome, on the record."""

    pair: PairId
    committed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """From the controller: say what became of this exchange, or see to it that nothing will."""

    pair: PairId


@dataclass(frozen=True, kw_only=True, slots=True)
class Gone:
    """From the controller: this member is fenced."""

    member: MemberId


@dataclass(frozen=True, kw_only=True, slots=True)
class Begin:
    """The worker is at its send point, and this is the newest roster it knows."""

    pair: PairId
    since: int
    upto: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """A member's payload is here and has the digest of its offer."""

    pair: PairId
    member: MemberId


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchFailed:
    """It could not be had now; it is tried again with the next retry."""

    pair: PairId
    member: MemberId


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedOut:
    """The pair timeout since `Begin` is over."""

    pair: PairId


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryDue:
    """A part of the timeout is over: what was not answered is said again."""

    pair: PairId


Peer = Offer | Ready | Commit | Abort
Event = Begin | Peer | Fetched | FetchFailed | TimedOut | RetryDue | Recorded | Asked | Gone


@dataclass(frozen=True, kw_only=True, slots=True)
class Say:
    """Send to a member."""

    to: MemberId
    message: Peer


@dataclass(frozen=True, kw_only=True, slots=True)
class Tell:
    """Send to the controller."""

    message: Report | Query


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchPayload:
    """Fetch what an offer names."""

    offer: Offer


@dataclass(frozen=True, kw_only=True, slots=True)
class Apply:
    """Average: the outer step over the payloads of these offers, in this order."""

    pair: PairId
    offers: tuple[Offer, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """Change nothing: the displacement stays and is offered with the next one."""

    pair: PairId
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepTime:
    """Start the worker's timers of an exchange: `TimedOut` once, `RetryDue` again and again until it is over."""

    pair: PairId


Command = Say | Tell | FetchPayload | Apply | Skip | KeepTime


class PairContradiction(Exception):
    """The record says the opposite of what this member did: a bug, or a fenced member that does not know yet."""


@dataclass(kw_only=True, slots=True)
class PairMachine:
    """One member's side; at most one exchange at a time."""

    me: MemberId
    state: State = "idle"
    pair: PairId | None = None
    last_round: int = -1
    offers: dict[MemberId, Offer] = field(default_factory=dict)
    held: set[MemberId] = field(default_factory=set)
    fetching: set[MemberId] = field(default_factory=set)
    votes: set[MemberId] = field(default_factory=set)
    outcomes: dict[PairId, Report] = field(default_factory=dict)
    early: list[Peer] = field(default_factory=list)
    num_stale: int = 0
    out: list[Command] = field(default_factory=list)

    def handle(self, event: Event) -> list[Command]:
        """Take one event; what is stale is counted and has no effect."""
        match event:
            case Begin():
                self._begin(event)
            case Gone(member=member):
                self._gone(member)
            case Asked(pair=pair):
                self._asked(pair)
            case _ if event.pair == self.pair and self.state != "idle":
                self._current(event)
            case Offer() | Ready() | Abort() if event.pair.round_ > self.last_round and self.me in event.pair.members:
                self._keep_for_later(event)
            case Offer() | Ready():
                self._answer(event)
            case _:
                self.num_stale += 1
        out, self.out = self.out, []
        return out

    def validate(self) -> None:
        """Our invariants, for tests."""
        assert (self.state == "idle") == (self.pair is None), self.state
        if self.pair is not None:
            assert self.me in self.pair.members
            assert self.held <= self.offers.keys() <= set(self.pair.members)
            if self.state in ("ready", "doubt"):
                assert self.pair.leader != self.me and self.held == set(self.pair.members)
            if self.state == "unrecorded":
                assert self.pair in self.outcomes
        assert len(self.outcomes) <= KEPT_OUTCOMES

    # ------------------------------------------------------------ beginning

    def _begin(self, event: Begin) -> None:
        pair = event.pair
        if pair.round_ <= self.last_round or self.me not in pair.members:
            self.num_stale += 1
            return
        if self.state != "idle":
            # Nobody waits for a third: the others go on at once.
            self._refuse(pair, f"{self.me} is not done with round {self.last_round}")
            self.out.append(Skip(pair=pair, why=f"still {self.state}"))
            return
        self.state, self.pair, self.last_round = "collecting", pair, pair.round_
        self.held, self.fetching, self.votes = {self.me}, set(), set()
        offer = Offer(pair=pair, sender=self.me, since=event.since, upto=event.upto, digest=event.digest)
        self.offers = {self.me: offer}
        self.out.append(KeepTime(pair=pair))
        self._say_to_others(offer)
        waiting, self.early = self.early, []
        for message in waiting:
            if message.pair == self.pair:
                self._current(message)

    def _keep_for_later(self, message: Offer | Ready | Abort) -> None:
        newest = max((kept.pair.round_ for kept in self.early), default=-1)
        if message.pair.round_ > newest:
            self.early = []
        if message.pair.round_ >= newest and message not in self.early:
            self.early.append(message)

    def _refuse(self, pair: PairId, why: str) -> None:
        done = self.state == "idle"
        self._remember(Report(pair=pair, sender=self.me, committed=False, why=why, done_before=done))
        for member in pair.members:
            if member != self.me:
                self.out.append(Say(to=member, message=Abort(pair=pair, sender=self.me, why=why)))

    # ------------------------------------------------------------ the exchange that is going on

    def _current(self, event: Event) -> None:
        match self.state, event:
            case "unrecorded", Offer() | Ready():
                self._answer(event)
            case "unrecorded" | "doubt" | "ready", Recorded(committed=committed):
                self._settle(committed)
            case "collecting", Recorded(committed=committed):
                assert not committed, f"{event}: {self.me} never agreed to it"
                self._settle(False)
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
            case _, RetryDue():
                self._retry()
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
            self._say_to_others(Commit(pair=pair, sender=self.me))

    def _commit(self) -> None:
        pair = self._pair()
        offers = tuple(self.offers[member] for member in pair.members)
        self.out.append(Apply(pair=pair, offers=offers))
        self._report(Report(pair=pair, sender=self.me, committed=True, offers=offers))

    def _give_up(self, why: str) -> None:
        pair = self._pair()
        if self.state == "collecting":
            self._say_to_others(Abort(pair=pair, sender=self.me, why=why))
        self.out.append(Skip(pair=pair, why=why))
        self._report(Report(pair=pair, sender=self.me, committed=False, why=why))

    def _report(self, report: Report) -> None:
        self.state = "unrecorded"
        self._remember(report)
        self.out.append(Tell(message=report))

    def _doubt(self) -> None:
        self.state = "doubt"
        self.out.append(Tell(message=Query(pair=self._pair(), sender=self.me)))

    def _settle(self, committed: bool) -> None:
        pair = self._pair()
        if self.state == "unrecorded":
            if self.outcomes[pair].committed != committed:
                raise PairContradiction(
                    f"{self.me}, {pair}: recorded as committed = {committed}, {self.outcomes[pair]}"
                )
        elif committed:
            self._commit()
        else:
            self._give_up("the controller says so")
        if self.state == "unrecorded":
            # What it just told the controller, that knew already.
            self.out = [command for command in self.out if not isinstance(command, Tell)]
        self.state, self.pair = "idle", None

    def _retry(self) -> None:
        pair = self._pair()
        if self.state == "collecting":
            self._say_to_others(self.offers[self.me])
            for member in sorted(self.offers.keys() - self.held - self.fetching):
                self._fetch(member)
        elif self.state == "ready":
            self.out.append(Say(to=pair.leader, message=Ready(pair=pair, sender=self.me)))
            self._say_to_others(self.offers[self.me])
        elif self.state == "doubt":
            self.out.append(Tell(message=Query(pair=pair, sender=self.me)))
        else:
            self.out.append(Tell(message=self.outcomes[pair]))

    # ------------------------------------------------------------ what others want to know

    def _gone(self, member: MemberId) -> None:
        if self.pair is None or member not in self.pair.members:
            return
        if self.state == "collecting":
            self._give_up(f"{member} is gone")
        elif self.state == "ready" and member == self.pair.leader:
            self._doubt()

    def _asked(self, pair: PairId) -> None:
        if self.me not in pair.members:
            self.num_stale += 1
        elif pair in self.outcomes:
            self.out.append(Tell(message=self.outcomes[pair]))
        elif pair == self.pair and self.state == "collecting":
            self._give_up("the controller asked")
        elif pair == self.pair and self.state in ("ready", "doubt"):
            self._doubt()
        elif pair.round_ > self.last_round:
            # Never begun, and now it never will be.
            self.last_round = pair.round_
            self._refuse(pair, "the controller asked")
            self.out.append(Tell(message=self.outcomes[pair]))

    def _answer(self, message: Offer | Ready) -> None:
        """Somebody has not heard the outcome. Silence about what is forgotten: it has been on the record for long."""
        report = self.outcomes.get(message.pair)
        if report is None:
            self.num_stale += 1
        elif not report.committed:
            answer = Abort(pair=message.pair, sender=self.me, why=report.why)
            self.out.append(Say(to=message.sender, message=answer))
        elif message.pair.leader == self.me:
            self.out.append(Say(to=message.sender, message=Commit(pair=message.pair, sender=self.me)))

    # ------------------------------------------------------------ helpers

    def _remember(self, report: Report) -> None:
        self.outcomes[report.pair] = report
        self.last_round = max(self.last_round, report.pair.round_)
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
        for member in self._members():
            if member != self.me:
                self.out.append(Say(to=member, message=message))
