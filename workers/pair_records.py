"""Rows of the journal for pairs and groups that meet between two exchanges of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workers.record_base import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRosterRecord(Record):
    """Who meets whom in a round of gossip: each group as `island-0.1+island-1.1`, the first leads."""

    kind: ClassVar[str] = "pair_roster"
    round_: int
    groups: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCommitRecord(Record):
    """A group averaged in a round: of member i the samples `since[i]` to `upto[i]` of its consumption are in."""

    kind: ClassVar[str] = "pair_commit"
    round_: int
    members: tuple[str, ...]
    incarnations: tuple[int, ...]
    since: tuple[int, ...]
    upto: tuple[int, ...]
