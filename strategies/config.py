"""Settings of strategies and codecs (no torch here: the controller and the command line read them)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

# Marks a field that `atoll set` changes while a run goes on.
LIVE: dict[str, JsonValue] = {"live": True}


class Section(BaseModel):
    """Base of every section of a run configuration: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class StrategyConfig(Section):
    """`[strategy]`: when members synchronise and what the outer step does with the result."""

    name: Literal["diloco", "ddp"] = Field("diloco", description="Synchronisation algorithm.")
    inner_steps: int = Field(
        100,
        ge=1,
        le=1_000_000,
        description="Local optimizer steps between synchronisations (H).",
        json_schema_extra=LIVE,
    )
    outer: Literal["nesterov", "average"] = Field(
        "nesterov", description="Outer optimizer; 'average' is plain parameter averaging."
    )
    outer_lr: float = Field(0.7, gt=0, le=10, description="Learning rate of the outer step.", json_schema_extra=LIVE)
    outer_momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of the outer step.")
    num_fragments: int = Field(1, ge=1, le=4096, description="Number of fragments that are synchronised separately.")
    pattern: Literal["sequential", "strided"] = Field("strided", description="How layers are dealt to fragments.")
    warmup_sync: float = Field(
        0.0, ge=0, le=1, description="Share of the run's tokens trained with averaging after every step first."
    )

    def inner_steps_at(self, progress: float) -> int:
        """Local steps of a round that starts at `progress` (0 to 1): a function of nothing else, so that all agree."""
        return 1 if self.name == "ddp" or progress < self.warmup_sync else self.inner_steps


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
    backend: Literal["auto", "torch", "numba"] = Field(
        "auto", description="Implementation, all with the same bytes; auto: numba where it is installed."
    )
    error_feedback: bool = Field(False, description="Keep what the codec lost and add it to the next contribution.")
    feedback_decay: float = Field(1.0, gt=0, le=1, description="Decay of the error-feedback residual.")

    @property
    def values_per_block(self) -> int:
        """Values that share one scale; 1 for codecs without blocks. Chunks are multiples of it."""
        default = DEFAULT_BLOCKS.get(self.name)
        return 1 if default is None else self.block or default
