"""`atoll status`, `atoll ledger` and `atoll runs`: read what a run wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.options import json_option, latest_run_dir_argument


@click.command()
@latest_run_dir_argument
@json_option
@click.option("--watch", is_flag=True, help="Stay, and show it again as it changes.")
def status(run_dir: Path | None, as_json: bool, watch: bool) -> int:
    """Show where a run is.

    Without RUN_DIR it is the newest one, runs/latest.
    """
    from orchestrator.rundir import open_run_dir

    directory = open_run_dir(run_dir)
    from orchestrator.status import status_command

    return status_command(directory.path, as_json, watch)


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

    return ledger_command(directory.path, as_json)


@click.command()
@click.option(
    "--base", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder with the runs."
)
@json_option
def runs(base: Path, as_json: bool) -> int:
    """List the runs."""
    from orchestrator.rundir import list_runs, read_json

    found = list_runs(base)
    rows = [(str(run.path), run.state()) for run in found]
    if as_json:
        click.echo(json.dumps([{"run_dir": path, "state": state} for path, state in rows]))
        return 0
    if not rows:
        click.echo(f"no runs in {base}; `atoll demo` or `atoll train` makes one", err=True)
    width = max((len(path) for path, _ in rows), default=0)
    for run, (path, state) in zip(found, rows, strict=True):
        click.echo(f"{path:<{width}}  {state:<11}  {_came_to(read_json(run.summary))}".rstrip())
    return 0


def _came_to(summary: Mapping[str, Any]) -> str:
    """What a summary says in a few words; empty while there is none."""
    tokens, loss = summary.get("tokens_committed"), summary.get("final_val_loss")
    words = f"{tokens:,} tokens" if isinstance(tokens, int) else ""
    return f"{words}, validation loss {loss:.4f}" if isinstance(loss, float) else words
