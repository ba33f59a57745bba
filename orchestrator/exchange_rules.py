"""The rules of an exchange: small functions, each of which keeps the result right; a test takes each of them out.

Each says what it decides and, where it is a judgement, why. The machine in `orchestrator/exchange.py` calls them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from orchestrator.settings import ExchangeConfig
from strategies.robust import Recipe, too_long
from workers.messages import Announce, Assign, ExchangeId, Offer, Version
from workers.records import MemberId, RosterEntry, Term

if TYPE_CHECKING:
    from orchestrator.fleet import MemberView

Pair = tuple[MemberId, MemberId]
"""An owner, and a contributor that it could not reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """Live members, the fragment's head, and the round's planned local steps, at one moment.

    `own_pace`: each version is a push of one member, or of a few.
    """

    members: Mapping[MemberId, MemberView]
    head: Version
    inner_steps: int
    samples_committed: int
    own_pace: bool = False


@dataclass(kw_only=True, slots=True)
class OpenExchange:
    """An exchange between its first offer and its end. Lost at a restart, harmlessly.

    By the last look at everybody: `needed` offers make a quorum, `waits_for` is one whose offer is still to come (the
    slowest), `likely` would own the parts, chunk by chunk, and have `unannounced` still to hear of. `first`: what
    told of this exchange; `assignment`: what told of its present attempt. `entries_digest`: of the roster alone,
    `roster_digest`: of what owners make of it; `results`: of what they have made, all chunks of it.
    """

    id: ExchangeId
    base: Version
    opened_s: float
    state: Literal["open", "measuring", "reducing", "spread"] = "open"
    offers: dict[MemberId, tuple[str, Offer]] = field(default_factory=dict)
    quorum_s: float | None = None
    closed_s: float = 0.0
    spread_s: float = 0.0
    closed_because: str = ""
    attempt: int = 0
    roster: tuple[RosterEntry, ...] = ()
    roster_digest: str = ""
    entries_digest: str = ""
    base_samples: int = 0
    owners: tuple[MemberId, ...] = ()
    candidates: frozenset[MemberId] = frozenset()
    removed_owners: set[MemberId] = field(default_factory=set)
    progress_s: dict[MemberId, float] = field(default_factory=dict)
    reduced: dict[int, str] = field(default_factory=dict)
    results: str = ""
    haves: dict[MemberId, str] = field(default_factory=dict)
    bad_pairs: set[Pair] = field(default_factory=set)
    verified: bool = False
    needed: int = 0
    waits_for: MemberId | None = None
    likely: tuple[MemberId, ...] = ()
    likely_names: tuple[str, ...] = ()
    first: Announce | None = None
    unannounced: list[Announce] = field(default_factory=list)
    assignment: Assign | None = None
    base_shares: tuple[float, ...] = ()
    recipe: Recipe | None = None
    checkers: list[list[MemberId]] = field(default_factory=list)
    answers: dict[int, dict[MemberId, Hashable]] = field(default_factory=dict)
    measured: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def workers(self, chunk: int) -> list[MemberId]:
        """Who works on a part, its owner first."""
        return [self.owners[chunk], *(self.checkers[chunk] if self.checkers else ())]

    @property
    def done(self) -> dict[int, str] | dict[int, tuple[float, ...]]:
        """What is known of parts in this state."""
        return self.measured if self.state == "measuring" else self.reduced


# ---------------------------------------------------------------- rules


def offer_problem(offer: Offer, member: MemberView, head: Version) -> str | None:
    """Why an offer is not valid for the head, or None (protocol 1.3; C2: the coverage must be contiguous)."""
    if offer.base != head:
        return f"base {offer.base.n} is not the head {head.n}"
    if offer.since != member.watermark:
        return f"since {offer.since} is not the watermark {member.watermark}"
    if offer.upto <= offer.since or offer.weight <= 0 or offer.num_steps <= 0:
        return "it covers no steps"
    if offer.upto > member.num_leased:
        return "it covers samples that were not leased"
    if offer.ranges != member.cut(offer.since, offer.upto):
        return "its ranges are not what was leased"
    return None


def expected_members(open_: OpenExchange, fleet: Fleet, among: Iterable[MemberView] | None = None) -> list[MemberView]:
    """Who may offer, of all or of `among`: live members with samples leased beyond their watermark, also suspect (H11).

    Not who is blocked: it stands at its bound because of another fragment, and would be waited for in a circle. Nor a
    newcomer before its first step, which is slow: it has nothing to offer, and everybody else would stand still.
    """
    offers, founding = open_.offers, fleet.head.n == 0
    views = fleet.members.values() if among is None else among
    return [m for m in views if m.id in offers or (m.may_offer and (founding or m.stepped))]


def offers_needed(config: ExchangeConfig, num_expected: int) -> int:
    """Offers that make a quorum: the set minimum, else more than the share of those expected, or all."""
    share = num_expected if config.quorum >= 1 else int(config.quorum * num_expected) + 1
    share = config.min_members or share
    return max(min(share, num_expected), 1)


def awaited_members(open_: OpenExchange, expected: Iterable[MemberView]) -> list[MemberView]:
    """Whose offers are still to come: those expected who can make one now."""
    offers = open_.offers
    return [m for m in expected if m.id not in offers and m.ready and not m.suspect and not far_behind(m)]


