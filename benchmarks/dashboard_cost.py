"""What a viewer of the dashboard costs: one run, watched for a block of rounds, left alone for the next, and so on.

    python -m benchmarks.dashboard_cost [--pairs 16] [--block 12] [--islands 2] [--door] [--dry]

A pair is a watched block beside one without a viewer, in the same run, the watched one first in every other pair: what
changes slowly on the machine or in the run changes both. A block begins and ends with a commit: no round is cut. Two
figures come out, each with its standard error over the pairs:

    speed        committed tokens a second, watched over alone; 1.0 means free
    processor    processor time of everything but the islands, watched minus alone, as a share of all cores: what
                 training cannot have where islands use every core. It resolves a ten-thousandth, also on a machine with
                 other work to do; the speed of a pair varies by some percent even on a quiet one

The aim is less than 1 %: `processor` with its error below 0.01, and the speed not below 0.99 by two errors or more.

The viewer is `atoll dashboard` in a process of its own and a client that reads the events and asks for curves and
timeline every 1.5 s, as the page does; the client's work and drawing in a browser are not counted, they happen on the
viewer's machine. The dashboard reads the run's files, or, with `--door`, asks the controller on a cluster of `atoll up`
by its join string. Its process runs on the cores that train, which a viewer elsewhere would not; it stays between the
blocks, and does nothing while nobody looks.

Sixteen pairs take eight minutes for each of the two ways. `--dry` is two short pairs: nothing is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.common import ROOT, keep
from orchestrator.metrics import ExchangeRow, row_from_dict
from orchestrator.waiting import waiting

ASK_EVERY_S = 1.5
POLL_S = 0.1
LIMIT_S = 120.0
PATIENCE_S = 60.0
SAID = "said.txt"
ATOLL = (sys.executable, "-m", "orchestrator.cli.main")
MARK = "ATOLL_BENCHMARK"
SESSION = secrets.token_hex(8)
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
AIM = 0.01
# No end, no evaluation and no snapshot falls into a block.
BASE = ("run.name=watched", "train.tokens=2_000_000_000", "eval.every=1.0", "run.snapshot_every_s=100000")


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """A commit, and the processor time that everything but the islands had used by then."""

    at_s: float
    num_tokens: int
    others_cpu_s: float
    dashboard_cpu_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """What happened between two commits."""

    watched: bool
    seconds: float
    tokens_per_s: float
    others_cpu: float  # cores
    dashboard_cpu: float


def block_between(first: Moment, last: Moment, *, watched: bool) -> Block:
    """The figures of a block."""
    seconds = last.at_s - first.at_s
    return Block(
        watched=watched,
        seconds=seconds,
        tokens_per_s=(last.num_tokens - first.num_tokens) / seconds,
        others_cpu=(last.others_cpu_s - first.others_cpu_s) / seconds,
        dashboard_cpu=(last.dashboard_cpu_s - first.dashboard_cpu_s) / seconds,
    )


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard error of the mean, median, extremes."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {
        "mean": statistics.fmean(values),
        "error": error,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def compare(pairs: Sequence[tuple[Block, Block]], *, cores: int) -> dict[str, Any]:
    """Watched against alone, pair by pair; `met` says whether both aims are."""
    speed = mean_and_error([watched.tokens_per_s / alone.tokens_per_s for watched, alone in pairs])
    processor = mean_and_error([(watched.others_cpu - alone.others_cpu) / cores for watched, alone in pairs])
    return {
        "speed": speed,
        "processor": processor,
        "dashboard_process": mean_and_error([watched.dashboard_cpu / cores for watched, _ in pairs]),
        "met": processor["mean"] + processor["error"] < AIM and speed["mean"] + 2 * speed["error"] > 1 - AIM,
    }


def processor_times() -> tuple[float, float]:
    """Seconds of processor time of our processes that are no islands, and of the dashboard's among them."""
    others = dashboard = 0.0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if f"{MARK}={SESSION}".encode() not in (entry / "environ").read_bytes():
                continue
            command = (entry / "cmdline").read_bytes().split(b"\0")
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        used_s = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
        if not command[0].startswith(b"ray::IslandActor"):
            others += used_s
        if b"dashboard" in command:
            dashboard += used_s
    return others, dashboard


