"""What a viewer of the dashboard costs: the speed of a run with one, over the speed without, interleaved.

    python -m benchmarks.dashboard_cost [--pairs 5] [--tokens 2_000_000] [--islands 2]

Each pair trains the same run twice, one of them watched, the watched one first in every other pair. The viewer is
`Dashboard` in a process of its own and a client that reads the events and asks for curves and timeline every 1.5 s, as
the page does; drawing in a browser is not counted, it happens on the viewer's machine. Speeds are committed tokens per
second from the second commit to the last but one. 1.0 means free; the aim is at least 0.99.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

from benchmarks.common import ROOT, keep, spread
from orchestrator.metrics import ExchangeRow, read_rows

ASK_EVERY_S = 1.5
BASE = ("run.name=watched", "eval.every=1.0", "eval.windows=8")


class Viewer:
    """Opens the dashboard of a run directory and looks at it until `stop`."""

    def __init__(self, run_dir: Path) -> None:
        """Starts the dashboard's process once the run has a configuration."""
        self.run_dir, self.over = run_dir, threading.Event()
        self.num_asked = 0
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not (self.run_dir / "metrics.jsonl").exists():
            if self.over.wait(0.2):
                return
        command = [sys.executable, "-m", "orchestrator.cli.main", "dashboard", str(self.run_dir), "--port", "0"]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address, _, token = server.stdout.readline().split(": ", 1)[1].strip().partition("#token=")
            head = {"Authorization": f"Bearer {token}"}
            events = urllib.request.urlopen(urllib.request.Request(f"{address}api/events", headers=head), timeout=60)
            threading.Thread(target=events.read, daemon=True).start()
            while not self.over.wait(ASK_EVERY_S):
                for path in ("series?from=0&to=60&bins=1000", "timeline?from=0&to=60&bins=1100"):
                    request = urllib.request.Request(f"{address}api/{path}", headers=head)
                    json.loads(urllib.request.urlopen(request, timeout=60).read())
                    self.num_asked += 1
        finally:
            server.terminate()
            server.wait(timeout=20)

    def stop(self) -> None:
        """Go away."""
        self.over.set()
        self.thread.join(timeout=60)


def speed(tokens: int, num: int, *, watched: bool) -> float:
    """Committed tokens per second of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "orchestrator.cli.main", "train", "demo", "--run-dir", str(run_dir)]
        for override in (*BASE, f"run.islands={num}", f"train.tokens={tokens}"):
            command += ["--set", override]
        viewer = Viewer(run_dir) if watched else None
        try:
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finally:
            if viewer is not None:
                viewer.stop()
        assert viewer is None or viewer.num_asked > 4, "the viewer saw nothing of the run"
        commits = [row for row in read_rows(run_dir / "metrics.jsonl") if isinstance(row, ExchangeRow)]
    first, last = commits[1], commits[-2]
    return (last.tokens_committed - first.tokens_committed) / (last.t_s - first.t_s)


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--islands", type=int, default=2)
    arguments = parser.parse_args()
    ratios = []
    for pair in range(arguments.pairs):
        order = (True, False) if pair % 2 else (False, True)
        found = {watched: speed(arguments.tokens, arguments.islands, watched=watched) for watched in order}
        ratios.append(found[True] / found[False])
        print(f"pair {pair}: {found[False]:,.0f} alone, {found[True]:,.0f} watched: {ratios[-1]:.4f}", flush=True)
    keep("dashboard_cost", {"ratios": ratios, "watched_over_alone": spread(ratios)})


if __name__ == "__main__":
    main()
