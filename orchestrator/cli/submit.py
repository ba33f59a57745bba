"""`atoll submit`: a run as a job of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.cluster import hide_token, place_of, token_file_option
from orchestrator.cli.options import json_option, set_option

if TYPE_CHECKING:
    from orchestrator.cluster.join_string import JoinString


HTTP = ("http://", "https://")


@click.command()
@click.argument("run")
@click.option(
    "--address",
    metavar="JOIN_STRING|auto|http://HOST:8265",
    help="The cluster of atoll up, or Ray's job server [RAY_ADDRESS].",
)
@token_file_option
@set_option
@click.option("--working-dir", type=click.Path(path_type=Path), help="Folder that the job gets a copy of [none].")
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Directory of the run, on the machines of the cluster."
)
@click.option("--wait", is_flag=True, help="Stay, show what the job prints, and end with its exit code.")
@json_option
def submit(
    run: str,
    address: str | None,
    token_file: Path | None,
    overrides: Sequence[str],
    working_dir: Path | None,
    run_dir: Path | None,
    wait: bool,
    as_json: bool,
) -> int:
    """Start a run as a job of a Ray cluster, and return.

    RUN is a preset or a TOML file; the file itself is handed over. The same as ray job submit ... -- atoll train RUN.
    The job starts the run's controller and watches it: its end harms nothing, and ray job stop stops the run so that
    it can be resumed. With the join string of atoll up (or auto, on a machine of the cluster) Ray's job server is
    started there if it does not run yet. Another Ray's machines need Atoll, and places for islands (resource
    atoll_worker).
    """
    from orchestrator.submit import submit_run
    from orchestrator.waiting import waiting

    hide_token(address or "")
    where = _place(address, token_file)
    with waiting("asking the job server"):
        job = submit_run(run, address=where, overrides=overrides, working_dir=working_dir, run_dir=run_dir)
    if as_json:
        from orchestrator.answers import Submitted

        click.echo(Submitted(job=job.id, address=job.address, run_dir=job.run_dir).model_dump_json())
    else:
        click.echo(f"job {job.id} on {job.address}, run directory {job.run_dir}")
        let_in = "" if where is None or isinstance(where, str) else " (with RAY_AUTH_MODE=token, RAY_AUTH_TOKEN=...)"
        click.echo(f"its output: ray job logs --address {job.address} --follow {job.id}{let_in}", err=True)
    if wait:
        for text in job.follow():
            click.echo(text, nl=False, err=as_json)
        return job.exit_code()
    return 0


def _place(address: str | None, token_file: Path | None) -> JoinString | str | None:
    """The door of a cluster, the address of a job server, or None for what `RAY_ADDRESS` says."""
    from orchestrator.cluster.state import AUTO, find_cluster

    if address is None and "RAY_ADDRESS" not in os.environ and find_cluster() is not None:
        address = AUTO
    return address if address is None or address.startswith(HTTP) else place_of(address, token_file)