class Commits:
    """The commits of a run as they come, from its metrics."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._file: IO[bytes] | None = None
        self._rest = b""

    def next(self, since_s: float = 0.0) -> Moment:
        """Wait for the first commit from now on that lies `since_s` or later on the run's clock."""
        deadline = time.monotonic() + LIMIT_S
        self._new_rows()
        while time.monotonic() < deadline:
            rows = [row for row in self._new_rows() if row.t_s >= since_s]
            if rows:
                others, dashboard = processor_times()
                row = rows[-1]
                return Moment(
                    at_s=row.t_s, num_tokens=row.tokens_committed, others_cpu_s=others, dashboard_cpu_s=dashboard
                )
            time.sleep(POLL_S)
        said = (self.path.parents[1] / SAID).read_text()[-2000:]
        raise SystemExit(f"no commit in {LIMIT_S:g} s: {self.path}\n{said}")

    def _new_rows(self) -> list[ExchangeRow]:
        if self._file is None:
            if not self.path.exists():
                return []
            self._file = self.path.open("rb")
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        rows = [row_from_dict(json.loads(line)) for line in lines]
        return [row for row in rows if isinstance(row, ExchangeRow)]


class Viewer:
    """`atoll dashboard` of a run, and somebody who looks at it now and then."""

    def __init__(self, source: Sequence[str], environment: dict[str, str]) -> None:
        command = [*ATOLL, "dashboard", *source, "--port", "0"]
        self._server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._server.stdout is not None
        said = self._server.stdout.readline()
        self._address, _, token = said.split(": ", 1)[1].strip().partition("#token=")
        self._head = {"Authorization": f"Bearer {token}"}

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look while the block lasts."""
        over, asked = threading.Event(), [0]
        events = self._open("events")
        reader = threading.Thread(target=_read, args=(events,), daemon=True)
        asker = threading.Thread(target=self._ask, args=(over, asked), daemon=True)
        reader.start()
        asker.start()
        try:
            yield
        finally:
            over.set()
            asker.join(timeout=PATIENCE_S)
            events.fp.raw._sock.shutdown(2)  # the reader sits in a read
            reader.join(timeout=PATIENCE_S)
            events.close()
        assert asked[0] >= 4, "the viewer saw nothing of the run"

    def _ask(self, over: threading.Event, asked: list[int]) -> None:
        while not over.wait(ASK_EVERY_S):
            for path in ("series?from=0&to=600&bins=1000", "timeline?from=0&to=600&bins=1100"):
                with self._open(path) as answer:
                    answer.read()
                asked[0] += 1

    def _open(self, path: str) -> Any:
        request = urllib.request.Request(f"{self._address}api/{path}", headers=self._head)
        return urllib.request.urlopen(request, timeout=PATIENCE_S)

    def close(self) -> None:
        """End the dashboard's process."""
        self._server.terminate()
        self._server.wait(timeout=PATIENCE_S)


def _read(events: Any) -> None:
    with contextlib.suppress(http.client.IncompleteRead):  # the end of looking cuts it off
        while events.read1(65536):
            pass


@contextmanager
def cluster(environment: dict[str, str], num: int, *, wanted: bool) -> Iterator[str | None]:
    """The join string of a cluster of `atoll up` that lives as long as the block; None where none is wanted."""
    if not wanted:
        yield None
        return
    up = ["up", "--host", "127.0.0.1", "--workers", str(num), "--background", "--json"]
    said = subprocess.run([*ATOLL, *up], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield str(json.loads(said.stdout)["join"])
    finally:
        subprocess.run([*ATOLL, "leave", "--now"], cwd=ROOT, check=True, env=environment)


@contextmanager
def training(run_dir: Path, num: int, place: str | None, environment: dict[str, str]) -> Iterator[None]:
    """A run that goes on as long as the block."""
    command = [*ATOLL, "train", "demo", "--run-dir", str(run_dir), "--set", f"run.islands={num}"]
    for override in (*BASE, *(() if place is None else ("run.address=auto",))):
        command += ["--set", override]
    with (run_dir.parent / SAID).open("w+") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            yield
            assert process.poll() is None, f"the run ended: {Path(said.name).read_text()[-2000:]}"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=PATIENCE_S)
            finally:
                process.kill()
                process.wait()