def close_reason(
    open_: OpenExchange, fleet: Fleet, awaited: Sequence[MemberView], config: ExchangeConfig, now: float
) -> str | None:
    """Why the exchange closes now, or None: everybody who can has offered, or quorum plus grace is over (H2)."""
    if len(open_.offers) < open_.needed or len(fleet.members) < (config.min_members or 1):
        return None
    if not awaited:
        return "all members that can offer have offered"
    if config.quorum >= 1 or open_.quorum_s is None or now < open_.quorum_s + config.grace_s:
        return None
    return f"quorum and {config.grace_s:g} s of grace; not waiting for {', '.join(str(m.id) for m in awaited)}"


def staleness_factor(staleness: int) -> float:
    """Weight of late work: 1 up to one version late, then staleness ** -1/2 (protocol 1.6)."""
    return 1.0 if staleness <= 1 else float(staleness) ** -0.5


def push_factor(staleness: int) -> float:
    """Weight of a push: (1 + staleness) ** -1/2, the polynomial weight of Asynchronous Local-SGD (arXiv 2401.09135)."""
    return 1.0 / math.sqrt(1 + staleness)


def eligible_weight(fleet: Fleet, roster: Iterable[Offer]) -> float:
    """Divisor of the coefficients: tokens per step of **all** live members that have made a step (C9)."""
    return float(sum(m.weight * m.trust for m in fleet.members.values() if m.stepped))


def coefficients(offers: Sequence[tuple[MemberId, Offer]], fleet: Fleet) -> list[float]:
    """`c_i = a_i s(sigma_i) / sum of a over the eligible`, rounded to fp32 once; capped so that h_eff <= 2 H (1.6)."""
    divisor = eligible_weight(fleet, [offer for _, offer in offers])
    outside = sum(o.weight for m, o in offers if m not in fleet.members or not fleet.members[m].stepped)
    divisor += outside
    factor = push_factor if fleet.own_pace else staleness_factor
    trust = [fleet.members[m].trust if m in fleet.members else 1.0 for m, _ in offers]
    raw = [t * o.weight * factor(o.base.n - o.born) / divisor for t, (_, o) in zip(trust, offers, strict=True)]
    effective = sum(c * o.num_steps for c, (_, o) in zip(raw, offers, strict=True))
    limit = 2.0 * fleet.inner_steps
    if effective > limit:
        raw = [c * limit / effective for c in raw]
    return as_fp32(raw)


def as_fp32(values: Sequence[float]) -> list[float]:
    """Each rounded once, to what owners calculate with."""
    rounded: list[float] = np.asarray(values, dtype=np.float32).tolist()
    return rounded


def refused_lengths(offers: Mapping[MemberId, tuple[str, Offer]], times: float) -> dict[MemberId, str]:
    """Who is refused when an exchange closes, with the reason: by the announced length, which owners compare."""
    lengths = {str(m): length_of(offer) for m, (_, offer) in offers.items()}
    found = too_long(lengths, {str(m): offer.num_steps for m, (_, offer) in offers.items()}, times)
    return {m: found[str(m)] for m in sorted(offers) if str(m) in found}


def length_of(offer: Offer) -> float:
    """The norm of a contribution, all its chunks together."""
    return math.sqrt(math.fsum(offer.sumsq)) if all(math.isfinite(s) and s >= 0 for s in offer.sumsq) else math.nan


def far_behind(member: MemberView) -> bool:
    """Whether it has yet to catch up, and has nothing to offer before.

    After a cut it is heard long before it hears: its own messages come through while those to it, which were sent in
    vain more often, wait for their next try. One version behind is who is just applying the newest one.
    """
    return member.behind > 1


def able_owners(fleet: Fleet) -> list[MemberId]:
    """Who can own parts; those who are about to leave, or far behind, only where nobody else is there."""
    able = [m for m in fleet.members.values() if m.can_own]
    return [m.id for m in able if not m.leaving and not far_behind(m)] or [m.id for m in able]


def reaching_owners(able: Sequence[MemberId], roster: Collection[MemberId], cut: Collection[Pair]) -> list[MemberId]:
    """Those who can own parts and have lately got pieces of everybody in the roster; all where nobody has (H7).

    A pair that could not reach each other is left out on both sides: a cut is seldom one way.
    """
    if not cut:
        return list(able)
    parted = {owner for owner, other in cut if other in roster} | {other for owner, other in cut if owner in roster}
    return [m for m in able if m not in parted] or list(able)


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
    if len(alive) < min(config.copies, len(fleet.members)):  # most often; the nodes of all members need not be known
        return False
    need, nodes = copies_needed(config, fleet)
    return len(alive) >= need and len({m.node for m in alive}) >= nodes


def is_current(open_: OpenExchange | None, exchange: ExchangeId, attempt: int) -> bool:
    """Whether a message belongs to the present attempt of the open exchange (C5)."""
    return open_ is not None and open_.id == exchange and open_.attempt == attempt


def parts_after_roster_change(reduced: Mapping[int, str]) -> dict[int, str]:
    """Which reduced parts outlive a change of the roster: none, for a contribution is in all parts or in none (C6)."""
    return {}


def make_exchange_id(term: Term, serial: int) -> ExchangeId:
    """Exchange ids never repeat, not even after a restart of the controller (C5)."""
    return ExchangeId(term=term, serial=serial)
