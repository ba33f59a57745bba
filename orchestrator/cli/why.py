"""`atoll why`: the chain of decisions behind what a run did."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from orchestrator.cli.options import json_option


@click.command()
@click.argument("words", metavar="[RUN_DIR] [MEMBER|EXCHANGE]", nargs=-1)
@click.option("--run", "run_dir", type=click.Path(path_type=Path), metavar="DIR", help="Which run [the newest].")
@json_option
def why(words: Sequence[str], run_dir: Path | None, as_json: bool) -> int:
    """Tell from the journal why something was decided.

    MEMBER is island-1, or island-1.2 for one incarnation. EXCHANGE is the number of a version, or FRAGMENT.NUMBER.
    Of a pipeline they are peer-1 (or trainer-0) and the number of a step. Without either it is the whole run.
    """
    from orchestrator.errors import UserError
    from orchestrator.metrics import ExchangeRow, newest_rows
    from orchestrator.pipeline.figures import step_lines
    from orchestrator.pipeline.replay import is_pipeline
    from orchestrator.rundir import open_run_dir
    from orchestrator.segments import read_run
    from orchestrator.waiting import waiting
    from orchestrator.why import NothingKnown, commit_times, why_exchange, why_member, why_run

    named = list(words)
    if run_dir is None and named and Path(named[0]).is_dir():
        run_dir = Path(named.pop(0))
    if len(named) > 1:
        folder = "" if run_dir is not None else f" (no folder is called {named[0]})"
        raise click.UsageError(f"one member or exchange, not {len(named)}: {' '.join(named)}{folder}")
    what = named[0] if named else None
    directory = open_run_dir(run_dir)
    with waiting("reading the journal"):
        rows = read_run(directory.path).rows
        measured = newest_rows(directory.metrics) if directory.metrics.exists() else iter(())
        times = commit_times([row for row in measured if isinstance(row, ExchangeRow)])
    try:
        if is_pipeline(row.record for row in rows):
            from orchestrator.pipeline import why as stages

            at = {line["step"]: line["t_s"] for line in step_lines(directory.path)}
            if what is None:
                lines = stages.why_run(rows, at)
            elif what.isdigit():
                lines = stages.why_step(rows, at, int(what))
            else:
                lines = stages.why_member(rows, at, what)
        elif what is None:
            lines = why_run(rows, times)
        elif number := re.fullmatch(r"(?:([0-9]+)\.)?([0-9]+)", what):
            lines = why_exchange(rows, times, int(number[1] or 0), int(number[2]))
        else:
            lines = why_member(rows, times, what)
    except NothingKnown as error:
        raise UserError(
            str(error), place=str(directory.path), remedy="atoll why alone tells of the whole run"
        ) from error
    if as_json:
        from orchestrator.answers import WhyLines

        click.echo(WhyLines.model_validate([asdict(line) for line in lines]).model_dump_json())
        return 0
    for line in lines:
        when = f"{line.at_s:9.1f} s" if line.at_s is not None else " " * 11
        click.echo(f"{when}  row {line.seq:>5}  {line.text}")
    return 0
