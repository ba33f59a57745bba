"""What a pipeline costs on given links: bytes of each stage, seconds of a step, utilisation, memory. Pure arithmetic.

Bytes are exact but for headers: what `TrainerHost` and `PeerHost` send for each microbatch, and what the peers of a
stage send each other. Seconds are a model. A stage computes in proportion to its parameters, each peer at the speed of
one island of the case, links carry while peers compute, and the slower of the two is what a microbatch takes. Filling
the pipeline is waited for, and synchronising unless updates are delayed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from orchestrator.pipeline.plan import (
    BYTES_PER_VALUE,
    PAYLOAD_HEADER_BYTES,
    activation_bytes,
    cut_model,
    outer_states,
    pipeline_size,
)
from orchestrator.planner import ARITHMETIC_BYTES_PER_S, FP32, LINK_SHARE, ROUND_TRIPS, Case, codecs_of, payload_bytes
from strategies.errors import SettingError
from strategies.swarm import Stage, peer_bytes, trainer_bytes
from workers.pipeline.costs import tensors_of
from workers.pipeline.spec import CHUNK_VALUES

if TYPE_CHECKING:
    from orchestrator.config import RunConfig

# Of one pass through a stage: a forward, and a backward that is twice as much; it runs the forward again.
FORWARD, BACKWARD = 1, 3
PASS = 3
# A call and its tensor: the request with the fetch of its input, the reply with the fetch of its output.
CALL_ROUND_TRIPS = 2


class StageCost(BaseModel):
    """One stage of a pipeline that is planned."""

    stage: int
    params: int = Field(description="Parameters of the stage.")
    compute_s: float = Field(description="Seconds that one peer computes for a microbatch, forward run twice.")
    boundary_bytes: int = Field(description="Activations and their gradients that a peer sends and receives in a step.")
    gradient_bytes: int = Field(description="What a peer sends to the others of its stage when they synchronise.")
    memory_bytes: int = Field(description="Memory of one peer.")


class PipelineRow(BaseModel):
    """One pipeline of a plan."""

    preset: str
    strategy: str = Field(description="strategy.name")
    codec: str = Field(description="codec.name: between the peers of a stage.")
    boundary: str = Field(description="pipeline.boundary: between stages.")
    peers: int = Field(description="Stage peers, of all stages.")
    trainers: int
    inner_steps: int = Field(description="Steps between two synchronisations.")
    step_s: float = Field(description="Seconds of a step, its share of a synchronisation included.")
    sync_s: float = Field(description="Seconds of a synchronisation, of one fragment where there are several.")
    utilisation: float = Field(description="Expected share of the time in which peers compute, 0 to 1.")
    peer_bytes_per_step: int = Field(
        description="What the busiest peer sends or receives in a step, whichever is more."
    )
    trainer_bytes_per_step: int = Field(description="The same of a trainer.")
    needs_bit_per_s: float = Field(description="The larger of these over the seconds of a step, bits a second.")
    memory_bytes: int = Field(description="Memory of the largest peer.")
    trainer_memory_bytes: int = Field(description="Boundary tensors that a trainer keeps.")
    stages: list[StageCost]


def pipeline_cost(preset: str, config: RunConfig, case: Case) -> PipelineRow:
    """The costs of a configuration with stages. Raises SettingError where the case's model cannot be cut so."""
    pipeline = config.pipeline
    assert pipeline.stages is not None, preset
    if case.shape is None:
        raise SettingError("what crosses its boundaries depends on the model's width: give RUN in place of --params")
    shape, num_stages, mates = case.shape, pipeline.stages, pipeline.peers
    stages = cut_model(shape, pipeline)
    size = pipeline_size(shape, pipeline, outer_states=outer_states(config))
    widest = activation_bytes(shape, pipeline, stages)
    largest = max(stage.num_params for stage in stages)
    values = pipeline.microbatch_size * shape.seq_len * shape.dim
    tensor_bytes = int(values * BYTES_PER_VALUE[pipeline.boundary]) + PAYLOAD_HEADER_BYTES
    rate = case.link_bit_per_s * LINK_SHARE
    per_peer = pipeline.microbatches / mates
    pass_s = case.step_s / case.step_samples * pipeline.microbatch_size / PASS
    total = sum(stage.num_params for stage in stages)
    rows, slowest_s, latency_s, computed_s, sync_s, most = list[StageCost](), 0.0, 0.0, 0.0, 0.0, 0.0
    steps = 1 if config.strategy.name == "ddp" else config.strategy.inner_steps
    parts, overlap = config.strategy.num_fragments, config.strategy.overlap_steps
    for stage in stages:
        calls = BACKWARD + (FORWARD if stage.index < num_stages - 1 else 0)
        compute_s = calls * pass_s * stage.num_params / total
        crossing = tensors_of(stage.index, num_stages)
        link_s = 8 * max(crossing.sent, crossing.received) * tensor_bytes / rate
        gradient = gradient_bytes(config, stage, ordered=size.ordered)
        added = stage.num_params * (pipeline.microbatches if size.ordered else mates) / mates
        seconds = ROUND_TRIPS * case.rtt_s + (8 * gradient / rate + FP32 * added / ARITHMETIC_BYTES_PER_S) / parts
        slowest_s = max(slowest_s, per_peer * max(compute_s, link_s))
        latency_s += compute_s + CALL_ROUND_TRIPS * (2 if stage.index < num_stages - 1 else 1) * case.rtt_s + link_s
        computed_s += pipeline.microbatches * compute_s
        sync_s = max(sync_s, seconds)
        most = max(most, per_peer * max(crossing.sent, crossing.received) * tensor_bytes + gradient / steps)
        rows.append(
            StageCost(
                stage=stage.index,
                params=stage.num_params,
                compute_s=compute_s,
                boundary_bytes=int(per_peer * (crossing.sent + crossing.received) * tensor_bytes),
                gradient_bytes=gradient,
                memory_bytes=peer_bytes(stage, size, activation_bytes=widest, buddy_params=largest),
            )
        )
    each = [tensors_of(stage, num_stages) for stage in range(num_stages)]
    through = max(sum(one.sent for one in each), sum(one.received for one in each))
    trainer = through * tensor_bytes * pipeline.microbatches // pipeline.trainers
    in_turns = -(-pipeline.microbatches // (pipeline.in_flight * pipeline.trainers))
    through_s = max(slowest_s + latency_s, in_turns * latency_s, 8 * trainer / rate)
    waits_s = max(sync_s - overlap * through_s, 0.0) * parts / steps  # for each fragment, once in a round
    step_s = max(through_s, sync_s) if pipeline.delayed else through_s + waits_s
    return PipelineRow(
        preset=preset,
        strategy=config.strategy.name,
        codec=config.codec.name,
        boundary=pipeline.boundary,
        peers=pipeline.num_peers,
        trainers=pipeline.trainers,
        inner_steps=steps,
        step_s=step_s,
        sync_s=sync_s,
        utilisation=min(computed_s / (pipeline.num_peers * step_s), 1.0),
        peer_bytes_per_step=int(most),
        trainer_bytes_per_step=trainer,
        needs_bit_per_s=8 * max(most, trainer) / step_s,
        memory_bytes=max(row.memory_bytes for row in rows),
        trainer_memory_bytes=trainer_bytes(num_stages, size),
        stages=rows,
    )


def gradient_bytes(config: RunConfig, stage: Stage, *, ordered: bool) -> int:
    """What one peer of a stage sends when its peers synchronise: to the owners, and its sums to who holds the stage.

    `ordered`: the gradient of each microbatch by itself, so that they are added in their order (ADR 33).
    """
    contribution, result = codecs_of(config.codec)
    chunk = config.exchange.chunk_values or CHUNK_VALUES
    mates = config.pipeline.peers
    each = payload_bytes(contribution, stage.num_params, chunk)
    parts = config.pipeline.microbatches / mates if ordered else 1
    holders = mates + (1 if config.pipeline.buddies and config.pipeline.stages != 1 else 0)
    sums = payload_bytes(result, stage.num_params, chunk) / mates
    return int(parts * each * (mates - 1) / mates + sums * (holders - 1))
