"""One row of `make bench-quality` again, on Ray: real processes and sockets must end with the same bits.

    python -m benchmarks.quality_ray [--row diloco-30-int8] [--seed 1]

Takes a finished run from `quality_runs.jsonl`, trains with its settings by `atoll train`, and compares the digest of
the final anchor. Keeps `quality_ray.json`, which the report of `benchmarks.quality` quotes. Exit code 1: other bits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, environment
from benchmarks.quality import RUNS, read_runs
from benchmarks.quality_plan import STEPS
from benchmarks.quality_run import PRESET, overrides

RAY_RESULT = "quality_ray.json"


def repeat(record: dict[str, Any]) -> dict[str, Any]:
    """Train a finished run's settings on Ray, and return its `summary.json`."""
    with tempfile.TemporaryDirectory(prefix="atoll-quality-") as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "orchestrator.cli.main", "train", PRESET, "--run-dir", str(run_dir)]
        for override in overrides(record["settings"]):
            command += ["--set", override]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, check=True, env=environ)
        found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
        return found


def main(arguments: list[str] | None = None) -> int:
    """Repeat one run and keep the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the finished runs")
    parser.add_argument("--row", default="diloco-30-int8")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    wanted = {"row": options.row, "seed": options.seed, "steps": options.steps}
    found = [run for run in read_runs(options.out / RUNS) if wanted.items() <= run.items()]
    if not found:
        print(f"error: no finished run {wanted} in {options.out / RUNS}", file=sys.stderr)
        return 2
    record = found[-1]
    summary = repeat(record)
    same = summary["anchor_digest"] == record["anchor_digest"]
    result = {
        **wanted,
        "settings": record["settings"],
        "in_process": {"anchor_digest": record["anchor_digest"], "loss": record["final"]},
        "ray": {key: summary[key] for key in ("anchor_digest", "final_val_loss", "seconds", "faults")},
        "equal": same,
        "environment": environment(),
    }
    (options.out / RAY_RESULT).write_text(json.dumps(result, indent=2) + "\n")
    print(f"{options.row} seed {options.seed}: {'the same bits' if same else 'OTHER BITS'} on Ray")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
