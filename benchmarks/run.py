"""`make bench`: every benchmark of speed and memory, one after the other; results in `benchmarks/results/`.

Stops at nothing: a benchmark that fails is named at the end, and the exit code says so.
"""

from __future__ import annotations

import subprocess
import sys
from subprocess import PIPE

from benchmarks.common import ROOT
from orchestrator.waiting import waiting

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
    with waiting("benchmarks", len(wanted)) as show:
        for done, name in enumerate(wanted):
            show(done)
            print(f"== {name}", flush=True)
            # Its lines pass through here: two processes that write to one terminal overwrite each other.
            with subprocess.Popen([sys.executable, *BENCHMARKS[name]], cwd=ROOT, stdout=PIPE, text=True) as process:
                for line in process.stdout or ():
                    print(line, end="", flush=True)
            if process.returncode:
                failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
