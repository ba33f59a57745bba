"""Steps of a pipeline whose peers step on their own, and the synchronisations of their stages (pure).

Every step is counted in all stages (`StepCount`: a disjoint cover, as where gradients are added); then each peer makes
a step of its own with what it counted, and trainers let the step's tensors go. After `sync_steps` of them the stages
synchronise (`WorkCommit`): what each peer has moved from the anchor is added, by weights of the journal, and everybody
who holds a stage computes the next anchor. Whoever dies takes along what it made since the last synchronisation, of its
own stage alone: that is on the record (`WorkLostRecord`). A peer that lives and was left out offers it the next time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.pipeline.brain import PipelineBrain
from orchestrator.pipeline.commit import Contradiction, StepCommit
from orchestrator.pipeline.delayed import DelayedBrain
from orchestrator.pipeline.plan import PipelinePlan, with_settings
from orchestrator.pipeline.replay import PipelineHistory, newest_snapshot
from orchestrator.pipeline.roster import Peer
from workers.pipeline.messages import (
    Apply,
    Evaluated,
    FromPeer,
    FromTrainer,
    Heartbeat,
    Holds,
    LocalStep,
    Offered,
    OfferWork,
    Part,
)
from workers.pipeline.records import StageCountRecord, StageSyncRecord, WorkLostRecord
from workers.records import Record

SILENCE = "no answer"


@dataclass(kw_only=True, slots=True)
class Work:
    """What a peer has made of its own and nobody has committed."""

    stage: int
    num_microbatches: int = 0
    num_steps: int = 0

    @property
    def rate(self) -> float:
        """Microbatches in a step: how many steps there were is in the displacement's length (protocol, 1.6)."""
        return self.num_microbatches / self.num_steps


class StepCount(StepCommit):
    """A step that is counted, and nothing more: gradients stay where they are."""

    def _try_reduce(self, name: str) -> None:
        """Nothing is added."""

    def may_commit(self, now_s: float, *, grace_s: float) -> bool:
        """Whether every stage is covered."""
        return self.is_collected


class WorkCommit(StepCommit):
    """A synchronisation of all stages, from the anchors of version `step` on; `work` is the controller's own."""

    work: Mapping[str, Work] = {}

    def begin(self, work: Mapping[str, Work], *, next_version: int) -> None:
        """Ask for what everybody has."""
        self.work, self.next_version = work, next_version
        for number, stage in enumerate(self.stages):
            able = [peer for peer in self._able(number) if peer.name in work]
            stage.phase, stage.asked = "collecting", {peer.name for peer in able}
            for peer in able:
                order = OfferWork(version=self.step, round_=self.round_, peer=peer.name)
                self.wanted.append((peer.process, order, ("work", number, peer.name)))
            self._look(number)

    def offered_work(self, number: int, peer: str) -> None:
        """A peer's displacement can be fetched."""
        stage = self.stages[number]
        if stage.phase == "collecting" and peer in stage.asked:
            stage.offers[peer] = ()
            self._look(number)

    def _look(self, number: int) -> None:
        stage = self.stages[number]
        if stage.phase == "collecting" and stage.offers.keys() == stage.asked:
            stage.phase = "collected"
            for unit in self.units:
                self._try_reduce(unit)

    def _try_reduce(self, name: str) -> None:
        stages = [self.stages[number] for number in self.layout.stages_of[name]]
        if all(stage.phase == "collected" and not stage.offers for stage in stages):
            self.units[name].skipped = True  # nobody moved it
        else:
            super()._try_reduce(name)

    def _parts(self, number: int) -> tuple[Part, ...]:
        """Displacements with their weights: of all who have work in the stage, also of those who are left out."""
        total = math.fsum(one.rate for one in self.work.values() if one.stage == number)
        places = {peer.name: peer.address for peer in self.roster.serving(number)}
        return tuple(
            Part(peer=name, address=places[name], numbers=(0,), weight=self.work[name].rate / total)
            for name in sorted(self.stages[number].offers)
        )

    def scale(self) -> float:
        """A displacement is not clipped: the steps that made it were."""
        if not math.isfinite(norm := self.norm()):
            raise Contradiction(f"version {self.step}: the displacement's norm is {norm}")
        return 1.0

    def may_commit(self, now_s: float, *, grace_s: float) -> bool:
        """See `StepCommit.may_commit`."""
        if not self.spreading and all(unit.is_done for unit in self.units.values()):
            self._spread(now_s)
        return super().may_commit(now_s, grace_s=grace_s)

    def contributors(self, number: int) -> tuple[str, ...]:
        """Whose work is in a stage's next anchor."""
        return tuple(sorted(self.stages[number].offers))

    def fence(self, name: str, process: str) -> None:
        """A peer is left out of this synchronisation."""
        self.fenced.add(name)
        for number, stage in enumerate(self.stages):
            if name not in stage.asked:
                continue
            stage.asked.discard(name)
            if stage.offers.pop(name, None) is not None:
                for unit, stages in self.layout.stages_of.items():
                    if number in stages:
                        self.units[unit].forget()
                self.stop_spreading()
            self._look(number)
        self.lost_owner(process)


