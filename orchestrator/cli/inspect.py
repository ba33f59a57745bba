"""`atoll status`, `atoll ledger` and `atoll runs`: read what a run wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.cluster import token_file_option
from orchestrator.cli.options import json_option, latest_run_dir_argument
from orchestrator.waiting import waiting


@click.command()
@click.argument("target", required=False, metavar="[RUN_DIR|ADDRESS|JOIN_STRING]")
@token_file_option
@click.option("--run", metavar="NAME", help="Which one, where several go on.")
@json_option
@click.option("--watch", is_flag=True, help="Stay, and show it again as it changes.")
def status(target: str | None, token_file: Path | None, run: str | None, as_json: bool, watch: bool) -> int:
    """Show where a run is.

    Without a target it is the newest one, runs/latest. A run elsewhere is asked for by an address of Ray or by the
    join string of its cluster.
    """
    from functools import partial

    from orchestrator.rundir import open_run_dir
    from orchestrator.status import Status, read_status, status_command

    if token_file is None and not _is_place(target):
        directory = open_run_dir(None if target is None else Path(target))
        from orchestrator.pipeline.views import is_pipeline_run, read_pipeline_status, render_pipeline

        if is_pipeline_run(directory.path):
            return status_command(partial(read_pipeline_status, directory.path), as_json, watch, render_pipeline)
        return status_command(partial(read_status, directory.path), as_json, watch)
    from orchestrator.cli.cluster import hide_token
    from orchestrator.client import connect

    hide_token(target or "")
    from orchestrator.pipeline.views import PipelineStatus, read_answer, render_pipeline
    from orchestrator.status import render

    def show(status: Status | PipelineStatus) -> Any:
        return render_pipeline(status) if isinstance(status, PipelineStatus) else render(status)

    with connect(target, token_file) as runs:
        return status_command(lambda: read_answer(runs.ask("status", run)), as_json, watch, show)


def _is_place(target: str | None) -> bool:
    """Whether a target is a join string or an address, and no directory."""
    return target is not None and not Path(target).exists() and (":" in target or target == "auto")


@click.command()
@latest_run_dir_argument
@json_option
def ledger(run_dir: Path | None, as_json: bool) -> int:
    """Recompute from the journal that every sample was counted once.

    Reads journal.jsonl alone, names every exception, and compares with summary.json. Exit code 5 when the
    journal contradicts itself or the summary. Without RUN_DIR it is the newest run, runs/latest.
    """
    from orchestrator.rundir import open_run_dir

    directory = open_run_dir(run_dir)
    from orchestrator.ledger import ledger_command
    from orchestrator.pipeline.views import is_pipeline_run, pipeline_ledger

    if is_pipeline_run(directory.path):
        return pipeline_ledger(directory.path, as_json)

    return ledger_command(directory.path, as_json)


@click.command()
@click.option(
    "--base", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder with the runs."
)
@click.option("--at", "target", metavar="ADDRESS|JOIN_STRING", help="Those that go on in a cluster, instead.")
@token_file_option
@json_option
def runs(base: Path, target: str | None, token_file: Path | None, as_json: bool) -> int:
    """List the runs."""
    if target is not None:
        return _runs_at(target, token_file, as_json)
    from orchestrator.rundir import list_runs, read_json

    found = list_runs(base)
    rows = [(str(run.path), run.state()) for run in found]
    if as_json:
        from orchestrator.answers import RunsHere

        click.echo(
            RunsHere.model_validate([{"run_dir": path, "state": state} for path, state in rows]).model_dump_json()
        )
        return 0
    if not rows:
        click.echo(f"no runs in {base}; `atoll demo` or `atoll train` makes one", err=True)
    width = max((len(path) for path, _ in rows), default=0)
    for run, (path, state) in zip(found, rows, strict=True):
        click.echo(f"{path:<{width}}  {state:<11}  {_came_to(read_json(run.summary))}".rstrip())
    return 0


def _runs_at(target: str, token_file: Path | None, as_json: bool) -> int:
    from orchestrator.cli.cluster import hide_token
    from orchestrator.client import connect

    hide_token(target)
    with waiting("asking"), connect(target, token_file) as there:
        found = there.ask("runs")
        failure = there.ask("failed_job")
    _say_failure(failure, any_run=bool(found))
    if as_json:
        from orchestrator.answers import RunsThere

        click.echo(RunsThere.model_validate(found).model_dump_json())
        return 0
    for run in found:
        done = "" if run["progress"] is None else f"{100 * run['progress']:.1f} %"
        click.echo(f"{run['run']}  {run['state']:<8}  {done:>7}  {len(run['members'])} members  {run['run_dir']}")
    return 0


def _say_failure(failure: Mapping[str, Any] | None, *, any_run: bool) -> None:
    """Why the newest job came to no run. Of one whose driver was killed nothing is said while runs go on: its may."""
    from orchestrator.job_ends import FailedJob

    if not any_run:
        click.echo("no run goes on there", err=True)
    if failure is None or (any_run and (failure["exit_code"] or -1) < 0):
        return
    failed = FailedJob(**failure)
    click.echo(f"note: {failed.sentence()}", err=True)
    if failed.remedy:
        click.echo(f"  try:   {failed.remedy}", err=True)


@click.command()
@latest_run_dir_argument
@click.option("--out", type=click.Path(path_type=Path), help="The archive to write [<run>.bundle.tar.gz].")
@json_option
def bundle(run_dir: Path | None, out: Path | None, as_json: bool) -> int:
    """Put what a run wrote into one archive: journal, metrics, logs, configuration, versions, summary.

    For a report of a problem. Parameters, tokens and anything that looks like a password are left out; logs and paths
    are not, have a look before you hand it on.
    """
    from orchestrator.bundle import write_bundle
    from orchestrator.rundir import open_run_dir

    directory = open_run_dir(run_dir)
    with waiting("packing"):
        path, names = write_bundle(directory, out)
    if as_json:
        from orchestrator.answers import Bundled

        bundled = Bundled(bundle=str(path), files=names, size_bytes=path.stat().st_size)
        click.echo(bundled.model_dump_json())
    else:
        click.echo(f"{path}: {len(names)} files, {path.stat().st_size / 1e6:.1f} MB")
    return 0


def _came_to(summary: Mapping[str, Any]) -> str:
    """What a summary says in a few words; empty while there is none."""
    tokens, loss = summary.get("tokens_committed"), summary.get("final_val_loss")
    words = f"{tokens:,} tokens" if isinstance(tokens, int) else ""
    return f"{words}, validation loss {loss:.4f}" if isinstance(loss, float) else words
