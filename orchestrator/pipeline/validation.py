"""When the model of a pipeline is validated, and by whom (pure).

Between two steps, at the version that all stages hold: one trainer sends fixed validation samples forward through the
stages, the last of which says the loss. `[eval]` says how often, as for islands: also at the beginning and at the end.
"""

from __future__ import annotations

import math

from orchestrator.pipeline.commands import Tell
from orchestrator.pipeline.plan import PipelinePlan
from orchestrator.pipeline.watch import Watch
from workers.pipeline.messages import Evaluate, Evaluated
from workers.records import EvaluationRecord

OF_A_LIFE = 1_000_000
"""Evaluations that one life of a controller may number."""


class Validation(Watch):
    """See the module. `evaluations`: version and loss of each."""

    def __init__(self, plan: PipelinePlan, *, first_incarnations: dict[str, int] | None = None) -> None:
        super().__init__(plan, first_incarnations=first_incarnations)
        self.evaluations: list[tuple[int, float]] = []
        self._evaluated = plan.evaluated
        self._evaluating: tuple[str, int] | None = None  # trainer, number of the evaluation
        # It is the round of the evaluation's calls: peers refuse what is lower than they have seen, in any life.
        self._num_evaluations = plan.life * OF_A_LIFE

    def _validates(self) -> bool:
        """Whether an evaluation is under way, or begins now: the next step waits for it."""
        if self._evaluating is None and self._is_due() and self.roster.trainers:
            trainers = sorted(self.roster.trainers)
            self._num_evaluations += 1
            number = self._num_evaluations
            process = trainers[number % len(trainers)]
            self._evaluating = (process, number)
            order = Evaluate(version=self.version, number=number, life=self.plan.life, peers=self.roster.places())
            self._out.append(Tell(process=process, nonce=self.roster.trainers[process], message=order))
        return self._evaluating is not None

    def _is_due(self) -> bool:
        if not self.plan.eval_every or self.stopping is not None or not self.at_anchor:
            return False
        if self._evaluated is None or (self.version >= self.plan.total_steps and self.version != self._evaluated):
            return True
        each = self.plan.eval_every * self.plan.total_steps
        return math.floor(self.version / each) > math.floor(self._evaluated / each)

    def _evaluated_now(self, process: str, message: Evaluated) -> None:
        if self._evaluating != (process, message.number) or message.version != self.version:
            return
        self._evaluating, self._evaluated = None, message.version
        self.evaluations.append((message.version, message.loss))
        finite = message.loss if math.isfinite(message.loss) else None
        samples = self.version * self.plan.pipeline.samples_per_step
        versions = (self.version,) * self.layout.num_stages
        self._write(EvaluationRecord(member=process, versions=versions, samples=samples, val_loss=finite))

    def _evaluator_died(self, process: str) -> None:
        """Somebody else does it."""
        if self._evaluating is not None and self._evaluating[0] == process:
            self._evaluating = None
