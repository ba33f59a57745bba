"""Steps of a pipeline whose updates are delayed by one (pure): as in SWARM (arXiv 2301.11913), after ZeRO-Offload
(arXiv 2101.06840).

While the gradients of a step are added and its update is computed, the next step goes through the stages already, with
the parameters that are there. So step k is made with the parameters after k - 1 updates, and the links between the
peers of a stage work while they compute. Nothing of that is seen by peers but a request's `behind`: what a step
computes with stays as it is until the step is counted in every stage, because the update before it is committed, and
applied, only then.

What was counted in a step whose update is under way cannot be counted again: its parameters are no more. If some of it
is lost with a peer before enough holders have the next state, both steps are begun anew, the first of them with the
parameters of now. Its gradient is not one update late then, so bits depend on who died and when (ADR 70).
"""

from __future__ import annotations

from orchestrator.pipeline.brain import PipelineBrain
from orchestrator.pipeline.commit import StepCommit
from orchestrator.pipeline.plan import PipelinePlan
from orchestrator.pipeline.roster import Peer
from workers.pipeline.messages import Part

SPREAD_GRACE_S = 5.0


class DelayedCommit(StepCommit):
    """A step whose gradients wait until the update before it is committed (`reduce`)."""

    def __init__(self, *arguments: object, **values: object) -> None:
        super().__init__(*arguments, **values)  # type: ignore[arg-type]
        self.reduces = False
        self.places: dict[str, str] = {}  # peer -> where what it counted can be fetched, whatever it serves by then
        self.gone: set[str] = set()  # processes that died since: who follows one has nothing of it

    def offered(self, number: int, peer: str, microbatches: tuple[int, ...]) -> bool:
        """See `StepCommit.offered`."""
        known = self.roster.by_name(peer)
        if known is not None:
            self.places[peer] = known.address
        return super().offered(number, peer, microbatches)

    def reduce(self) -> None:
        """Its turn has come."""
        self.reduces = True
        self.retry()

    def _try_reduce(self, name: str) -> None:
        if self.reduces:
            super()._try_reduce(name)

    def _parts(self, number: int, unit: str) -> tuple[Part, ...]:
        offers = self.stages[number].offers
        return tuple(
            Part(peer=name, address=self.places[name], numbers=microbatches)
            for name, microbatches in sorted(offers.items())
            if microbatches
        )

    def ask(self, stage: int, peer: Peer) -> None:
        """See `StepCommit.ask`; whoever comes when a sum is gone, and enough have used it, catches up."""
        if not any(owner in self.gone for unit in self.units.values() for owner in unit.owners.values()):
            super().ask(stage, peer)

    def lacks(self) -> bool:
        """Whether something that was counted is with a process that is gone."""
        return any(
            ids and name.rpartition(".")[0] in self.gone for stage in self.stages for name, ids in stage.offers.items()
        )

    def lose_holder(self, process: str) -> bool:
        """A process is gone; whether enough others of every stage have the next state."""
        self.gone.add(process)
        self.waiting = {(stage, waiting) for stage, waiting in self.waiting if waiting != process}
        for haves in self.haves.values():
            haves.pop(process, None)
        return bool(self.spreading) and all(len(haves) >= self._copies for haves in self.haves.values())


class DelayedBrain(PipelineBrain):
    """See the module. `commit` is the step that is counted, `reducing` the one before it, on its way to its update."""

    step_kind = DelayedCommit

    def __init__(self, plan: PipelinePlan, *, first_incarnations: dict[str, int] | None = None) -> None:
        super().__init__(plan, first_incarnations=first_incarnations)
        self.reducing: DelayedCommit | None = None

    @property
    def reduced(self) -> StepCommit | None:
        """See `StageKeeper.reduced`."""
        return self.reducing

    @property
    def next_step(self) -> int:
        """See `PipelineBrain.next_step`."""
        return self.version + (self.reducing is not None)

    def _open_commits(self) -> list[StepCommit]:
        return [commit for commit in (self.reducing, self.commit) if commit is not None]

    def _advance(self) -> None:
        for commit in self._open_commits():
            self._order_wanted(commit)
        reducing, counting = self.reducing, self.commit
        if reducing is not None and (counting is None or counting.is_collected):
            if reducing.may_commit(self._now_s, grace_s=SPREAD_GRACE_S):
                self._commit(reducing)
        if self.reducing is None and isinstance(self.commit, DelayedCommit) and self.commit.is_collected:
            self.reducing, self.commit = self.commit, None
            self.reducing.reduce()
            self._order_wanted(self.reducing)
        if self.commit is None and self.begun and self.finished is None:
            if self.reducing is None or not self._waits_for_update():
                self._open_step("")

    def _waits_for_update(self) -> bool:
        """Whether no further step is begun before the update under way: there is none, or something comes between."""
        return (
            self.next_step >= self.plan.total_steps
            or self.stopping is not None
            or self.paused
            or self._evaluating is not None
            or self._is_due()
            or self._somebody_goes()
        )

    def _closed(self, commit: StepCommit) -> None:
        self.version, self.reducing, self._failures = commit.step + 1, None, 0

    # ------------------------------------------------------------ losses

    def _lost(self, peer: Peer, why: str) -> None:
        super()._lost(peer, why)
        reducing = self.reducing
        if reducing is None or reducing.lose_holder(peer.process):
            return
        if reducing.lacks():
            self._step_back(f"{peer.process} is gone, and what was counted in step {reducing.step} is not whole")
            return
        reducing.fenced.add(peer.name)
        gone, reducing.gone = sorted(reducing.gone), set()
        for process in gone:
            reducing.lost_owner(process)

    def _cannot_be_fetched(self, peer: Peer, why: str) -> None:
        self._step_back(f"the gradients of {peer.name} cannot be fetched: {why}")

    def _step_back(self, why: str) -> None:
        """Both open steps are void: the first of them is made again, with the parameters of now."""
        self.reducing = None
        self._restart_step(why)
