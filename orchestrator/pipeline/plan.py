"""From a resolved configuration to a pipeline: the cut, its memory, and what the controller decides by."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.pipeline.commands import Layout
from strategies.errors import SettingError
from strategies.swarm import WORKING_COPIES, PipelineSize, Stage, check_pipeline, peer_bytes, split_layers
from workers.config import TrainConfig
from workers.data.index import load_index
from workers.model.shape import DecoderShape, resolve_shape
from workers.pipeline.config import PipelineConfig
from workers.pipeline.costs import decoder_costs
from workers.pipeline.layer_table import LayerTable, read_table
from workers.pipeline.spec import CHUNK_VALUES, PipelineSpec
from workers.schedule import agreed_rate

BYTES_PER_VALUE = {"fp32": 4.0, "bf16": 2.0, "int8": 1.01, "int4": 0.52}
PAYLOAD_HEADER_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """What `PipelineBrain` decides by; `version` and the rest of the second half are where a resumed run begins.

    `eval_every`: share of the run between two evaluations, 0: there is nothing to evaluate with; `evaluated`: the
    version that was evaluated last. `sync_steps`: steps that peers make of their own before their stage synchronises,
    0: none; `num_fragments`: parts of each stage that are synchronised one after the other, each once in so many steps;
    `overlap_steps`: steps that are made while one is under way. `next_fragment`: whose turn it is, `outer_rounds`: how
    often each was synchronised. `probes`: peers measure their links before the first placement. `life`: how often a
    controller began before. `paused`: no step is opened before somebody says so. `left`: not started.
    """

    layout: Layout
    pipeline: PipelineConfig
    peers: tuple[str, ...]
    trainers: tuple[str, ...]
    total_steps: int
    copies: int
    grad_clip: float
    rate: Callable[[int], float]
    snapshots: Path
    start_timeout_s: float = 120.0
    snapshot_every_s: float = 60.0
    max_restarts: int = 20
    version: int = 0
    round_: int = 0
    digests: tuple[str, ...] = ()
    from_folder: str | None = None
    sync_steps: int = 0
    num_fragments: int = 1
    overlap_steps: int = 0
    next_fragment: int = 0
    outer_rounds: tuple[int, ...] = ()
    probes: bool = False
    life: int = 0
    eval_every: float = 0.0
    evaluated: int | None = None
    paused: bool = False
    left: frozenset[str] = frozenset()

    @property
    def delayed(self) -> bool:
        """Whether a step is opened while the update of the one before it is computed."""
        return self.pipeline.delayed

    def relative_speed(self, peer: str) -> float:
        """Speed of a peer that was not measured, in peers that are not slowed down."""
        paces = [self.pipeline.pace_for(name) for name in self.peers]
        least, own = min(paces), self.pipeline.pace_for(peer)
        return least / own if least > 0 and own > 0 else 1.0

    def snapshot_folder(self, version: int) -> str:
        """Where the stages of a version are written; the end of the run has a name of its own."""
        return str(self.snapshots / ("final" if version >= self.total_steps else f"v{version}"))


LIVE = ("strategy.inner_steps", "pipeline.rebalance_s", "pipeline.hysteresis")
"""What `atoll set` changes in a pipeline: nobody but the controller decides by it."""


def with_settings(plan: PipelinePlan, values: Mapping[str, Any]) -> PipelinePlan:
    """The plan with other values of `LIVE` settings."""
    own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("pipeline.")}
    steps = values.get("strategy.inner_steps", plan.sync_steps) if plan.sync_steps else 0
    return replace(plan, sync_steps=steps, pipeline=plan.pipeline.model_copy(update=own))


def peer_name(index: int) -> str:
    """`peer-0`, `peer-1`, ..."""
    return f"peer-{index}"


def trainer_name(index: int) -> str:
    """`trainer-0`, ..."""
    return f"trainer-{index}"


def member_names(pipeline: PipelineConfig) -> tuple[str, ...]:
    """Names of all processes of a run."""
    peers = (peer_name(i) for i in range(pipeline.num_peers))
    return (*peers, *(trainer_name(i) for i in range(pipeline.trainers)))


def cut_model(shape: DecoderShape, pipeline: PipelineConfig, table: LayerTable | None = None) -> tuple[Stage, ...]:
    """The stages of the model, by parameters or by measured time. Raises SettingError for more stages than layers."""
    assert pipeline.stages is not None, "a pipeline has stages"
    if table is None:
        return split_layers(decoder_costs(shape), pipeline.stages)
    costs = table.costs()
    if table.is_decoder:  # with what it knows of the tied matrix
        pairs = zip(decoder_costs(shape), costs, strict=True)
        costs = [replace(known, seconds=measured.seconds) for known, measured in pairs]
    return split_layers(costs, pipeline.stages, by=pipeline.split)


def pipeline_size(
    shape: DecoderShape, pipeline: PipelineConfig, table: LayerTable | None = None, *, outer_states: int | None = None
) -> PipelineSize:
    """What decides how much memory the pipeline takes. `outer_states`: of peers that step on their own, else None."""
    in_sample = shape.seq_len * shape.dim if table is None or table.is_decoder else table.boundary_values
    values = pipeline.microbatch_size * in_sample
    local = outer_states is not None
    # Of its own: gradient of a microbatch, two moments, displacement, residual; of the anchor: itself, its states, the
    # next of all these.
    copies = 5 + 2 * (1 + outer_states) if outer_states is not None else WORKING_COPIES
    buddy_copies = 2 * (1 + outer_states if outer_states is not None else 3)
    return PipelineSize(
        num_microbatches=pipeline.microbatches,
        max_in_flight=pipeline.in_flight,
        boundary_bytes=int(values * BYTES_PER_VALUE[pipeline.boundary]) + PAYLOAD_HEADER_BYTES,
        min_peers=pipeline.min_peers,
        num_open_steps=2 if pipeline.delayed else 1,
        ordered=not local,
        working_copies=copies,
        buddy_copies=buddy_copies if pipeline.buddies and pipeline.stages != 1 else 0,
    )


def activation_bytes(
    shape: DecoderShape, pipeline: PipelineConfig, stages: tuple[Stage, ...], table: LayerTable | None = None
) -> int:
    """What the widest stage keeps of one pass: as measured, or roughly 16 vectors a token and layer, scores, logits."""
    if table is not None:
        saved = [row.saved_bytes + 4 * row.out_values for row in table.rows]
        return pipeline.microbatch_size * max(sum(saved[stage.first : stage.end]) for stage in stages)
    tokens = pipeline.microbatch_size * shape.seq_len
    layers = max(len(stage.names) for stage in stages)
    scores = pipeline.microbatch_size * shape.heads * shape.seq_len * shape.seq_len
    return 4 * (layers * (tokens * (12 * shape.dim + 4 * shape.hidden) + scores) + 3 * tokens * shape.vocab_size)


def check_memory(
    shape: DecoderShape,
    pipeline: PipelineConfig,
    *,
    machine_bytes: int,
    on_one_machine: bool,
    table: LayerTable | None = None,
    outer_states: int | None = None,
) -> tuple[Stage, ...]:
    """Cut the model and refuse, with the numbers, what can never run (`check_pipeline`); returns the stages.

    `machine_bytes` are this machine's. Those of others are known when processes have begun there: `place` refuses then.
    """
    stages = cut_model(shape, pipeline, table)
    limit = pipeline.peer_memory_bytes or (machine_bytes // pipeline.num_processes if on_one_machine else sys.maxsize)
    check_pipeline(
        stages,
        pipeline_size(shape, pipeline, table, outer_states=outer_states),
        peers={peer_name(i): limit for i in range(pipeline.num_peers)},
        trainer_limit_bytes=pipeline.trainer_memory_bytes or machine_bytes // 4,
        activation_bytes=activation_bytes(shape, pipeline, stages, table),
    )
    return stages


def check_fragments(stages: tuple[Stage, ...], num_fragments: int) -> None:
    """Raise SettingError for fragments that no stage has a layer for; one with fewer layers goes without some."""
    most = max(len(stage.names) for stage in stages)
    if num_fragments > most:
        raise SettingError(
            f"strategy.num_fragments = {num_fragments}: a fragment is of whole layers of a stage, and the longest of "
            f"{len(stages)} stages has {most}; set it to {most} or less, or take fewer stages"
        )


def pipeline_spec(config: RunConfig, *, run_id: str, run_dir: Path, pack: Path) -> PipelineSpec:
    """What every process of the run is told."""
    index = load_index(pack)
    shape = resolve_shape(config.model, vocab_size=index.vocab_size, seq_len=index.seq_len)
    table = read_table(run_dir)
    return PipelineSpec(
        run_id=run_id,
        run_dir=run_dir.resolve(),
        pack=pack,
        shape=shape,
        stages=cut_model(shape, config.pipeline, table),
        pipeline=config.pipeline,
        train=config.train,
        data=config.data,
        codec=config.codec,
        strategy=config.strategy,
        eval=config.eval,
        num_validation=index.splits["val"].num_samples,
        total_steps=total_steps(config, index.seq_len),
        factory=config.model.factory,
        factory_digest=config.model.factory_digest,
        options=dict(config.model.options),
        table=table,
        connections=config.exchange.connections,
        chunk_values=config.exchange.chunk_values or CHUNK_VALUES,
    )


def outer_states(config: RunConfig) -> int | None:
    """Vectors of the outer step beside a stage's anchor; None where peers make no steps of their own."""
    if config.strategy.name == "ddp":
        return None
    return {"nesterov": 1, "heavy-ball": 1, "adam": 2}.get(config.strategy.outer, 0)


