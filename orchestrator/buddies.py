"""Who keeps the local state of whom (`run.redundancy = "buddy"`). Pure: places and reports in, assignments out.

A buddy is on another node than its ward, so that a machine that is lost takes no state and its copy with it; where all
members are on one node it is another process there, which still survives the death of the ward's. Among those who can
do it, who has the fewest wards takes the next one. An assignment lasts as long as its buddy is a member and is where it
should be: each change costs the transfer of a whole state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workers.copies import Copy
from workers.messages import Keeping
from workers.records import MemberId

AGAIN_S = 5.0


def choose(ward: MemberId, places: Mapping[MemberId, str], load: Mapping[MemberId, int]) -> MemberId | None:
    """Who should keep what `ward` has: on another node, if there is one, and with the fewest wards; None if alone.

    Args:
        places: node of each member that can keep something. load: wards that each has already.
    """
    others = sorted(member for member in places if member.name != ward.name)
    here = places.get(ward)
    ring = [m for m in others if m > ward] + [m for m in others if m < ward]  # the next one in the circle, if equal
    return min(ring, key=lambda m: (places[m] == here, load.get(m, 0)), default=None)


def assign(wards: Mapping[MemberId, MemberId], places: Mapping[MemberId, str]) -> dict[MemberId, MemberId]:
    """The buddy of each member; those in `wards` stay who they are where that is still as good."""
    kept: dict[MemberId, MemberId] = {}
    nodes = set(places.values())
    for ward, buddy in wards.items():
        if ward in places and buddy in places and (places[ward] != places[buddy] or len(nodes) == 1):
            kept[ward] = buddy
    load = Counter(kept.values())
    for ward in sorted(places):
        if ward not in kept and (found := choose(ward, places, load)) is not None:
            kept[ward] = found
            load[found] += 1
    return kept


@dataclass(kw_only=True, slots=True)
class Buddies:
    """Assignments, what wards offer, and what each member says that it keeps; a restart hears it from heartbeats."""

    of: dict[MemberId, MemberId] = field(default_factory=dict)
    offered: dict[MemberId, Copy] = field(default_factory=dict)
    kept: dict[MemberId, tuple[Copy, ...]] = field(default_factory=dict)
    _told: dict[MemberId, tuple[Keeping, float]] = field(default_factory=dict)

    def heard(self, member: MemberId, copy: Copy | None, kept: Sequence[Copy]) -> list[Copy] | None:
        """A heartbeat; returns the copies that this member has and had not before, None where nothing is new."""
        offered = copy if copy is not None and copy.member == member else None
        had = self.kept.get(member)
        if had == tuple(kept) and self.offered.get(member) == offered:
            return None
        if offered is not None:
            self.offered[member] = offered
        else:
            self.offered.pop(member, None)
        self.kept[member] = tuple(kept)
        return [copy for copy in kept if copy not in (had or ())]

    def place(self, places: Mapping[MemberId, str]) -> None:
        """Assign anew; whoever is not in `places` keeps nothing any more that counts."""
        self.of = assign(self.of, places)
        for table in (self.offered, self.kept, self._told):
            for gone in [member for member in table if member not in places]:
                del table[gone]

    def copies_of(self, name: str) -> list[tuple[Copy, MemberId]]:
        """Copies of the local states that an island's incarnations had, with who has them."""
        found = [(copy, holder) for holder, kept in sorted(self.kept.items()) for copy in kept]
        return [(copy, holder) for copy, holder in found if copy.member.name == name]

    def holder_of(self, member: MemberId) -> tuple[Copy, MemberId] | None:
        """The newest copy of an island's state, and who has it."""
        found = self.copies_of(member.name)
        return max(found, key=lambda entry: (entry[0].member, sum(entry[0].versions)), default=None)

    def orders(self, now: float) -> dict[MemberId, Keeping]:
        """What has to be told: what is new, and after a while again what was not carried out."""
        out: dict[MemberId, Keeping] = {}
        wards: dict[MemberId, list[Copy]] = {}
        for ward, buddy in sorted(self.of.items()):
            if ward in self.offered:
                wards.setdefault(buddy, []).append(self.offered[ward])
        mine: dict[MemberId, set[str]] = {}
        for ward, buddy in self.of.items():
            mine.setdefault(buddy, set()).add(ward.name)
        holders: dict[str, list[tuple[MemberId, MemberId]]] = {}
        for holder, kept in self.kept.items():
            for copy in kept:
                holders.setdefault(copy.member.name, []).append((copy.member, holder))
        for member in sorted({*self.of, *self.kept, *self._told}):
            needed = mine.get(member, set()) | {
                copy.member.name
                for copy in self.kept.get(member, ())
                if not _has_other(holders[copy.member.name], member, copy)
            }
            body = self._order(member, tuple(wards.get(member, ())), tuple(sorted(needed)))
            told = self._told.get(member)
            again = told is not None and now - told[1] >= AGAIN_S and self._is_open(member, body)
            if told is None or told[0] != body or again:
                out[member] = body
                self._told[member] = (body, now)
        return out

    def _order(self, member: MemberId, wards: tuple[Copy, ...], keep: tuple[str, ...]) -> Keeping:
        buddy = self.of.get(member)
        held = next((c.digest for c in self.kept.get(buddy, ()) if c.member == member), "") if buddy else ""
        return Keeping(buddy=str(buddy or ""), held=held, wards=wards, keep=keep)

    def _is_open(self, member: MemberId, body: Keeping) -> bool:
        """Whether it seems not to have heard what it was told: messages may be lost."""
        have = self.kept.get(member, ())
        offered = self.offered.get(member)
        lacking = any(copy not in have for copy in body.wards)
        idle = any(copy.member.name not in body.keep for copy in have)
        never = bool(body.buddy) and not body.held and offered is None
        return lacking or idle or never or (offered is not None and offered.digest == body.held)


def _has_other(holders: Sequence[tuple[MemberId, MemberId]], holder: MemberId, copy: Copy) -> bool:
    """Whether somebody else has a copy of that island's state that is no older."""
    return any(member >= copy.member and other != holder for member, other in holders)
