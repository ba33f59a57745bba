"""The live members as an exchange sees them, made one by one when somebody asks: most messages concern one member."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from orchestrator.exchange_rules import MemberView
from orchestrator.membership import Process
from orchestrator.run_state import RunState
from workers.records import MemberId


class LiveMembers(Mapping[MemberId, MemberView]):
    """Views of the live incarnations for one fragment, in the order that rosters use.

    It holds for the handling of one event: who is live is fixed when it is made, what is known of them when it is
    asked for.
    """

    __slots__ = ("_fragment", "_leaving", "_live", "_made", "_processes", "_state")

    def __init__(
        self, state: RunState, processes: Mapping[MemberId, Process], leaving: Collection[str], fragment: int
    ) -> None:
        """`leaving`: names of those who were asked to leave."""
        self._state, self._processes, self._leaving, self._fragment = state, processes, leaving, fragment
        self._live = state.live()
        self._made: dict[MemberId, MemberView] = {}

    def __len__(self) -> int:
        """Live incarnations."""
        return len(self._live)

    def __iter__(self) -> Iterator[MemberId]:
        """In member order."""
        return iter(self._live)

    def __contains__(self, member: object) -> bool:
        """Whether it is a live incarnation."""
        return isinstance(member, MemberId) and self._state.current.get(member.name) == member

    def __getitem__(self, member: MemberId) -> MemberView:
        """What is known of one of them."""
        made = self._made.get(member)
        if made is None:
            if self._state.current.get(member.name) != member:
                raise KeyError(member)
            made = self._made[member] = self._view(member)
        return made

    def _view(self, member: MemberId) -> MemberView:
        entry, process, fragment = self._state.members[member], self._processes.get(member), self._fragment
        watermark, leaving = entry.watermarks[fragment], member.name in self._leaving
        if process is None:
            return MemberView(
                id=member, node=entry.node, address="", suspect=True, ready=False, stepped=False, weight=0,
                watermark=watermark, leases=entry.leases, leaving=leaving, trust=self._state.bans.weight(member.name),
            )  # fmt: skip
        hello, head = process.hello, self._state.heads[fragment].version.n
        return MemberView(
            id=member, node=entry.node, address=process.info.address, suspect=process.is_suspect(),
            ready=process.ready(), stepped=process.stepped, weight=process.info.weight, watermark=watermark,
            leases=entry.leases, blocked=process.blocked(fragment, head, watermark), leaving=leaving,
            behind=process.behind(fragment, head), step_s=hello.median_step_s if hello is not None else 0.0,
            trust=self._state.bans.weight(member.name),
        )  # fmt: skip
