"""What Atoll costs: islands inside Atoll against as many bare torch loops, same model, data and threads.

    python -m benchmarks.overhead [--pairs 5] [--seconds 30] [--warmup 12]

The first seconds count on neither side: a machine is busy with the processes that have just started (Ray's own take
about ten seconds of a core), and a run lasts hours. Interleaved pairs; a ratio is bare over Atoll for times, Atoll
over bare for speeds, so that 1.0 means free. Atoll's figures come from its own metrics: time inside steps, and
committed tokens from the first commit after the warm-up to the last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, keep, spread
from orchestrator.metrics import ExchangeRow, StepRow, read_rows

BASE = ("run.name=overhead", "eval.every=1.0", "eval.windows=8", "codec.name=int8", "exchange.quorum=1.0")


def bare(num: int, seconds: float, warmup: float, overrides: list[str]) -> dict[str, float]:
    """`num` bare loops side by side: median step, summed speed."""
    command = [sys.executable, "-m", "benchmarks.bare_loop", "diloco", "--seconds", str(seconds)]
    command += ["--warmup", str(warmup)]
    command += [word for override in overrides for word in ("--set", override)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    loops = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(num)
    ]
    outs = [json.loads(loop.communicate()[0].splitlines()[-1]) for loop in loops]
    return {
        "step_ms": statistics.median(out["median_step_ms"] for out in outs),
        "tokens_per_s": sum(out["tokens_per_s"] for out in outs),
    }


def atoll(num: int, seconds: float, warmup: float, step_ms: float, overrides: list[str]) -> dict[str, float]:
    """A run of `num` islands of about `warmup + seconds`: median step and speed after the warm-up."""
    values = dict(override.split("=") for override in overrides)
    batch_tokens = int(values["train.batch_size"]) * int(values["data.seq_len"])
    tokens = int(num * (warmup + seconds) / (step_ms / 1e3) * batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "orchestrator.cli.main", "train", "diloco", "--run-dir", str(run_dir)]
        for override in (*overrides, f"run.islands={num}", f"train.tokens={tokens}"):
            command += ["--set", override]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = list(read_rows(run_dir / "metrics.jsonl"))
    counted_from = warmup + min(row.t_s for row in rows if isinstance(row, StepRow))
    steps = [row.step_ms for row in rows if isinstance(row, StepRow) and row.t_s >= counted_from]
    commits = [row for row in rows if isinstance(row, ExchangeRow) and row.t_s >= counted_from]
    first, last = commits[0], commits[-2] if len(commits) > 2 else commits[-1]
    speed = (last.tokens_committed - first.tokens_committed) / (last.t_s - first.t_s)
    return {"step_ms": statistics.median(steps), "tokens_per_s": speed}


def measure(name: str, num: int, pairs: int, seconds: float, warmup: float, overrides: list[str]) -> dict[str, Any]:
    """Interleaved pairs of one case."""
    step_ratios: list[float] = []
    speed_ratios: list[float] = []
    raw: list[dict[str, dict[str, float]]] = []
    for pair in range(pairs):
        reference = bare(num, seconds, warmup, overrides)
        ours = atoll(num, seconds, warmup, reference["step_ms"], overrides)
        raw.append({"bare": reference, "atoll": ours})
        step_ratios.append(reference["step_ms"] / ours["step_ms"])
        speed_ratios.append(ours["tokens_per_s"] / reference["tokens_per_s"])
        print(f"{name} pair {pair + 1}: step {step_ratios[-1]:.3f}, tokens/s {speed_ratios[-1]:.3f}", flush=True)
    return {"step_ratio": spread(step_ratios), "tokens_ratio": spread(speed_ratios), "pairs": raw}


def main() -> None:
    """Both cases: one island on one core, two islands on two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--warmup", type=float, default=12.0)
    options = parser.parse_args()
    small = [*BASE, "data.seq_len=128", "model.layers=2", "model.dim=128", "train.batch_size=16"]
    small += ["strategy.inner_steps=100", "train.threads=1", "train.device=cpu", "data.corpus=stdlib"]
    result = {
        "one_island": measure("one island", 1, options.pairs, options.seconds, options.warmup, small),
        "two_islands": measure("two islands", 2, options.pairs, options.seconds, options.warmup, small),
    }
    keep("overhead", result)


if __name__ == "__main__":
    main()