def measure(num_pairs: int, block_s: float, num: int, *, door: bool) -> list[tuple[Block, Block]]:
    """Pairs of a watched block and one alone."""
    pairs: list[tuple[Block, Block]] = []
    with tempfile.TemporaryDirectory(prefix="atoll-viewer-") as folder:
        environment = {**os.environ, "ATOLL_STATE_DIR": str(Path(folder) / "state"), MARK: SESSION}
        run_dir = Path(folder) / "run-watched"
        with (
            waiting("pairs", num_pairs) as show,
            cluster(environment, num, wanted=door) as place,
            training(run_dir, num, place, environment),
        ):
            commits = Commits(run_dir)
            commits.next(block_s)  # the first seconds are not like the others
            viewer = Viewer(
                [str(run_dir)] if place is None else ["--address", place, "--run", run_dir.name], environment
            )
            try:
                for pair in range(num_pairs):
                    show(pair)
                    order = (True, False) if pair % 2 else (False, True)
                    found = {watched: _block(commits, viewer, block_s, watched=watched) for watched in order}
                    pairs.append((found[True], found[False]))
                    print(_told(pair, *pairs[-1]), flush=True)
            finally:
                viewer.close()
    return pairs


def _block(commits: Commits, viewer: Viewer, block_s: float, *, watched: bool) -> Block:
    if not watched:
        first = commits.next()
        return block_between(first, commits.next(first.at_s + block_s), watched=False)
    with viewer.looking():
        first = commits.next()
        return block_between(first, commits.next(first.at_s + block_s), watched=True)


def _told(pair: int, watched: Block, alone: Block) -> str:
    return (
        f"pair {pair}: {alone.tokens_per_s:,.0f} tokens/s alone, {watched.tokens_per_s:,.0f} watched: "
        f"{watched.tokens_per_s / alone.tokens_per_s:.4f}; {alone.others_cpu:.4f} and {watched.others_cpu:.4f} cores"
    )


def main() -> int:
    """Measure, print and keep; 1 if an aim was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--block", type=float, default=12.0, help="seconds of a block, at least")
    parser.add_argument("--islands", type=int, default=2)
    parser.add_argument("--door", action="store_true", help="ask the controller, by a join string")
    parser.add_argument("--dry", action="store_true", help="two short pairs, nothing is kept")
    arguments = parser.parse_args()
    num_pairs, block_s = (2, 6.0) if arguments.dry else (arguments.pairs, arguments.block)
    pairs = measure(num_pairs, block_s, arguments.islands, door=arguments.door)
    cores = len(os.sched_getaffinity(0))
    result = compare(pairs, cores=cores)
    if arguments.dry:
        print(json.dumps(result, indent=2))
        return 0
    kept = [{"watched": vars_of(watched), "alone": vars_of(alone)} for watched, alone in pairs]
    keep("dashboard_cost_door" if arguments.door else "dashboard_cost", {**result, "cores": cores, "pairs": kept})
    return 0 if result["met"] else 1


def vars_of(block: Block) -> dict[str, float]:
    """A block's figures."""
    return {
        "seconds": round(block.seconds, 2),
        "tokens_per_s": round(block.tokens_per_s, 1),
        "others_cpu": round(block.others_cpu, 5),
        "dashboard_cpu": round(block.dashboard_cpu, 5),
    }


if __name__ == "__main__":
    sys.exit(main())
