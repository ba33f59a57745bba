"""The controller's side of one exchange: how a group agrees on one synchronisation of one fragment.

`IDLE -> OPEN -> REDUCING -> SPREAD -> commit -> IDLE` (protocol 1.3). The machine is pure: events and the fleet's
present state come in, effects come out; the clock is an argument. Every rule that keeps the result right is one small
function below, named after what it decides; a test takes each of them out and shows what breaks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from orchestrator.settings import ExchangeConfig
from workers import messages as msg
from workers import ranges
from workers.messages import ExchangeId, Offer, Version
from workers.records import (
    CommitRecord,
    MemberId,
    OfferId,
    Record,
    RosterEntry,
    Term,
    roster_digest,
    version_chain,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberView:
    """What the exchange needs to know of one live member."""

    id: MemberId
    node: str
    address: str
    suspect: bool
    ready: bool
    stepped: bool
    weight: int
    watermark: int
    leases: Sequence[ranges.Range]
    blocked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """Live members, the fragment's head, and the round's planned local steps, at one moment."""

    members: Mapping[MemberId, MemberView]
    head: Version
    inner_steps: int
    samples_committed: int


# ---------------------------------------------------------------- effects


@dataclass(frozen=True, kw_only=True, slots=True)
class ToAll:
    """Send a body to every live member."""

    body: msg.ControllerBody


@dataclass(frozen=True, kw_only=True, slots=True)
class ToOne:
    """Send a body (or, with `None`, only the journal rows it lacks) to one member."""

    member: MemberId
    body: msg.ControllerBody | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """Append a record; whoever hears of it hears after the flush."""

    record: Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Fence:
    """End an incarnation."""

    member: MemberId
    why: str
    refused: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """Drop a living member's uncommitted work by rule."""

    member: MemberId
    upto: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A decision with its reason, for the log; `fault` when something misbehaved."""

    text: str
    fault: str = ""
    member: str = ""


Effect = ToAll | ToOne | Journal | Fence | Drop | Note


# ---------------------------------------------------------------- rules


def offer_problem(offer: Offer, member: MemberView, head: Version) -> str | None:
    """Why an offer is not valid for the head, or None (protocol 1.3; C2: the coverage must be contiguous)."""
    if offer.base != head:
        return f"base {offer.base.n} is not the head {head.n}"
    if offer.since != member.watermark:
        return f"since {offer.since} is not the watermark {member.watermark}"
    if offer.upto <= offer.since or offer.weight <= 0 or offer.num_steps <= 0:
        return "it covers no steps"
    if offer.upto > ranges.count(member.leases):
        return "it covers samples that were not leased"
    if offer.ranges != ranges.cut(member.leases, offer.since, offer.upto):
        return "its ranges are not what was leased"
    return None


def expected_members(open_: OpenExchange, fleet: Fleet) -> list[MemberView]:
    """Who may offer: live members with samples leased beyond their watermark, suspect ones too (H11).

    Not who is blocked: it stands at its bound because of another fragment, and would be waited for in a circle. Nor a
    newcomer before its first step, which is slow: it has nothing to offer, and everybody else would stand still.
    """
    fresh = {m.id for m in fleet.members.values() if not m.stepped and fleet.head.n > 0}
    return [
        m
        for m in fleet.members.values()
        if m.id in open_.offers or (ranges.count(m.leases) > m.watermark and not m.blocked and m.id not in fresh)
    ]


def offers_needed(config: ExchangeConfig, num_expected: int) -> int:
    """Offers that make a quorum: more than the share of those expected, or all."""
    share = num_expected if config.quorum >= 1 else int(config.quorum * num_expected) + 1
    return max(min(share, num_expected), 1)


def close_reason(open_: OpenExchange, fleet: Fleet, config: ExchangeConfig, now: float) -> str | None:
    """Why the exchange closes now, or None: everybody who can has offered, or quorum plus grace is over (H2)."""
    expected = expected_members(open_, fleet)
    if len(open_.offers) < offers_needed(config, len(expected)) or len(fleet.members) < config.min_members:
        return None
    awaited = [m for m in expected if m.ready and not m.suspect and m.id not in open_.offers]
    if not awaited:
        return "all members that can offer have offered"
    if config.quorum >= 1 or open_.quorum_s is None or now < open_.quorum_s + config.grace_s:
        return None
    return f"quorum and {config.grace_s:g} s of grace; not waiting for {', '.join(str(m.id) for m in awaited)}"


def staleness_factor(staleness: int) -> float:
    """Weight of late work: 1 up to one version late, then staleness ** -1/2 (protocol 1.6)."""
    return 1.0 if staleness <= 1 else float(staleness) ** -0.5


def eligible_weight(fleet: Fleet, roster: Iterable[Offer]) -> float:
    """Divisor of the coefficients: tokens per step of **all** live members that have made a step (C9)."""
    return float(sum(m.weight for m in fleet.members.values() if m.stepped))


def coefficients(offers: Sequence[tuple[MemberId, Offer]], fleet: Fleet) -> list[float]:
    """`c_i = a_i s(sigma_i) / sum of a over the eligible`, rounded to fp32 once; capped so that h_eff <= 2 H (1.6)."""
    divisor = eligible_weight(fleet, [offer for _, offer in offers])
    outside = sum(o.weight for m, o in offers if m not in fleet.members or not fleet.members[m].stepped)
    divisor += outside
    raw = [o.weight * staleness_factor(o.base.n - o.born) / divisor for _, o in offers]
    effective = sum(c * o.num_steps for c, (_, o) in zip(raw, offers, strict=True))
    limit = 2.0 * fleet.inner_steps
    if effective > limit:
        raw = [c * limit / effective for c in raw]
    return [float(np.float32(c)) for c in raw]


def deal_chunks(num_chunks: int, owners: Sequence[MemberId]) -> tuple[MemberId, ...]:
    """Contiguous, nearly equal shares of the chunks, in member order."""
    ordered = sorted(owners)
    return tuple(ordered[chunk * len(ordered) // num_chunks] for chunk in range(num_chunks))


def redeal_chunks(owners: Sequence[MemberId], lost: MemberId, left: Sequence[MemberId]) -> tuple[MemberId, ...]:
    """Give the chunks of `lost` to those who are left, round robin; everybody else keeps his."""
    ordered, turn, out = sorted(left), 0, []
    for owner in owners:
        if owner == lost:
            out.append(ordered[turn % len(ordered)])
            turn += 1
        else:
            out.append(owner)
    return tuple(out)


def copies_needed(config: ExchangeConfig, fleet: Fleet) -> tuple[int, int]:
    """`(members, nodes)` that must hold a result before its commit (C1)."""
    nodes = {m.node for m in fleet.members.values()}
    need = min(config.copies, len(fleet.members))
    return need, min(need, len(nodes))


def enough_copies(holders: Iterable[MemberId], config: ExchangeConfig, fleet: Fleet) -> bool:
    """Whether live members on different nodes hold the whole result (C1)."""
    alive = [fleet.members[m] for m in holders if m in fleet.members]
    need, nodes = copies_needed(config, fleet)
    return len(alive) >= need and len({m.node for m in alive}) >= nodes


def is_current(open_: OpenExchange | None, exchange: ExchangeId, attempt: int) -> bool:
    """Whether a message belongs to the present attempt of the open exchange (C5)."""
    return open_ is not None and open_.id == exchange and open_.attempt == attempt


def keeps_parts_after_roster_change() -> bool:
    """A new roster makes every reduced part invalid: a contribution is in all parts or in none (C6)."""
    return False


def make_exchange_id(term: Term, serial: int) -> ExchangeId:
    """Exchange ids never repeat, not even after a restart of the controller (C5)."""
    return ExchangeId(term=term, serial=serial)


# ---------------------------------------------------------------- the machine


@dataclass(kw_only=True, slots=True)
class OpenExchange:
    """An exchange between its first offer and its end. Lost at a restart, harmlessly."""

    id: ExchangeId
    base: Version
    opened_s: float
    state: Literal["open", "reducing", "spread"] = "open"
    offers: dict[MemberId, tuple[str, Offer]] = field(default_factory=dict)
    quorum_s: float | None = None
    closed_s: float = 0.0
    spread_s: float = 0.0
    closed_because: str = ""
    attempt: int = 0
    roster: tuple[RosterEntry, ...] = ()
    roster_digest: str = ""
    base_samples: int = 0
    owners: tuple[MemberId, ...] = ()
    removed_owners: set[MemberId] = field(default_factory=set)
    progress_s: dict[MemberId, float] = field(default_factory=dict)
    reduced: dict[int, str] = field(default_factory=dict)
    haves: dict[MemberId, str] = field(default_factory=dict)
    bad_pairs: set[tuple[MemberId, MemberId]] = field(default_factory=set)
    verified: bool = False


class FragmentExchange:
    """Exchanges of one fragment, one after the other."""

    def __init__(self, *, fragment: int, num_chunks: int, config: ExchangeConfig, term: Term) -> None:
        """`num_chunks`: parts that owners reduce; `term`: the controller life that names the exchanges."""
        self.fragment = fragment
        self.num_chunks = num_chunks
        self.config = config
        self.term = term
        self.serial = 0
        self.open: OpenExchange | None = None
        self.discards = 0
        self.disagreements = 0

    # ------------------------------------------------------------ OPEN

    def on_offer(self, sender: MemberId, offer: Offer, fleet: Fleet, now: float) -> list[Effect]:
        """A member offers. Repeats are no-ops; an invalid offer is answered with the records that the sender lacks."""
        member = fleet.members[sender]
        problem = offer_problem(offer, member, fleet.head)
        if problem is None and len(offer.chunk_digests) != self.num_chunks:
            problem = f"it has {len(offer.chunk_digests)} chunks, expected {self.num_chunks}"
        if problem is not None:
            return [ToOne(member=sender, body=None), Note(text=f"offer {sender}/{offer.seq} refused: {problem}")]
        staleness = fleet.head.n - offer.born
        if staleness > self.config.staleness_limit:
            why = f"its oldest step is {staleness} versions old, exchange.staleness_limit is {self.config.staleness_limit}"
            return [Drop(member=sender, upto=offer.upto, why=why)]
        if self.open is None:
            self.serial += 1
            self.open = OpenExchange(id=make_exchange_id(self.term, self.serial), base=fleet.head, opened_s=now)
        if self.open.state != "open" or sender in self.open.offers:
            return []
        self.open.offers[sender] = (member.address, offer)
        owners = deal_chunks(self.num_chunks, self._able(fleet) or [sender])
        announce = msg.Announce(
            offer_by=sender, address=member.address, offer=offer, owners=tuple(str(owner) for owner in owners)
        )
        return [ToAll(body=announce), *self.tick(fleet, now)]

    def _able(self, fleet: Fleet) -> list[MemberId]:
        able = [m.id for m in fleet.members.values() if m.ready and not m.suspect]
        return [m for m in able if self.open is None or m not in self.open.removed_owners]

    def _close(self, open_: OpenExchange, fleet: Fleet, now: float, because: str) -> list[Effect]:
        offers = [
            (member, open_.offers[member][1]) for member in sorted(open_.offers)
        ]  # fmt: skip
        shares = coefficients(offers, fleet)
        open_.roster = tuple(
            RosterEntry(
                member=member.name, incarnation=member.incarnation, seq=offer.seq, since=offer.since, upto=offer.upto,
                ranges=offer.ranges, num_steps=offer.num_steps, coefficient=share,
            )
            for (member, offer), share in zip(offers, shares, strict=True)
        )  # fmt: skip
        open_.state, open_.closed_s, open_.closed_because = "reducing", now, because
        open_.base_samples = fleet.samples_committed
        able = self._able(fleet)
        if not able:
            return self.discard(f"no member can own a part of fragment {self.fragment}")
        open_.owners = deal_chunks(self.num_chunks, able)
        return [Note(text=f"exchange {open_.id} closes: {because}"), *self._assign(open_, fleet, now)]

    # ------------------------------------------------------------ REDUCING

    def _assign(self, open_: OpenExchange, fleet: Fleet, now: float) -> list[Effect]:
        open_.attempt += 1
        open_.state = "reducing"
        open_.roster_digest = roster_digest(open_.roster)
        open_.haves = {}
        open_.progress_s = {owner: now for owner in open_.owners}
        return [ToAll(body=self._assignment(open_, fleet))]

    def _assignment(self, open_: OpenExchange, fleet: Fleet) -> msg.Assign:
        included = {entry.offer.member for entry in open_.roster}
        return msg.Assign(
            fragment=self.fragment,
            exchange=open_.id,
            attempt=open_.attempt,
            base=open_.base,
            base_samples=open_.base_samples,
            roster=open_.roster,
            roster_digest=open_.roster_digest,
            owners=open_.owners,
            owner_addresses=tuple(
                (str(m), fleet.members[m].address) for m in sorted(set(open_.owners)) if m in fleet.members
            ),
            offers=tuple((m, *open_.offers[m]) for m in sorted(open_.offers) if m in included),
        )

    def on_missing(self, sender: MemberId, body: msg.Missing, fleet: Fleet, now: float) -> list[Effect]:
        """An owner lacks a piece: another owner if the contributor lives and one can reach it (H7), else a new roster."""
        open_ = self.open
        if open_ is None or not is_current(open_, body.exchange, body.attempt) or sender not in open_.owners:
            return []
        lost = body.offer.member
        if lost not in {entry.offer.member for entry in open_.roster}:
            return []
        open_.bad_pairs.add((sender, lost))
        blamed = {contributor for owner, contributor in open_.bad_pairs if owner == sender}
        others = [m for m in self._able(fleet) if m != sender and (m, lost) not in open_.bad_pairs]
        if (lost in fleet.members and others) or (len(blamed) >= 2 and others):
            note = Note(text=f"{sender} cannot reach {lost} ({body.why}): its parts go to others")
            return [note, *self._remove_owner(open_, sender, fleet, now)]
        return self._shrink(open_, body.offer, f"no owner can get its pieces: {body.why}", fleet, now)

    def on_refused(self, sender: MemberId, body: msg.Refused, fleet: Fleet, now: float) -> list[Effect]:
        """An owner found bad content: a roster without it for all parts, and the contributor is fenced (H4)."""
        open_ = self.open
        if open_ is None or not is_current(open_, body.exchange, body.attempt) or sender not in open_.owners:
            return []
        fence = Fence(member=body.offer.member, why=f"contribution refused: {body.why}", refused=True)
        return [fence, *self._shrink(open_, body.offer, body.why, fleet, now)]

    def _shrink(self, open_: OpenExchange, offer: OfferId, why: str, fleet: Fleet, now: float) -> list[Effect]:
        left = tuple(entry for entry in open_.roster if entry.offer != offer)
        if left == open_.roster:
            return []
        if not left:
            return self.discard(f"nobody is left in the roster ({why})")
        note = Note(text=f"exchange {open_.id}: {offer} leaves the roster: {why}", member=offer.member.name)
        kept = [(e.offer.member, open_.offers[e.offer.member][1]) for e in left]
        shares = coefficients(kept, fleet)
        open_.roster = tuple(replace(e, coefficient=share) for e, share in zip(left, shares, strict=True))
        if not keeps_parts_after_roster_change():
            open_.reduced = {}
        return [note, *self._assign(open_, fleet, now)]

    def _remove_owner(self, open_: OpenExchange, owner: MemberId, fleet: Fleet, now: float) -> list[Effect]:
        open_.removed_owners.add(owner)
        if owner not in open_.owners:
            return []
        able = self._able(fleet)
        if not able:
            return self.discard("no owner is left")
        for chunk, holder in enumerate(open_.owners):
            if holder == owner:
                open_.reduced.pop(chunk, None)
        open_.owners = redeal_chunks(open_.owners, owner, able)
        return self._assign(open_, fleet, now)

    def on_reduced(self, sender: MemberId, body: msg.Reduced, fleet: Fleet, now: float) -> list[Effect]:
        """An owner finished chunks of the present roster."""
        open_ = self.open
        if open_ is None or open_.id != body.exchange or body.roster_digest != open_.roster_digest:
            return []
        if open_.state != "reducing":
            return []
        for chunk, digest in body.chunks:
            if 0 <= chunk < self.num_chunks and open_.owners[chunk] == sender:
                open_.reduced.setdefault(chunk, digest)
        open_.progress_s[sender] = now
        if len(open_.reduced) < self.num_chunks:
            return []
        open_.state, open_.spread_s = "spread", now
        return [ToAll(body=self._spread(open_))]

    def _spread(self, open_: OpenExchange) -> msg.Spread:
        digests = tuple(open_.reduced[chunk] for chunk in range(self.num_chunks))
        return msg.Spread(fragment=self.fragment, exchange=open_.id, attempt=open_.attempt, chunk_digests=digests)

    # ------------------------------------------------------------ SPREAD

    def on_have(self, sender: MemberId, body: msg.Have, fleet: Fleet, now: float) -> list[Effect]:
        """A member holds the whole result; commit once enough copies agree on the next anchor."""
        open_ = self.open
        if open_ is None or not is_current(open_, body.exchange, body.attempt):
            return []
        if open_.state != "spread" or body.results != self._results(open_):
            return []
        open_.haves[sender] = body.next_digest
        alive = {m: d for m, d in open_.haves.items() if m in fleet.members}
        if len(set(alive.values())) > 1:
            return self._disagree(open_, alive)
        if not enough_copies(alive, self.config, fleet):
            return []
        return [Journal(record=self._commit_record(open_, body.next_digest))]

    def _results(self, open_: OpenExchange) -> str:
        return msg.results_digest(tuple(open_.reduced[chunk] for chunk in range(self.num_chunks)))

    def _disagree(self, open_: OpenExchange, haves: Mapping[MemberId, str]) -> list[Effect]:
        """Next anchors differ (1.7): everybody checks the anchor it holds; no majority decides."""
        story = ", ".join(f"{m}={d[:8]}" for m, d in sorted(haves.items()))
        fault = Note(text=f"next anchors of fragment {self.fragment} differ: {story}", fault="digest_mismatch")
        if open_.verified:
            self.disagreements += 1
            return [fault, *self.discard("next anchors still differ after everybody verified its own")]
        open_.verified, open_.haves = True, {}
        return [fault, ToAll(body=msg.Verify(fragment=self.fragment, exchange=open_.id, attempt=open_.attempt))]

    def _commit_record(self, open_: OpenExchange, next_digest: str) -> CommitRecord:
        chunk_digests = tuple(open_.reduced[chunk] for chunk in range(self.num_chunks))
        n = open_.base.n + 1
        chain = version_chain(
            open_.base.chain,
            {"f": self.fragment, "n": n, "roster": open_.roster_digest, "chunks": chunk_digests, "digest": next_digest},
        )
        return CommitRecord(
            fragment=self.fragment, n=n, prev_chain=open_.base.chain, chain=chain, serial=open_.id.serial,
            attempt=open_.attempt, roster=open_.roster, roster_digest=open_.roster_digest,
            chunk_digests=chunk_digests, digest=next_digest, base_samples=open_.base_samples,
        )  # fmt: skip

    def committed(self) -> OpenExchange | None:
        """The commit is in the journal: the exchange is over; returns it for the metrics."""
        done, self.open = self.open, None
        self.disagreements = 0
        return done

    # ------------------------------------------------------------ time and membership

    def discard(self, why: str) -> list[Effect]:
        """End the exchange without a commit; offers stay pending at their members (H1)."""
        if self.open is None:
            return []
        ended, self.open = self.open, None
        self.discards += 1
        body = msg.Discarded(fragment=self.fragment, exchange=ended.id, why=why)
        return [Note(text=f"exchange {ended.id} discarded: {why}"), ToAll(body=body)]

    def holds(self, member: MemberId) -> bool:
        """Whether `member` is in a fixed roster: its samples may still be committed (C3)."""
        open_ = self.open
        return open_ is not None and open_.state != "open" and any(e.offer.member == member for e in open_.roster)

    def on_gone(self, member: MemberId, fleet: Fleet, now: float) -> list[Effect]:
        """An incarnation was fenced: its open offer leaves, its parts move; a fixed roster keeps it."""
        open_ = self.open
        if open_ is None:
            return []
        if open_.state == "open":
            open_.offers.pop(member, None)
            if not open_.offers:
                return self.discard("the only offer was of a fenced member")
            return self.tick(fleet, now)
        open_.haves.pop(member, None)
        if member in open_.owners:
            if open_.state == "spread" and any(m in fleet.members for m in open_.haves):
                return []
            return self._remove_owner(open_, member, fleet, now)
        return self.tick(fleet, now)

    def tick(self, fleet: Fleet, now: float) -> list[Effect]:
        """Timers: close after grace, move the parts of owners that are suspect or make no progress."""
        open_ = self.open
        if open_ is None:
            return []
        if open_.state == "open":
            needed = offers_needed(self.config, len(expected_members(open_, fleet)))
            if open_.quorum_s is None and len(open_.offers) >= needed:
                open_.quorum_s = now
            because = close_reason(open_, fleet, self.config, now)
            return self._close(open_, fleet, now, because) if because else []
        if open_.state == "spread":
            return self._try_commit(open_, fleet) or self._unstick(open_, fleet, now)
        for owner in sorted(set(open_.owners)):
            pending = any(o == owner and c not in open_.reduced for c, o in enumerate(open_.owners))
            view = fleet.members.get(owner)
            stuck = now - open_.progress_s.get(owner, now) > self.config.progress_timeout_s
            if pending and (view is None or view.suspect or stuck):
                why = "gone" if view is None else "suspect" if view.suspect else "no progress"
                return [
                    Note(text=f"owner {owner} loses its parts: {why}"),
                    *self._remove_owner(open_, owner, fleet, now),
                ]
        return []

    def _try_commit(self, open_: OpenExchange, fleet: Fleet) -> list[Effect]:
        alive = {m: d for m, d in open_.haves.items() if m in fleet.members}
        if alive and len(set(alive.values())) == 1 and enough_copies(alive, self.config, fleet):
            return [Journal(record=self._commit_record(open_, next(iter(alive.values()))))]
        return []

    def _unstick(self, open_: OpenExchange, fleet: Fleet, now: float) -> list[Effect]:
        """Too few copies for too long: owners that are suspect lose their parts, at last the exchange is discarded."""
        waited = now - open_.spread_s
        if waited <= self.config.progress_timeout_s:
            return []
        if not any(m in fleet.members for m in open_.haves):
            for owner in sorted(set(open_.owners)):
                view = fleet.members.get(owner)
                if view is None or view.suspect:
                    note = Note(text=f"nobody holds the result and owner {owner} is gone or suspect: its parts move")
                    return [note, *self._remove_owner(open_, owner, fleet, now)]
        if waited <= 3 * self.config.progress_timeout_s:
            return []
        return self.discard(f"after {waited:.0f} s only {len(open_.haves)} members hold the result")

    def lacks_news(self, report: msg.FragmentReport) -> bool:
        """Whether a member that reports this has not heard of the present attempt, or of its results."""
        open_ = self.open
        if open_ is None or open_.state == "open":
            return False
        if report.exchange != open_.id or report.attempt != open_.attempt:
            return True
        return open_.state == "spread" and not report.spread

    def repeat(self, member: MemberId, fleet: Fleet) -> list[Effect]:
        """What a member that may have missed messages needs to take part in the open exchange."""
        open_ = self.open
        if open_ is None or open_.state == "open":
            return []
        out: list[Effect] = [ToOne(member=member, body=self._assignment(open_, fleet))]
        if open_.state == "spread":
            out.append(ToOne(member=member, body=self._spread(open_)))
        return out
