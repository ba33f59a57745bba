"""What every process of a pipeline is told (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strategies.config import CodecConfig, StrategyConfig
from strategies.fragments import fragment_of_layer
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
    def num_fragments(self) -> int:
        """Parts of each stage that its peers exchange one after the other (Streaming DiLoCo)."""
        return self.strategy.num_fragments

    def fragment_of(self, unit: str) -> int:
        """The fragment that a unit is in; of the tied matrix, that of the head, whose stage owns it."""
        if unit == TIED:
            return self._layer_fragment(len(self.stages[-1].names) - 1, self.num_stages - 1)
        return int(unit.partition(".")[2] or 0)

    def _layer_fragment(self, layer: int, stage: int) -> int:
        of, pattern = self.num_fragments, self.strategy.pattern
        return fragment_of_layer(layer, len(self.stages[stage].names), num_fragments=of, pattern=pattern)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter of the whole model -> shape."""
        if self.factory is None:
            return parameter_shapes(self.shape)
        assert self.table is not None, "a list of layers has a table"
        return self.table.shapes

    @property
    def boundary_values(self) -> int:
        """Values that cross the widest boundary for one sample."""
        if self.table is None or self.table.is_decoder:
            return self.shape.seq_len * self.shape.dim
        return self.table.boundary_values

    @property
    def is_tied(self) -> bool:
        """Whether two stages hold the embedding matrix."""
        return self.factory is None and self.shape.tie_embeddings and self.num_stages > 1

    def units_of(self, stage: int) -> tuple[str, ...]:
        """The vectors that the stage's state consists of: its own, and the tied matrix in the first and last stage.

        Its own are one for each fragment that some of its layers are in.
        """
        units = (unit_of(stage, fragment, self.num_fragments) for fragment in range(self.num_fragments))
        own = tuple(unit for unit in units if self.slots(unit))
        return (*own, TIED) if self.is_tied and stage in (0, self.num_stages - 1) else own

    @property
    def units(self) -> tuple[str, ...]:
        """All vectors that are reduced in a step."""
        return tuple(dict.fromkeys(unit for stage in range(self.num_stages) for unit in self.units_of(stage)))

    def stages_of(self, unit: str) -> tuple[int, ...]:
        """The stages that contribute to a unit; the owner of the tied matrix first."""
        return (self.num_stages - 1, 0) if unit == TIED else (_stage_of(unit),)

    def slots(self, unit: str) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, in the order of the flat vector."""
        shapes = self.shapes
        if unit == TIED:
            return {EMBEDDING_WEIGHT: shapes[EMBEDDING_WEIGHT]}
        stage, fragment = _stage_of(unit), self.fragment_of(unit)
        layers = [one for at, one in enumerate(self.stages[stage].names) if self._layer_fragment(at, stage) == fragment]
        names = [name for name in shapes if _is_in(name, layers)]
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


def unit_of(stage: int, fragment: int = 0, num_fragments: int = 1) -> str:
    """Name of the vector of a stage's own parameters, or of those in one of its fragments."""
    return f"stage-{stage}" if num_fragments == 1 else f"stage-{stage}.{fragment}"


def _stage_of(unit: str) -> int:
    return int(unit.removeprefix("stage-").partition(".")[0])


def _is_in(name: str, layers: Sequence[str]) -> bool:
    if name == EMBEDDING_WEIGHT:
        return EMBEDDING in layers
    if name in ("lm_head.weight", "model.norm.weight"):
        return HEAD in layers
    return any(name.startswith(f"{layer}.") for layer in layers)
