"""How long an inner step of a run will take, as an earlier run of the same model on the same machines has measured it.

Kept nowhere but in the runs themselves: what they wrote is the measurement, and its place can be named. No torch.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from orchestrator.config import load_config
from orchestrator.errors import UserError
from orchestrator.rundir import RunDir, list_runs

if TYPE_CHECKING:
    from orchestrator.config import RunConfig

MOST_RUNS = 20
TAIL_BYTES = 256 * 1024
# All that an inner step's length depends on; `[model]` whole, but for the weights that it starts from.
OF_TRAIN = (
    *("batch_size", "accumulation", "fit_batch", "optimizer", "precision", "threads", "device", "pace_s"),
    *("loop", "loop_digest", "per_island"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of an inner step of the slowest island, and the run that measured them.

    Without a run they are about right at best: a few steps that were made before the islands (`time_here`).
    """

    seconds: float
    run: Path | None


def former_step(config: RunConfig, runs: Path) -> StepTime | None:
    """Of the newest run below `runs` with the same model, batch, devices and number of islands; None without one."""
    wanted = _costs(config)
    for run in reversed(list_runs(runs)[-MOST_RUNS:]):
        try:
            same = _costs(load_config(run.config).config) == wanted
            seconds = measured_s(run) if same else None
        except (UserError, OSError):  # of another version of Atoll; it has measured nothing, or is another user's
            continue
        if seconds is not None:
            return StepTime(seconds=seconds, run=run.path)
    return None


def measured_s(run: RunDir) -> float | None:
    """Median of each island's newest steps, of the slowest of them; None where nobody has timed any."""
    with run.metrics.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - TAIL_BYTES, 0))
        lines = file.read(TAIL_BYTES).splitlines()
    steps_ms: dict[str, list[float]] = defaultdict(list)
    for line in lines[1:] if size > TAIL_BYTES else lines:
        if line.startswith(b'{"kind":"step"') and line.endswith(b"}"):  # the last one may be half written
            row = json.loads(line)
            if row["step_ms"] > 0:
                steps_ms[row["member"]].append(row["step_ms"])
    return max((median(values) for values in steps_ms.values()), default=0.0) / 1000 or None


def _costs(config: RunConfig) -> tuple[Any, ...]:
    tables = config.to_tables()
    model = {key: value for key, value in tables["model"].items() if key != "init_from"}
    train = {key: tables["train"][key] for key in OF_TRAIN}
    run = tables["run"]
    return model, train, tables["data"]["seq_len"], run["islands"], run["elastic"], run["address"] is None
