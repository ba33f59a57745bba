"""Names of what a run consists of: incarnations of members, lives of controllers, offers, and an offer in a roster."""

from __future__ import annotations

from typing import NamedTuple

from workers.ranges import Range


class MemberId(NamedTuple):
    """One incarnation of a member: `name.incarnation`.

    A named tuple, like `OfferId`: the controller sorts and looks up members all the time, and comparison and hash of
    these are compiled.
    """

    name: str
    incarnation: int

    def __str__(self) -> str:
        """`island-1.2`: the form used in keys, logs and the journal."""
        return f"{self.name}.{self.incarnation}"


class Term(NamedTuple):
    """One life of a controller; it fences every lower term. `lineage` rises only when a lost journal is rebuilt."""

    lineage: int
    number: int
    controller: str

    @property
    def rank(self) -> tuple[int, int]:
        """What terms are compared by."""
        return (self.lineage, self.number)

    def __str__(self) -> str:
        """`lineage.number`."""
        return f"{self.lineage}.{self.number}"


class OfferId(NamedTuple):
    """Names one offer: member, incarnation, sequence number."""

    member: MemberId
    seq: int

    def __str__(self) -> str:
        """`island-1.2/7`."""
        return f"{self.member}/{self.seq}"


class RosterEntry(NamedTuple):
    """One contribution of a commit: which samples, how many steps, with which coefficient (fp32)."""

    member: str
    incarnation: int
    seq: int
    since: int
    upto: int
    ranges: tuple[Range, ...]
    num_steps: int
    coefficient: float

    @property
    def member_id(self) -> MemberId:
        """The incarnation that this entry is of."""
        return MemberId(self.member, self.incarnation)

    @property
    def offer(self) -> OfferId:
        """Id of the offer that this entry includes."""
        return OfferId(MemberId(self.member, self.incarnation), self.seq)

    def weighed(self, coefficient: float) -> RosterEntry:
        """The same with another coefficient."""
        return RosterEntry(*self[:-1], coefficient)  # `_replace` takes three times as long
