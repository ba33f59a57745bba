"""Reaching the runs that go on somewhere: by a run directory, a Ray address, or the join string of a cluster.

With a directory or an address this process becomes a driver of that Ray; with a join string it asks the cluster's door,
and needs neither Ray nor a place in the cluster.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from orchestrator.cluster.door_client import call
from orchestrator.cluster.join_string import SCHEME, JoinString, parse
from orchestrator.cluster.state import AUTO, find_cluster
from orchestrator.cluster.tokens import read_place
from orchestrator.errors import ClusterUnreachable, UserError
from orchestrator.rundir import LATEST, RUNS, RunDir, open_run_dir, read_json
from orchestrator.waiting import waiting

ASKED = "the run that is meant"
ELSEWHERE = "atoll status and atoll logs show what went on there"  # for errors of lower layers, which name no remedy


class Runs(Protocol):
    """Where requests go; see `orchestrator.operate`."""

    def ask(self, what: str, run: str | None = None, **args: Any) -> Any:
        """The answer. Raises UserError, ClusterUnreachable."""
        ...


class DoorRuns:
    """Through the door of a cluster."""

    def __init__(self, place: JoinString) -> None:
        self._place = place

    def ask(self, what: str, run: str | None = None, **args: Any) -> Any:
        """See `Runs.ask`."""
        return unpack(call(self._place, {"do": what, "run": run, "args": args}))


class RayRuns:
    """Over the Ray that this process is connected to. `run`: the one that is meant where none is named."""

    def __init__(self, run: str | None = None) -> None:
        self._run = run

    def ask(self, what: str, run: str | None = None, **args: Any) -> Any:
        """See `Runs.ask`."""
        from orchestrator.operate import answer

        return answer({"do": what, "run": run or (None if what == "runs" else self._run), "args": args})


def unpack(reply: Mapping[str, Any]) -> Any:
    """What is in an answer; an error in it is raised."""
    if "error" in reply:
        error = reply["error"]
        kind = ClusterUnreachable if error.get("code") == ClusterUnreachable.exit_code else UserError
        raise kind(str(error["message"]), place=error.get("place"), remedy=error.get("remedy") or ELSEWHERE)
    return reply["ok"]


@contextmanager
def connect(target: str | None, token_file: Path | None = None) -> Iterator[Runs]:
    """Reach the runs at a target; None: the newest run directory here if it is on a cluster, else this machine's.

    Raises:
        UserError: the target is none, or its run does not go on.
        ClusterUnreachable: nobody answers there.
    """
    with ExitStack() as held:
        with waiting("reaching the run"):
            runs = _reach(target, token_file, held)
        yield runs


def _reach(target: str | None, token_file: Path | None, held: ExitStack) -> Runs:
    if target is not None and target.startswith(SCHEME):
        return DoorRuns(parse(target))
    if token_file is not None and target is not None:
        return DoorRuns(read_place(target, token_file, os.environ))
    directory = directory_of(target)
    if target is None and directory is not None and directory.state() != "running":
        directory = None  # the newest one here is over: what goes on is elsewhere
    if directory is None:
        if target is None and find_cluster(AUTO) is None:
            raise ClusterUnreachable(
                f"no run of {Path.cwd() / RUNS} goes on, and this machine is in no cluster",
                remedy="call it where runs/ is, or name the run's directory, HOST:PORT of its Ray, or a join string",
            )
        held.enter_context(_driver(target or AUTO, None, local=False))
        return RayRuns()
    where = read_json(directory.cluster_file)
    if not where or directory.state() != "running":
        raise does_not_go_on(directory)
    held.enter_context(_driver(str(where["address"]), str(where["node_ip"]), local=bool(where["local"])))
    return RayRuns(str(where["run"]))


def does_not_go_on(directory: RunDir) -> UserError:
    """The error for a run that is asked for something when it is over."""
    path, state = directory.path, directory.state()
    known = {"done": f"atoll report {path} shows what came of it", "failed": f"atoll logs --at {path}"}
    remedy = known.get(state, f"atoll train --resume {path}")
    return UserError(f"the run in {path} does not go on: it is {state}", remedy=f"{remedy}; or name a cluster")


def directory_of(target: str | None) -> RunDir | None:
    """The run directory that is meant, if one is; without a target the newest one here, if there is any."""
    if target is None:
        return open_run_dir() if (RUNS / LATEST).exists() else None
    if target.startswith(SCHEME):
        return None
    path = Path(target)
    if path.is_dir() or (RUNS / target).is_dir():
        return open_run_dir(path)
    if target == AUTO or ":" in target:
        return None
    raise UserError(
        f"{target!r} is no run directory, no address and no join string",
        remedy="a folder in runs/, HOST:PORT of Ray, or what atoll up printed",
    )


@contextmanager
def _driver(address: str, node_ip: str | None, *, local: bool) -> Iterator[None]:
    """Connect to a Ray, unless this process is connected to one."""
    from orchestrator.launch import LOOPBACK_ONLY, RAY_ENVIRONMENT, enter_cluster, no_answer

    known = None
    if local or (node_ip is not None and find_cluster(address) is None):
        os.environ.update({**RAY_ENVIRONMENT, LOOPBACK_ONLY: "0"})
        host, _, port = address.rpartition(":")
        enter_cluster(f"{host}:{port}", known=False, asked=ASKED)
    else:
        known = enter_cluster(address, asked=ASKED)
    import ray

    from orchestrator.processes import NAMESPACE

    if ray.is_initialized():
        yield
        return
    if known is not None:
        address, node_ip = known.gcs_address, known.node_ip
    options: dict[str, Any] = {"_node_ip_address": node_ip} if node_ip else {}
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=False,
            **options,
        )
    except (ConnectionError, RuntimeError) as error:
        raise no_answer(address, str(error), ASKED) from error
    try:
        yield
    finally:
        ray.shutdown()
