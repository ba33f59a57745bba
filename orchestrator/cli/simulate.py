"""`atoll simulate`: the production machines under random faults, in virtual time."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.options import json_option

FAILED = 5


@click.command()
@click.option("--seeds", "num", default=1000, show_default=True, type=click.IntRange(min=1), help="How many seeds.")
@click.option("--first-seed", "first", default=0, show_default=True, type=click.IntRange(min=0), help="The first one.")
@click.option("--members", type=click.IntRange(min=1), help="Members in every run [drawn from the seed: 1 to 6].")
@click.option("--workers", type=click.IntRange(min=1), help="Processes [one per core].")
@click.option(
    "--keep", type=click.Path(path_type=Path, dir_okay=False), help="Keep results here, and go on from there."
)
@click.option("--seed", type=click.IntRange(min=0), help="Run this seed alone, exactly as it was.")
@click.option("--trace", is_flag=True, help="With --seed: print everything that happens.")
@json_option
def simulate(
    num: int,
    first: int,
    members: int | None,
    workers: int | None,
    keep: Path | None,
    seed: int | None,
    trace: bool,
    as_json: bool,
) -> int:
    """Look for histories that break the protocol.

    Members, controllers, network and disk are virtual; exchange, membership, leases, recovery and journal are those
    that a real run uses. They are killed, cut off, delayed, doubled and given full disks, and after every event the
    invariants of the protocol must hold. A seed that breaks one is printed (exit code 5), and --seed runs it again.
    """
    if trace and seed is None:
        raise click.UsageError("--trace needs --seed: the trace of one run has thousands of lines")
    if seed is not None:
        return _one(seed, members, trace, as_json)
    return _many(first, num, members, workers, keep, as_json)


def _one(seed: int, members: int | None, trace: bool, as_json: bool) -> int:
    from orchestrator.simulation.batch import run_seed

    result = run_seed(seed, members=members, trace=trace)
    for line in result.trace:
        click.echo(line)
    if as_json:
        from orchestrator.answers import SimulatedOne

        told = {"seed": seed, "ok": result.ok, "invariant": result.invariant, "problem": result.problem}
        told |= {"events": result.num_events, "faults": result.num_faults, **result.counts}
        click.echo(SimulatedOne.model_validate(told).model_dump_json())
    else:
        click.echo(
            f"seed {seed}: {result.num_events:,} events, {result.num_faults} faults, "
            f"{result.counts['commits']} commits "
            f"in {result.seconds:.1f} virtual seconds: {'every invariant held' if result.ok else 'VIOLATION'}"
        )
        if not result.ok:
            click.echo(f"invariant {result.invariant}: {result.problem}")
    return 0 if result.ok else FAILED


def _many(first: int, num: int, members: int | None, workers: int | None, keep: Path | None, as_json: bool) -> int:
    from orchestrator.simulation.batch import run_batch
    from orchestrator.waiting import waiting

    began_s = time.monotonic()
    done = events = faults = violations = 0
    cpu_s = 0.0
    shown_s = began_s
    counts: Counter[str] = Counter()
    with waiting(f"{num:,} seeds", num) as show:
        for block in run_batch(first, num, members=members, workers=workers, keep=keep):
            done, events, faults, cpu_s = (
                done + block.num, events + block.num_events, faults + block.num_faults, cpu_s + block.seconds
            )  # fmt: skip
            counts.update(block.counts)
            for seed, invariant, problem in block.violations:
                violations += 1
                again = f"atoll simulate --seed {seed}" + (f" --members {members}" if members else "") + " --trace"
                click.echo(f"seed {seed}: invariant {invariant}: {problem}\n  again: {again}", err=True)
            show(done)
            if not as_json and not sys.stderr.isatty() and time.monotonic() - shown_s > 10:
                shown_s = time.monotonic()
                click.echo(f"{done:,} of {num:,} seeds, {events:,} events, {violations} violations", err=True)
    seconds = time.monotonic() - began_s
    per_s = events / cpu_s if cpu_s else 0.0
    if as_json:
        from orchestrator.answers import Simulated

        told: dict[str, Any] = {"seeds": done, "events": events, "faults": faults, "violations": violations}
        told |= {"seconds": seconds, "events_per_cpu_s": per_s, "counts": dict(counts)}
        click.echo(Simulated.model_validate(told).model_dump_json())
    else:
        click.echo(
            f"{done:,} seeds, {events:,} events, {faults:,} faults, {counts['commits']:,} commits in {seconds:.0f} s "
            f"({per_s:,.0f} events a second and core): {violations or 'no'} violation{'s' if violations != 1 else ''}"
        )
    return FAILED if violations else 0
