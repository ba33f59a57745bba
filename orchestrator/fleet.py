"""The live members as an exchange sees them: views of what is known at the moment, one per member and fragment."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from orchestrator.membership import Process
from orchestrator.run_state import Head, Membership, RunState
from workers.ranges import Range
from workers.records import MemberId


class MemberView:
    """What an exchange needs to know of one live incarnation, as it is when it is asked for.

    Thousands of messages an exchange ask for a few of its fields each; a copy of all of them took longer than the rest.
    """

    __slots__ = ("_entry", "_fragment", "_head", "_leaving", "_process", "_state", "id")

    def __init__(
        self,
        member: MemberId,
        state: RunState,
        process: Process | None,
        leaving: Collection[str],
        fragment: int,
    ) -> None:
        """`process`: None for who lived before this controller and was not heard by it."""
        self.id = member
        self._entry: Membership = state.members[member]
        self._process, self._state, self._leaving, self._fragment = process, state, leaving, fragment
        self._head: list[Head] = state.heads

    @property
    def node(self) -> str:
        """Where it runs."""
        return self._entry.node

    @property
    def address(self) -> str:
        """Of its transport; empty if it is not here."""
        return self._process.info.address if self._process is not None else ""

    @property
    def suspect(self) -> bool:
        """Whether it is silent, hangs or is not here."""
        process = self._process
        return process is None or bool(process.silence or process.hanging)

    @property
    def ready(self) -> bool:
        """Whether it holds a state of every fragment."""
        return self._process is not None and self._process.holds_state

    @property
    def can_own(self) -> bool:
        """Whether it can be given parts: it is here, holds the state, is not suspect, and is trusted."""
        process = self._process
        if process is None or not process.holds_state or process.silence or process.hanging:
            return False
        return not self._state.bans.entries or self.trust > 0.0

    @property
    def stepped(self) -> bool:
        """Whether this incarnation has made an inner step."""
        return self._process is not None and self._process.consumed > 0

    @property
    def weight(self) -> int:
        """Tokens of one inner step."""
        return self._process.info.weight if self._process is not None else 0

    @property
    def watermark(self) -> int:
        """Samples of its leases that the fragment has settled."""
        return self._entry.watermarks[self._fragment]

    @property
    def num_leased(self) -> int:
        """Samples that it was leased."""
        return self._entry.num_leased

    def cut(self, since: int, upto: int) -> tuple[Range, ...]:
        """What it was leased between two consumption counts."""
        return self._entry.cut(since, upto)

    @property
    def may_offer(self) -> bool:
        """Whether it has samples beyond its watermark, and does not stand still because of another fragment."""
        entry, process = self._entry, self._process
        watermark = entry.watermarks[self._fragment]
        if entry.num_leased <= watermark:
            return False
        if process is None or process.hello is None or not process.hello.waiting:  # mostly
            return True
        return not process.blocked(self._fragment, self._head[self._fragment].version.n, watermark)

    @property
    def blocked(self) -> bool:
        """Whether it waits for another fragment."""
        process, fragment = self._process, self._fragment
        return process is not None and process.blocked(fragment, self._head[fragment].version.n, self.watermark)

    @property
    def leaving(self) -> bool:
        """Whether it was asked to leave."""
        return self.id.name in self._leaving

    @property
    def behind(self) -> int:
        """Versions to the head, by its last heartbeat."""
        process, fragment = self._process, self._fragment
        if process is None or process.hello is None or fragment >= len(process.hello.fragments):
            return 0
        return max(self._head[fragment].version.n - process.hello.fragments[fragment].n, 0)

    @property
    def step_s(self) -> float:
        """Of an inner step, 0 where that is not measured."""
        process = self._process
        return process.hello.median_step_s if process is not None and process.hello is not None else 0.0

    @property
    def trust(self) -> float:
        """By what its weight is multiplied."""
        bans = self._state.bans
        return bans.weight(self.id.name) if bans.entries else 1.0  # mostly nobody was ever refused


class LiveMembers:
    """The views of one fragment, in the order that rosters use; made anew only when somebody comes or goes."""

    def __init__(
        self, state: RunState, processes: Mapping[MemberId, Process], leaving: Collection[str], fragment: int
    ) -> None:
        """`leaving`: names of those who were asked to leave; looked at when it is asked for, like the others."""
        self._state, self._processes, self._leaving, self._fragment = state, processes, leaving, fragment
        self._of: tuple[list[MemberId], int] | None = None
        self._views: dict[MemberId, MemberView] = {}

    def views(self) -> dict[MemberId, MemberView]:
        """Of all live incarnations. Another dictionary after each change of who is live, and of who is here."""
        live, num_here = self._state.live(), len(self._processes)
        if self._of is None or self._of[0] is not live or self._of[1] != num_here:
            self._of = (live, num_here)
            self._views = {
                member: MemberView(member, self._state, self._processes.get(member), self._leaving, self._fragment)
                for member in live
            }
        return self._views