def total_steps(config: RunConfig, seq_len: int) -> int:
    """Steps until `train.tokens` are committed."""
    return max(-(-config.train.tokens // (config.pipeline.samples_per_step * seq_len)), 1)


def pipeline_plan(config: RunConfig, spec: PipelineSpec, run_dir: Path) -> PipelinePlan:
    """What the controller decides by."""
    size = pipeline_size(spec.shape, config.pipeline, spec.table, outer_states=outer_states(config))
    widest = activation_bytes(spec.shape, config.pipeline, spec.stages, spec.table)
    largest = max(stage.num_params for stage in spec.stages)
    layout = Layout(
        num_stages=spec.num_stages,
        chunks={unit: len(spec.chunks(unit)) for unit in spec.units},
        stages_of={unit: spec.stages_of(unit) for unit in spec.units},
        params=tuple(stage.num_params for stage in spec.stages),
        stage_bytes=tuple(
            peer_bytes(stage, size, activation_bytes=widest, buddy_params=largest) for stage in spec.stages
        ),
        is_tied=spec.is_tied,
        seconds=tuple(stage.seconds for stage in spec.stages) if config.pipeline.split == "time" else (),
        fragment_of={unit: spec.fragment_of(unit) for unit in spec.units},
    )
    return PipelinePlan(
        layout=layout,
        pipeline=config.pipeline,
        peers=tuple(peer_name(i) for i in range(config.pipeline.num_peers)),
        trainers=tuple(trainer_name(i) for i in range(config.pipeline.trainers)),
        total_steps=spec.total_steps,
        copies=config.exchange.copies,
        grad_clip=config.train.grad_clip,
        rate=partial(_rate, train=config.train, total_steps=spec.total_steps),
        snapshots=run_dir / "snapshots",
        start_timeout_s=config.run.start_timeout_s,
        snapshot_every_s=config.run.snapshot_every_s,
        max_restarts=config.run.max_restarts,
        sync_steps=config.strategy.inner_steps if spec.is_local else 0,
        num_fragments=spec.num_fragments,
        overlap_steps=config.strategy.overlap_steps,
        probes=spec.num_stages > 1,
        eval_every=config.eval.every if spec.num_validation else 0.0,
    )


def _rate(step: int, *, train: TrainConfig, total_steps: int) -> float:
    return agreed_rate(step / total_steps, train=train)
