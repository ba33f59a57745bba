"""The controller of a pipeline: a pure machine, `handle(event, now_s) -> commands`.

It starts processes, gives each peer a stage (`place`), opens one step after the other, leads each to its commit
(`StepCommit`), and keeps every stage alive: a copy of its state at a buddy, peers in the place of dead ones, moves to
the slowest stage (`decide`). Whatever is lost costs at most the step under way. Rules of counting: docs/swarm.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestrator.pipeline.commands import (
    Answered,
    Command,
    Died,
    End,
    Event,
    Failed,
    Finish,
    Heard,
    Joined,
    Order,
    Rebalance,
    Sealed,
    Start,
    StepDone,
    Stop,
    Tell,
    Tick,
    Write,
)
from orchestrator.pipeline.commit import Contradiction, StepCommit, Wanted
from orchestrator.pipeline.plan import PipelinePlan
from orchestrator.pipeline.roster import Peer, Roster, deal
from orchestrator.rebalance import PeerPower, Rebalancer, StageNeed, decide, place
from workers.pipeline.messages import (
    Applied,
    Apply,
    DropStage,
    FenceStep,
    FromPeer,
    FromTrainer,
    GaveUp,
    Have,
    Holds,
    Offered,
    OpenStep,
    PeerFenced,
    Peers,
    Reduced,
    SaveStage,
    StageReady,
    StepCommitted,
    TakeStage,
)
from workers.records import (
    FenceRecord,
    JoinRecord,
    PipelineGenesisRecord,
    Record,
    ServeRecord,
    SnapshotRecord,
    StageCommitRecord,
    StepFenceRecord,
    StepRecord,
    StopRecord,
)

RETRY_S = 0.5
SPREAD_GRACE_S = 5.0
MAX_FAILURES = 3


class PipelineBrain:
    """See the module. `version` is the number of steps that are committed in every stage."""

    def __init__(self, plan: PipelinePlan, *, first_incarnations: dict[str, int] | None = None) -> None:
        self.plan, self.layout = plan, plan.layout
        self.roster = Roster()
        self.roster.incarnations = dict(first_incarnations or {})
        self.version, self.round_ = plan.version, plan.round_
        self.digests: tuple[str, ...] = plan.digests
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
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._now_s = self._step_since_s = self._look_s = self._saved_s = 0.0
        self._failures = 0
        self._saving: tuple[str, int, set[int]] | None = None
        self._started_s: float | None = None

    # ------------------------------------------------------------ dispatch

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """One event in, what to do out; in that order."""
        self._now_s = now_s
        if self.finished is None:
            try:
                self._dispatch(event)
                self._go_on()
            except Contradiction as error:
                self._finish("failed", str(error))
        out, self._out = self._out, []
        return out

    def _dispatch(self, event: Event) -> None:
        match event:
            case Joined():
                self._joined(event)
            case Died():
                self._died(event)
            case Answered(ticket=ticket, answer=answer):
                process, about = self._open.pop(ticket, ("", ()))
                if about and process in self.roster.peers:
                    self._answered(self.roster.peers[process], about, answer)
            case Failed(ticket=ticket, why=why):
                process, about = self._open.pop(ticket, ("", ()))
                if about and process in self.roster.peers:
                    self._failed(self.roster.peers[process], about, why)
            case Heard(process=process, nonce=nonce, message=message):
                if self.roster.trainers.get(process) == nonce:
                    self._heard(process, message)
            case Tick():
                self._ticked()
            case Rebalance():
                self._rebalance()
            case Stop():
                self.stopping = event

    def begin(self, now_s: float) -> list[Command]:
        """Start all processes."""
        self._now_s = self._started_s = self._saved_s = now_s
        return [Start(process=name, why="start") for name in (*self.plan.peers, *self.plan.trainers)]

    def _write(self, *records: Record) -> None:
        self._out.append(Write(records=records))

    def _order(self, wanted: Wanted) -> None:
        process, order, about = wanted
        peer = self.roster.peers.get(process)
        if peer is None:
            return
        self._ticket += 1
        self._open[self._ticket] = (process, about)
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

    # ------------------------------------------------------------ processes

    def _joined(self, event: Joined) -> None:
        self.roster.next_name(event.process)
        incarnation = self.roster.incarnations[event.process]
        self._write(JoinRecord(member=event.process, incarnation=incarnation, nonce=event.nonce, node=event.node))
        if event.process in self.plan.trainers:
            self.roster.trainers[event.process] = event.nonce
            return  # it takes part from the next step on
        peer = Peer(
            process=event.process,
            nonce=event.nonce,
            address=event.address,
            node=event.node,
            memory_bytes=event.memory_bytes,
            versions=dict(event.held),
            serves=event.serves,
        )
        self.roster.peers[event.process] = peer
        for stage, digest in event.has_next:
            # It was told to compute the step that is the last on the record, and nobody told it so.
            if peer.versions.get(stage) == self.version - 1 and digest == self.digests[stage]:
                order = Apply(step=self.version - 1, stage=stage, digest=digest)
                peer.versions[stage] = self.version
                self._order((peer.process, order, ("applied", stage, self.version)))
        self.rebalancer.changed()
        if self.placed:
            self._place_newcomer(peer)

    def _died(self, event: Died) -> None:
        if self.roster.trainers.get(event.process) == event.nonce:
            del self.roster.trainers[event.process]
            if self.commit is not None and event.process in self.commit.trainers:
                self._restart_step(f"{event.process} is gone")
        elif (peer := self.roster.peers.get(event.process)) is not None and peer.nonce == event.nonce:
            self._lost(peer, event.why)
        self._write(
            FenceRecord(member=event.process, incarnation=self.roster.incarnations.get(event.process, 0), why=event.why)
        )
        self.num_restarts[event.process] = self.num_restarts.get(event.process, 0) + 1
        if self.num_restarts[event.process] > self.plan.max_restarts:
            self._finish("failed", f"{event.process} ended {self.num_restarts[event.process]} times: {event.why}")
            return
        self._out.append(Start(process=event.process, why=event.why))

    def _lost(self, peer: Peer, why: str) -> None:
        """A peer's process is gone, with its states, its sums and what it had counted."""
        name, stage = peer.name, peer.stage
        del self.roster.peers[peer.process]
        self.rebalancer.changed()
        if self.rebalancer.open is not None and self.rebalancer.open.move.peer == peer.process:
            self.rebalancer.give_up(self.rebalancer.open.number, "it died")
        self._open = {ticket: one for ticket, one in self._open.items() if one[0] != peer.process}
        self._saving = None  # it may have been asked to write a stage
        if stage is not None:
            self._fence_for_step(name, peer.process, why)
            self._tell_all(Peers(peers=self.roster.places()))
        elif self.commit is not None:
            self.commit.lost_owner(peer.process)

    def _fence_for_step(self, name: str, process: str, why: str) -> None:
        commit = self.commit
        if commit is None or name in commit.fenced:
            return
        self._write(StepFenceRecord(peer=name, step=commit.step, round=commit.round_, why=why))
        commit.fence(name, process)
        self._tell_all(PeerFenced(peer=name, step=commit.step))
        if process in self.roster.peers:
            self._order((process, FenceStep(peer=name, step=commit.step), ("nothing",)))

    # ------------------------------------------------------------ stages

    def _needs(self) -> list[StageNeed]:
        pairs = zip(self.layout.params, self.layout.stage_bytes, strict=True)
        return [StageNeed(work=float(params), bytes=num_bytes) for params, num_bytes in pairs]

    def _powers(self) -> list[PeerPower]:
        """Peers with their speeds: measured where they served, else as configured."""
        known: dict[str, float] = {}
        for peer in self.roster.peers.values():
            if peer.throughput is not None and peer.stage is not None:
                known[peer.process] = peer.throughput * self.layout.params[peer.stage]
        usual = sorted(known.values())[len(known) // 2] if known else 1.0
        return [
            PeerPower(
                name=peer.process,
                speed=known.get(peer.process, usual * self.plan.relative_speed(peer.process)),
                memory_bytes=peer.memory_bytes,
            )
            for peer in sorted(self.roster.peers.values(), key=lambda peer: peer.process)
        ]

    def _place_all(self) -> None:
        """The first placement, when everybody is there (or has had the time to come)."""
        late = self._started_s is not None and self._now_s > self._started_s + self.plan.start_timeout_s
        everybody = len(self.roster.peers) == len(self.plan.peers) and len(self.roster.trainers) > 0
        if not everybody and not (late and self.roster.peers and self.roster.trainers):
            return
        self.placed = True
        known = {peer.process: peer.serves for peer in self.roster.peers.values() if peer.serves is not None}
        for process, stage in sorted(known.items()):
            self.roster.peers[process].taking[stage] = self.roster.next_name(process)
        if known:
            for process in sorted(self.roster.peers.keys() - known):
                self._place_newcomer(self.roster.peers[process])
        else:
            assignment = place(self._needs(), self._powers(), minimum=self.plan.pipeline.min_peers)
            for process, stage in sorted(assignment.items()):
                self.roster.peers[process].taking[stage] = self.roster.next_name(process)
        self._take_what_can()

    def _place_newcomer(self, peer: Peer) -> None:
        """A process in the place of a dead one: to the stage that has fewest, or is slowest."""
        counts = self.roster.counts(self.layout.num_stages)
        needs = self._needs()
        fitting = [s for s in range(self.layout.num_stages) if needs[s].bytes <= peer.memory_bytes]
        if not fitting:
            return
        loads = self._loads()
        stage = max(fitting, key=lambda s: (counts[s] < self.plan.pipeline.min_peers, -min(counts[s], 1), loads[s]))
        peer.taking[stage] = self.roster.next_name(peer.process)

    def _loads(self) -> list[float]:
        from orchestrator.rebalance import stage_loads

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
        sources = [one for one in self.roster.holders(stage, self.version) if one is not peer]
        order = TakeStage(
            stage=stage, version=self.version, sources=tuple(one.address for one in sources), serve_as=name
        )
        if not sources and peer.versions.get(stage) != self.version:
            if self.begun:
                self._check_alive(stage)
                return
            makers = [one for one in self.roster.peers.values() if one.taking.get(stage) is not None]
            if min(makers, key=lambda one: one.process) is not peer:
                return
            tied = None
            if self.layout.is_tied and stage == 0 and self.plan.from_folder is None:
                owners = self.roster.holders(self.layout.num_stages - 1, self.version)
                if not owners:
                    return
                tied = owners[0].address
            order = replace(order, tied_from=tied, from_folder=self.plan.from_folder)
        self._order((peer.process, order, ("take", stage, name, self.version)))

    def _check_alive(self, stage: int) -> None:
        """A stage without any holder of its state cannot go on: only a snapshot has it."""
        if any(stage in peer.versions for peer in self.roster.peers.values()):
            return
        self._finish("failed", f"every process that held stage {stage} at version {self.version} is gone; "
                     "`atoll train --resume` goes on from the newest snapshot")  # fmt: skip

    def _took(self, peer: Peer, stage: int, name: str | None, answer: Holds) -> None:
        if peer.taking.get(stage, "") != name:
            return  # something else is wanted of it meanwhile
        peer.versions[stage] = answer.version
        if answer.version != self.version:
            return  # a step was committed meanwhile: it is ordered again
        if not self.begun and answer.digest and stage not in self.genesis_digests:
            self.genesis_digests[stage] = answer.digest
        del peer.taking[stage]
        if name is not None:
            before, peer.stage, peer.name = peer.stage, stage, name
            peer.throughput = None
            self.rebalancer.changed()
            self._write(ServeRecord(process=peer.process, peer=name, stage=stage, why=self.move_reason(peer, before)))
            if before is not None and before != stage:
                peer.versions.pop(before, None)
                self._order((peer.process, DropStage(stage=before), ("nothing",)))
            self._tell_all(Peers(peers=self.roster.places()))
        if self.commit is not None:
            self.commit.ask(stage, peer)
            self.commit.retry()

    def move_reason(self, peer: Peer, before: int | None) -> str:
        """Why a peer serves the stage that it serves."""
        return "placed" if before is None else f"moved from stage {before}: {self.moves[-1] if self.moves else ''}"

    @property
    def genesis_digests(self) -> dict[int, str]:
        """Digests of the stages at the version that the run begins with."""
        return self.__dict__.setdefault("_genesis_digests", {})  # type: ignore[no-any-return]

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
            ]
            needs = self._needs()
            spare = [peer for peer in spare if peer.memory_bytes >= needs[stage].bytes]
            if not spare:
                continue
            peer = min(spare, key=lambda one: (one.versions.get(stage) != self.version, one.process))
            assert peer.stage is not None
            counts[peer.stage] -= 1
            self.moves.append(f"{peer.process} from stage {peer.stage} to {stage}, which has nobody")
            self._leave_stage(peer, f"it goes to stage {stage}, which has nobody")
            peer.taking[stage] = self.roster.next_name(peer.process)

    def _leave_stage(self, peer: Peer, why: str) -> None:
        """In the middle of a step: what it counted is counted again by its mates, which have its state."""
        name, peer.stage = peer.name, None
        self._fence_for_step(name, peer.process, why)
        self._tell_all(Peers(peers=self.roster.places()))

    # ------------------------------------------------------------ steps

    def _go_on(self) -> None:
        """Whatever is possible now."""
        if self.finished is not None:
            return
        if not self.placed:
            self._place_all()
        if self.begun:
            self._fill_empty()
            self._want_buddies()
        if self.placed:
            self._take_what_can()
        if self.placed and not self.begun:
            self._begin_training()
        commit = self.commit
        if commit is not None:
            wanted, commit.wanted = commit.wanted, []
            for one in wanted:
                self._order(one)
            if commit.may_commit(self._now_s, grace_s=SPREAD_GRACE_S):
                self._commit(commit)
        elif self.begun and self.finished is None:
            self._open_step("")

    def _begin_training(self) -> None:
        if not all(self.roster.serving(stage) for stage in range(self.layout.num_stages)):
            return
        self.begun = True
        self.digests = tuple(self.genesis_digests[stage] for stage in range(self.layout.num_stages))
        self._write(
            PipelineGenesisRecord(
                digests=self.digests,
                num_params=self.layout.num_params,
                num_microbatches=self.plan.pipeline.microbatches,
                samples_per_step=self.plan.pipeline.samples_per_step,
                version=self.version,
            )
        )

    def _open_step(self, why: str) -> None:
        """The next step, or the same one anew; with nobody to serve a stage it waits."""
        if self._is_over() or not self.roster.trainers:
            return
        trainers = tuple(sorted(self.roster.trainers))
        dealt = deal(self.plan.pipeline.microbatches, trainers)
        size = self.plan.pipeline.samples_per_step
        first = self.version * size
        names = tuple(f"{name}.{self.roster.incarnations[name]}" for name in trainers)
        self._write(
            StepRecord(step=self.version, round=self.round_, ranges=((first, first + size),), trainers=names, why=why)
        )
        self.commit = StepCommit(
            self.layout,
            self.roster,
            step=self.version,
            round_=self.round_,
            num_microbatches=self.plan.pipeline.microbatches,
            trainers=trainers,
            lr=self.plan.rate(self.version),
            grad_clip=self.plan.grad_clip,
            copies=max(1, min(self.plan.copies, len(self.roster.peers), self._most_holders())),
        )
        self._step_since_s = self._now_s
        places = self.roster.places()
        for name in trainers:
            message = OpenStep(
                step=self.version,
                round_=self.round_,
                microbatches=dealt[name],
                num_microbatches=self.plan.pipeline.microbatches,
                first_sample=first,
                peers=places,
            )
            self._out.append(Tell(process=name, nonce=self.roster.trainers[name], message=message))

    def _most_holders(self) -> int:
        """Copies that every stage can have: with buddies one more than the peers that it is sure to have."""
        if self.layout.num_stages == 1:
            return len(self.plan.peers)
        return self.plan.copies if self.plan.pipeline.buddies else self.plan.pipeline.min_peers

    def _restart_step(self, why: str) -> None:
        """Nothing that was counted in the step stays: who died was not a peer, or peers contradict trainers."""
        self.commit = None
        self.round_ += 1
        self._open_step(why)

    def _is_over(self) -> bool:
        if self.version >= self.plan.total_steps:
            self._seal_or("done")
            return True
        if self.stopping is not None:
            self._seal_or("stopped")
            return True
        return False

    def _seal_or(self, reason: str) -> None:
        """At the end a snapshot is taken first, unless it was said that nothing shall be saved."""
        if self.stopping is not None and not self.stopping.save:
            self._finish(reason)
        elif self._saving is None:
            if self._saved_version == self.version:
                self._finish(reason)
            else:
                self._save()

    def _commit(self, commit: StepCommit) -> None:
        digests = commit.digests()
        records: list[Record] = []
        for stage, digest in enumerate(digests):
            counted = tuple(f"{name}:{','.join(map(str, ids))}" for name, ids in commit.counted(stage).items())
            records.append(
                StageCommitRecord(
                    step=commit.step,
                    round=commit.round_,
                    stage=stage,
                    digest=digest,
                    counted=counted,
                    holders=tuple(sorted(commit.haves[stage])),
                )
            )
        self._write(*records)
        self.digests = tuple(digests)
        for stage, digest in enumerate(digests):
            for process in commit.haves[stage]:
                peer = self.roster.peers[process]
                peer.versions[stage] = commit.step + 1
                about = ("applied", stage, commit.step + 1)
                self._order((process, Apply(step=commit.step, stage=stage, digest=digest), about))
        self.version, self.round_, self.commit, self._failures = commit.step + 1, 0, None, 0
        loss = commit.loss()
        self.losses.append(loss)
        seconds = self._now_s - self._step_since_s
        self._out.append(StepDone(step=commit.step, loss=loss, seconds=seconds, attempts=commit.attempt))
        self._tell_all(StepCommitted(step=commit.step))
        self._catch_up()
        self._between_steps()

    def _catch_up(self) -> None:
        """Whoever did not have the next state pulls it; until then it serves nobody."""
        for peer in self.roster.peers.values():
            for stage in [stage for stage, version in peer.versions.items() if version < self.version]:
                if stage in peer.taking:
                    continue
                serves = peer.stage == stage
                if serves:
                    peer.stage = None
                peer.taking[stage] = self.roster.next_name(peer.process) if serves else None

    def _between_steps(self) -> None:
        """Nothing is under way: who has pulled its new stage moves, a snapshot is taken, the next step begins."""
        claim = self.rebalancer.open
        if claim is not None:
            peer = self.roster.peers[claim.move.peer]
            target = claim.move.target
            if peer.versions.get(target) == self.version:
                peer.moving_to = None
                if self.rebalancer.join(claim.number, self.roster.assignment()):
                    peer.stage = None
                    peer.taking[target] = self.roster.next_name(peer.process)
        due = self.plan.snapshot_every_s > 0 and self._now_s >= self._saved_s + self.plan.snapshot_every_s
        if due and self._saving is None and self.version < self.plan.total_steps:
            self._save()

    # ------------------------------------------------------------ answers

    def _answered(self, peer: Peer, about: tuple[object, ...], answer: FromPeer) -> None:
        commit = self.commit
        match about, answer:
            case ("take", int(stage), (str() | None) as name, int()), Holds():
                self._took(peer, stage, name, answer)
            case ("offer", int(stage), str(name)), Offered(microbatches=ids) if commit is not None:
                if not commit.offered(stage, name, ids):
                    self._restart_step(f"stage {stage} lacks microbatches that trainers saw counted")
            case ("sums", str(unit), int(attempt)), Reduced(sums=sums) if commit is not None:
                commit.reduced(unit, attempt, sums, self._now_s)
            case ("have", int(stage), int(spread)), Have(digest=digest) if commit is not None:
                commit.have(stage, peer.process, spread, digest)
            case ("applied", int(stage), int(version)), Applied(done=done):
                if not done and peer.versions.get(stage) == version:
                    del peer.versions[stage]
                    self._catch_up_one(peer, stage)
            case ("saved", int(stage), str(folder)), _:
                self._saved(stage, folder)
            case _:
                pass

    def _catch_up_one(self, peer: Peer, stage: int) -> None:
        serves = peer.stage == stage
        if serves:
            self._leave_stage(peer, "it does not have the committed state")
        peer.taking[stage] = self.roster.next_name(peer.process) if serves else None

    def _failed(self, peer: Peer, about: tuple[object, ...], why: str) -> None:
        commit = self.commit
        match about:
            case ("take", int(stage), _, _):
                # Until then it counts as ordered, so that it is not ordered in every event.
                ticket = self._ticket = self._ticket + 1
                self._open[ticket] = (peer.process, about)
                self._at(RETRY_S, lambda: self._forget_ticket(ticket))
            case ("offer", int(), str(name)) if commit is not None:
                self._fence_for_step(name, peer.process, f"it cannot offer: {why}")
            case ("sums", str(unit), int(attempt)) if commit is not None:
                self._failures += 1
                named = next((one for one in self.roster.peers.values() if one.address in why), None)
                if self._failures > MAX_FAILURES and named is not None and named.stage is not None:
                    self._fence_for_step(named.name, named.process, f"its gradients cannot be fetched: {why}")
                commit.reduce_failed(unit, attempt)
                self._at(RETRY_S, lambda: commit.retry() if self.commit is commit else None)
            case ("have", int(stage), int(spread)) if commit is not None:
                self._failures += 1
                if self._failures > MAX_FAILURES:
                    commit.have_not(stage, peer.process, spread)
                else:
                    self._at(RETRY_S, lambda: self._ask_again(commit, stage, peer, spread))
            case ("saved", int(), str()):
                self._saving = None
                self._failures += 1
                if self._failures > MAX_FAILURES:
                    self._finish("failed", f"the snapshot of version {self.version} cannot be written: {why}")
            case _:
                pass

    def _forget_ticket(self, ticket: int) -> None:
        self._open.pop(ticket, None)

    def _ask_again(self, commit: StepCommit, stage: int, peer: Peer, spread: int) -> None:
        if self.commit is commit and commit.spreading == spread and peer.process in self.roster.peers:
            if peer.versions.get(stage) == commit.step:
                commit.ask(stage, peer)

    def _heard(self, process: str, message: FromTrainer) -> None:
        commit = self.commit
        if commit is None or (message.step, message.round_) != (commit.step, commit.round_):
            return
        if isinstance(message, GaveUp):
            self._finish("failed", f"{process} gave up step {message.step}: {message.reason}")
        elif isinstance(message, StageReady):
            for name, throughput in message.throughputs.items():
                if (peer := self.roster.by_name(name)) is not None:
                    peer.throughput = throughput
            commit.ready(process, message)
        else:
            known = self.roster.by_name(message.peer)
            owner = known.process if known is not None else message.peer.rpartition(".")[0]
            self._fence_for_step(message.peer, owner, message.reason)

    # ------------------------------------------------------------ time, moves, snapshots

    def _ticked(self) -> None:
        due = [what for time_s, what in self._later if time_s <= self._now_s]
        self._later = [(time_s, what) for time_s, what in self._later if time_s > self._now_s]
        for what in due:
            what()
        if self.begun and not self.roster.trainers and self.commit is not None:
            self.commit.stop_spreading()
        late = self.rebalancer.expire(self._now_s)
        if late is not None and (peer := self.roster.peers.get(late.move.peer)) is not None:
            self._stay(peer, late.move.target)
        period_s = self.plan.pipeline.rebalance_s
        if period_s and self._now_s >= self._look_s + period_s:
            self._look_s = self._now_s
            self._rebalance()

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
        if peer.versions.get(claim.move.target) != self.version:
            peer.taking[claim.move.target] = None

    def _stay(self, peer: Peer, target: int) -> None:
        peer.moving_to = None
        if peer.stage != target:
            peer.taking.pop(target, None)

    _saved_version = -1

    def _save(self) -> None:
        """Every stage into one folder, by one of its holders; the manifest when all are there."""
        folder = self.plan.snapshot_folder(self.version)
        self._saving = (folder, self.version, set())
        self._saved_s = self._now_s
        for stage in range(self.layout.num_stages):
            holders = self.roster.holders(stage, self.version)
            if not holders:
                self._saving = None
                return
            order = SaveStage(stage=stage, version=self.version, folder=folder)
            self._order((holders[0].process, order, ("saved", stage, folder)))

    def _saved(self, stage: int, folder: str) -> None:
        if self._saving is None or self._saving[0] != folder:
            return
        _, version, done = self._saving
        done.add(stage)
        if len(done) < self.layout.num_stages:
            return
        self._saving, self._saved_version = None, version
        digests = self.digests if version == self.version else ()
        self._out.append(Sealed(folder=folder, version=version, digests=digests))
        name = folder.rstrip("/").rpartition("/")[2]
        self._write(SnapshotRecord(name=name, versions=(version,) * self.layout.num_stages))


def end_all(brain: PipelineBrain) -> list[End]:
    """Every process that is known."""
    peers = [End(process=peer.process, nonce=peer.nonce) for peer in brain.roster.peers.values()]
    return peers + [End(process=name, nonce=nonce) for name, nonce in brain.roster.trainers.items()]
