"""Steps of a pipeline whose peers step on their own, and the synchronisations of their stages (pure).

Every step is counted in all stages (`StepCount`: a disjoint cover, as where gradients are added); then each peer makes
a step of its own with what it counted, and trainers let the step's tensors go. After `sync_steps` of them the stages
synchronise (`WorkCommit`): what each peer has moved from the anchor is added, by weights of the journal, and everybody
who holds a stage computes the next anchor. With fragments one of them synchronises after each `sync_steps / P` steps,
and may be under way while `overlap_steps` more are made; it is applied after these, neither earlier nor later. Whoever
dies takes along what it made and not all fragments hold, of its own stage alone: that is on the record
(`WorkLostRecord`). A peer that lives and was left out offers it the next time.
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.pipeline.brain import SPREAD_GRACE_S, PipelineBrain
from orchestrator.pipeline.commit import StepCommit
from orchestrator.pipeline.delayed import DelayedBrain
from orchestrator.pipeline.plan import PipelinePlan, with_settings
from orchestrator.pipeline.replay import PipelineHistory, newest_snapshot, turn_after
from orchestrator.pipeline.roster import Peer
from orchestrator.pipeline.synchronise import StepCount, WorkCommit
from orchestrator.pipeline.work import Work
from workers.pipeline.messages import (
    Apply,
    FromPeer,
    Holds,
    LocalStep,
    Offered,
)
from workers.pipeline.records import StageCountRecord, StageSyncRecord, WorkLostRecord
from workers.records import Record

SILENCE = "no answer"


class RoundBrain(PipelineBrain):
    """See the module. `version` counts steps; `synced` is the version of the anchors: the steps before it are in one.

    `commit` is the step that is counted, `syncing` the synchronisation that is under way.
    """

    step_kind = StepCount

    def __init__(self, plan: PipelinePlan, *, first_incarnations: dict[str, int] | None = None) -> None:
        super().__init__(plan, first_incarnations=first_incarnations)
        self.synced = plan.version
        self.syncing: WorkCommit | None = None
        self.work: dict[str, Work] = {}
        self.next_fragment = plan.next_fragment
        self.outer_rounds = list(plan.outer_rounds) or [0] * plan.num_fragments
        # By fragment: all that any peer had made before this step was offered to it.
        self._offered = [plan.version] * plan.num_fragments
        self._sent = self._applied = plan.version

    @property
    def held_version(self) -> int:
        """See `StageKeeper.held_version`."""
        return self.synced

    @property
    def reduced(self) -> StepCommit | None:
        """See `StageKeeper.reduced`."""
        return self.syncing

    @property
    def is_busy(self) -> bool:
        """See `StageKeeper.is_busy`; what is under way for later steps rests with them."""
        return self.commit is not None or (self.syncing is not None and self._is_due_now())

    @property
    def at_anchor(self) -> bool:
        """See `StageKeeper.at_anchor`."""
        return self.syncing is None and self.version == self._applied

    def _open_commits(self) -> list[StepCommit]:
        return [commit for commit in (self.syncing, self.commit) if commit is not None]

    def _go_on(self) -> None:
        self._forget_lost_work()
        super()._go_on()

    def _forget_lost_work(self) -> None:
        """Who serves under its name no more has nothing that could be committed."""
        for name in [name for name in self.work if self.roster.by_name(name) is None]:
            lost = self.work.pop(name)
            why = f"{lost.num_microbatches} microbatches of {len(lost.counted)} steps: it does not serve any more"
            self._write(WorkLostRecord(peer=name, stage=lost.stage, why=why))

    # ------------------------------------------------------------ steps

    def _advance(self) -> None:
        for commit in self._open_commits():
            self._order_wanted(commit)
        # Nobody steps on before everybody has offered what it had when the fragment was sent.
        if self.commit is not None and (self.syncing is None or self.syncing.is_offered):
            if self.commit.may_commit(self._now_s, grace_s=SPREAD_GRACE_S):
                self._close_step(self.commit)
        if self.begun and self.commit is None and self.syncing is None and (due := self._fragments_due()):
            self._open_sync(due, at_once=self._stops() or self._somebody_moves())
        if self.syncing is not None:
            self.syncing.spread_if_reduced(self._now_s)
            self._order_wanted(self.syncing)
            if self._is_due_now() and self.syncing.may_commit(self._now_s, grace_s=SPREAD_GRACE_S):
                self._commit_sync(self.syncing)
        if self.begun and self.commit is None and self.finished is None:
            self._open_step("")

    def _open_step(self, why: str) -> None:
        if not self._is_due_now() and (self.syncing is not None or not self._fragments_due()):
            super()._open_step(why)

    def _stops(self) -> bool:
        """Whether no step comes after this one: what was made is to be in the anchors then."""
        return self.version >= self.plan.total_steps or (self._is_saved_first() and not self._lacks_a_step())

    def _is_saved_first(self) -> bool:
        return self.stopping is not None and self.stopping.save

    def _lacks_a_step(self) -> bool:
        """Whether a stop has to wait for one: a fragment moved after this step, and what the others lack would be in a
        state of the same version.
        """
        return self._is_saved_first() and min(self._offered) < self.version == self.synced < self.plan.total_steps

    def _is_over(self) -> bool:
        if self._lacks_a_step():
            self.paused = False
            return False
        return super()._is_over()

    def _fragments_due(self) -> tuple[int, ...]:
        """What is to be synchronised now: a fragment after each part of a round, and all before something ends.

        Before a peer moves or leaves, too: it would take along what some fragments lack.
        """
        every = tuple(range(self.plan.num_fragments))
        if self._stops():
            return every if self.version > min(self._offered) else ()
        if self._somebody_goes() and self.work and self.version > self.synced:
            return every
        if self.version - self._sent < max(self.plan.sync_steps // self.plan.num_fragments, 1):
            return ()
        return every if self._somebody_moves() else (self.next_fragment,)

    def _uncommitted(self, peer: Peer) -> int:
        own = self.work.get(peer.name)
        return 0 if own is None else own.num_microbatches

    def _somebody_moves(self) -> bool:
        if self._somebody_goes():
            return True
        claim = self.rebalancer.open
        peer = None if claim is None else self.roster.peers.get(claim.move.peer)
        return claim is not None and peer is not None and peer.versions.get(claim.move.target) == self.held_version

    def _open_sync(self, fragments: tuple[int, ...], *, at_once: bool) -> None:
        commit = self._new_commit(WorkCommit, ())
        assert isinstance(commit, WorkCommit), commit
        commit.step = self.synced
        commit.begin(
            self.work,
            fragments=fragments,
            sent=self.version,
            applies_at=self.version if at_once else self.version + self.plan.overlap_steps,
            outer_rounds=dict(enumerate(self.outer_rounds)),
        )
        self.syncing, self._sent = commit, self.version
        self._order_wanted(commit)

    def _is_due_now(self) -> bool:
        """Whether the synchronisation under way is to be applied before a further step is made."""
        syncing = self.syncing
        return syncing is not None and (self.version >= (syncing.applies_at or 0) or self._stops())

    def _close_step(self, commit: StepCommit) -> None:
        """The step is counted everywhere: on the record, then each peer makes its own step."""
        records: list[Record] = []
        orders: list[tuple[str, LocalStep, tuple[object, ...]]] = []
        for stage in range(self.layout.num_stages):
            counted = commit.counted(stage)
            rows = tuple(f"{name}:{','.join(map(str, ids))}" for name, ids in counted.items())
            records.append(StageCountRecord(step=commit.step, round=commit.round_, stage=stage, counted=rows))
            for name, ids in counted.items():
                begun = Work.begin(stage, commit.step, self.plan.num_fragments)
                self.work.setdefault(name, begun).count(commit.step, len(ids))
            for peer in self.roster.serving(stage):
                orders.append(self._local_step(peer, commit.step, tuple(counted.get(peer.name, ()))))
        self._write(*records)
        for order in orders:
            self._order(order)
        self.version, self.round_, self.commit, self._failures = commit.step + 1, self.plan.round_, None, 0
        self._step_done(commit)

    def _local_step(self, peer: Peer, step: int, counted: tuple[int, ...]) -> tuple[str, LocalStep, tuple[object, ...]]:
        order = LocalStep(step=step, peer=peer.name, counted=counted, lr=self.plan.rate(step))
        return peer.process, order, ("local", peer.stage, peer.name)

    def _commit_sync(self, commit: WorkCommit) -> None:
        self.digests = tuple(commit.digests())
        included: dict[str, tuple[int, ...]] = {}
        records: list[Record] = []
        for stage, digest in enumerate(self.digests):
            contributors = commit.contributors(stage)
            included |= {name: commit.lacking(name) for name in contributors}
            records.append(
                StageSyncRecord(
                    base=self.synced,
                    version=commit.sent,
                    stage=stage,
                    digest=digest,
                    contributors=contributors,
                    holders=tuple(sorted(commit.haves[stage])),
                    fragments=commit.fragments,
                )
            )
        self._write(*records)
        for stage, digest in enumerate(self.digests):
            for process in commit.haves[stage]:
                peer = self.roster.peers[process]
                peer.versions[stage] = commit.sent
                is_in = included.get(peer.name, ()) if peer.stage == stage else ()
                order = Apply(step=commit.step, stage=stage, digest=digest, version=commit.sent, included=is_in)
                self._order((process, order, ("applied", stage, commit.sent)))
        for name in included:
            self.work[name].commit(commit.fragments, commit.sent)
        self.work = {name: one for name, one in self.work.items() if one.counted}
        self._synchronised(commit)

    def _synchronised(self, commit: WorkCommit) -> None:
        for fragment in commit.fragments:
            self._offered[fragment] = commit.sent
            self.outer_rounds[fragment] += 1
        self.next_fragment = turn_after(commit.fragments, self.plan.num_fragments)
        self.synced, self.syncing, self._failures, self._applied = commit.sent, None, 0, self.version
        self._catch_up()
        if min(self._offered) == self.version:
            self._between_steps()
        else:
            self._save_if_due()

    # ------------------------------------------------------------ losses

    def _lost(self, peer: Peer, why: str) -> None:
        super()._lost(peer, why)
        self._leave_out(peer.name, peer.process)
        if self.syncing is not None:
            self.syncing.lost_owner(peer.process)  # it may have been left out before, and hold what is shared

    def _leave_stage(self, peer: Peer, why: str) -> None:
        super()._leave_stage(peer, why)
        self._leave_out(peer.name, peer.process)

    def _cannot_be_fetched(self, peer: Peer, why: str) -> None:
        self._leave_out(peer.name, peer.process)

    def _leave_out(self, name: str, process: str) -> None:
        """Of the synchronisation under way."""
        self._forget_lost_work()
        if self.syncing is not None and name not in self.syncing.fenced:
            self.syncing.fence(name, process)

    # ------------------------------------------------------------ answers

    def _answered(self, peer: Peer, about: tuple[object, ...], answer: FromPeer) -> None:
        match about, answer:
            case ("work", int(stage), str(name)), Offered():
                if self.syncing is not None:
                    self.syncing.offered_work(stage, name)
            case _:
                super()._answered(peer, about, answer)

    def _failed(self, peer: Peer, about: tuple[object, ...], why: str) -> None:
        match about:
            case ("work" | "local", int(stage), str(name)) if peer.name == name and peer.stage == stage:
                if about[0] == "work":
                    self._leave_out(name, peer.process)
                if about[0] == "local" or not why.startswith(SILENCE):
                    # What it has made cannot be told any more from what the journal says: it begins at the anchor.
                    self._catch_up_one(peer, stage)
            case _:
                super()._failed(peer, about, why)

    def _took(self, peer: Peer, stage: int, name: str | None, answer: Holds) -> None:
        super()._took(peer, stage, name, answer)
        if name is not None and (peer.name, peer.stage) == (name, stage) and self.version > self.synced:
            # Steps that were closed on its way: it counted nothing in them.
            self._order(self._local_step(peer, self.version - 1, ()))


def make_brain(plan: PipelinePlan, *, first_incarnations: dict[str, int] | None = None) -> PipelineBrain:
    """The controller that the run's strategy asks for."""
    kind = RoundBrain if plan.sync_steps else DelayedBrain if plan.delayed else PipelineBrain
    return kind(plan, first_incarnations=first_incarnations)


