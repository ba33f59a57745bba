"""What members of a pair say to each other and to the controller, what happens to one of them, and what it is to do.

The words of `PairMachine` (`workers/pair.py`), where the numbered calls are.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.records import MemberId


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
class Commitment:
    """A commit that may not be on the record: of each member of the group the samples `[since, upto)`."""

    pair: PairId
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """`sender` has published its payload, which covers the samples `[since, upto)` of its consumption order.

    `rests_on`: what is in the payload besides, as far as `sender` knows not on the record yet; from the oldest on.
    """

    pair: PairId
    sender: MemberId
    since: int
    upto: int
    digest: str
    rests_on: tuple[Commitment, ...] = ()


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
    `rests_on`: commits that come before this, and may not be on the record; from the oldest on.
    `confirmed`: the controller has confirmed to `sender` what it reported of rounds up to this one.
    `held`: False where `sender` holds nothing of the exchange: it never began it and never will, or was told long ago
    that it is on the record.
    """

    pair: PairId
    sender: MemberId
    committed: bool
    offers: tuple[Offer, ...] = ()
    why: str = ""
    done_before: bool = True
    rests_on: tuple[Commitment, ...] = ()
    confirmed: int = -1
    held: bool = True

    def as_commitment(self) -> Commitment:
        """What is committed, for those whose commits rest on it."""
        return Commitment(pair=self.pair, spans=tuple((offer.since, offer.upto) for offer in self.offers))


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
    """From the controller: this member of an exchange is fenced."""

    pair: PairId
    member: MemberId


@dataclass(frozen=True, kw_only=True, slots=True)
class Begin:
    """The worker is at its send point, and this exchange comes next (`PairPlan.next`)."""

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
    """Start the worker's timer of an exchange: `TimedOut` once.

    `RetryDue` comes again and again as long as `PairMachine.is_waiting`.
    """

    pair: PairId


Command = Say | Tell | FetchPayload | Apply | Skip | KeepTime
