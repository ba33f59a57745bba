"""Memory of a run with 50 M parameters: controller and islands (PSS) against a bare loop with the same model.

    python -m benchmarks.memory

The bound for an island: its bare loop + 250 MB + parameters x (8 + 3.5 x bytes per value on the wire). Of every process
the largest PSS counts that a look five times a second sees.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.bare_loop import pss_bytes
from benchmarks.common import ROOT, keep

MODEL = [
    "run.name=memory",
    "run.islands=2",
    "data.corpus=stdlib",
    "data.seq_len=64",
    "model.layers=8",
    "model.dim=704",
    "model.heads=8",
    "train.batch_size=2",
    "train.threads=1",
    "train.device=cpu",
    "strategy.inner_steps=4",
    "eval.every=1.0",
    "eval.windows=2",
]
LOOK_S = 0.2
WIRE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / 4096}


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    out: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            out += [int(child), *children(int(child))]
    return out


def ray_actors(root: int) -> dict[int, str]:
    """Processes below `root` that run an actor, by Ray's process titles."""
    found: dict[int, str] = {}
    for pid in children(root):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        for kind in ("ControllerActor", "IslandActor"):
            if f"ray::{kind}" in title:
                found[pid] = kind
    return found


def pss_now(pid: int) -> int:
    """Proportional set size, bytes; 0 for a process that is gone."""
    try:
        return pss_bytes(pid)
    except (FileNotFoundError, ProcessLookupError, RuntimeError):
        return 0


def watch_bare() -> dict[str, int]:
    """The bare loop; its parameters and its largest PSS."""
    command = [sys.executable, "-m", "benchmarks.bare_loop", "diloco", "--seconds", "20"]
    command += [word for override in MODEL for word in ("--set", override)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    loop = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    peak = 0
    while loop.poll() is None:
        peak = max(peak, pss_now(loop.pid))
        time.sleep(LOOK_S)
    out = json.loads(loop.communicate()[0].splitlines()[-1])
    assert loop.returncode == 0, f"the bare loop ended with {loop.returncode}"
    return {"params": int(out["num_params"]), "bare_pss_bytes": peak}


def watch(codec: str) -> dict[str, object]:
    """One run; the largest PSS seen of the controller and of any island."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "orchestrator.cli.main", "train", "diloco", "--run-dir", f"{folder}/run"]
        for override in (*MODEL, f"codec.name={codec}", "train.tokens=6144"):
            command += ["--set", override]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        peak = {"ControllerActor": 0, "IslandActor": 0}
        while run.poll() is None:
            for pid, kind in ray_actors(run.pid).items():
                peak[kind] = max(peak[kind], pss_now(pid))
            time.sleep(LOOK_S)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    assert run.returncode == 0, f"the run ended with {run.returncode}"
    return {"controller_pss_bytes": peak["ControllerActor"], "island_pss_bytes": peak["IslandActor"], **summary}


def main() -> None:
    """Bare loop, then one run a codec."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codecs", nargs="*", default=["int8", "fp32"])
    options = parser.parse_args()
    bare = watch_bare()
    result: dict[str, object] = {**bare}
    for codec in options.codecs:
        seen = watch(codec)
        allowed = bare["bare_pss_bytes"] + 250e6 + bare["params"] * (8 + 3.5 * WIRE_BYTES[codec])
        result[codec] = {
            "controller_mb": int(seen["controller_pss_bytes"]) / 1e6,  # type: ignore[call-overload]
            "island_mb": int(seen["island_pss_bytes"]) / 1e6,  # type: ignore[call-overload]
            "island_allowed_mb": allowed / 1e6,
        }
    keep("memory", result)


if __name__ == "__main__":
    main()
