"""Settings of strategies and codecs (no torch here: the controller and the command line read them)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from strategies.qsr import quadratic_steps

# Marks a field that `atoll set` changes while a run goes on.
LIVE: dict[str, JsonValue] = {"live": True}


class Section(BaseModel):
    """Base of every section of a run configuration: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


StrategyName = Literal[
    "diloco",
    "ddp",
    "streaming",
    "eager",
    "delayed",
    "muloco",
    "sparseloco",
    "async-dn",
    "decoupled",
    "noloco",
    "gossip",
]
Patterns = list[Annotated[list[str], Field(min_length=1)]]

DELAYED = ("eager", "delayed")
"""Strategies whose contributions are applied a whole round later."""

GOSSIP = ("noloco", "gossip")
"""Strategies whose members meet in pairs or groups between two exchanges of all."""

REMEMBERING = ("nesterov", "heavy-ball")
"""Values of `outer` whose state is a sum over earlier results that fades."""

OVERLAPPING = ("streaming", "decoupled")
"""Strategies that train on for `overlap_steps` while a fragment is under way."""


class StrategyConfig(Section):
    """`[strategy]`: when members synchronise and what the outer step does with the result."""

    name: StrategyName = Field("diloco", description="Synchronisation algorithm.")
    inner_steps: int = Field(
        100,
        ge=1,
        le=1_000_000,
        description="Local optimizer steps between synchronisations (H).",
        json_schema_extra=LIVE,
    )
    outer: Literal["nesterov", "average", "sgd", "heavy-ball", "adam"] = Field(
        "nesterov", description="Outer optimizer; 'average' is plain parameter averaging."
    )
    outer_lr: float = Field(0.7, gt=0, le=10, description="Learning rate of the outer step.", json_schema_extra=LIVE)
    outer_momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of the outer step; of Adam, beta 1.")
    outer_beta2: float = Field(0.95, ge=0, lt=1, description="Outer Adam: decay of the second moment.")
    outer_eps: float = Field(0.1, gt=0, le=1, description="Outer Adam: added to the denominator.")
    num_fragments: int = Field(1, ge=1, le=4096, description="Number of fragments that are synchronised separately.")
    pattern: Literal["sequential", "strided"] = Field("strided", description="How layers are dealt to fragments.")
    fragments: Patterns = Field(
        default_factory=list,
        description="Fragments of your own: for each a list of patterns of parameter names (`*` and `?`), the first "
        "that fits decides; takes the place of num_fragments and pattern.",
    )
    overlap_steps: int = Field(
        0, ge=0, le=1_000_000, description="streaming, decoupled: local steps made while a fragment is under way (tau)."
    )
    merge_alpha: float = Field(
        0.0, ge=0, le=1, description="streaming, decoupled: weight of the local parameters when a result is applied."
    )
    merge_kappa: float = Field(
        1.0,
        ge=0,
        le=1,
        description="streaming, decoupled: share that is kept of the steps made while a fragment was under way; as "
        "published: equal to merge_alpha.",
    )
    momentum_every: int = Field(
        8, ge=1, le=4096, description="async-dn: versions between two uses of the momentum (N), the number of islands."
    )
    momentum_spread: float = Field(
        0.0, ge=0, le=1, description="async-dn: weight of the momentum in between (c), at most 1 / momentum_every."
    )
    aggregate: Literal["mean", "radial"] = Field(
        "mean", description="decoupled: weighted mean, or mean length and mean direction (radial-directional average)."
    )
    grace_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="decoupled: share of the time to spare until a result is due in which late members are waited for.",
    )
    merge_every: int = Field(
        10, ge=2, le=1_000_000, description="noloco, gossip: rounds of inner_steps from one full merge to the next."
    )
    topology: Literal["random", "exponential", "ring", "near"] = Field(
        "random",
        description="noloco, gossip: who meets whom: random groups, one-peer exponential, a ring in turns, or random "
        "groups of near members in some rounds (keep_gap).",
    )
    group_size: int = Field(2, ge=2, le=64, description="noloco, gossip: members of a group, random or near.")
    keep_gap: float = Field(
        0.5,
        gt=0,
        le=1,
        description="topology near: share of the rounds that draw from all members, and of the spectral gap of random "
        "groups that is kept at least.",
    )
    near_label: str = Field(
        "region",
        min_length=1,
        description="topology near: near are machines with the same value of this label (atoll join --label); islands "
        "of a machine without it are near each other.",
    )
    gossip_steps: int = Field(
        1, ge=1, le=16, description="gossip: meetings with one partner after another at each send point."
    )
    gamma: float = Field(0.7, gt=0, le=10, description="noloco: pull of a member's anchor towards its group's mean.")
    pair_timeout_s: float = Field(
        3.0, gt=0, le=600, description="noloco, gossip: seconds after which a partner that does not come is skipped."
    )
    qsr_alpha: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Quadratic synchronisation rule: H = (qsr_alpha / learning rate)^2, at least inner_steps; 0: off.",
    )
    qsr_max_steps: int = Field(10_000, ge=1, le=1_000_000, description="Quadratic synchronisation rule: largest H.")
    warmup_sync: float = Field(
        0.0, ge=0, le=1, description="Share of the run's tokens trained with averaging after every step first."
    )

    @property
    def total_fragments(self) -> int:
        """Number of fragments, by whichever setting."""
        return len(self.fragments) or self.num_fragments

    @property
    def own_pace(self) -> bool:
        """Whether members push when they have made their steps, and wait for nobody."""
        return self.name == "async-dn"

    @property
    def in_pairs(self) -> bool:
        """Whether members meet in pairs or groups between two exchanges of all."""
        return self.name in GOSSIP

    @property
    def delay(self) -> int:
        """Rounds between a contribution and the outer step that has it."""
        return 1 if self.name in DELAYED else 0

    def inner_steps_at(self, progress: float, rate: Callable[[float], float] | None = None, warmup: float = 0.0) -> int:
        """Local steps of a round that starts at `progress` (0 to 1): a function of nothing else, so that all agree.

        `rate` (progress -> inner learning rate, whose warm-up ends at `warmup`) is for the quadratic rule, which
        without it is off.
        """
        if self.name == "ddp" or progress < self.warmup_sync:
            return 1
        if self.in_pairs:
            return self.inner_steps * self.merge_every
        if rate is None or self.qsr_alpha == 0:
            return self.inner_steps
        return quadratic_steps(
            rate(max(progress, warmup)), alpha=self.qsr_alpha, least=self.inner_steps, most=self.qsr_max_steps
        )


