"""Who is kept out because its contributions were refused again and again, for how long, and its way back. Pure.

A member whose contribution was refused `BAN_REFUSALS` times in its last `WINDOW` exchanges is banned for
`BAN_EXCHANGES` exchanges; then it is on probation for as long as a window, with a small weight. One refusal on
probation bans it again; a window without any makes it an ordinary member. Counted by name: a new incarnation is the
same machine. Every change has a reason, which goes to the journal and to `status`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

BAN_REFUSALS = 3
WINDOW = 10
BAN_EXCHANGES = 20
PROBATION_WEIGHT = 0.1

Standing = Literal["member", "banned", "probation"]
WEIGHTS: dict[Standing, float] = {"member": 1.0, "probation": PROBATION_WEIGHT, "banned": 0.0}
STANDINGS = ("member", "banned", "probation")


@dataclass(frozen=True, kw_only=True, slots=True)
class StandingChange:
    """A row of the journal: what a member is from exchange `serial` on, and why."""

    member: str
    standing: Standing
    serial: int
    why: str


@dataclass(kw_only=True, slots=True)
class _Entry:
    standing: Standing = "member"
    since: int = 0
    recent: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """Of the last exchanges it took part in: serial, and why it was refused or nothing."""

    def refusals(self) -> list[str]:
        return [why for _, why in self.recent if why]


@dataclass(kw_only=True, slots=True)
class Bans:
    """The standing of every member that was ever looked at; all others are ordinary members."""

    entries: dict[str, _Entry] = field(default_factory=dict)

    def exchange(self, serial: int, verdicts: dict[str, str]) -> list[StandingChange]:
        """An exchange is over. `verdicts`: of each contribution why it was refused, or nothing. Serials rise."""
        self.count(serial, verdicts)
        return self.due(serial)

    def count(self, serial: int, verdicts: dict[str, str]) -> None:
        """Remember what became of the contributions to an exchange. Whoever is banned is not counted: what it sent
        before, to an exchange that ended after, is judged already.
        """
        for member, why in verdicts.items():
            entry = self.entries.get(member)
            if entry is None:
                if not why:
                    continue  # who was never refused: there are thousands of them
                entry = self.entries[member] = _Entry()
            if entry.standing != "banned":
                entry.recent.append((serial, why))

    def due(self, serial: int) -> list[StandingChange]:
        """Whose standing changes by what was counted up to exchange `serial`, and is changed by this call."""
        changes = []
        for member, entry in sorted(self.entries.items()):
            refused = entry.refusals()
            if entry.standing == "banned":
                continue
            if entry.standing == "probation" and refused:
                changes.append(self._change(member, "banned", serial, f"refused on probation: {refused[-1]}"))
            elif len(refused) >= BAN_REFUSALS:
                why = f"refused {len(refused)} times in its last {len(entry.recent)} exchanges: {refused[-1]}"
                changes.append(self._change(member, "banned", serial, why))
            elif entry.standing == "probation" and len(entry.recent) == WINDOW:
                changes.append(self._change(member, "member", serial, f"{WINDOW} exchanges without a refusal"))
        for member, entry in sorted(self.entries.items()):
            if entry.standing == "banned" and serial - entry.since >= BAN_EXCHANGES:
                why = f"banned for {BAN_EXCHANGES} exchanges; weight {PROBATION_WEIGHT} for {WINDOW} more"
                changes.append(self._change(member, "probation", serial, why))
        return changes

    def unban(self, member: str, serial: int) -> list[StandingChange]:
        """Somebody wants it back: on probation at once. Raises ValueError if it is not banned."""
        standing = self.standing(member)
        if standing != "banned":
            raise ValueError(
                f"{member} is not banned: it is {'on probation' if standing == 'probation' else 'welcome'}"
            )
        return [self._change(member, "probation", serial, "unbanned by hand")]

    def replay(self, change: StandingChange) -> None:
        """A row of the journal. Refusals that led to nothing are not in it: counting begins anew."""
        self._change(change.member, change.standing, change.serial, change.why)

    def standing(self, member: str) -> Standing:
        """What it is now."""
        entry = self.entries.get(member)
        return entry.standing if entry is not None else "member"

    def may_contribute(self, member: str) -> bool:
        """Whether its offers are accepted. A banned member trains on and follows the anchor."""
        return self.standing(member) != "banned"

    def weight(self, member: str) -> float:
        """What its coefficient is multiplied by."""
        return WEIGHTS[self.standing(member)]

    def _change(self, member: str, standing: Standing, serial: int, why: str) -> StandingChange:
        entry = self.entries.setdefault(member, _Entry())
        entry.standing, entry.since = standing, serial
        entry.recent.clear()
        return StandingChange(member=member, standing=standing, serial=serial, why=why)