def resumed_brain(plan: PipelinePlan, history: PipelineHistory, *, reborn: bool) -> PipelineBrain:
    """The controller that goes on with a journal.

    `reborn`: the one before has died, and the run's processes may be there, with what is committed. Else, and after a
    rollback that has not begun again, it goes on from the newest snapshot that the history has.
    """
    first = history.incarnations
    if not history.num_stages:
        return make_brain(replace(plan, paused=history.paused), first_incarnations=first)
    plan = replace(
        with_settings(plan, history.settings),
        version=history.version,
        round_=history.next_round,
        digests=history.digests,
        life=history.num_lives,
        evaluated=history.evaluated,
        paused=history.paused,
        left=frozenset(history.left) if reborn else frozenset(),
        next_fragment=history.next_fragment,
        outer_rounds=history.outer_rounds,
    )
    if reborn and history.goes_back_to is None:
        return make_brain(plan, first_incarnations=first)
    saved = newest_snapshot(plan.snapshots, at_most=history.version)
    if saved is None:
        plan = replace(plan, version=0, digests=())
    else:
        plan = replace(plan, version=saved.version, from_folder=str(saved.folder), digests=())
    turn, outer_rounds = history.turn_at(plan.version)
    plan = replace(plan, next_fragment=turn, outer_rounds=outer_rounds)
    return make_brain(plan, first_incarnations=first)
