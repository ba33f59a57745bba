"""What a pipeline tells monitoring systems and whoever is to be woken: the same outlets as those of islands."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.alarms import Alarm, Alarms
from orchestrator.pipeline.brain import PipelineBrain
from orchestrator.pipeline.commands import StepDone
from orchestrator.telemetry.catalogue import Sample, sample
from orchestrator.telemetry.telemetry import Outlets
from workers.records import EvaluationRecord, FaultRecord, Record

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.pipeline.figures import Figures


class PipelineTelemetry(Outlets):
    """See the module; `figures` are the controller's, which peers report to."""

    def __init__(self, config: RunConfig, run_dir: Path, figures: Figures, *, seq_len: int) -> None:
        """Nothing is opened before `open`."""
        super().__init__(config, run_dir)
        self._figures, self._run, self._seq_len = figures, run_dir.name, seq_len
        self._newest: StepDone | None = None
        self._num_steps = self._num_rows = 0
        self._faults: Counter[str] = Counter()
        self._val_loss: float | None = None

    # ------------------------------------------------------------ what happens

    def records(self, records: Sequence[Record], brain: PipelineBrain) -> None:
        """Rows were written into the journal."""
        self._num_rows += len(records)
        for record in records:
            match record:
                case FaultRecord(fault=fault):
                    self._faults[fault] += 1
                case EvaluationRecord(val_loss=loss) if loss is not None:
                    self._val_loss = loss
                    self._track({"run/val_loss": loss}, brain)

    def step_done(self, done: StepDone, brain: PipelineBrain) -> None:
        """A step was committed."""
        self._newest, self._num_steps = done, self._num_steps + 1
        values = {"run/step_s": done.seconds, "run/attempts": float(done.attempts)}
        if math.isfinite(done.loss):
            values["run/loss"] = done.loss
        for stage in range(brain.layout.num_stages):
            speeds = [peer.throughput for peer in brain.roster.serving(stage) if peer.throughput is not None]
            values[f"stage-{stage}/forwards_per_s"] = math.fsum(speeds)
            values[f"stage-{stage}/peers"] = float(len(brain.roster.serving(stage)))
        self._track(values, brain)

    def _track(self, values: dict[str, float], brain: PipelineBrain) -> None:
        for tracker in self.trackers:
            tracker.note(values, self._tokens(brain))

    def _tokens(self, brain: PipelineBrain) -> int:
        return brain.held_version * brain.plan.pipeline.samples_per_step * self._seq_len

    # ------------------------------------------------------------ samples

    def tick(self, brain: PipelineBrain, now_s: float) -> None:
        """See `publish`."""
        self.publish(lambda: tuple(self.samples(brain, now_s)), now_s)

    def samples(self, brain: PipelineBrain, now_s: float) -> Iterator[Sample]:
        """Everything that is known now; who is gone has no samples."""
        run, live = self._run, len(brain.roster.peers) + len(brain.roster.trainers)
        yield sample("run_seconds", now_s, run)
        yield sample("progress_ratio", min(brain.held_version / brain.plan.total_steps, 1.0), run)
        yield sample("tokens_committed", self._tokens(brain), run)
        yield sample("live_members", live, run)
        yield sample("sent_bytes", self._figures.bytes_sent, run)
        yield sample("journal_rows", self._num_rows, run)
        yield sample("pipeline_steps", self._num_steps, run)
        yield sample("pipeline_moves", len(brain.moves), run)
        if self._val_loss is not None:
            yield sample("validation_loss", self._val_loss, run)
        if self._newest is not None:
            yield sample("pipeline_loss", self._newest.loss, run)
            yield sample("pipeline_step_seconds", self._newest.seconds, run)
        for fault, num in sorted(self._faults.items()):
            yield sample("faults", num, run, fault)
        for stage in self._figures.stages(brain):
            yield from self._of_stage(stage, brain)

    def _of_stage(self, stage: dict[str, object], brain: PipelineBrain) -> Iterator[Sample]:
        run, name, serving = self._run, str(stage["stage"]), stage["serving"]
        assert isinstance(serving, list), stage
        yield sample("version", brain.held_version, run, name)
        yield sample("stage_peers", len(serving), run, name)
        buddies = stage["buddies"]
        yield sample("stage_buddies", len(buddies) if isinstance(buddies, list) else 0, run, name)
        for peer in serving:
            of = (run, name, str(peer["peer"]))
            yield sample("peer_queue", peer["queue"], *of)
            for short, value in (
                ("peer_forwards_per_second", peer["throughput"]),
                ("peer_memory_bytes", peer["memory_bytes"]),
                ("peer_busy_seconds", self._figures.busy_s(str(peer["peer"]).partition(".")[0])),
            ):
                if value is not None:
                    yield sample(short, value, *of)


class PipelineAlarms:
    """What somebody wants to be woken for; below its quorum is a pipeline of which a stage is served by nobody."""

    def __init__(self, alarms: Alarms) -> None:
        self._alarms = alarms

    def on_records(self, records: Sequence[Record], now_s: float) -> list[Alarm]:
        """Rows were written into the journal."""
        return [alarm for record in records for alarm in self._alarms.on_record(record, now_s)]

    def on_step(self, done: StepDone, now_s: float) -> list[Alarm]:
        """A step was committed."""
        return self._alarms.on_metric({"kind": "step", "member": "", "loss": done.loss}, now_s)

    def on_time(self, brain: PipelineBrain, now_s: float) -> list[Alarm]:
        """Time passed."""
        empty = [str(s) for s in range(brain.layout.num_stages) if not brain.roster.serving(s)]
        lacks = f"nobody serves stage {' and '.join(empty)}" if empty else ""
        if not brain.roster.trainers:
            lacks = f"{lacks}; no trainer is there" if lacks else "no trainer is there"
        return self._alarms.on_lack(lacks, now_s, started=brain.begun)
