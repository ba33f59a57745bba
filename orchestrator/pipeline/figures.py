"""What a pipeline measures: one line for each step in `pipeline.jsonl`, the table of its stages, its summary."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.pipeline.brain import PipelineBrain
from orchestrator.pipeline.commands import Finish, StepDone
from orchestrator.pipeline.replay import PipelineHistory
from orchestrator.rundir import RunDir
from orchestrator.summary import FaultRow, Summary, tokens_per_s
from workers.pipeline.spec import PipelineSpec

FILE_NAME = "pipeline.jsonl"


def seconds_so_far(run_dir: Path) -> float:
    """Run time that earlier lives of the controller have seen, by the newest line; 0 for a new run."""
    return float(newest_line(run_dir).get("t_s", 0.0))


def step_lines(run_dir: Path, *, newest_first: bool = False) -> Iterator[dict[str, Any]]:
    """The lines of all steps, in the order in which they were committed; after a rollback some steps come again."""
    path = run_dir / FILE_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in reversed(lines) if newest_first else lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a process that was killed while it wrote
        if isinstance(row, dict):
            yield row


def newest_line(run_dir: Path) -> dict[str, Any]:
    """The newest step's line; empty before the first one."""
    return next(step_lines(run_dir, newest_first=True), {})


class Figures:
    """Of one life of the controller; `seconds` are its own."""

    def __init__(self, config: RunConfig, spec: PipelineSpec, run_dir: RunDir, seq_len: int) -> None:
        self._config, self._spec, self._path, self._seq_len = config, spec, run_dir.path / FILE_NAME, seq_len
        self._first_s: float | None = None
        self._joined_s: float | None = None
        self._steps_s: list[float] = []
        self._memory_bytes: dict[str, int] = {}
        self._peak_bytes: int | None = None
        self._losses: list[float] = []
        self._seconds = 0.0
        self._faults: list[dict[str, Any]] = []
        self._busy_s: dict[str, float] = {}
        self._sent: dict[str, float] = {}
        self._past: defaultdict[tuple[str, str], float] = defaultdict(
            float
        )  # of processes that are gone: what they had said last

    def joined(self, now_s: float) -> None:
        """A process is there; time counts from the first one on."""
        self._joined_s = now_s if self._joined_s is None else self._joined_s

    def injected(self, kind: str, process: str, now_s: float) -> None:
        """A fault is about to happen."""
        self._faults.append({"member": process, "t_s": now_s, "kind": kind})

    def died(self, process: str, now_s: float) -> None:
        """The controller noticed that a process is gone."""
        self.gone(process)
        known = [f for f in self._faults if f["member"] == process and "detected_s" not in f]
        if known:
            known[-1]["detected_s"] = now_s
        else:
            self._faults.append({"member": process, "t_s": now_s, "kind": "died", "detected_s": now_s, "guess": True})

    def gone(self, process: str) -> None:
        """A process has ended; who follows it counts from zero."""
        for what, values in (("busy", self._busy_s), ("sent", self._sent)):
            self._past[what, process] += values.pop(process, 0.0)

    def of_peer(self, process: str, figures: dict[str, float]) -> None:
        """What a peer says of itself every so often, and at the end."""
        self._busy_s[process] = figures["busy_s"]
        self._sent[process] = figures["bytes_sent"]
        self._memory_bytes[process] = int(figures["memory_bytes"])
        self._peak_bytes = max(self._peak_bytes or 0, self._memory_bytes[process])

    @property
    def bytes_sent(self) -> int:
        """Of all peers, by what they said last."""
        past = sum(value for (what, _), value in self._past.items() if what == "sent")
        return int(past + sum(self._sent.values()))

    def busy_s(self, process: str) -> float | None:
        """Seconds that processes of this name have spent inside calls; None: it has not said yet."""
        now = self._busy_s.get(process)
        return None if now is None else now + self._past["busy", process]

    def stages(self, brain: PipelineBrain) -> list[dict[str, Any]]:
        """See `stage_table`."""
        return stage_table(brain, self._memory_bytes)

    def step_done(self, done: StepDone, brain: PipelineBrain, now_s: float) -> None:
        """A step was committed."""
        self._first_s = now_s - done.seconds if self._first_s is None else self._first_s
        self._losses.append(done.loss)
        self._seconds = now_s
        self._steps_s.append(done.seconds)
        for fault in self._faults:
            if "detected_s" in fault:
                fault.setdefault("next_commit_s", now_s)
        row = {
            "t_s": round(now_s, 4),
            "step": done.step,
            "loss": done.loss if math.isfinite(done.loss) else None,
            "seconds": round(done.seconds, 4),
            "attempts": done.attempts,
            "bytes_sent": self.bytes_sent,
            "stages": self.stages(brain),
            "val_loss": self._validated(brain),
            "no_move": brain.why_no_move,
        }
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")

    def status(self, brain: PipelineBrain, now_s: float) -> dict[str, Any]:
        """What whoever watches the run is shown."""
        plan = brain.plan
        samples = brain.version * plan.pipeline.samples_per_step
        peers = {
            peer.process: {"status": "serving" if peer.stage is not None else "joining", "reason": "", "steps": 0}
            for peer in brain.roster.peers.values()
        }
        trainers = {name: {"status": "sending", "reason": "", "steps": 0} for name in brain.roster.trainers}
        members = {**peers, **trainers}
        return {
            "seconds": now_s,
            "progress": min(brain.version / plan.total_steps, 1.0),
            "tokens": samples * self._seq_len,
            "params": brain.layout.num_params,
            "rounds": brain.version,
            "loss": self._losses[-1] if self._losses else None,
            "val_loss": brain.evaluations[-1][1] if brain.evaluations else None,
            "evaluations": len(brain.evaluations),
            "members": {f"{name}.{brain.num_restarts.get(name, 0) + 1}": one for name, one in sorted(members.items())},
            "faults": len(self._faults),
            "stages": self.stages(brain),
            "moves": list(brain.moves),
            "no_move": brain.why_no_move,
            "fault_rows": list(self._faults),
            "version": brain.version,
            "paused": brain.paused,
            "busy": brain.is_busy,
        }

    def _validated(self, brain: PipelineBrain) -> float | None:
        """The newest validation loss, if it is finite."""
        loss = brain.evaluations[-1][1] if brain.evaluations else math.nan
        return loss if math.isfinite(loss) else None

    def _goodput(self, history: PipelineHistory, tokens: int, end_s: float) -> float:
        """Tokens committed over those of as many median steps as fit between the first join and the end.

        The median step is one without faults unless most have some. What was lost with peers that step on their own is
        not committed in its stage, and counts as that share of a token.
        """
        if not self._steps_s or self._joined_s is None or end_s <= self._joined_s:
            return 0.0
        step_tokens = self._spec.pipeline.samples_per_step * self._seq_len
        possible = (end_s - self._joined_s) / statistics.median(self._steps_s) * step_tokens
        counted, lost = sum(history.committed.values()), sum((*history.lost.values(), *history.partial.values()))
        share = counted / (counted + lost) if counted else 1.0
        return min(tokens * share / possible, 1.0)

    def summary(
        self,
        brain: PipelineBrain,
        finish: Finish,
        now_s: float,
        *,
        run_id: str,
        history: PipelineHistory,
        num_rows: int,
        last_hash: str,
    ) -> Summary:
        """What the run came to."""
        tokens = brain.held_version * brain.plan.pipeline.samples_per_step * self._seq_len
        made = len(self._losses) * brain.plan.pipeline.samples_per_step * self._seq_len
        training_s = self._seconds - self._first_s if self._first_s is not None else 0.0
        peers = len(brain.plan.peers)
        losses = [one.val_loss for one in history.evaluations]
        past_s = sum(value for (what, _), value in self._past.items() if what == "busy")
        busy = (past_s + sum(self._busy_s.values())) / (peers * training_s) if training_s > 0 else 0.0
        return Summary(
            run_id=run_id,
            exit_reason=finish.reason,  # type: ignore[arg-type]
            error=(finish.detail or "unknown") if finish.reason == "failed" else None,
            seconds=now_s,
            params=brain.layout.num_params,
            tokens_committed=tokens,
            exchanges_committed=history.num_commits,
            tokens_reissued=history.num_taken_back * brain.plan.pipeline.samples_per_step * self._seq_len,
            initial_val_loss=losses[0] if losses else None,
            final_val_loss=losses[-1] if len(losses) > 1 else None,
            goodput=self._goodput(history, made, now_s),
            peak_memory_bytes=self._peak_bytes,
            bytes_sent=self.bytes_sent,
            tokens_per_s=tokens_per_s(made, training_s),
            compute_utilization=min(busy, 1.0),
            codec_backend="torch",
            faults=tuple(_fault_row(fault) for fault in self._faults),
            journal_rows=num_rows,
            journal_hash=last_hash,
            seq_len=self._seq_len,
        )


