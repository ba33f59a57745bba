"""What every process of a pipeline is told (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strategies.config import CodecConfig, StrategyConfig
from strategies.swarm import Stage
from workers.config import DataConfig, EvalConfig, TrainConfig
from workers.model.shape import DecoderShape, parameter_shapes
from workers.pipeline.config import PipelineConfig
from workers.pipeline.layer_table import LayerTable

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
EMBEDDING_WEIGHT = "model.embed_tokens.weight"
TIED = "tied"
CHUNK_VALUES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSpec:
    """The cut model and all settings; the same in every process of a run.

    `factory`: of a model that is a list of layers, which `table` describes; `shape` then says only the samples' length.
    """

    run_id: str
    run_dir: Path
    pack: Path
    shape: DecoderShape
    stages: tuple[Stage, ...]
    pipeline: PipelineConfig
    train: TrainConfig
    data: DataConfig
    codec: CodecConfig
    strategy: StrategyConfig
    eval: EvalConfig
    num_validation: int
    total_steps: int
    factory: str | None = None
    factory_digest: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    table: LayerTable | None = None
    connections: int = 2
    chunk_values: int = CHUNK_VALUES

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.stages)

    @property
    def is_local(self) -> bool:
        """Whether peers make steps of their own, and their stage synchronises after some of them."""
        return self.strategy.name != "ddp"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter of the whole model -> shape."""
        if self.factory is None:
            return parameter_shapes(self.shape)
        assert self.table is not None, "a list of layers has a table"
        return self.table.shapes

    @property
    def is_tied(self) -> bool:
        """Whether two stages hold the embedding matrix."""
        return self.factory is None and self.shape.tie_embeddings and self.num_stages > 1

    def units_of(self, stage: int) -> tuple[str, ...]:
        """The vectors that the stage's state consists of: its own, and the tied matrix in the first and last stage."""
        own = (unit_of(stage),) if self.slots(unit_of(stage)) else ()
        return (*own, TIED) if self.is_tied and stage in (0, self.num_stages - 1) else own

    @property
    def units(self) -> tuple[str, ...]:
        """All vectors that are reduced in a step."""
        return tuple(dict.fromkeys(unit for stage in range(self.num_stages) for unit in self.units_of(stage)))

    def stages_of(self, unit: str) -> tuple[int, ...]:
        """The stages that contribute to a unit; the owner of the tied matrix first."""
        return (self.num_stages - 1, 0) if unit == TIED else (int(unit.removeprefix("stage-")),)

    def slots(self, unit: str) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, in the order of the flat vector."""
        shapes = self.shapes
        if unit == TIED:
            return {EMBEDDING_WEIGHT: shapes[EMBEDDING_WEIGHT]}
        stage = self.stages[int(unit.removeprefix("stage-"))]
        names = [name for name in shapes if _is_in(name, stage.names, self.shape.tie_embeddings)]
        return {name: shapes[name] for name in names if not (self.is_tied and name == EMBEDDING_WEIGHT)}

    def num_values(self, unit: str) -> int:
        """Length of the flat vector."""
        total = 0
        for shape in self.slots(unit).values():
            size = 1
            for side in shape:
                size *= side
            total += size
        return total

    def chunks(self, unit: str) -> list[slice]:
        """The flat vector in pieces of equal length."""
        num = self.num_values(unit)
        return [slice(start, min(start + self.chunk_values, num)) for start in range(0, num, self.chunk_values)]


def unit_of(stage: int) -> str:
    """Name of the vector of a stage's own parameters."""
    return f"stage-{stage}"


def _is_in(name: str, layers: Sequence[str], tied: bool) -> bool:
    if name == EMBEDDING_WEIGHT:
        return EMBEDDING in layers or (tied and HEAD in layers)
    if name in ("lm_head.weight", "model.norm.weight"):
        return HEAD in layers
    return any(name.startswith(f"{layer}.") for layer in layers)
