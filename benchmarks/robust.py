"""Members that do wrong, under each rule: `python -m benchmarks.robust` (`make bench-robust`).

8 islands in one process, 2 of them attackers, paired seeds, production code; gossip beside it, without attackers. Every
finished run is a line of `benchmarks/results/robust_runs.jsonl`, and a run that is there already is skipped: interrupt
and start again at will. Then the report, of what is there: goals, what stealthy attacks cost under each rule, what
rules cost an owner in time, and the time of a whole exchange as `benchmarks/rule_time.py` measured it.

    python -m benchmarks.robust                                   # what is missing, then the report
    python -m benchmarks.robust --minutes 20                      # as much of it as begins within 20 minutes
    python -m benchmarks.robust --report                          # only the report
    python -m benchmarks.robust --only gossip --seeds 1           # some of it
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.quality import RunsFile, corpus_digest
from benchmarks.robust_plan import (
    INNER_STEPS,
    NUM_ISLANDS,
    PRESET,
    RULES,
    SEEDS,
    STEPS,
    Goal,
    Job,
    all_jobs,
    judge,
    table,
)
from orchestrator.waiting import waiting

RUNS = "robust_runs.jsonl"
NUM_VALUES, REPEATS = 1 << 18, 21
"""A part as large as runs make them (`fragments.MAX_CHUNK_VALUES`), and how often each rule has its turn."""


def run_one(job: Job) -> dict[str, Any]:
    """In a worker process: imports torch there and not here."""
    from benchmarks.robust_run import run_job

    return run_job(job)


def reduce_seconds(rules: Sequence[str], num_values: int = NUM_VALUES, repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds in which an owner works on a part of 8 contributions, by rule: what `Replica` does in a run.

    Rules take turns, and every time another one begins: what follows a rule that leaves much memory to clean up takes
    longer, whichever it is.
    """
    import torch

    from strategies.config import CodecConfig, StrategyConfig
    from strategies.fragments import TensorSpec, plan_fragments
    from strategies.norm import sum_of_squares
    from strategies.registry import build_strategy
    from strategies.robust import decide, to_measure, whole_squares
    from workers.config import TrainConfig
    from workers.replica import Piece, Replica

    strategy = build_strategy(
        StrategyConfig(), CodecConfig(name="int8"), lr_at=lambda progress: 1e-3, train=TrainConfig()
    )
    codec, shares, num_wrong = strategy.codec, [1 / NUM_ISLANDS] * NUM_ISLANDS, 2
    tensor = TensorSpec(name="p", shape=(num_values,))
    specs = plan_fragments([tensor], num_fragments=1, pattern="strided", chunk_values=num_values)
    replica = Replica(specs=specs, strategy=strategy, tensors={"p": torch.zeros(num_values)}, total_samples=1)
    generator = torch.Generator().manual_seed(0)
    payloads = [codec.encode(torch.randn(num_values, generator=generator)) for _ in range(NUM_ISLANDS)]
    squares = [float(sum_of_squares(codec.decode(p, num_values=num_values))) for p in payloads]
    lengths = [value**0.5 for value in squares]

    def pieces(weights: Sequence[float]) -> list[Piece]:
        whole = zip(payloads, weights, squares, strict=True)
        return [Piece(payload=p, coefficient=w, sumsq=s, num_samples=1) for p, w, s in whole]

    def work(rule: Any) -> None:
        wanted = to_measure(rule, lengths)
        found = whole_squares([replica.measure(0, 0, pieces(shares), wanted)]) if wanted is not None else None
        decision = decide(rule, shares, lengths, found, num_wrong=num_wrong)
        replica.reduce(0, 0, pieces(decision.weights), n=0, recipe=decision.recipe)

    times: dict[str, list[float]] = {rule: [] for rule in rules}
    order = list(rules)
    for rule in order:  # compiled, or read from the cache
        work(rule)
    for _ in range(repeats):
        order = [*order[1:], order[0]]
        for rule in order:
            began = time.perf_counter()
            work(rule)
            times[rule].append(time.perf_counter() - began)
    return {rule: statistics.median(values) for rule, values in times.items()}


