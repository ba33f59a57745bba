"""Which exchange a member begins next: the rosters of the present round and of some to come. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.pair import PairId, PairMachine


@dataclass(kw_only=True, slots=True)
class PairPlan:
    """Rounds that a member may begin: round -> its group, None where it meets nobody; the present one first."""

    newest: int = -1
    rounds: dict[int, PairId | None] = field(default_factory=dict)
    sat_out: int = -1

    def learn(self, rounds: Sequence[tuple[int, PairId | None]]) -> None:
        """The controller says which rounds there are; what it said before is void. One that comes late is not heard."""
        if not rounds:
            return
        first, newest = rounds[0][0], rounds[-1][0]
        if (newest, first) >= (self.newest, min(self.rounds, default=-1)):
            self.newest, self.rounds = newest, dict(rounds)

    def next(self, machine: PairMachine) -> tuple[int, PairId | None] | None:
        """At a send point: the round and whom to meet in it (None: nobody, it is sat out); None: no roster is left.

        Where another member waits already it is that exchange, also of a later round, and one that another has given up
        is passed over: who fell behind the others would come too late to all of them.
        """
        invited = machine.invited()
        if invited is not None:
            return invited.round_, invited
        for round_, pair in sorted(self.rounds.items()):
            over = pair is not None and machine.is_void(pair)
            if round_ > max(machine.last_round, self.sat_out) and not over:
                meets = pair is not None and machine.me in pair.members and pair not in machine.never
                return round_, pair if meets else None
        return None

    def sit_out(self, round_: int) -> None:
        """It meets nobody in this round."""
        self.sat_out = max(self.sat_out, round_)

    def ahead(self, machine: PairMachine) -> list[PairId]:
        """Exchanges that others may begin before this member does."""
        return [pair for round_, pair in self.rounds.items() if pair is not None and round_ > machine.last_round]
