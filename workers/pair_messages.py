"""How the messages of pairs travel: to the controller and through it, between bodies of the ordinary ones.

Payloads do not: members fetch them from each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.pair import Asked, Gone, PairId, Peer, Query, Recorded, Report
from workers.records import MemberId


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSay:
    """A member says something to another one of its group; the controller hands it on."""

    to: MemberId
    message: Peer


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTell:
    """A member tells the controller what became of an exchange of its group, or asks."""

    message: Report | Query


@dataclass(frozen=True, kw_only=True, slots=True)
class PairHear:
    """A member hears another one of its group, or the controller."""

    message: Peer | Recorded | Asked | Gone


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRoster:
    """Whom a member meets in a round, and at which addresses; None: nobody."""

    round_: int
    pair: PairId | None
    addresses: tuple[tuple[str, str], ...] = ()
