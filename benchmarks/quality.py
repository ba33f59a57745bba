"""Loss against data parallel training: `python -m benchmarks.quality` (`make bench-quality`).

Production code over the loopback transport, islands in one process; settings in `quality_plan.py`. Every finished run
is a line of `benchmarks/results/quality_runs.jsonl`, and a run that is there already is skipped: interrupt and start
again at will. After every run the table (`quality.md`), the figures (`quality.json`) and the plot (`quality.svg`) are
written from what is there.

    python -m benchmarks.quality                       # what is missing, then the report
    python -m benchmarks.quality --out /tmp/again      # everything anew, elsewhere
    python -m benchmarks.quality --report              # only write the report
    python -m benchmarks.quality --steps 60 --short-steps 30 --seeds 1 --out /tmp/smoke
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.quality_plan import SEEDS, SHORT_STEPS, STEPS, Job, Length, Losses, final_loss, next_jobs
from benchmarks.quality_report import write_report
from orchestrator.waiting import waiting

RUNS = "quality_runs.jsonl"


class RunsFile:
    """Finished runs, one JSON object a line; only this process writes it."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; a last line without its end (the machine went down) is dropped."""
        self.path = path
        self.records = read_runs(path)

    def append(self, record: dict[str, Any]) -> None:
        """Add one run, durably."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as out:
            out.seek(0)
            out.truncate(out.read().rfind(b"\n") + 1)  # what a torn last line left
            out.write(json.dumps(record).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
        self.records.append(record)

    def of_corpus(self, corpus: str | None) -> list[dict[str, Any]]:
        """The runs that may be compared: the embedded corpus is that of the interpreter."""
        return [record for record in self.records if record["corpus"] == corpus]


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file; none if there is no file. Raises ValueError for a line that is no run."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); remove the line") from error
    return records


def corpus_digest() -> str:
    """Digest of the corpus that runs of this interpreter train on."""
    from workers.data.corpus import corpus_digest as digest_of

    return digest_of("stdlib")


def run_one(job: Job) -> dict[str, Any]:
    """In a worker process: imports torch there and not here."""
    from benchmarks.quality_run import run_job

    return run_job(job)


class Board:
    """Runs jobs on worker processes until nothing is left or the time is up."""

    def __init__(self, runs: RunsFile, length: Length, *, workers: int, minutes: float, out: Path) -> None:
        """`minutes`: no job begins that would end later, by the speed of those before it."""
        self.runs, self.length, self.workers, self.out = runs, length, workers, out
        self.corpus = corpus_digest()
        self.deadline = time.monotonic() + 60 * minutes
        self.step_s = 0.012
        self.open: dict[Future[dict[str, Any]], Job] = {}

    def work(self) -> bool:
        """Return whether everything is done. Raises BrokenProcessPool if workers die again and again."""
        while True:
            before = len(self.runs.records)
            try:
                return self._work_with_pool()
            except BrokenProcessPool:
                if len(self.runs.records) == before:
                    raise
                print("a worker process was killed from outside; its runs start again", file=sys.stderr, flush=True)
                self.open.clear()

    def _work_with_pool(self) -> bool:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, mp_context=context) as pool:
            try:
                return self._until_done(pool)
            except BaseException:
                # Leaving the pool would wait for its jobs, and a killed parent would leave them running.
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise

    def _until_done(self, pool: ProcessPoolExecutor) -> bool:
        while True:
            left = self._fill(pool)
            if not self.open:
                return left == 0
            done, _ = wait(self.open, return_when=FIRST_COMPLETED)
            for future in done:
                self._finished(self.open.pop(future), future.result())

    def _fill(self, pool: ProcessPoolExecutor) -> int:
        """Start what there is time and a worker for; returns how many known jobs are not done."""
        jobs = next_jobs(Losses(self.runs.of_corpus(self.corpus)), self.length)
        running = list(self.open.values())
        todo = [job for job in jobs if job not in running]
        for job in todo:
            if len(self.open) >= self.workers:
                break
            if time.monotonic() + job.steps_of_all * self.step_s > self.deadline:
                continue
            self.open[pool.submit(run_one, job)] = job
        return len(jobs)

    def _finished(self, job: Job, record: dict[str, Any]) -> None:
        self.runs.append(record)
        self.step_s = max(record["seconds"] / job.steps_of_all, self.step_s / 2)
        left = max(self.deadline - time.monotonic(), 0) / 60
        seconds = f"{record['seconds']:.0f} s, {record['cpu_s']:.0f} s of CPU"
        print(f"{job}: {final_loss(record):.4f} ({seconds}; {left:.0f} min left)", flush=True)
        write_report(self.runs.of_corpus(self.corpus), self.length, self.out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of runs and report")
    parser.add_argument("--minutes", type=float, default=75.0, help="time after which no run begins")
    parser.add_argument("--workers", type=int, default=max(len(os.sched_getaffinity(0)), 1), help="processes at a time")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report")
    parser.add_argument("--steps", type=int, default=STEPS, help="inner steps of each island")
    parser.add_argument("--short-steps", type=int, default=SHORT_STEPS, help="those of the inner learning rate's sweep")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and write the report; 1 if something is missing still or a goal is missed."""
    options = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers, whose torch reads it once
    length = Length(steps=options.steps, short_steps=options.short_steps, seeds=tuple(options.seeds))
    runs = RunsFile(options.out / RUNS)
    whole = True
    if not options.report:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is a Ctrl-C
        board = Board(runs, length, workers=options.workers, minutes=options.minutes, out=options.out)
        try:
            with waiting("runs that are missing", 60 * options.minutes, timed=True):
                whole = board.work()
        except KeyboardInterrupt:
            print("interrupted; finished runs are kept: start again to go on", file=sys.stderr)
            return 130
    report = write_report(runs.of_corpus(corpus_digest()), length, options.out)
    print(report.text)
    if not whole:
        print("not everything is done: start again to go on", file=sys.stderr)
    return int(not whole or not all(goal.met for goal in report.goals))


if __name__ == "__main__":
    sys.exit(main())
