"""`atoll status` and `atoll ledger` of a pipeline: read from its directory alone (no Ray, no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.config import load_config
from orchestrator.pipeline.figures import newest_line
from orchestrator.pipeline.replay import PipelineHistory, replay
from orchestrator.rundir import RunDir, read_json
from orchestrator.segments import read_run, segment_paths
from orchestrator.status import Status
from workers.records import Scalar

EXIT_WRONG = 5


class PeerStatus(BaseModel):
    """One peer that serves a stage."""

    model_config = ConfigDict(frozen=True)

    peer: str
    throughput: float | None = Field(description="Forwards a second, as trainers measure it (a backward is 2.5).")
    queue: int = Field(description="Calls that trainers have sent to it and it has not answered.")
    memory_bytes: int | None = Field(description="Memory that its process has; null: not asked yet.")
    memory_limit_bytes: int = Field(description="Memory that a stage may take of it.")
    why: str = Field(description="Why it serves this stage.")


class StageStatus(BaseModel):
    """One stage as the newest step shows it."""

    model_config = ConfigDict(frozen=True)

    stage: int
    params: int
    bytes: int = Field(description="Memory that a peer needs for it.")
    peers: dict[str, float | None] = Field(
        description="Peers that serve it, with their measured throughput in forwards a second (a backward is 2.5)."
    )
    serving: list[PeerStatus] = Field(default=[], description="The same peers with queue, memory and reason.")
    buddies: list[str] = Field(description="Processes of other stages that keep a copy of its state.")
    moving_here: list[str] = Field(description="Processes that pull its state and will serve it.")


class PipelineStatus(BaseModel):
    """How a run with stages stands."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    run_dir: str
    state: str = Field(description="running, interrupted, done, stopped or failed.")
    paused: bool = Field(False, description="Whether the run is paused: no further step is begun.")
    settings: dict[str, Scalar] = Field(default_factory=dict, description="What `atoll set` changed since the start.")
    rollbacks: int = Field(0, description="How often the run went back to an older version.")
    seconds: float = Field(description="Run time at the newest step, seconds.")
    version: int = Field(description="Steps that are committed in every stage.")
    total_samples: int = Field(description="Samples that are committed in every stage.")
    loss: float | None = Field(description="Training loss of the newest step, nats per token.")
    val_loss: float | None = Field(default=None, description="Newest validation loss, nats per token.")
    step_s: float | None = Field(description="Seconds that the newest step took.")
    num_begun_again: int = Field(description="Steps that were begun anew: a trainer or the controller had died.")
    stages: list[StageStatus]
    moves: list[str] = Field(description="Moves of peers between stages, with their reasons.")
    why_no_move: str = Field(description="What the rebalancer said when it last looked.")


class PipelineLedger(BaseModel):
    """What the journal of a run with stages adds up to."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    steps: int = Field(description="Steps that are committed in every stage.")
    stages: int
    microbatches_per_step: int
    samples: int = Field(description="Samples that are committed in every stage.")
    steps_begun_again: int = Field(description="Steps that were begun anew: a trainer or the controller had died.")
    steps_taken_back: int = Field(description="Steps that a snapshot took back.")
    committed_by_stage: list[int] = Field(description="Microbatches that are committed in each stage.")
    lost_by_stage: list[int] = Field(
        description="Microbatches of each stage that were lost with peers that make steps of their own (DiLoCo)."
    )
    partial_by_stage: list[int] = Field(
        description="Of what was lost the same way with fragments: microbatches that some of them have committed."
    )
    open_by_stage: list[int] = Field(
        description="Microbatches of each stage that peers have stepped on and not every fragment has committed yet."
    )
    peers_fenced_for_a_step: int = Field(description="How often a peer was left out of a step.")
    findings: list[str] = Field(description="What does not add up; empty if every microbatch counts once.")


def read_answer(values: Mapping[str, Any]) -> Status | PipelineStatus:
    """What a controller says of its run: of islands or of stages."""
    return PipelineStatus.model_validate(values) if "stages" in values else Status.model_validate(values)


def is_pipeline_run(run_dir: Path) -> bool:
    """Whether the run in a directory has stages."""
    config = RunDir(run_dir).config
    return config.exists() and load_config(config).config.pipeline.stages is not None


def read_history(run_dir: Path) -> PipelineHistory:
    """The journal's replay; raises JournalError if it is damaged."""
    rows = read_run(run_dir).rows if segment_paths(run_dir) else ()
    return replay(row.record for row in rows)


def read_pipeline_status(run_dir: Path) -> PipelineStatus:
    """Status of the run in `run_dir`."""
    directory, history, newest = RunDir(run_dir), read_history(run_dir), newest_line(run_dir)
    return PipelineStatus(
        run_dir=str(run_dir),
        state=directory.state(),
        paused=history.paused,
        settings=history.settings,
        rollbacks=len(history.rollbacks),
        seconds=newest.get("t_s", 0.0),
        version=history.version,
        total_samples=history.num_samples,
        loss=newest.get("loss"),
        val_loss=history.evaluations[-1].val_loss if history.evaluations else None,
        step_s=newest.get("seconds"),
        num_begun_again=history.num_begun_again,
        stages=[StageStatus.model_validate(stage) for stage in newest.get("stages", [])],
        moves=history.moves,
        why_no_move=newest.get("no_move", ""),
    )