def stage_table(brain: PipelineBrain, memory_bytes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each stage: its peers with throughput, queue and memory, and why they are there; its buddies."""
    out = []
    for stage in range(brain.layout.num_stages):
        serving = brain.roster.serving(stage)
        buddies = [p.process for p in brain.roster.holders(stage, brain.held_version) if p.stage != stage]
        out.append(
            {
                "stage": stage,
                "params": brain.layout.params[stage],
                "bytes": brain.layout.stage_bytes[stage],
                "peers": {p.name: p.throughput for p in serving},
                "serving": [
                    {
                        "peer": p.name,
                        "throughput": p.throughput,
                        "queue": brain.queue(p.name),
                        "memory_bytes": memory_bytes.get(p.process),
                        "memory_limit_bytes": brain.memory_of(p),
                        "why": p.came,
                    }
                    for p in serving
                ],
                "buddies": buddies,
                "moving_here": [p.process for p in brain.roster.peers.values() if p.moving_to == stage],
            }
        )
    return out


def _fault_row(fault: dict[str, Any]) -> FaultRow:
    at_s = fault["t_s"]
    detected, committed = fault.get("detected_s"), fault.get("next_commit_s")
    return FaultRow(
        kind=fault["kind"],
        member=fault["member"],
        detected_after_s=None if detected is None or fault.get("guess") else detected - at_s,
        next_commit_after_s=None if committed is None else committed - at_s,
        estimated=bool(fault.get("guess")),
    )
