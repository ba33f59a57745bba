"""The two things that lead to a commit where peers step on their own: a step's count, and a synchronisation (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from orchestrator.pipeline.commit import Contradiction, StepCommit
from orchestrator.pipeline.work import Work
from workers.pipeline.messages import OfferWork, Part


class StepCount(StepCommit):
    """A step that is counted, and nothing more: gradients stay where they are."""

    def _try_reduce(self, name: str) -> None:
        """Nothing is added."""

    def may_commit(self, now_s: float, *, grace_s: float) -> bool:
        """Whether every stage is covered."""
        return self.is_collected


class WorkCommit(StepCommit):
    """A synchronisation of some fragments of all stages, from the anchors of version `step` on.

    `work` is the controller's own; what is offered are its steps before `sent`.
    """

    work: Mapping[str, Work] = {}
    fragments: tuple[int, ...] = (0,)
    sent = 0

    def begin(
        self,
        work: Mapping[str, Work],
        *,
        fragments: tuple[int, ...],
        sent: int,
        applies_at: int,
        outer_rounds: Mapping[int, int],
    ) -> None:
        """Ask for what everybody has."""
        self.work, self.fragments, self.sent = work, fragments, sent
        self.next_version, self.applies_at = sent, applies_at
        self.units = {name: unit for name, unit in self.units.items() if self._fragment(name) in fragments}
        self.outer_rounds = {name: outer_rounds[self._fragment(name)] for name in self.units}
        for number, stage in enumerate(self.stages):
            able = {peer.name: self.lacking(peer.name) for peer in self._able(number)}
            stage.phase, stage.asked = "collecting", {name for name, lacking in able.items() if lacking}
            for peer in self._able(number):
                if able[peer.name]:
                    order = OfferWork(
                        version=self.step,
                        round_=self.round_,
                        peer=peer.name,
                        step=sent,
                        fragments=able[peer.name],
                    )
                    self.wanted.append((peer.process, order, ("work", number, peer.name)))
            self._look(number)

    def _fragment(self, unit: str) -> int:
        return self.layout.fragment_of.get(unit, 0)

    def lacking(self, name: str) -> tuple[int, ...]:
        """The fragments that lack steps of a peer."""
        own = self.work.get(name)
        return tuple(f for f in self.fragments if own is not None and own.rate(f, self.sent) > 0)

    @property
    def is_offered(self) -> bool:
        """Whether everybody who is asked has offered: what was sent is what was there after the step `sent`."""
        return all(stage.phase == "collected" for stage in self.stages)

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
        stages = self.layout.stages_of[name]
        collected = all(self.stages[number].phase == "collected" for number in stages)
        if collected and not any(self._parts(number, name) for number in stages):
            self.units[name].skipped = True  # nobody moved it
        else:
            super()._try_reduce(name)

    def _parts(self, number: int, unit: str) -> tuple[Part, ...]:
        """Displacements with their weights: of all who have work in the stage, also of those who are left out."""
        fragment = self._fragment(unit)
        rates = {name: one.rate(fragment, self.sent) for name, one in self.work.items() if one.stage == number}
        total = math.fsum(rates.values())
        places = {peer.name: peer.address for peer in self.roster.serving(number)}
        return tuple(
            Part(peer=name, address=places[name], numbers=(0,), weight=rates[name] / total)
            for name in sorted(self.stages[number].offers)
            if rates[name] > 0
        )

    def scale(self) -> float:
        """A displacement is not clipped: the steps that made it were."""
        if not math.isfinite(norm := self.norm()):
            raise Contradiction(f"version {self.step}: the displacement's norm is {norm}")
        return 1.0

    def may_commit(self, now_s: float, *, grace_s: float) -> bool:
        """See `StepCommit.may_commit`."""
        self.spread_if_reduced(now_s)
        return super().may_commit(now_s, grace_s=grace_s)

    def spread_if_reduced(self, now_s: float) -> None:
        """Also where nobody moved anything."""
        if not self.spreading and all(unit.is_done for unit in self.units.values()):
            self._spread(now_s)

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
                self._forget_units(number)
            self._look(number)
        self.lost_owner(process)
