"""`atoll up`, `join`, `leave`, `doctor`: a cluster of several machines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.options import Command, json_option
from orchestrator.names import label_problem
from orchestrator.waiting import waiting

if TYPE_CHECKING:
    from orchestrator.cluster.join_string import JoinString
    from orchestrator.cluster.state import ClusterState
    from orchestrator.cluster.supervisor import Plan

token_file_option: Callable[[Command], Command] = click.option(
    "--token-file", type=click.Path(path_type=Path), metavar="FILE", help="Holds the token, where HOST:PORT is given."
)
workers_option: Callable[[Command], Command] = click.option(
    "--workers", type=click.IntRange(min=0), help="Islands that this machine may hold [one for each GPU, or 1]."
)
label_option: Callable[[Command], Command] = click.option(
    "--label", "labels", metavar="K=V", multiple=True, help="Of this machine in Ray; may be repeated."
)
background_option: Callable[[Command], Command] = click.option(
    "--background", is_flag=True, help="Return when it is ready."
)
ready_fd_option: Callable[[Command], Command] = click.option("--ready-fd", type=int, hidden=True)


@click.command()
@click.option("--host", metavar="ADDRESS", help="Where the others reach this machine [that of the default route].")
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Of Ray [any].")
@click.option("--door-port", default=0, type=click.IntRange(0, 65535), help="Of the door, where machines join [any].")
@workers_option
@click.option("--wan", is_flag=True, help="The machines are far apart: Ray waits longer before it gives one up.")
@label_option
@click.option(
    "--jobs-port", type=click.IntRange(0, 65535), help="Start Ray's job server at once, there [when asked, any]."
)
@click.option("--fresh", is_flag=True, help="Do not go on with a cluster whose head ended without leaving.")
@click.option("--recover-from-members", "lost", metavar="RUN", help="Rebuild the journal of a run that was lost.")
@click.option("--force", is_flag=True, help="Rebuild it although not more than half of the members answer.")
@json_option
@background_option
@ready_fd_option
def up(
    host: str | None,
    port: int,
    door_port: int,
    workers: int | None,
    wan: bool,
    labels: Sequence[str],
    jobs_port: int | None,
    fresh: bool,
    lost: str | None,
    force: bool,
    as_json: bool,
    background: bool,
    ready_fd: int | None,
) -> int:
    """Start a cluster on this machine and keep it running until atoll leave or Ctrl-C.

    Prints the command with which other machines join. Whoever has it can run code on all machines of the cluster: hand
    it on like a password, and keep the cluster inside one network.

    Where an earlier atoll up was killed, or its machine was, this goes on with its cluster: same address, same join
    string, same tables, so that machines and runs elsewhere find it again. A run whose directory was lost with the
    head's disk is rebuilt from its members with --recover-from-members; where the head runs, this does only that.
    """
    if force and lost is None:
        raise click.UsageError("--force belongs to --recover-from-members")
    if lost is not None and (running := _head_here()) is not None:
        _recover(running, lost, force)
        return 0
    if background:
        return _start_in_background(lambda ready: _show_head(ready, as_json))
    from orchestrator.cluster.join_string import JoinString, parse_address
    from orchestrator.cluster.preflight import address_of, default_host
    from orchestrator.cluster.ray_node import default_workers, parse_devices
    from orchestrator.cluster.state import ray_host, take_up
    from orchestrator.cluster.supervisor import Plan
    from orchestrator.cluster.tokens import new_token

    former = take_up(fresh=fresh, host=host, port=port, door_port=door_port)
    place = JoinString(host=host or default_host(), port=door_port, token=new_token())
    if former is not None:
        where, door_port = parse_address(former.door)
        place = JoinString(host=where, port=door_port, token=former.token())
        port, wan = parse_address(former.gcs_address)[1], former.wan
        click.echo(f"going on with the cluster {former.gcs_address}, whose head ended without leaving", err=True)
    devices = parse_devices("auto")
    plan = Plan(
        place=place,
        node_ip=ray_host(address_of(place.host)),
        workers=default_workers(devices) if workers is None else workers,
        devices=devices,
        labels=dict(map(_label, labels)),
        wan=wan,
        gcs_port=port,
        former=former,
        jobs_port=jobs_port,
    )
    return _supervise(plan, ready_fd, lambda ready: _show_head(ready, as_json), lost=lost, force=force)


@click.command()
@click.argument("place", metavar="STRING|HOST:PORT")
@token_file_option
@workers_option
@click.option("--devices", default="auto", metavar="auto|cpu|cuda:0,...", help="What the islands here may use.")
@label_option
@click.option("--node-ip", metavar="ADDRESS", help="Where the others reach this machine [as the way to them says].")
@click.option("--wan", is_flag=True, help="Join only a cluster that was started with --wan.")
@json_option
@background_option
@ready_fd_option
def join(
    place: str,
    token_file: Path | None,
    workers: int | None,
    devices: str,
    labels: Sequence[str],
    node_ip: str | None,
    wan: bool,
    as_json: bool,
    background: bool,
    ready_fd: int | None,
) -> int:
    """Let this machine be part of a cluster until atoll leave or Ctrl-C.

    STRING is what atoll up printed there. It does not stay in the list of processes; to keep it out of the history of
    the shell too, give HOST:PORT and --token-file, or set ATOLL_TOKEN.
    """
    hide_token(place)
    if background:
        return _start_in_background(lambda ready: _show_node(ready, as_json))
    from orchestrator.cluster.preflight import check_join
    from orchestrator.cluster.ray_node import check_devices, default_workers, parse_devices
    from orchestrator.cluster.supervisor import Plan
    from orchestrator.cluster.tokens import read_place

    door = read_place(place, token_file, os.environ)  # first: it removes the file that the token was hidden in
    usable, named = parse_devices(devices), dict(map(_label, labels))
    check_devices(usable)
    with waiting("asking the cluster"):
        admission = check_join(door, node_ip=node_ip, wan=wan)
    plan = Plan(
        place=door,
        node_ip=admission.node_ip,
        workers=default_workers(usable) if workers is None else workers,
        devices=usable,
        labels=named,
        wan=admission.wan,
        gcs_address=admission.gcs_address,
    )
    return _supervise(plan, ready_fd, lambda ready: _show_node(ready, as_json))


@click.command()
@click.argument("member", required=False)
@click.option("--now", is_flag=True, help="Do not wait for the islands.")
@click.option(
    "--cluster", metavar="NAME|ADDRESS", help="Which one, where this machine is in several, or several times."
)
@click.option("--all", "every", is_flag=True, help="All that this machine is in.")
@click.option("--address", default="auto", show_default=True, metavar="ADDRESS", help="Of the cluster of MEMBER.")
@json_option
def leave(member: str | None, now: bool, cluster: str | None, every: bool, address: str, as_json: bool) -> int:
    """Take this machine out of its cluster, or let one MEMBER of a run go.

    The islands of this machine say good-bye to their runs first. Where atoll up runs, this ends the cluster.
    """
    from orchestrator.cluster.leave import choose, leave_cluster, leave_member
    from orchestrator.cluster.state import known_clusters

    def say(text: str) -> None:
        click.echo(text, err=True)

    left = []
    with waiting("leaving"):
        if member is not None:
            leave_member(member, address, now=now, say=say)
            left.append(member)
        else:
            for state in choose(known_clusters(), cluster, every=every):
                leave_cluster(state, now=now, say=say)
                left.append(state.name)
    if as_json:
        from orchestrator.answers import Left

        click.echo(Left(left=left).model_dump_json())
    return 0


@click.command()
@click.argument("place", metavar="STRING|ADDRESS", default="auto")
@token_file_option
@json_option
def doctor(place: str, token_file: Path | None, as_json: bool) -> int:
    """Check whether this machine can join a cluster: door, token, versions, ports both ways, clock, link.

    STRING is what atoll up printed; ADDRESS is that of a door (with --token-file or ATOLL_TOKEN), or of a cluster that
    this machine is in. Exit code 1 if a check failed.
    """
    hide_token(place)
    from dataclasses import asdict

    from orchestrator.cluster.doctor import examine

    checks = []
    with waiting("checking"):
        for check in examine(place_of(place, token_file)):
            checks.append(check)
            if not as_json:
                click.echo(f"{check.name:<10}{'ok' if check.ok else 'FAILED':<8}{check.found}")
                if check.remedy:
                    click.echo(f"{'':<10}{'':<8}try: {check.remedy}")
    if as_json:
        from orchestrator.answers import Checks

        click.echo(Checks.model_validate([asdict(check) for check in checks]).model_dump_json())
    return 0 if all(check.ok for check in checks) else 1


def place_of(text: str, token_file: Path | None) -> JoinString:
    """The door that a join string, an address or `auto` names."""
    from orchestrator.cluster.join_string import SCHEME, JoinString, parse_address
    from orchestrator.cluster.state import AUTO, find_cluster
    from orchestrator.cluster.tokens import read_place
    from orchestrator.errors import ClusterUnreachable

    if not text.startswith(SCHEME) and token_file is None and (known := find_cluster(text)) is not None:
        host, port = parse_address(known.door)
        return JoinString(host=host, port=port, token=known.token())
    if text == AUTO:
        raise ClusterUnreachable("this machine is in no cluster", remedy="atoll doctor STRING, or atoll up")
    return read_place(text, token_file, os.environ)


def hide_token(place: str) -> None:
    """Where the token is in the command line, this process becomes one that has it in a file instead."""
    from orchestrator.cluster.join_string import SCHEME, parse
    from orchestrator.cluster.state import state_root
    from orchestrator.cluster.tokens import hide_token

    if place.startswith(SCHEME):
        arguments = hide_token(parse(place), sys.orig_argv, state_root())
        os.execv(sys.executable, arguments)


def _label(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not (separator and key and value) or "," in text:
        raise click.UsageError(f"--label {text!r} is not of the form KEY=VALUE")
    if (problem := label_problem(key, value)) is not None:
        raise click.UsageError(f"--label {text}: {problem}")
    return key, value


def _head_here() -> ClusterState | None:
    from orchestrator.cluster.state import known_clusters

    return next((state for state in known_clusters() if state.role == "head" and state.gcs_address), None)


def _recover(state: ClusterState, run_id: str, force: bool) -> None:
    from orchestrator.cluster.recover import recover_run

    with waiting("asking the members"):
        rows = recover_run(state, run_id, force=force)
    click.echo(f"the journal of {run_id} was rebuilt from its members: {rows} rows; the run goes on", err=True)


def _supervise(
    plan: Plan,
    ready_fd: int | None,
    show: Callable[[dict[str, Any]], None],
    *,
    lost: str | None = None,
    force: bool = False,
) -> int:
    from orchestrator.cluster.background import say_ready
    from orchestrator.cluster.supervisor import Supervisor
    from orchestrator.errors import UserError

    def on_ready(state: ClusterState, place: JoinString) -> None:
        ready = {
            "name": state.name,
            "address": state.gcs_address,
            "door": state.door,
            "node": state.node_id,
            "workers": plan.workers,
            "pid": os.getpid(),
        }
        if plan.role == "head":
            ready["join"] = str(place)
        if ready_fd is None:
            show(ready)
        else:
            say_ready(ready_fd, ready, state.folder / "supervisor.log")
        if lost is not None:
            try:
                _recover(state, lost, force)
            except UserError as error:  # the cluster stays: its other runs, and another try, need it
                click.echo(f"error: {error}", err=True)

    return Supervisor(plan, on_ready).run()


def _start_in_background(show: Callable[[dict[str, Any]], None]) -> int:
    from orchestrator.cluster.background import start_in_background

    code, ready = start_in_background(sys.orig_argv)
    if ready is not None:
        show(ready)
    return code


def _show_head(ready: dict[str, Any], as_json: bool) -> None:
    """The one line for the other machines on stdout, what else there is to know on stderr."""
    if as_json:
        from orchestrator.answers import ClusterUp

        click.echo(ClusterUp.model_validate(ready).model_dump_json())
    else:
        click.echo(f"atoll join {ready['join']}")
    sys.stdout.flush()
    click.echo(f"cluster {ready['address']} with room for {ready['workers']} islands on this machine", err=True)
    click.echo("the line above lets other machines join; keep it secret", err=True)
    click.echo("train with: atoll train diloco --set run.address=auto", err=True)
    click.echo("end it with: atoll leave", err=True)


def _show_node(ready: dict[str, Any], as_json: bool) -> None:
    if as_json:
        from orchestrator.answers import ClusterJoined

        click.echo(ClusterJoined.model_validate(ready).model_dump_json())
        sys.stdout.flush()
        return
    click.echo(
        f"joined {ready['address']} as {ready['node'][:8]} with room for {ready['workers']} islands; "
        "atoll leave takes it out again",
        err=True,
    )