# Values that share one scale where `codec.block` is not set: `int8` has room for outliers, 4 bits have not.
DEFAULT_BLOCKS = {
    "int8": 4096,
    "int8-stochastic": 4096,
    "int4": 256,
    "int4-stochastic": 256,
    "fp4": 256,
    "e3m0": 256,
    "sign": 4096,
    "topk": 4096,
}


class CodecConfig(Section):
    """`[codec]`: how values become bytes on the wire."""

    name: Literal[
        "fp32", "bf16", "int8", "int8-stochastic", "int4", "int4-stochastic", "fp4", "e3m0", "sign", "topk"
    ] = Field(
        "int8",
        description="Encoding of contributions, and of results unless it is sign or topk (then int8).",
        json_schema_extra=LIVE,
    )
    block: int | None = Field(
        None, ge=32, le=1 << 20, description="Values that share one scale; unset: 256 with 4 bits a value, else 4096."
    )
    backend: Literal["auto", "torch", "numba", "triton"] = Field(
        "auto",
        description="Implementation, all with the same bytes; auto: numba where it is installed, which runs on CPUs. "
        "triton: on GPUs, for int8, int4, fp4, e3m0.",
    )
    error_feedback: bool = Field(False, description="Keep what the codec lost and add it to the next contribution.")
    feedback_decay: float = Field(1.0, gt=0, le=1, description="Decay of the error-feedback residual.")

    @property
    def values_per_block(self) -> int:
        """Values that share one scale; 1 for codecs without blocks. Chunks are multiples of it."""
        default = DEFAULT_BLOCKS.get(self.name)
        return 1 if default is None else self.block or default
