"""The controller of a pipeline: a pure machine, `handle(event, now_s) -> commands`.

It starts processes, gives each peer a stage (`place`), opens one step after the other, leads each to its commit
(`StepCommit`), and keeps every stage alive: a copy of its state at a buddy, peers in the place of dead ones, moves to
the slowest stage (`decide`). Whatever is lost costs at most the step under way. Rules of counting: docs/swarm.md.
"""

from __future__ import annotations

from orchestrator.pipeline.commands import (
    Answered,
    Command,
    Died,
    Event,
    Failed,
    Heard,
    Joined,
    Rebalance,
    Start,
    StepDone,
    Stop,
    Tell,
    Tick,
)
from orchestrator.pipeline.commit import Contradiction, StepCommit
from orchestrator.pipeline.leaving import Leaving
from orchestrator.pipeline.roster import Peer, deal
from orchestrator.pipeline.watch import PING
from workers.pipeline.messages import (
    Alive,
    Applied,
    Apply,
    Evaluated,
    FromPeer,
    FromTrainer,
    GaveUp,
    Have,
    Heartbeat,
    Holds,
    Offered,
    OpenStep,
    Peers,
    Probed,
    Reduced,
    StageReady,
    StepCommitted,
)
from workers.pipeline.records import PipelineGenesisRecord, StageCommitRecord, StepRecord
from workers.records import FenceRecord, JoinRecord, Record

RETRY_S = 0.5
SPREAD_GRACE_S = 5.0
MAX_FAILURES = 3


