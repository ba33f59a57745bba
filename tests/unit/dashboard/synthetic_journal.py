"""The journal that fits a `SyntheticRun`, and rows that the report does not read: links, a silence.

Not a test module: import it as `tests.unit.dashboard.synthetic_journal`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from orchestrator.config import load_config
from orchestrator.metrics import ExchangeRow, LinkRow, MetricsWriter, SilenceRow
from tests.unit.report.synthetic_run import BATCH_SIZE, SyntheticRun
from workers.records import (
    GENESIS_HASH,
    CommitRecord,
    FaultRecord,
    FenceRecord,
    GenesisRecord,
    JoinRecord,
    LeaseRecord,
    MemberId,
    Record,
    RosterEntry,
    Row,
    SettleRecord,
    StopRecord,
    TermRecord,
    dump_row,
    make_row,
)


class JournalOf:
    """Builds rows one by one; `current` is the incarnation of each member."""

    def __init__(self, run: SyntheticRun) -> None:
        self.run, self.rows = run, list[Row]()
        self.current = {f"island-{i}": 1 for i in range(run.islands)}
        self.given: dict[MemberId, int] = {}
        self.position = 0

    def log(self, record: Record) -> None:
        prev = self.rows[-1].hash if self.rows else GENESIS_HASH
        self.rows.append(make_row(len(self.rows), prev, record))

    def build(self, *, nodes: int, stopped: bool) -> list[Row]:
        self.log(TermRecord(lineage=0, number=1, controller="c"))
        for i, name in enumerate(self.current):
            self.join(name, 1, f"{i % nodes:04x}node")
        self.log(GenesisRecord(maker="island-0.1", digests=("d0",), num_params=self.run.params, num_chunks=(1,)))
        chain = "genesis"
        faults = {row.member: row for row in self.run.rows if row.kind == "fault"}
        for row in self.run.rows:
            if not isinstance(row, ExchangeRow):
                continue
            for name, fault in faults.items():
                if row.version == self.run.kill_round:
                    self.log(FaultRecord(fault="died", member=name, injected=False, t_s=fault.detected_s or 0.0))
                    self.log(FenceRecord(member=name, incarnation=1, why="its process died"))
                    self.log(SettleRecord(member=name, incarnation=1, lost=17 * BATCH_SIZE))
                elif name in row.roster and self.current[name] == 1 and row.version > (self.run.kill_round or 0):
                    self.current[name] = 2
                    self.join(name, 2, "0000node")
            chain = self.commit(row, chain)
        if stopped:
            self.log(StopRecord(reason="done"))
        return self.rows

    def join(self, name: str, incarnation: int, node: str) -> None:
        self.log(JoinRecord(member=name, incarnation=incarnation, nonce=f"{name}/{incarnation}", node=node))

    def commit(self, row: ExchangeRow, chain: str) -> str:
        samples = self.run.inner_steps * BATCH_SIZE
        entries = []
        for name in row.roster:
            member = MemberId(name=name, incarnation=self.current[name])
            since = self.given.get(member, 0)
            part = ((self.position, self.position + samples),)
            self.position += samples
            self.given[member] = since + samples
            self.log(LeaseRecord(member=name, incarnation=member.incarnation, index=since, ranges=part))
            entries.append(
                RosterEntry(
                    member=name, incarnation=member.incarnation, seq=row.version, since=since, upto=since + samples,
                    ranges=part, num_steps=self.run.inner_steps, coefficient=1 / len(row.roster),
                )
            )  # fmt: skip
        after = f"chain{row.version}"
        self.log(
            CommitRecord(
                fragment=0, n=row.version, prev_chain=chain, chain=after, serial=row.version, attempt=1,
                roster=tuple(entries), roster_digest="r", chunk_digests=("x",), digest=f"d{row.version}",
                base_samples=0,
            )
        )  # fmt: skip
        return after


def write_run(
    run: SyntheticRun, run_dir: Path, *, nodes: int = 3, stopped: bool = True, share: float = 1.0, links: bool = True
) -> Path:
    """A run directory with metrics and journal."""
    run.write(run_dir, summary=stopped, share=share)
    rows = JournalOf(run).build(nodes=nodes, stopped=stopped)
    (run_dir / "journal.jsonl").write_bytes(b"".join(map(dump_row, rows)))
    rng, end_s = random.Random(run.seed), max(row.t_s for row in run.rows if isinstance(row, ExchangeRow))
    names = [f"island-{i}" for i in range(run.islands)]
    speed = {name: rng.uniform(2e6, 9e7) for name in names}
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        for source in names if links else ():
            for target in rng.sample(names, min(len(names), 60)):
                if source != target:
                    rate, rtt_s = min(speed[source], speed[target]), rng.uniform(0.01, 0.12)
                    writer.append(
                        LinkRow(t_s=end_s / 2, member=target, peer=source, bytes=9, bytes_per_s=rate, rtt_s=rtt_s)
                    )
        writer.append(
            SilenceRow(member=names[-1], incarnation=1, start_s=end_s * 0.3, end_s=end_s * 0.36),
        )
    return run_dir


PIPELINE_STEPS = 30
KILLED_S, NOTICED_S = 10.25, 10.375


def write_pipeline(run_dir: Path) -> Path:
    """The directory of a pipeline of two stages: a peer was killed on purpose, and a trainer died of its own accord."""
    run_dir.mkdir(parents=True)
    sizes = ["pipeline.microbatches=4", "pipeline.microbatch_size=2", "pipeline.in_flight=4", "train.tokens=65536"]
    config = load_config("swarm", overrides=[*sizes, "data.path=", "data.corpus=stdlib"]).config
    (run_dir / "config.toml").write_text(config.to_toml())
    names = ("peer-0", "peer-1", "peer-2", "peer-3", "trainer-0")
    rows = list[Row]()
    for record in (
        TermRecord(lineage=0, number=1, controller="c"),
        *(JoinRecord(member=name, incarnation=1, nonce=name, node=f"{n % 2:04x}node") for n, name in enumerate(names)),
        FaultRecord(fault="kill", member="peer-1", injected=True, t_s=KILLED_S, detail="kill:peer-1"),
        FaultRecord(fault="died", member="peer-1", injected=False, t_s=NOTICED_S, detail="its process ended"),
        FenceRecord(member="peer-1", incarnation=1, why="its process ended"),
        JoinRecord(member="peer-1", incarnation=2, nonce="peer-1 again", node="0001node"),
        FaultRecord(fault="died", member="trainer-0", injected=False, t_s=20.5, detail="its process ended"),
        FenceRecord(member="trainer-0", incarnation=1, why="its process ended"),
        JoinRecord(member="trainer-0", incarnation=2, nonce="trainer-0 again", node="0000node"),
        StopRecord(reason="done"),
    ):
        rows.append(make_row(len(rows), rows[-1].hash if rows else GENESIS_HASH, record))
    (run_dir / "journal.jsonl").write_bytes(b"".join(map(dump_row, rows)))
    (run_dir / "summary.json").write_text(json.dumps({"exit_reason": "done"}))
    lines = [json.dumps(_pipeline_step(step)) + "\n" for step in range(PIPELINE_STEPS)]
    (run_dir / "pipeline.jsonl").write_text("".join(lines))
    return run_dir


def _pipeline_step(step: int) -> dict[str, Any]:
    stages = [
        {
            "stage": stage,
            "params": 1000 * (stage + 1),
            "bytes": 16_000 * (stage + 1),
            "peers": {f"peer-{stage}.1": 1.5, f"peer-{stage + 2}.1": None},
            "buddies": [f"peer-{1 - stage}"],
            "moving_here": [],
        }
        for stage in range(2)
    ]
    row = {"t_s": step + 1.0, "step": step, "loss": 5.0 - step / 10, "seconds": 1.0, "attempts": 1, "stages": stages}
    return {**row, "bytes_sent": 50_000 * (step + 1), "val_loss": 5.0 - step // 10, "no_move": ""}
