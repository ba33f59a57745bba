"""Keeping every stage of a pipeline alive: who serves which, who holds copies, who moves (pure).

The lower half of `PipelineBrain`: orders go out by `_order`, and what comes of them is told to `_took`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from orchestrator.errors import UserError
from orchestrator.pipeline.commands import Command, Finish, Order, Stop, Tell, Write
from orchestrator.pipeline.commit import StepCommit, Wanted
from orchestrator.pipeline.plan import PipelinePlan
from orchestrator.pipeline.roster import Peer, Roster
from orchestrator.rebalance import PeerPower, Rebalancer, StageNeed, decide, place, stage_loads
from workers.pipeline.calls import BACKWARD_SIZE, FORWARD_SIZE
from workers.pipeline.costs import tensors_of
from workers.pipeline.messages import (
    DropStage,
    FenceStep,
    Holds,
    OpenStep,
    PeerFenced,
    Peers,
    Probe,
    StepCommitted,
    TakeStage,
)
from workers.pipeline.records import ServeRecord, StepFenceRecord
from workers.records import FaultRecord, Record, StopRecord

PROBE_WAIT_S = 15.0
SAME_LINK_S = 0.005
FITS_NO_STAGE = "fits_no_stage"


def link_class(seconds: float | None) -> float | None:
    """To the next power of two: links that differ by less are alike, and so are all that take a few milliseconds."""
    return None if seconds is None else 2.0 ** round(math.log2(max(seconds, SAME_LINK_S)))


class StageKeeper:
    """See the module. `version` is the number of steps that are committed in every stage."""

    def __init__(self, plan: PipelinePlan, *, first_incarnations: dict[str, int] | None = None) -> None:
        self.plan, self.layout = plan, plan.layout
        self.roster = Roster()
        self.roster.incarnations = dict(first_incarnations or {})
        self.version, self.round_ = plan.version, plan.round_
        self.digests: tuple[str, ...] = plan.digests
        self.genesis_digests: dict[int, str] = {}
        self.commit: StepCommit | None = None
        self.placed = self.begun = False
        self.finished: Finish | None = None
        self.stopping: Stop | None = None
        self.rebalancer = Rebalancer(minimum=plan.pipeline.min_peers)
        self.moves: list[str] = []
        self.why_no_move = ""
        self.losses: list[float] = []
        self.num_restarts: dict[str, int] = {}
        self._out: list[Command] = []
        self._ticket = 0
        self._open: dict[int, tuple[str, tuple[object, ...]]] = {}
        self._ordered_s: dict[int, float] = {}
        self._strikes: dict[str, int] = {}  # process -> times in a row that it did not answer
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._now_s = self._look_s = self._saved_s = 0.0
        self._announced_s = self._asked_s = 0.0
        self._failures = 0
        self._saving: tuple[str, int, set[int]] | None = None
        self._started_s: float | None = None
        self._probed_s: float | None = None

    @property
    def held_version(self) -> int:
        """The version that holders of a stage have."""
        return self.version

    @property
    def reduced(self) -> StepCommit | None:
        """The step whose gradients are added, and whose update is computed."""
        return self.commit

    @property
    def is_busy(self) -> bool:
        """Whether a step or a synchronisation is under way."""
        return bool(self._open_commits())

    @property
    def at_anchor(self) -> bool:
        """Whether what all holders of a stage have is as new as it can be after this step: a time to validate it."""
        return self.version == self.held_version

    def _open_commits(self) -> list[StepCommit]:
        return [self.commit] if self.commit is not None else []

    # ------------------------------------------------------------ saying

    def _write(self, *records: Record) -> None:
        self._out.append(Write(records=records))

    def _order(self, wanted: Wanted) -> None:
        process, order, about = wanted
        peer = self.roster.peers.get(process)
        if peer is None:
            return
        self._ticket += 1
        self._open[self._ticket] = (process, about)
        self._ordered_s[self._ticket] = self._now_s
        self._out.append(Order(process=process, nonce=peer.nonce, ticket=self._ticket, order=order))

    def _tell_all(self, message: OpenStep | Peers | PeerFenced | StepCommitted) -> None:
        for name, nonce in sorted(self.roster.trainers.items()):
            self._out.append(Tell(process=name, nonce=nonce, message=message))

    def _at(self, delay_s: float, what: Callable[[], None]) -> None:
        self._later.append((self._now_s + delay_s, what))

    def _finish(self, reason: str, detail: str = "") -> None:
        self.finished = Finish(reason=reason, detail=detail)
        self._write(StopRecord(reason=reason, detail=detail))
        self._out.append(self.finished)

    def _fence_for_step(self, name: str, process: str, why: str) -> None:
        commit = self.commit
        if commit is None or name in commit.fenced:
            return
        self._write(StepFenceRecord(peer=name, step=commit.step, round=commit.round_, why=why))
        commit.fence(name, process)
        self._tell_all(PeerFenced(peer=name, step=commit.step))
        if process in self.roster.peers:
            self._order((process, FenceStep(peer=name, step=commit.step, round_=commit.round_), ("nothing",)))

    # ------------------------------------------------------------ stages

    def _needs(self) -> list[StageNeed]:
        """What a microbatch costs: forward and backward, in the last stage a backward alone, which runs its forward."""
        calls = [FORWARD_SIZE + BACKWARD_SIZE] * (self.layout.num_stages - 1) + [BACKWARD_SIZE]
        crossing = [tensors_of(stage, self.layout.num_stages) for stage in range(self.layout.num_stages)]
        four = zip(self.layout.work, self.layout.stage_bytes, calls, crossing, strict=True)
        return [
            StageNeed(work=work * size, bytes=num_bytes, tensors=max(traffic.sent, traffic.received))
            for work, num_bytes, size, traffic in four
        ]

    def memory_of(self, peer: Peer) -> int:
        """What a stage may take of a peer: as configured, or its share of its machine."""
        if self.plan.pipeline.peer_memory_bytes is not None:
            return peer.memory_bytes
        return peer.memory_bytes // sum(one.node == peer.node for one in self.roster.peers.values())

    def _powers(self) -> list[PeerPower]:
        """Peers with their speeds: measured where they served, else as configured."""
        known: dict[str, float] = {}
        for peer in self.roster.peers.values():
            if peer.throughput is not None and peer.stage is not None:
                known[peer.process] = peer.throughput * self.layout.work[peer.stage]
        usual = sorted(known.values())[len(known) // 2] if known else 1.0
        return [
            PeerPower(
                name=peer.process,
                speed=known.get(peer.process, usual * self.plan.relative_speed(peer.process)),
                memory_bytes=self.memory_of(peer),
                link_s=link_class(peer.link_s),
            )
            for peer in sorted(self.roster.peers.values(), key=lambda peer: peer.process)
            if peer.process not in self.roster.leaving
        ]

    def _place_all(self) -> None:
        """The first placement, when everybody is there (or has had the time to come)."""
        late = self._started_s is not None and self._now_s > self._started_s + self.plan.start_timeout_s
        everybody = self.roster.peers.keys() >= set(self.plan.peers) - self.plan.left and len(self.roster.trainers) > 0
        if not everybody and not (late and self.roster.peers and self.roster.trainers):
            return
        known = {peer.process: peer.serves for peer in self.roster.peers.values() if peer.serves is not None}
        if not known and self._probes():
            return
        assignment = known or self._first_placement(everybody=everybody)
        if not assignment:
            return
        self.placed = True
        for process, stage in sorted(assignment.items()):
            self.roster.peers[process].taking[stage] = self.roster.next_name(process)
        for process in sorted(self.roster.peers.keys() - assignment.keys() - self.roster.leaving.keys()):
            self._place_newcomer(self.roster.peers[process])
        self._take_what_can()

    def _first_placement(self, *, everybody: bool) -> dict[str, int]:
        """Process -> stage; nothing where a stage fits too few, with which the run ends, and says the numbers.

        Where somebody is still to come, who may be what is lacking, that is waited for.
        """
        try:
            return place(self._needs(), self._powers(), minimum=self.plan.pipeline.min_peers)
        except UserError as refusal:
            self.why_no_move = str(refusal)
            if everybody:
                self._finish("failed", str(refusal))
            return {}

    def _probes(self) -> bool:
        """Whether peers still measure how far they are from the trainers; for some seconds that is waited for."""
        if not self.plan.probes:
            return False
        if self._probed_s is None:
            self._probed_s = self._now_s
            addresses = tuple(self.roster.addresses[name] for name in sorted(self.roster.trainers))
            for process in sorted(self.roster.peers):
                self._order((process, Probe(addresses=addresses), ("probe",)))
        waiting = any(about == ("probe",) for _, about in self._open.values())
        return waiting and self._now_s < self._probed_s + PROBE_WAIT_S

    def _place_newcomer(self, peer: Peer) -> None:
        """A process in the place of a dead one: to the stage that has fewest, or is slowest.

        One that no stage fits is on the record with the numbers, and waits for nothing.
        """
        counts = self.roster.counts(self.layout.num_stages)
        needs = self._needs()
        memory_bytes = self.memory_of(peer)
        fitting = [s for s in range(self.layout.num_stages) if needs[s].bytes <= memory_bytes]
        if not fitting:
            least = min(need.bytes for need in needs)
            detail = f"it may take {memory_bytes:,} bytes, and the smallest stage needs {least:,}: it serves none"
            t_s = round(self._now_s, 6)
            self._write(FaultRecord(fault=FITS_NO_STAGE, member=peer.process, injected=False, t_s=t_s, detail=detail))
            return
        loads = self._loads()
        stage = max(fitting, key=lambda s: (counts[s] < self.plan.pipeline.min_peers, -min(counts[s], 1), loads[s]))
        peer.taking[stage] = self.roster.next_name(peer.process)

    def _loads(self) -> list[float]:
        return stage_loads(self._needs(), self._powers(), self.roster.assignment())

    def _take_what_can(self) -> None:
        """Order what is wanted and possible: the first peer of a stage makes version 0, the others pull."""
        for peer in sorted(self.roster.peers.values(), key=lambda peer: peer.process):
            for stage, name in sorted(peer.taking.items()):
                if not self._is_ordered(peer, stage):
                    self._take(peer, stage, name)

    def _is_ordered(self, peer: Peer, stage: int) -> bool:
        return any(who == peer.process and about[:2] == ("take", stage) for who, about in self._open.values())

    def _take(self, peer: Peer, stage: int, name: str | None) -> None:
        version = self.held_version
        sources = [one for one in self.roster.holders(stage, version) if one is not peer]
        order = TakeStage(
            stage=stage,
            version=version,
            sources=tuple(one.address for one in sources),
            serve_as=name,
            step=self.version,
        )
        if not sources and peer.versions.get(stage) != version:
            if self.begun or (version > 0 and self.plan.from_folder is None):
                self._check_alive(stage)
                return
            makers = [one for one in self.roster.peers.values() if one.taking.get(stage) is not None]
            if min(makers, key=lambda one: one.process) is not peer:
                return
            tied = None
            if self.layout.is_tied and stage == 0 and self.plan.from_folder is None:
                owners = self.roster.holders(self.layout.num_stages - 1, version)
                if not owners:
                    return
                tied = owners[0].address
            order = replace(order, tied_from=tied, from_folder=self.plan.from_folder)
        self._order((peer.process, order, ("take", stage, name, version)))

    def _check_alive(self, stage: int) -> None:
        """A stage without any holder of its state cannot go on: only a snapshot has it."""
        if any(stage in peer.versions for peer in self.roster.peers.values()):
            return
        self._finish("failed", f"every process that held stage {stage} at version {self.held_version} is gone; "
                     "`atoll train --resume` goes on from the newest snapshot")  # fmt: skip

    def _took(self, peer: Peer, stage: int, name: str | None, answer: Holds) -> None:
        if peer.taking.get(stage, "") != name:
            return  # something else is wanted of it meanwhile
        peer.versions[stage] = answer.version
        if answer.version != self.held_version:
            return  # a step was committed meanwhile: it is ordered again
        if not self.begun and answer.digest and stage not in self.genesis_digests:
            self.genesis_digests[stage] = answer.digest
        del peer.taking[stage]
        if name is not None:
            before, peer.stage, peer.name = peer.stage, stage, name
            why, peer.why = peer.why, "it serves again"
            peer.came = why
            peer.throughput = None
            self.rebalancer.changed()
            self._write(ServeRecord(process=peer.process, peer=name, stage=stage, why=why))
            if before is not None and before != stage:
                peer.versions.pop(before, None)
                self._order((peer.process, DropStage(stage=before), ("nothing",)))
            self._tell_all(Peers(peers=self.roster.places()))
        for commit in self._open_commits():
            commit.ask(stage, peer)
            commit.retry()

    def _want_buddies(self) -> None:
        """Each stage has a copy elsewhere, one and no more."""
        if not self.plan.pipeline.buddies or self.layout.num_stages < 2:
            return
        for stage in range(self.layout.num_stages):
            buddies = self.roster.buddies(stage)
            if not buddies and self.roster.serving(stage):
                if (buddy := self.roster.buddy_for(stage)) is not None:
                    buddy.taking[stage] = None
            for spare in sorted(buddies, key=lambda one: one.process)[1:]:
                if stage in spare.versions and stage not in spare.taking and spare.moving_to != stage:
                    del spare.versions[stage]
                    self._order((spare.process, DropStage(stage=stage), ("nothing",)))

    def _fill_empty(self) -> None:
        """A stage that nobody serves: its buddy takes over, if its own stage can spare it; else whoever comes."""
        counts = self.roster.counts(self.layout.num_stages)
        for stage, count in enumerate(counts):
            if count:
                continue
            spare = [
                peer
                for peer in self.roster.peers.values()
                if peer.stage is not None and counts[peer.stage] > 1 and not any(peer.taking.values())
                if peer.process not in self.roster.leaving
            ]
            needs = self._needs()
            # Its whole machine, however many share it: without this stage nobody does anything.
            spare = [peer for peer in spare if peer.memory_bytes >= needs[stage].bytes]
            if not spare:
                continue
            peer = min(spare, key=lambda one: (one.versions.get(stage) != self.held_version, one.process))
            assert peer.stage is not None
            counts[peer.stage] -= 1
            peer.why = f"moved from stage {peer.stage}: stage {stage} has nobody"
            self.moves.append(f"{peer.process} {peer.why}")
            self._leave_stage(peer, f"it goes to stage {stage}, which has nobody")
            peer.taking[stage] = self.roster.next_name(peer.process)

    def _leave_stage(self, peer: Peer, why: str) -> None:
        """In the middle of a step: what it counted is counted again by its mates, which have its state."""
        name, peer.stage = peer.name, None
        claim = self.rebalancer.open
        if claim is not None and claim.move.peer == peer.process:
            # It was claimed as a peer of the stage that it leaves now: the one that it goes to may have no other.
            self.rebalancer.give_up(claim.number, why)
            self._stay(peer, claim.move.target)
        self._fence_for_step(name, peer.process, why)
        self._tell_all(Peers(peers=self.roster.places()))

    def _catch_up_one(self, peer: Peer, stage: int) -> None:
        serves = peer.stage == stage
        if serves:
            self._leave_stage(peer, "it does not have the committed state")
        peer.taking[stage] = self.roster.next_name(peer.process) if serves else None

    # ------------------------------------------------------------ moves

    def _rebalance(self) -> None:
        """Claim the move that helps the slowest stage most, if one helps enough; the mover pulls while it serves on."""
        settled = all(not any(peer.taking.values()) for peer in self.roster.peers.values())
        if not self.begun or not settled:
            self.why_no_move = "peers are still on their way to their stages"
            return
        view = self.rebalancer.view
        decision = decide(
            self._needs(),
            self._powers(),
            self.roster.assignment(),
            minimum=self.plan.pipeline.min_peers,
            hysteresis=self.plan.pipeline.hysteresis,
        )
        self.why_no_move = decision.reason
        claim = self.rebalancer.claim(decision, view=view, now_s=self._now_s)
        if claim is None:
            return
        peer = self.roster.peers[claim.move.peer]
        self.moves.append(decision.reason)
        peer.moving_to = claim.move.target
        if peer.versions.get(claim.move.target) != self.held_version:
            peer.taking[claim.move.target] = None

    def _finish_move(self) -> None:
        """Who has pulled its new stage goes there, if its old one can do without it."""
        claim = self.rebalancer.open
        if claim is not None:
            peer = self.roster.peers[claim.move.peer]
            target = claim.move.target
            if peer.versions.get(target) == self.version:
                peer.moving_to = None
                if self.rebalancer.join(claim.number, self.roster.assignment()):
                    peer.why = f"moved from stage {peer.stage}: {self.moves[-1]}"
                    peer.stage = None
                    peer.taking[target] = self.roster.next_name(peer.process)

    def _stay(self, peer: Peer, target: int) -> None:
        peer.moving_to = None
        if peer.stage != target:
            peer.taking.pop(target, None)
