"""A strategy is a record of parts: when to synchronise, what is sent and how, and what is done with the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from strategies.codecs.base import Codec
from strategies.codecs.int4 import Int4
from strategies.codecs.int8 import Int8
from strategies.errors import SettingError
from strategies.fragments import Pattern
from strategies.outer import Average, OuterStep
from strategies.schedule import overlap_steps_at

Contribution = Literal["displacement", "gradient"]
InFlight = Literal["keep", "restart", "eager"]
Aggregate = Literal["mean", "radial"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """One algorithm with its settings. `progress` is the share of the run's tokens committed, 0 to 1.

    contribution      "displacement": anchor minus live parameters after local steps; "gradient": the gradient of one
                      batch, the live parameters being the anchor itself
    inner_steps       progress -> local steps between two contributions of a fragment
    outer_at          progress -> the outer step; all of them keep the same number of states
    codec             of contributions
    result            codec of results where it is not `result_codec_of(codec)`
    error_feedback    whether residuals are kept; never with a codec that loses nothing
    overlap_steps     inner steps between a contribution and the step at which its result is due; 0: wait for it
    in_flight         where local training goes on from while a contribution is under way: "keep", where it is;
                      "restart", the anchor; "eager", the anchor as it will be by this member's own contribution
    staggered         fragments are sent at even distances within a round, not all after the same step
    merge_alpha       weight of the local point when a result is applied (`merge.advance_included`)
    merge_kappa       how much of the progress made in flight is kept
    own_pace          a member's rounds are its own: what others commit does not begin a new one
    aggregate         what owners make of the contributions: weighted mean, or radial-directional average
    num_fragments, pattern, groups   how the parameters are divided (`fragments.plan_fragments`)
    """

    name: str
    contribution: Contribution
    inner_steps: Callable[[float], int]
    outer_at: Callable[[float], OuterStep]
    codec: Codec
    result: Codec | None = None
    error_feedback: bool = False
    feedback_decay: float = 1.0
    overlap_steps: int = 0
    in_flight: InFlight = "keep"
    staggered: bool = False
    merge_alpha: float = 0.0
    merge_kappa: float = 1.0
    own_pace: bool = False
    aggregate: Aggregate = "mean"
    num_fragments: int = 1
    pattern: Pattern = "strided"
    groups: tuple[tuple[str, ...], ...] = ()

    def overlap_at(self, progress: float) -> int:
        """Inner steps between a contribution that is sent here and the step at which its result is due."""
        whole_round = self.in_flight != "keep"
        return overlap_steps_at(self.overlap_steps, self.inner_steps(progress), whole_round=whole_round)

    @property
    def num_states(self) -> int:
        """Number of state vectors that the outer step keeps beside the anchor."""
        return self.outer_at(0.0).num_states

    @property
    def result_codec(self) -> Codec:
        """How the sum of the contributions is sent back: elementwise, and always rounded to nearest."""
        return self.result or result_codec_of(self.codec)


def result_codec_of(codec: Codec) -> Codec:
    """Return the codec for the results of a run whose contributions have this one.

    Everybody applies the result and nobody keeps what it lost, so every value must arrive: codecs that are not
    elementwise are replaced by int8. Those that round at random are replaced by their nearest form: averaging over
    members, which makes up for the randomness, is over by then.
    """
    if not codec.elementwise:
        return Int8(backend=codec.backend)
    nearest = {Int8.codec_id: Int8, Int4.codec_id: Int4}.get(codec.codec_id)
    return codec if nearest is None else nearest(codec.block, codec.backend)


def with_warmup_sync(strategy: Strategy, share: float) -> Strategy:
    """Return the strategy with plain averaging after every inner step while progress < `share`.

    The states of the outer step stay as they are (zero) until then. Source: DiLoCo (arXiv 2311.08105), section 3.1,
    starts from a model trained synchronously. Raises ValueError for a strategy that sends gradients: it is
    synchronous already.
    """
    if share == 0.0:
        return strategy
    if strategy.contribution != "displacement":
        raise SettingError(
            f"strategy.warmup_sync = {share}: strategy {strategy.name!r} is synchronous throughout; remove the key"
        )
    average = Average(num_states=strategy.num_states)
    return replace(
        strategy,
        inner_steps=lambda progress: 1 if progress < share else strategy.inner_steps(progress),
        outer_at=lambda progress: average if progress < share else strategy.outer_at(progress),
    )
