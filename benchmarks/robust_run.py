"""One run of `make bench-robust`: production code in one process, some of its members attackers."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common import environment
from benchmarks.robust_plan import Job
from faults import attacks
from faults.attacker import Others, begin_attack, begin_label_flip
from orchestrator.config import load_config
from orchestrator.local import LocalIsland, LocalRun
from workers.in_flight import displacement_of
from workers.pair_records import PairCommitRecord
from workers.records import CommitRecord, RefusalRecord, StandingRecord
from workers.replica import Replica

NAMED_WITHIN = 5


class SkewedSource:
    """An island's samples from its own share of the pack, in whatever order it is leased: a pack of its own."""

    def __init__(self, source: Any, index: int, num_islands: int, num_samples: int) -> None:
        self._source, self._index = source, index
        self._share = num_samples // num_islands

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def batch(self, ids: NDArray[np.int64]) -> Any:
        """The samples of its share that stand for these."""
        return self._source.batch(self._index * self._share + np.asarray(ids) % self._share)


def replica_of(island: LocalIsland) -> Replica:
    """Of an island that takes part."""
    sync = island.loop.island.sync
    assert sync is not None
    return sync.replica


def honest_others(run: LocalRun, attackers: tuple[str, ...]) -> Others:
    """What the honest members would send now: the worst case, as in the papers."""

    def others(fragment: int, where: slice) -> list[Tensor]:
        honest = [replica_of(island) for name, island in run.islands.items() if name not in attackers]
        return [displacement_of(r.parts[fragment], r.specs[fragment], r.tensors, where) for r in honest]

    return others


def prepare(run: LocalRun, job: Job) -> None:
    """Make members what the job says they are."""
    for index, (_, island) in enumerate(sorted(run.islands.items())):
        if job.skewed:
            source = island.loop.island.source
            skewed = SkewedSource(source, index, len(run.islands), source.num_samples)
            island.loop.island.__dict__["source"] = skewed
    for place, name in enumerate(job.attackers):
        if job.attack == "label_flip":
            begin_label_flip(run.islands[name].loop.inner)
        elif job.attack:
            others = honest_others(run, job.attackers) if job.attack in attacks.STEALTHY else None
            kind = {"nan": "send_nan"}.get(job.attack, job.attack)
            replica = replica_of(run.islands[name])
            begin_attack(replica, kind, seed=1000 * job.seed + place, others=others, num_wrong=len(job.attackers))


def run_job(job: Job) -> dict[str, Any]:
    """Train, and return the record of it."""
    began = time.perf_counter()
    config = load_config(job.preset, overrides=job.overrides).config
    with tempfile.TemporaryDirectory(prefix="atoll-robust-") as folder:
        run = LocalRun(config, Path(folder) / "run")
        run.start()
        prepare(run, job)
        finish = run.run(max_turns=job.steps * 20)
        rows = [row.record for row in run.host.coordinator.rows]
        state = run.host.coordinator.state
        corpus = run.config.data.digest
        run.close()
    losses = [e.val_loss for e in state.evaluations]
    whole = finish is not None and finish.reason == "done" and bool(losses)
    final = losses[-1] if whole and losses[-1] is not None and math.isfinite(losses[-1]) else None
    return {
        "job": job.name,
        "seed": job.seed,
        "steps": job.steps,
        "settings": dict(job.settings),
        "corpus": corpus,
        "final": final,
        "first": losses[0] if losses else None,
        "reason": finish.reason if finish is not None else "none",
        "exchanges": state.num_commits,
        "groups": sorted({len(r.members) for r in rows if isinstance(r, PairCommitRecord)}),
        "meetings": sum(isinstance(r, PairCommitRecord) for r in rows),
        "refused_early": sorted(refused(rows, upto=NAMED_WITHIN)),
        "refused": sorted(refused(rows)),
        "banned": sorted({r.member for r in rows if isinstance(r, StandingRecord) and r.standing == "banned"}),
        "given_up": sorted(run.host.coordinator.given_up),
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment(),
    }


def refused(rows: list[Any], *, upto: int | None = None) -> set[str]:
    """Members of which something was refused, before commit number `upto`."""
    commits, out = 0, set()
    for row in rows:
        commits += isinstance(row, CommitRecord)
        if upto is not None and commits >= upto:
            break
        if isinstance(row, RefusalRecord):
            out.add(row.member)
    return out
