"""One step on its way to its commit, in every stage at once: a pure machine, told by the controller what happened.

    counting    trainers send microbatches through the stages, until each is counted once in each
    collecting  of a stage: its peers say what they counted; that must be a disjoint cover of the step (`cover`)
    reducing    of a unit (a stage's vector, or the tied matrix of two): owners add their chunks in microbatch order
    spreading   everybody who holds a stage fetches the sums and computes its next state, and says its digest
    committed   `copies` holders of each stage have it, all with the same digest: on the record, then applied

Whoever is lost before that leaves what it counted uncounted: the stage counts again. What it owned others own. Peers
that were fenced for the step take no part. The norm of the gradient is of all stages together, which is why they commit
together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.pipeline.commands import Layout
from orchestrator.pipeline.roster import Peer, Roster
from workers.pipeline.accumulator import cover
from workers.pipeline.messages import Collect, Part, Reduce, Spread, StageReady, ToPeer

Wanted = tuple[str, ToPeer, tuple[object, ...]]
"""Process, order, and what its answer is for."""


class Contradiction(Exception):
    """Peers say what cannot be true: a microbatch is counted twice, or holders of a stage have different states."""


@dataclass(kw_only=True, slots=True)
class _Stage:
    phase: Literal["counting", "collecting", "collected"] = "counting"
    reports: dict[str, StageReady] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    offers: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class _Unit:
    attempt: int = 0
    owners: dict[int, str] = field(default_factory=dict)  # chunk -> process
    sums: dict[int, float] = field(default_factory=dict)

    skipped: bool = False

    @property
    def is_done(self) -> bool:
        """Whether its sum is there, or it has none."""
        return self.skipped or (bool(self.owners) and self.sums.keys() == self.owners.keys())

    def forget(self) -> None:
        """Nothing of it is reduced any more."""
        self.owners, self.sums, self.skipped = {}, {}, False


class StepCommit:
    """See the module. `wanted` is what is to be ordered next; the owner empties it."""

    def __init__(
        self,
        layout: Layout,
        roster: Roster,
        *,
        step: int,
        round_: int,
        num_microbatches: int,
        trainers: Sequence[str],
        lr: float,
        grad_clip: float,
        copies: int,
    ) -> None:
        self.layout, self.roster = layout, roster
        self.step, self.round_, self.num_microbatches = step, round_, num_microbatches
        self.trainers = tuple(trainers)
        self.fenced: set[str] = set()
        self.stages = [_Stage() for _ in range(layout.num_stages)]
        self.units = {unit: _Unit() for unit in layout.chunks}
        self.wanted: list[Wanted] = []
        self.attempt = self.first_attempt = 0
        self.opened_s = 0.0
        self.spreading = 0  # number of the spread that goes on; 0: none
        self.spread_since_s = math.inf
        self.haves: dict[int, dict[str, str]] = {}
        self.waiting: set[tuple[int, str]] = set()
        self.next_version: int | None = None
        self.applies_at: int | None = None
        self.outer_rounds: dict[str, int] = {}
        self._lr, self._grad_clip, self._copies = lr, grad_clip, copies

    def number_from(self, attempt: int) -> None:
        """Attempts of this commit have higher numbers: a late answer to another commit's is no answer to one of it."""
        self.attempt = self.first_attempt = attempt

    @property
    def is_collected(self) -> bool:
        """Whether every stage is covered: the step needs no trainer any more."""
        return all(stage.phase == "collected" for stage in self.stages)

    # ------------------------------------------------------------ counting and collecting

    def ready(self, trainer: str, report: StageReady) -> None:
        """All of a trainer's microbatches are counted in a stage."""
        stage = self.stages[report.stage]
        stage.reports[trainer] = report
        self._try_collect(report.stage)

    def _try_collect(self, number: int) -> None:
        stage = self.stages[number]
        if stage.phase != "counting" or stage.reports.keys() != set(self.trainers):
            return
        able = {peer.name for peer in self._able(number)}
        named = {peer for report in stage.reports.values() for _, peer in report.counted}
        if not named <= able:
            return  # one of them was lost: its trainer counts anew, and reports again
        stage.phase, stage.asked, stage.offers = "collecting", able, {}
        for peer in self._able(number):
            order = Collect(step=self.step, round_=self.round_, peer=peer.name)
            self.wanted.append((peer.process, order, ("offer", number, peer.name)))

    def _able(self, stage: int) -> list[Peer]:
        return [peer for peer in self.roster.serving(stage) if peer.name not in self.fenced]

    def offered(self, number: int, peer: str, microbatches: tuple[int, ...]) -> bool:
        """A peer's answer to `Collect`. False: the step lacks microbatches that trainers saw counted; begin it anew."""
        stage = self.stages[number]
        if stage.phase != "collecting" or peer not in stage.asked:
            return True
        stage.offers[peer] = microbatches
        if stage.offers.keys() != stage.asked:
            return True
        lacks = cover(stage.offers, range(self.num_microbatches))
        if lacks.doubled or lacks.foreign:
            raise Contradiction(f"step {self.step}, stage {number}: {lacks} of {stage.offers}")
        if lacks.missing:
            return False
        stage.phase = "collected"
        for unit in self.units:
            self._try_reduce(unit)
        return True

    def given_up(self) -> int | None:
        """A stage that is to be counted, and everybody who serves it was fenced for the step; None: there is none."""
        for number, stage in enumerate(self.stages):
            serving = self.roster.serving(number)
            if stage.phase == "counting" and serving and not self._able(number):
                return number
        return None

    # ------------------------------------------------------------ reducing

    def _try_reduce(self, name: str) -> None:
        unit, stages = self.units[name], self.layout.stages_of[name]
        if unit.owners or any(self.stages[stage].phase != "collected" for stage in stages):
            return
        owners = self._able(stages[0]) or self._able(stages[-1])
        if not owners:
            return  # the stage has nobody: it counts anew when somebody is there
        self.attempt += 1
        unit.attempt, unit.sums = self.attempt, {}
        chunks = range(self.layout.chunks[name])
        # Another owner first with each attempt: one that cannot fetch what it needs is not asked for ever.
        unit.owners = {chunk: owners[(chunk + self.attempt) % len(owners)].process for chunk in chunks}
        groups = tuple(parts for stage in stages if (parts := self._parts(stage, name)))
        for process in dict.fromkeys(unit.owners.values()):
            mine = tuple(chunk for chunk, owner in unit.owners.items() if owner == process)
            order = Reduce(
                step=self.step, round_=self.round_, attempt=unit.attempt, unit=name, chunks=mine, groups=groups
            )
            self.wanted.append((process, order, ("sums", name, unit.attempt)))

    def _parts(self, number: int, unit: str) -> tuple[Part, ...]:
        places = {peer.name: peer.address for peer in self.roster.serving(number)}
        offers = self.stages[number].offers
        return tuple(
            Part(peer=name, address=places[name], numbers=microbatches)
            for name, microbatches in sorted(offers.items())
            if microbatches
        )

    def reduced(self, name: str, attempt: int, sums: Sequence[tuple[int, float]], now_s: float) -> None:
        """An owner's answer to `Reduce`."""
        unit = self.units[name]
        if attempt != unit.attempt or not unit.owners:
            return
        unit.sums |= dict(sums)
        if all(one.is_done for one in self.units.values()):
            self._spread(now_s)

    def reduce_failed(self, name: str, attempt: int) -> None:
        """An owner could not get what it needs: others own, in another attempt."""
        if self.units[name].attempt == attempt:
            self.units[name].forget()
            self.stop_spreading()

    def retry(self) -> None:
        """Order again what is not under way."""
        for number in range(self.layout.num_stages):
            self._try_collect(number)
        for unit in self.units:
            self._try_reduce(unit)

    # ------------------------------------------------------------ spreading

    def norm(self) -> float:
        """Of the gradient of all stages; chunk after chunk, so that it does not depend on who owned them."""
        return math.sqrt(math.fsum(unit.sums[chunk] for unit in self.units.values() for chunk in sorted(unit.sums)))

    def scale(self) -> float:
        """What the gradient is multiplied by, so that its norm is at most that of `train.grad_clip`."""
        norm = self.norm()
        if not math.isfinite(norm):
            raise Contradiction(f"step {self.step}: the gradient's norm is {norm}")
        return 1.0 if self._grad_clip == 0 or norm <= self._grad_clip else self._grad_clip / norm

    def _spread(self, now_s: float) -> None:
        self.attempt += 1
        self.spreading, self.spread_since_s = self.attempt, now_s
        self.haves = {stage: {} for stage in range(self.layout.num_stages)}
        self.waiting = set()
        for stage in range(self.layout.num_stages):
            for peer in self.roster.holders(stage, self.step):
                self.ask(stage, peer)

    def ask(self, stage: int, peer: Peer) -> None:
        """Have a holder compute its next state; also one that came while the others do."""
        if not self.spreading:
            return
        owners = []
        for name, unit in self.units.items():
            if stage in self.layout.stages_of[name]:
                owners += [
                    (name, chunk, unit.attempt, self.roster.peers[process].address)
                    for chunk, process in sorted(unit.owners.items())
                ]
        order = Spread(
            step=self.step,
            round_=self.round_,
            stage=stage,
            owners=tuple(owners),
            scale=self.scale(),
            lr=self._lr,
            next_version=self.next_version,
            applies_at=self.applies_at,
            outer_rounds=tuple(sorted(self.outer_rounds.items())),
        )
        self.waiting.add((stage, peer.process))
        self.wanted.append((peer.process, order, ("have", stage, self.spreading)))

    def have(self, stage: int, process: str, spread: int, digest: str) -> None:
        """A holder's answer to `Spread`."""
        if spread == self.spreading:
            self.haves[stage][process] = digest
            self.waiting.discard((stage, process))

    def have_not(self, stage: int, process: str, spread: int) -> None:
        """A holder could not compute its next state: it is not waited for, and catches up."""
        if spread == self.spreading:
            self.waiting.discard((stage, process))

    def ask_again(self) -> None:
        """Ask those who could not compute their next state, where too few could."""
        if not self.spreading:
            return
        for stage, haves in self.haves.items():
            busy = any(waiting == stage for waiting, _ in self.waiting)
            if len(haves) < self._copies and not busy:
                for peer in self.roster.holders(stage, self.step):
                    if peer.process not in haves:
                        self.ask(stage, peer)

    def stop_spreading(self) -> None:
        """A sum is lost before the step is on the record."""
        self.spreading, self.spread_since_s, self.waiting = 0, math.inf, set()

    def may_commit(self, now_s: float, *, grace_s: float) -> bool:
        """Whether enough holders of every stage have the next state, and the others have had their time."""
        if not self.spreading:
            return False
        if self.waiting and now_s < self.spread_since_s + grace_s:
            return False
        return all(len(haves) >= self._copies for haves in self.haves.values())

    def digests(self) -> list[str]:
        """Of each stage's next state. Raises Contradiction where its holders differ."""
        found = []
        for stage, haves in self.haves.items():
            if len(set(haves.values())) != 1:
                raise Contradiction(f"step {self.step}, stage {stage}: holders have different states: {haves}")
            found.append(next(iter(haves.values())))
        return found

    def counted(self, stage: int) -> Mapping[str, tuple[int, ...]]:
        """Who counted which microbatches of a stage."""
        return {peer: ids for peer, ids in sorted(self.stages[stage].offers.items()) if ids}

    def loss(self) -> float:
        """Mean loss of the step's microbatches."""
        last = self.stages[-1].reports.values()
        return math.fsum(report.loss for report in last if report.loss is not None)

    # ------------------------------------------------------------ losses

    def fence(self, name: str, process: str) -> None:
        """Nothing of a peer is in this step any more, whether it lives or not."""
        self.fenced.add(name)
        for number, stage in enumerate(self.stages):
            named = {peer for report in stage.reports.values() for _, peer in report.counted}
            if name in named or stage.offers.get(name) or (stage.phase == "collecting" and name in stage.asked):
                self._count_again(number, name)
        self.lost_owner(process)

    def _count_again(self, number: int, name: str) -> None:
        stage = self.stages[number]
        stage.phase, stage.offers, stage.asked = "counting", {}, set()
        stage.reports = {
            trainer: report
            for trainer, report in stage.reports.items()
            if name not in {peer for _, peer in report.counted}
        }
        self._forget_units(number)

    def _forget_units(self, stage: int) -> None:
        """What was added of a stage is not its sum any more."""
        for name, unit in self.units.items():
            if stage in self.layout.stages_of[name]:
                unit.forget()
        self.stop_spreading()

    def lost_owner(self, process: str) -> None:
        """The sums that a process keeps are gone, or cannot be had."""
        for unit in self.units.values():
            if process in unit.owners.values():
                unit.forget()
                self.stop_spreading()
        self.waiting = {(stage, waiting) for stage, waiting in self.waiting if waiting != process}
        for haves in self.haves.values():
            haves.pop(process, None)
        self.retry()
