"""`make bench`: every benchmark of speed and memory, one after the other; results in `benchmarks/results/`.

Stops at nothing: a benchmark that fails is named at the end, and the exit code says so.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import ROOT

BENCHMARKS = {
    "overhead": ["-m", "benchmarks.overhead"],
    "memory": ["-m", "benchmarks.memory"],
    "pack": ["-m", "benchmarks.pack_memory", "--keep"],
    "transport": ["-m", "benchmarks.transport", "--keep"],
    "exchange": ["-m", "benchmarks.exchange", "--large"],
    "codecs": ["-m", "benchmarks.codecs"],
    "overlap": ["-m", "benchmarks.overlap"],
    "load": ["-m", "benchmarks.load_by_speed"],
    "simulator": ["-m", "benchmarks.simulator"],
}


def main() -> int:
    """Run all, or those named as arguments."""
    wanted = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in wanted if name not in BENCHMARKS]
    if unknown:
        print(f"error: unknown benchmarks {unknown}; known: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    failed = []
    for name in wanted:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, *BENCHMARKS[name]], cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
