"""What a viewer of the dashboard costs: the speed of a run with one, over the speed without, interleaved.

    python -m benchmarks.dashboard_cost [--pairs 5] [--tokens 2_000_000] [--islands 2] [--door] [--dry]

Each pair trains the same run twice, one of them watched, the watched one first in every other pair. The viewer is
`atoll dashboard` in a process of its own and a client that reads the events and asks for curves and timeline every
1.5 s, as the page does; drawing in a browser is not counted, it happens on the viewer's machine. The viewer reads the
run's files, or, with `--door`, asks the controller on a cluster of `atoll up` by its join string. Its server runs on
the cores that train, which a viewer elsewhere would not. Speeds are committed tokens per second from the second commit
to the last but one. 1.0 means free; the aim is at least 0.99.

With two islands on two cores a run takes about a minute: five pairs take eleven minutes for each of the two ways.
`--dry` is one short pair, to see that everything works: nothing is kept, and its ratio means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import ROOT, keep, spread
from orchestrator.metrics import ExchangeRow, read_rows

ASK_EVERY_S = 1.5
ATOLL = (sys.executable, "-m", "orchestrator.cli.main")
DRY_TOKENS = 300_000
BASE = ("run.name=watched", "eval.every=1.0", "eval.windows=8")


class Viewer:
    """Opens the dashboard of a run directory and looks at it until `stop`."""

    def __init__(self, run_dir: Path, place: str | None, state: Path) -> None:
        """Starts the dashboard's process once the run has begun. `place`: the join string to ask by."""
        self.run_dir, self.over = run_dir, threading.Event()
        self.source = [str(run_dir)] if place is None else ["--address", place, "--run", run_dir.name]
        self.environment = cluster_environment(state)
        self.num_asked = 0
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not (self.run_dir / "metrics.jsonl").exists():
            if self.over.wait(0.2):
                return
        command = [*ATOLL, "dashboard", *self.source, "--port", "0"]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=self.environment)
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


def cluster_environment(state: Path) -> dict[str, str]:
    """Of every command: the benchmark's cluster, if there is one, is the only one that it knows."""
    return {**os.environ, "ATOLL_STATE_DIR": str(state)}


@contextmanager
def cluster(state: Path, num: int, *, wanted: bool) -> Iterator[str | None]:
    """The join string of a cluster of `atoll up` that lives as long as the block; None where none is wanted."""
    if not wanted:
        yield None
        return
    up = ["up", "--host", "127.0.0.1", "--workers", str(num), "--background", "--json"]
    environment = cluster_environment(state)
    said = subprocess.run([*ATOLL, *up], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield str(json.loads(said.stdout)["join"])
    finally:
        subprocess.run([*ATOLL, "leave", "--now"], cwd=ROOT, check=True, env=environment)


def speed(tokens: int, num: int, place: str | None, state: Path, *, watched: bool) -> float:
    """Committed tokens per second of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / f"run-{'watched' if watched else 'alone'}"
        command = [*ATOLL, "train", "demo", "--run-dir", str(run_dir)]
        for override in (*BASE, f"run.islands={num}", f"train.tokens={tokens}"):
            command += ["--set", override]
        if place is not None:
            command += ["--set", "run.address=auto"]
        viewer = Viewer(run_dir, place, state) if watched else None
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=cluster_environment(state))
        finally:
            if viewer is not None:
                viewer.stop()
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
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
    parser.add_argument("--door", action="store_true", help="ask the controller, by a join string")
    parser.add_argument("--dry", action="store_true", help="one short pair, nothing is kept")
    arguments = parser.parse_args()
    pairs, tokens = (1, DRY_TOKENS) if arguments.dry else (arguments.pairs, arguments.tokens)
    num, ratios = arguments.islands, []
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder), num, wanted=arguments.door) as place:
        for pair in range(pairs):
            order = (True, False) if pair % 2 else (False, True)
            found = {watched: speed(tokens, num, place, Path(folder), watched=watched) for watched in order}
            ratios.append(found[True] / found[False])
            print(f"pair {pair}: {found[False]:,.0f} alone, {found[True]:,.0f} watched: {ratios[-1]:.4f}", flush=True)
    if not arguments.dry:
        name = "dashboard_cost_door" if arguments.door else "dashboard_cost"
        keep(name, {"ratios": ratios, "watched_over_alone": spread(ratios)})


if __name__ == "__main__":
    main()
