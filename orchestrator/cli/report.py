"""`atoll report`: a run, or two side by side, as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.cli.options import json_option, latest_run_dir_argument


@click.command()
@latest_run_dir_argument
@click.argument("run_dir2", type=click.Path(path_type=Path), required=False)
@json_option
def report(run_dir: Path | None, run_dir2: Path | None, as_json: bool) -> int:
    """Write the report of a run, or compare two.

    One self-contained HTML file in RUN_DIR: loss of the anchor and of the islands, throughput, bytes, a timeline of
    what every island did, faults. It needs no network: open it in a browser. An unfinished run has a report too,
    which says what is missing. With RUN_DIR2 both runs are shown side by side, without any it is the newest run,
    runs/latest.
    """
    from orchestrator.rundir import open_run_dir

    first = open_run_dir(run_dir)
    second = open_run_dir(run_dir2) if run_dir2 is not None else None
    from orchestrator.report.build import build_report
    from orchestrator.waiting import waiting

    with waiting("reading the metrics"):
        path = build_report(first.path, second.path if second else None)
    if as_json:
        from orchestrator.answers import Written

        click.echo(Written(path=str(path)).model_dump_json())
    else:
        click.echo(path)
    return 0
