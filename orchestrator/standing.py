"""What becomes of members whose contributions, or whose work for others, were refused: blame, bans, the way back."""

from __future__ import annotations

from orchestrator.bans import StandingChange
from orchestrator.redundancy import Redundancy
from workers.records import MemberId, RefusalRecord, StandingRecord

LYING_OWNER = "lying_owner"


class Standings(Redundancy):
    """Every change is a row of the journal; who is what follows from the rows (`RunState.bans`)."""

    def _fence(self, member: MemberId, why: str, *, refused: bool) -> None:
        """End an incarnation."""
        raise NotImplementedError

    def _grant(self, only: MemberId | None = None) -> None:
        """Lease what members lack."""
        raise NotImplementedError

    def _blame(self, member: MemberId, why: str) -> None:
        """What a member did for others was wrong: it keeps its place and its own work, until it is banned."""
        self._log(RefusalRecord(member=member.name, incarnation=member.incarnation, why=why, as_owner=True))
        self._fault(LYING_OWNER, member.name, why, injected=False)
        self._say(f"{member} is blamed: {why}", member=member.name, level="warning")

    def _judge_standings(self) -> None:
        """After a commit: who was refused too often is banned, and who was banned for long enough comes back."""
        if self.plan.robust.watches:
            for change in self.state.bans.due(self.state.num_commits):
                self._change_standing(change)

    def _change_standing(self, change: StandingChange) -> None:
        self._log(StandingRecord(member=change.member, standing=change.standing, serial=change.serial, why=change.why))
        self._say(f"{change.member} is now {change.standing}: {change.why}", member=change.member, level="warning")
        member = self.state.current.get(change.member)
        if change.standing == "banned" and member is not None:
            self._fence(member, f"banned: {change.why}", refused=True)
        self._grant()

    def _unban_requested(self, name: str) -> None:
        if self.state.bans.standing(name) == "banned":
            for change in self.state.bans.unban(name, self.state.num_commits):
                self._change_standing(change)
