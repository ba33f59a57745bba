"""`atoll dashboard`: a run in the browser, from its files or from its controller."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from orchestrator.cli.cluster import hide_token, token_file_option
from orchestrator.cli.options import json_option, latest_run_dir_argument, shown
from orchestrator.cluster.join_string import SCHEME
from orchestrator.waiting import waiting

REACHING = "reaching the run"


@click.command()
@latest_run_dir_argument
@click.option(
    "--address", metavar="JOIN_STRING|HOST:PORT|auto", help="Read a running run from its controller in this cluster."
)
@token_file_option
@click.option("--run", "run_name", metavar="NAME", help="Which run, where several go on at --address.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8577, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--background", is_flag=True, help="With --address: serve from an actor of the cluster, and return.")
@click.option("--chaos", is_flag=True, help="Members may be killed from the page.")
@json_option
def dashboard(
    run_dir: Path | None,
    address: str | None,
    token_file: Path | None,
    run_name: str | None,
    host: str,
    port: int,
    background: bool,
    chaos: bool,
    as_json: bool,
) -> int:
    """Show a run in the browser.

    From its directory, finished or going on (without RUN_DIR the newest, runs/latest): a slider replays it. With
    --address from the controller of a run that goes on, without any file of it here; with the join string of a cluster
    that works on any machine that reaches it. While the run goes on the page has buttons to pause, save, stop and
    drain. Prints a link that opens the page for whoever has it. Ctrl-C ends it; the run does not notice.
    """
    if address is None and any((run_name, background, token_file)):
        raise click.UsageError("--run, --background and --token-file need --address")
    if address is not None and run_dir is not None:
        raise click.UsageError("RUN_DIR or --address, not both")
    from orchestrator.dashboard.serve import serve
    from orchestrator.dashboard.server import POLL_S, Dashboard
    from orchestrator.dashboard.sources import FileSource, Source

    source: Source
    poll_s = POLL_S
    if address is not None and (address.startswith(SCHEME) or token_file is not None):
        from orchestrator.cluster.tokens import read_place
        from orchestrator.dashboard.door_source import POLL_S as DOOR_POLL_S
        from orchestrator.dashboard.door_source import DoorSource

        if background:
            raise click.UsageError("--background: an actor serves, which a machine of the cluster has to start")
        hide_token(address)
        with waiting(REACHING):
            source = DoorSource(read_place(address, token_file, os.environ), run_name, chaos=chaos)
        what, poll_s = source.run_id, DOOR_POLL_S
    elif address is not None:
        from orchestrator.dashboard.ray_source import RaySource, connect

        with waiting(REACHING):
            what = connect(address, run_name)
        if background:
            with waiting("starting the dashboard there"):
                from orchestrator.dashboard.actor import start_in_cluster

                link = start_in_cluster(what, host=host, port=port, chaos=chaos)
            _tell(what, link, as_json)
            return 0
        source = RaySource(what, chaos=chaos)
    else:
        from orchestrator.rundir import open_run_dir

        directory = open_run_dir(run_dir).path
        source, what = FileSource(directory, chaos=chaos), str(shown(directory))
    serve(Dashboard(source, host=host, port=port, poll_s=poll_s), lambda link: _tell(what, link, as_json))
    return 0


def _tell(what: str, link: str, as_json: bool) -> None:
    from orchestrator.answers import DashboardLink

    click.echo(DashboardLink(run=what, link=link).model_dump_json() if as_json else f"{what}: {link}")
    sys.stdout.flush()