def write_report(records: list[dict[str, Any]], out: Path, seconds: dict[str, float], missing: int) -> tuple[str, bool]:
    """Write `robust.md`; return it, and whether every goal that was run is met."""
    from benchmarks import rule_time  # and with it torch

    goals = judge(records)
    if seconds:
        cost = seconds[PRESET] / seconds["mean"] - 1
        text = "an owner's work under the preset's rule: at most 10 % more"
        goals.append(Goal(text=text, found=f"{100 * cost:+.1f} %", met=cost <= 0.1))
    goals += [Goal(text=text, found=found, met=met) for text, found, met in rule_time.goals(rule_time.kept())]
    lasted = sum(record["seconds"] for record in records)
    what = f"{len(records)} runs in {lasted / 60:.0f} minutes of a core, {missing} to come; {NUM_ISLANDS} islands"
    lines = ["# Members that do wrong, and members that meet in pairs", "", f"{what}, 2 attackers.", ""]
    lines += ["| goal | found | met |", "|---|---|---|"]
    lines += [f"| {g.text} | {g.found} | {'-' if g.met is None else 'yes' if g.met else 'no'} |" for g in goals]
    lines += ["", "Final loss against plain averaging without attackers:", "", table(records), ""]
    if seconds:
        base = seconds["mean"]
        lines += ["An owner's time for a part of 8 contributions, against the mean:", ""]
        lines += ["| rule | time |", "|---|---|"]
        lines += [f"| {rule} | {value / base:.2f} |" for rule, value in seconds.items()]
    text = "\n".join(lines) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "robust.md").write_text(text)
    return text, all(goal.met is not False for goal in goals)


def of_plan(runs: RunsFile, jobs: list[Job]) -> dict[tuple[str, int], dict[str, Any]]:
    """Finished runs of these jobs, by name and seed: on this corpus, and with the settings that they have now."""
    wanted = {(job.name, job.seed): dict(job.settings) for job in jobs}
    same = [r for r in runs.of_corpus(corpus_digest()) if wanted.get((r["job"], r["seed"])) == r["settings"]]
    return {(r["job"], r["seed"]): r for r in same}


def still_missing(runs: RunsFile, jobs: list[Job]) -> list[Job]:
    """Jobs that no finished run answers, in the order of the plan."""
    done = of_plan(runs, jobs)
    return [job for job in jobs if (job.name, job.seed) not in done]


def work(runs: RunsFile, missing: list[Job], workers: int, minutes: float) -> None:
    """Run what is missing, several at a time, in the plan's order; none begins after so many minutes."""
    until, coming = time.monotonic() + 60.0 * minutes, iter(missing)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            open_ = {pool.submit(run_one, job): job for job in islice(coming, workers)}
            left = len(missing) - len(open_)
            while open_:
                finished, _ = wait(open_, return_when=FIRST_COMPLETED)
                for future in finished:
                    job, record = open_.pop(future), future.result()
                    runs.append(record)
                    loss = "diverged" if record["final"] is None else f"{record['final']:.4f}"
                    print(f"{job.name} seed {job.seed}: {loss} ({record['seconds']:.0f} s; {left} left)", flush=True)
                    if time.monotonic() < until and (job := next(coming, None)) is not None:
                        open_[pool.submit(run_one, job)] = job
                        left -= 1
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of runs and report")
    parser.add_argument("--workers", type=int, default=max(len(os.sched_getaffinity(0)), 1), help="processes at a time")
    parser.add_argument(
        "--minutes", type=float, default=inf, help="begin no run after so long, and report what is there"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write the report")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of each island, a multiple of {INNER_STEPS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="beside those of the goals")
    parser.add_argument("--only", default="", help="runs whose names begin so, such as gossip or mean/noise")
    options = parser.parse_args(arguments)
    if options.steps < 2 * INNER_STEPS or options.steps % INNER_STEPS:
        parser.error(f"--steps {options.steps}: at least two rounds of {INNER_STEPS} steps, and whole ones")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and write the report; 1 if a goal is missed."""
    options = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    runs, stopped = RunsFile(options.out / RUNS), False
    planned = list(all_jobs(options.steps, options.seeds, options.rules))
    if not options.report:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        chosen = [job for job in still_missing(runs, planned) if job.name.startswith(options.only)]
        try:
            with waiting("runs that are missing"):
                work(runs, chosen, options.workers, options.minutes)
        except KeyboardInterrupt:
            print("interrupted; finished runs are kept: start again to go on", file=sys.stderr)
            stopped = True
    records = list(of_plan(runs, planned).values())
    seconds = {} if stopped else reduce_seconds(RULES)
    text, met = write_report(records, options.out, seconds, len(still_missing(runs, planned)))
    print(text)
    return 130 if stopped else int(not met)


if __name__ == "__main__":
    sys.exit(main())
