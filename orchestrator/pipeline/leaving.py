"""Processes of a pipeline that are asked to go, and hand over first (pure).

Whoever leaves finishes the step that is open, so that everything it has counted is committed, or in the anchors where
peers make steps of their own. It is let go between two steps, once its stage has another peer, each stage that it
holds has enough other holders, and no snapshot is being written. The last peer of a stage waits until the rebalancer
has moved another one there; the last trainer waits for another one. `waiting` says what for.
"""

from __future__ import annotations

from orchestrator.events import LeaveRequested
from orchestrator.pipeline.commands import Asked, End
from orchestrator.pipeline.operations import Operations
from orchestrator.pipeline.plan import PipelinePlan
from orchestrator.pipeline.roster import Peer
from workers.pipeline.messages import Peers
from workers.pipeline.records import LeftRecord
from workers.records import FenceRecord


class Leaving(Operations):
    """See the module. Who has left is not started again in this life of the run; a resumed run starts everybody."""

    def __init__(self, plan: PipelinePlan, *, first_incarnations: dict[str, int] | None = None) -> None:
        super().__init__(plan, first_incarnations=first_incarnations)
        self.left = set(plan.left)
        self.waiting: dict[str, str] = {}
        """Process -> what its leaving waits for."""

    def _operate(self, event: Asked) -> None:
        if not isinstance(event, LeaveRequested):
            super()._operate(event)
        elif event.name in self.roster.peers or event.name in self.roster.trainers:
            self.roster.leaving.setdefault(event.name, event.why)

    def _look_for_leavers(self) -> None:
        """The last peer of a stage: somebody else is to serve it; nobody waits for the rebalancer's next look."""
        for process in sorted(self.roster.leaving):
            peer = self.roster.peers.get(process)
            if peer is not None and peer.stage is not None and not self._mates(peer) and self.rebalancer.open is None:
                self._rebalance()

    def _let_go(self) -> None:
        """Between two steps: whoever is to go, and may."""
        self.waiting = {}
        for process, why in sorted(self.roster.leaving.items()):
            if process in self.roster.trainers:
                reason = "" if len(self.roster.trainers) > 1 else "it is the last trainer"
            elif (peer := self.roster.peers.get(process)) is not None:
                reason = self._why_it_stays(peer)
            else:
                continue
            if reason:
                self.waiting[process] = reason
            else:
                self._goes(process, why)

    def _somebody_goes(self) -> bool:
        """Whether somebody waits for nothing but the end of what is open."""
        peers = [peer for name in self.roster.leaving if (peer := self.roster.peers.get(name)) is not None]
        trainers = [name for name in self.roster.leaving if name in self.roster.trainers]
        return any(not self._why_it_stays(peer, idle=True) for peer in peers) or (
            bool(trainers) and len(self.roster.trainers) > 1
        )

    def _can_do_without(self, process: str) -> bool:
        """Of one that is gone: whether the others are enough to go on with."""
        if process in self.plan.trainers:
            return bool(self.roster.trainers)
        return all(self.roster.counts(self.layout.num_stages))

    def _mates(self, peer: Peer) -> list[Peer]:
        """Who serves the same stage and stays."""
        serving = self.roster.serving(peer.stage) if peer.stage is not None else []
        return [one for one in serving if one.process not in self.roster.leaving]

    def _why_it_stays(self, peer: Peer, *, idle: bool = False) -> str:
        """ "" if it may go; `idle`: as if nothing were under way."""
        if not idle and self._open_commits():
            return "a step is under way"
        if not idle and (own := self._uncommitted(peer)):
            return f"{own} microbatches that it has stepped on are not in the anchors yet"
        if peer.stage is not None and not self._mates(peer):
            return f"it is the last peer of stage {peer.stage}"
        if self._saving is not None:
            return "a snapshot is being written"
        rest = [one for one in self.roster.peers.values() if one.process not in self.roster.leaving]
        wanted = max(1, min(self.plan.copies, len(rest), self._most_holders()))
        for stage in sorted(peer.versions):
            held = sum(one.versions.get(stage) == self.held_version for one in rest)
            if held < wanted:
                return f"stage {stage} would be held by {held} others, and {wanted} are wanted"
        return ""

    def _uncommitted(self, peer: Peer) -> int:
        """Microbatches that are in a peer's own parameters alone."""
        return 0

    def _most_holders(self) -> int:
        raise NotImplementedError

    def _goes(self, process: str, why: str) -> None:
        told = f"left: {why}"
        incarnation = self.roster.incarnations.get(process, 0)
        nonce = self.roster.trainers.pop(process, "")
        if (peer := self.roster.peers.pop(process, None)) is not None:
            nonce = peer.nonce
            self.rebalancer.changed()
            if self.rebalancer.open is not None and self.rebalancer.open.move.peer == process:
                self.rebalancer.give_up(self.rebalancer.open.number, "it left")
            self._open = {ticket: one for ticket, one in self._open.items() if one[0] != process}
        self._has_left(process, told)
        self._write(FenceRecord(member=process, incarnation=incarnation, why=told))
        self._out.append(End(process=process, nonce=nonce))
        self._tell_all(Peers(peers=self.roster.places()))

    def _has_left(self, process: str, why: str) -> None:
        self.roster.leaving.pop(process, None)
        self.left.add(process)
        self._write(LeftRecord(process=process, why=why))
