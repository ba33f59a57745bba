"""`make storm`: what random faults cost, as `atoll storm` measures it; figures in `benchmarks/results/storm.json`.

Arguments go to the command; without any it is 10 minutes of 240 faults an hour on 8 islands, after 2 minutes without
faults. Both runs are made here and now, so that their ratio means something on a machine of any speed; it must have
two cores to itself.
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.common import ROOT, keep


def main() -> int:
    """Run it, and keep the figures; the exit code of `atoll storm`."""
    command = [sys.executable, "-m", "orchestrator.cli.main", "storm", "--json", *sys.argv[1:]]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.stdout.strip():
        keep("storm", {"command": "atoll " + " ".join(command[3:]), **json.loads(done.stdout)})
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