def render_pipeline(status: PipelineStatus) -> Any:
    """A table for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    validated = "-" if status.val_loss is None else f"{status.val_loss:.4f}"
    loss = "-" if status.loss is None else f"{status.loss:.4f} nats per token"
    took = "" if status.step_s is None else f", the last step took {status.step_s:.2f} s"
    table = Table("stage", "parameters", "needs", "peer", "forwards/s", "queue", "memory", "why", "buddy")
    for stage in status.stages:
        own = (str(stage.stage), f"{stage.params:,}", f"{stage.bytes / 1e6:,.1f} MB")
        buddies = ", ".join(stage.buddies) or "-"
        for place, peer in enumerate(stage.serving):
            rate = "not measured" if peer.throughput is None else f"{peer.throughput:.2f}"
            memory = "-" if peer.memory_bytes is None else f"{peer.memory_bytes / 1e6:,.0f} MB"
            first = own if place == 0 else ("", "", "")
            table.add_row(*first, peer.peer, rate, str(peer.queue), memory, peer.why, "" if place else buddies)
        if not stage.serving:
            table.add_row(*own, "nobody", "-", "-", "-", "-", buddies)
        for process in stage.moving_here:
            table.add_row("", "", "", process, "-", "-", "-", "is coming", "")
    parts: list[Any] = [
        Text(f"{status.run_dir}: {status.state}" + (", paused" if status.paused else "")),
        Text(f"step {status.version}, {status.total_samples:,} samples, {status.seconds:.0f} s{took}"),
        Text(f"training loss {loss}, validation loss {validated}"),
        table,
    ]
    if status.settings:
        parts.append(Text("set since: " + ", ".join(f"{key} = {value}" for key, value in status.settings.items())))
    parts += [Text(f"moved: {move}") for move in status.moves]
    if status.why_no_move:
        parts.append(Text(f"loads: {status.why_no_move}"))
    return Group(*parts)


def pipeline_ledger(run_dir: Path, as_json: bool) -> int:
    """Print what a journal adds up to: each microbatch once in every stage; 5 if it does not, else 0."""
    history = read_history(run_dir)
    findings = [*history.findings, *_against_summary(run_dir, history)]
    if as_json:
        told = PipelineLedger(
            steps=history.version,
            stages=history.num_stages,
            microbatches_per_step=history.num_microbatches,
            samples=history.num_samples,
            steps_begun_again=history.num_begun_again,
            steps_taken_back=history.num_taken_back,
            committed_by_stage=[_committed(history, stage) for stage in range(history.num_stages)],
            lost_by_stage=[history.lost.get(stage, 0) for stage in range(history.num_stages)],
            partial_by_stage=[history.partial.get(stage, 0) for stage in range(history.num_stages)],
            open_by_stage=[history.own_by_stage.get(stage, 0) for stage in range(history.num_stages)],
            peers_fenced_for_a_step=len(history.fenced),
            findings=findings,
        )
        print(told.model_dump_json(indent=2))
        return EXIT_WRONG if findings else 0
    counted = sum(_committed(history, stage) for stage in range(history.num_stages))
    print(f"{history.version} steps of {history.num_microbatches} microbatches in {history.num_stages} stages")
    print(f"{counted:,} times a microbatch was counted in a stage; {history.num_samples:,} samples")
    print(f"{history.num_begun_again} steps were begun anew, {history.num_taken_back} were taken back by a snapshot")
    print(f"{len(history.fenced)} times a peer was left out of a step")
    for stage in sorted(history.lost.keys() | history.partial.keys() | history.own_by_stage.keys()):
        open_, lost = history.own_by_stage.get(stage, 0), history.lost.get(stage, 0)
        partial = f" and {part} are in some fragments alone" if (part := history.partial.get(stage, 0)) else ""
        print(f"stage {stage}: {lost} microbatches went with peers that died{partial}, {open_} are not committed yet")
    for finding in findings:
        print(f"wrong: {finding}")
    exact = "every microbatch counts once in every stage" + (
        ", or is lost there" if history.lost or history.partial else ""
    )
    print(exact if not findings else "the journal does not add up")
    return EXIT_WRONG if findings else 0


def _committed(history: PipelineHistory, stage: int) -> int:
    if history.sync_steps:
        return history.committed.get(stage, 0)
    return history.version * history.num_microbatches


def _against_summary(run_dir: Path, history: PipelineHistory) -> list[str]:
    summary = read_json(RunDir(run_dir).summary)
    stated, seq_len = summary.get("tokens_committed"), summary.get("seq_len")
    if not isinstance(stated, int) or not isinstance(seq_len, int) or stated == history.num_samples * seq_len:
        return []
    return [f"summary.json says {stated:,} tokens, the journal {history.num_samples * seq_len:,}"]
