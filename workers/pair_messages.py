"""What members of a gossip run and its controller say to each other, between the bodies of ordinary messages.

What members of a group say to each other does not travel so: see `workers/pair_mail.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.pair import Asked, Gone, PairId, Query, Recorded, Report


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTell:
    """A member tells the controller what became of an exchange of its group, or asks."""

    message: Report | Query


@dataclass(frozen=True, kw_only=True, slots=True)
class PairHear:
    """The controller says something to a member about an exchange of its group."""

    message: Recorded | Asked | Gone


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRosters:
    """Whom a member meets in the present round and in those to come (None: nobody), and at which addresses."""

    rounds: tuple[tuple[int, PairId | None], ...]
    addresses: tuple[tuple[str, str], ...] = ()
