"""`atoll submit`: a run as a job of a Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.cli.options import json_option, set_option


@click.command()
@click.argument("run")
@click.option("--address", default=None, metavar="http://HOST:8265", help="Of Ray's job server [RAY_ADDRESS].")
@set_option
@click.option("--working-dir", type=click.Path(path_type=Path), help="Folder that the job gets a copy of [none].")
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Directory of the run, on the machines of the cluster."
)
@click.option("--wait", is_flag=True, help="Stay, and show what the job prints, until it ends.")
@json_option
def submit(
    run: str,
    address: str | None,
    overrides: Sequence[str],
    working_dir: Path | None,
    run_dir: Path | None,
    wait: bool,
    as_json: bool,
) -> int:
    """Start a run as a job of a Ray cluster, and return.

    RUN is a preset or a TOML file; the file itself is handed over. The same as ray job submit ... -- atoll train RUN.
    The job starts the run's controller and watches it: its end harms nothing, and ray job stop stops the run so that
    it can be resumed. The cluster's machines need Atoll, and places for islands (resource atoll_worker).
    """
    from orchestrator.submit import submit_run

    job = submit_run(run, address=address, overrides=overrides, working_dir=working_dir, run_dir=run_dir)
    if as_json:
        click.echo(json.dumps({"job": job.id, "address": job.address, "run_dir": job.run_dir}))
    else:
        click.echo(f"job {job.id} on {job.address}, run directory {job.run_dir}")
        click.echo(f"its output: ray job logs --address {job.address} --follow {job.id}", err=True)
    if wait:
        for text in job.follow():
            click.echo(text, nl=False, err=as_json)
        return job.exit_code()
    return 0
