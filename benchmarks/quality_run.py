"""One job of `make bench-quality`: a run in one process with production code, in a temporary run directory."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from benchmarks.quality_plan import Job, Value
from orchestrator.config import load_config
from orchestrator.local import LocalRun

PRESET = "diloco"


def overrides(settings: dict[str, Value]) -> list[str]:
    """`--set` arguments that say the same on the command line (TOML values)."""
    return [f"{key}={json.dumps(value)}" for key, value in sorted(settings.items())]


def run_job(job: Job) -> dict[str, Any]:
    """Train, and return the record of it. A run that ends otherwise than by its tokens has no final loss."""
    began, began_cpu = time.perf_counter(), time.process_time()
    config = load_config(PRESET, overrides=overrides(job.settings)).config
    with tempfile.TemporaryDirectory(prefix="atoll-quality-") as folder:
        run = LocalRun(config, Path(folder) / "run")
        run.start()
        finish = run.run()
        state = run.host.coordinator.state
        corpus = run.config.data.digest
        sent = sum(island.transport.bytes_sent for island in run.islands.values())
        run.close()
    total = run.host.plan.total_samples
    curve = [(e.samples / total, _loss(e.val_loss)) for e in sorted(state.evaluations, key=lambda e: e.samples)]
    whole = finish is not None and finish.reason == "done" and bool(curve) and curve[-1][0] == 1.0
    return {
        "row": job.row.name,
        "seed": job.seed,
        "steps": job.steps,
        "settings": job.settings,
        "corpus": corpus,
        "final": curve[-1][1] if whole else None,
        "reason": finish.reason if finish is not None else "none",
        "curve": curve,
        "params": state.num_params,
        "exchanges": state.heads[0].version.n,
        "bytes_sent": sent,
        "virtual_s": round(run.now, 3),
        "anchor_digest": state.heads[0].digest,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - began_cpu, 1),
        "environment": environment(),
    }


def _loss(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