class RoundBrain(PipelineBrain):
    """See the module. `version` counts steps; `synced` is the version of the anchors."""

    step_kind = StepCount

    def __init__(self, plan: PipelinePlan, *, first_incarnations: dict[str, int] | None = None) -> None:
        super().__init__(plan, first_incarnations=first_incarnations)
        self.synced = plan.version
        self.work: dict[str, Work] = {}

    @property
    def held_version(self) -> int:
        """See `StageKeeper.held_version`."""
        return self.synced

    def _go_on(self) -> None:
        self._forget_lost_work()
        super()._go_on()

    def _forget_lost_work(self) -> None:
        """Who serves under its name no more has nothing that could be committed."""
        for name in [name for name in self.work if self.roster.by_name(name) is None]:
            lost = self.work.pop(name)
            why = f"{lost.num_microbatches} microbatches of {lost.num_steps} steps: it does not serve any more"
            self._write(WorkLostRecord(peer=name, stage=lost.stage, why=why))

    # ------------------------------------------------------------ steps

    def _open_step(self, why: str) -> None:
        if self._sync_is_due():
            self._open_sync()
        else:
            super()._open_step(why)

    def _sync_is_due(self) -> bool:
        made = self.version - self.synced
        stops = self.stopping is not None and self.stopping.save
        return made > 0 and (made >= self.plan.sync_steps or self.version >= self.plan.total_steps or stops)

    def _open_sync(self) -> None:
        commit = self._new_commit(WorkCommit, ())
        assert isinstance(commit, WorkCommit), commit
        commit.step = self.synced
        self.commit = commit
        commit.begin(self.work, next_version=self.version)
        self._order_wanted(commit)

    def _commit(self, commit: StepCommit) -> None:
        if isinstance(commit, WorkCommit):
            self._commit_sync(commit)
        else:
            self._close_step(commit)

    def _close_step(self, commit: StepCommit) -> None:
        """The step is counted everywhere: on the record, then each peer makes its own step."""
        records: list[Record] = []
        orders: list[tuple[str, LocalStep, tuple[object, ...]]] = []
        for stage in range(self.layout.num_stages):
            counted = commit.counted(stage)
            rows = tuple(f"{name}:{','.join(map(str, ids))}" for name, ids in counted.items())
            records.append(StageCountRecord(step=commit.step, round=commit.round_, stage=stage, counted=rows))
            for name, ids in counted.items():
                own = self.work.setdefault(name, Work(stage=stage))
                own.num_microbatches, own.num_steps = own.num_microbatches + len(ids), own.num_steps + 1
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
        included: set[str] = set()
        records: list[Record] = []
        for stage, digest in enumerate(self.digests):
            contributors = commit.contributors(stage)
            included |= set(contributors)
            records.append(
                StageSyncRecord(
                    base=self.synced,
                    version=self.version,
                    stage=stage,
                    digest=digest,
                    contributors=contributors,
                    holders=tuple(sorted(commit.haves[stage])),
                )
            )
        self._write(*records)
        for stage, digest in enumerate(self.digests):
            for process in commit.haves[stage]:
                peer = self.roster.peers[process]
                peer.versions[stage] = self.version
                has_part = peer.stage == stage and peer.name in included
                order = Apply(step=commit.step, stage=stage, digest=digest, included=has_part)
                self._order((process, order, ("applied", stage, self.version)))
        self.work = {name: one for name, one in self.work.items() if name not in included}
        self.synced, self.commit, self._failures = self.version, None, 0
        self._catch_up()
        self._between_steps()

    # ------------------------------------------------------------ answers

    def _answered(self, peer: Peer, about: tuple[object, ...], answer: FromPeer) -> None:
        match about, answer:
            case ("work", int(stage), str(name)), Offered():
                if isinstance(self.commit, WorkCommit):
                    self.commit.offered_work(stage, name)
            case _:
                super()._answered(peer, about, answer)

    def _failed(self, peer: Peer, about: tuple[object, ...], why: str) -> None:
        match about:
            case ("work" | "local", int(stage), str(name)) if peer.name == name and peer.stage == stage:
                if about[0] == "work":
                    self._fence_for_step(name, peer.process, why)
                if about[0] == "local" or not why.startswith(SILENCE):
                    # What it has made cannot be told any more from what the journal says: it begins at the anchor.
                    self._catch_up_one(peer, stage)
            case _:
                super()._failed(peer, about, why)

    def _heard(self, process: str, message: FromTrainer) -> None:
        if isinstance(message, Heartbeat | Evaluated) or not isinstance(self.commit, WorkCommit):
            super()._heard(process, message)

    def _fence_for_step(self, name: str, process: str, why: str) -> None:
        commit = self.commit
        if not isinstance(commit, WorkCommit):
            super()._fence_for_step(name, process, why)
        elif name not in commit.fenced:
            self._forget_lost_work()
            commit.fence(name, process)

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
    )
    if reborn and history.goes_back_to is None:
        return make_brain(plan, first_incarnations=first)
    saved = newest_snapshot(plan.snapshots, at_most=history.version)
    if saved is None:
        plan = replace(plan, version=0, digests=())
    else:
        plan = replace(plan, version=saved.version, from_folder=str(saved.folder), digests=())
    return make_brain(plan, first_incarnations=first)