class PipelineBrain(Leaving):
    """See the module."""

    step_kind: type[StepCommit] = StepCommit
    _done_s = 0.0

    @property
    def next_step(self) -> int:
        """The step that is open, or is opened next."""
        return self.version

    # ------------------------------------------------------------ dispatch

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """One event in, what to do out; in that order."""
        self._now_s = now_s
        if self.finished is None and not self.went_back:
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
                if about != PING:  # whose orders wait for a call that hangs answers that as well
                    self._strikes.pop(process, None)
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
            case _:
                self._operate(event)

    def begin(self, now_s: float) -> list[Command]:
        """Start all processes."""
        self._now_s = self._started_s = self._saved_s = now_s
        names = (*self.plan.peers, *self.plan.trainers)
        return [Start(process=name, why="start") for name in names if name not in self.left]

    # ------------------------------------------------------------ processes

    def _joined(self, event: Joined) -> None:
        self.roster.next_name(event.process)
        incarnation = self.roster.incarnations[event.process]
        self._write(JoinRecord(member=event.process, incarnation=incarnation, nonce=event.nonce, node=event.node))
        if event.process in self.plan.trainers:
            self.roster.trainers[event.process] = event.nonce
            self.roster.addresses[event.process] = event.address
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
            before = peer.versions.get(stage)
            if before is not None and before < self.version and self.digests and digest == self.digests[stage]:
                order = Apply(step=before, stage=stage, digest=digest, version=self.version)
                peer.versions[stage] = self.version
                self._order((peer.process, order, ("applied", stage, self.version)))
        self.rebalancer.changed()
        if self.placed:
            self._place_newcomer(peer)

    def _died(self, event: Died) -> None:
        if self.roster.trainers.get(event.process) == event.nonce:
            del self.roster.trainers[event.process]
            self._evaluator_died(event.process)
            if self.commit is not None and event.process in self.commit.trainers:
                self._restart_step(f"{event.process} is gone")
        elif (peer := self.roster.peers.get(event.process)) is not None and peer.nonce == event.nonce:
            self._lost(peer, event.why)
        self._fault("non_finite" if event.damaged else "died", event.process, event.why, injected=False)
        self._write(
            FenceRecord(member=event.process, incarnation=self.roster.incarnations.get(event.process, 0), why=event.why)
        )
        if event.process in self.roster.leaving and self._can_do_without(event.process):
            self._has_left(event.process, event.why)
            return
        self.roster.leaving.pop(event.process, None)  # its successor is another process, wherever that is
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
        else:
            for commit in self._open_commits():
                commit.lost_owner(peer.process)

    # ------------------------------------------------------------ steps

    def _go_on(self) -> None:
        """Whatever is possible now."""
        if self.finished is not None or self.went_back:
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
        if self.commit is not None and (stage := self.commit.given_up()) is not None and not self._is_coming(stage):
            # They live, or nobody would count them: in a new round they may serve again.
            self._restart_step(f"everybody who serves stage {stage} was fenced")
        self._advance()

    def _advance(self) -> None:
        """Order what the open step wants; commit it, or open one."""
        commit = self.commit
        if commit is not None:
            self._order_wanted(commit)
            if commit.may_commit(self._now_s, grace_s=SPREAD_GRACE_S):
                self._commit(commit)
        elif self.begun and self.finished is None:
            self._open_step("")

    def _is_coming(self, stage: int) -> bool:
        return any(peer.taking.get(stage) is not None for peer in self.roster.peers.values())

    def _order_wanted(self, commit: StepCommit) -> None:
        wanted, commit.wanted = commit.wanted, []
        for one in wanted:
            self._order(one)

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
                sync_steps=self.plan.sync_steps,
                delayed=self.plan.delayed,
                num_fragments=self.plan.num_fragments,
            )
        )

    def _open_step(self, why: str) -> None:
        """The next step, or the same one anew; with nobody to serve a stage it waits."""
        if self._validates() or self._is_over():
            return
        self._let_go()
        if self.paused or not self.roster.trainers:
            return
        trainers = tuple(sorted(self.roster.trainers))
        dealt = deal(self.plan.pipeline.microbatches, trainers)
        size, step = self.plan.pipeline.samples_per_step, self.next_step
        first = step * size
        names = tuple(f"{name}.{self.roster.incarnations[name]}" for name in trainers)
        self._write(StepRecord(step=step, round=self.round_, ranges=((first, first + size),), trainers=names, why=why))
        self.commit = self._new_commit(self.step_kind, trainers)
        self.commit.opened_s = self._now_s
        places = self.roster.places()
        for name in trainers:
            message = OpenStep(
                step=step,
                round_=self.round_,
                microbatches=dealt[name],
                num_microbatches=self.plan.pipeline.microbatches,
                first_sample=first,
                peers=places,
                life=self.plan.life,
                serial=self.round_ if self.plan.delayed else 0,
                behind=step - self.version,
            )
            self._out.append(Tell(process=name, nonce=self.roster.trainers[name], message=message))

    def _new_commit(self, kind: type[StepCommit], trainers: tuple[str, ...]) -> StepCommit:
        commit = kind(
            self.layout,
            self.roster,
            step=self.next_step,
            round_=self.round_,
            num_microbatches=self.plan.pipeline.microbatches,
            trainers=trainers,
            lr=self.plan.rate(self.next_step),
            grad_clip=self.plan.grad_clip,
            copies=max(1, min(self.plan.copies, len(self.roster.peers), self._most_holders())),
        )
        commit.number_from(self._ticket)  # each attempt of those before had an order at least
        return commit

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
                order = Apply(step=commit.step, stage=stage, digest=digest, version=commit.step + 1)
                self._order((process, order, about))
        self._closed(commit)
        self._step_done(commit)
        self._catch_up()
        self._between_steps()

    def _closed(self, commit: StepCommit) -> None:
        self.version, self.round_, self.commit, self._failures = commit.step + 1, 0, None, 0

    def _step_done(self, commit: StepCommit) -> None:
        loss = commit.loss()
        self.losses.append(loss)
        seconds, self._done_s = self._now_s - max(commit.opened_s, self._done_s), self._now_s
        attempts = commit.attempt - commit.first_attempt
        self._out.append(StepDone(step=commit.step, loss=loss, seconds=seconds, attempts=attempts))
        self._tell_all(StepCommitted(step=commit.step))

    def _catch_up(self) -> None:
        """Whoever did not have the next state pulls it; until then it serves nobody."""
        for peer in self.roster.peers.values():
            for stage in [stage for stage, version in peer.versions.items() if version < self.held_version]:
                if stage in peer.taking:
                    continue
                serves = peer.stage == stage
                if serves:
                    peer.stage = None
                peer.taking[stage] = self.roster.next_name(peer.process) if serves else None

    def _between_steps(self) -> None:
        """Nothing is under way: who has pulled its new stage moves, a snapshot is taken, the next step begins."""
        self._finish_move()
        self._save_if_due()

    def _save_if_due(self) -> None:
        due = self.plan.snapshot_every_s > 0 and self._now_s >= self._saved_s + self.plan.snapshot_every_s
        if due and self._saving is None and self.version < self.plan.total_steps:
            self._save()

    # ------------------------------------------------------------ answers

    def _answered(self, peer: Peer, about: tuple[object, ...], answer: FromPeer) -> None:
        commit, reduced = self.commit, self.reduced
        match about, answer:
            case ("probe",), Probed(seconds=seconds):
                peer.link_s = seconds
            case ("ping",), Alive():
                self._lives(peer, answer)
            case ("take", int(stage), (str() | None) as name, int()), Holds():
                self._took(peer, stage, name, answer)
            case ("offer", int(stage), str(name)), Offered(microbatches=ids) if commit is not None:
                if not commit.offered(stage, name, ids):
                    self._restart_step(f"stage {stage} lacks microbatches that trainers saw counted")
            case ("sums", str(unit), int(attempt)), Reduced(sums=sums) if reduced is not None:
                reduced.reduced(unit, attempt, sums, self._now_s)
            case ("have", int(stage), int(spread)), Have(digest=digest) if reduced is not None:
                reduced.have(stage, peer.process, spread, digest)
            case ("applied", int(stage), int(version)), Applied(done=done):
                if not done and peer.versions.get(stage) == version:
                    del peer.versions[stage]
                    self._catch_up_one(peer, stage)
            case ("saved", int(stage), str(folder)), _:
                self._saved(stage, folder)
            case _:
                pass

    def _failed(self, peer: Peer, about: tuple[object, ...], why: str) -> None:
        commit, reduced = self.commit, self.reduced
        match about:
            case ("take", int(stage), _, _):
                # Until then it counts as ordered, so that it is not ordered in every event.
                ticket = self._ticket = self._ticket + 1
                self._open[ticket] = (peer.process, about)
                self._at(RETRY_S, lambda: self._forget_ticket(ticket))
            case ("offer", int(), str(name)) if commit is not None:
                self._fence_for_step(name, peer.process, f"it cannot offer: {why}")
            case ("sums", str(unit), int(attempt)) if reduced is not None:
                self._failures += 1
                named = next((one for one in self.roster.peers.values() if one.address in why), None)
                if self._failures > MAX_FAILURES and named is not None and named.stage is not None:
                    self._cannot_be_fetched(named, why)
                reduced.reduce_failed(unit, attempt)
                self._at(RETRY_S, lambda: reduced.retry() if self.reduced is reduced else None)
            case ("have", int(stage), int(spread)) if reduced is not None:
                self._failures += 1
                if self._failures > MAX_FAILURES:
                    reduced.have_not(stage, peer.process, spread)
                else:
                    self._at(RETRY_S, lambda: self._ask_again(reduced, stage, peer, spread))
            case ("saved", int(), str()):
                self._saving = None
                self._failures += 1
                if self._failures > MAX_FAILURES:
                    self._finish("failed", f"the snapshot of version {self.version} cannot be written: {why}")
            case _:
                pass

    def _cannot_be_fetched(self, peer: Peer, why: str) -> None:
        self._fence_for_step(peer.name, peer.process, f"its gradients cannot be fetched: {why}")

    def _forget_ticket(self, ticket: int) -> None:
        self._open.pop(ticket, None)

    def _ask_again(self, commit: StepCommit, stage: int, peer: Peer, spread: int) -> None:
        if self.reduced is commit and commit.spreading == spread and peer.process in self.roster.peers:
            if peer.versions.get(stage) == commit.step:
                commit.ask(stage, peer)

    def _heard(self, process: str, message: FromTrainer) -> None:
        commit = self.commit
        if isinstance(message, Heartbeat):
            self._heartbeat(process, message)
            return
        if isinstance(message, Evaluated):
            self._evaluated_now(process, message)
            return
        if isinstance(message, GaveUp) and message.step < 0:
            self._finish("failed", f"{process} gave up an evaluation: {message.reason}")
            return
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
            self._strike(owner, message.reason)

    # ------------------------------------------------------------ time, moves, snapshots

    def _ticked(self) -> None:
        due = [what for time_s, what in self._later if time_s <= self._now_s]
        self._later = [(time_s, what) for time_s, what in self._later if time_s > self._now_s]
        for what in due:
            what()
        self._forgive_absence()
        self._look_for_silence()
        self._look_for_trainers()
        self._look_for_peers()
        self._look_for_leavers()
        if self.begun and not self.roster.trainers and self.commit is not None and self.commit.trainers:
            self.commit.stop_spreading()
        if self.reduced is not None and self._now_s >= self._asked_s + RETRY_S:
            self._asked_s = self._now_s
            self.reduced.ask_again()
        if self._now_s >= self._announced_s + self.plan.pipeline.forward_timeout_s:
            # Who was banned and lives may be tried again.
            self._announced_s = self._now_s
            self._tell_all(Peers(peers=self.roster.places()))
        late = self.rebalancer.expire(self._now_s)
        if late is not None and (peer := self.roster.peers.get(late.move.peer)) is not None:
            self._stay(peer, late.move.target)
        period_s = self.plan.pipeline.rebalance_s
        if period_s and self._now_s >= self._look_s + period_s:
            self._look_s = self._now_s
            self._rebalance()
