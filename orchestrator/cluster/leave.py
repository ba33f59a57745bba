"""The commands' side of leaving: this machine, or one member of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from orchestrator.cluster.control import ask
from orchestrator.cluster.ray_node import cluster_environment, process_environment
from orchestrator.cluster.state import ClusterState, find_cluster, known_clusters, same_address
from orchestrator.errors import ClusterUnreachable, UserError

Say = Callable[[str], None]

END_S = 30.0
POLL_S = 0.02
MEMBER_TIMEOUT_S = 300.0


def choose(known: Sequence[ClusterState], wanted: str | None, *, every: bool) -> list[ClusterState]:
    """The supervisors that a command means: by the name of its folder, by an address, all, or the only one.

    Those of nodes come before those of heads, so that nobody loses its head first.

    Raises:
        ClusterUnreachable: this machine is in no cluster, or in none that is meant.
        UserError: several are meant, and one was asked for.
    """
    if not known:
        raise ClusterUnreachable("this machine is in no cluster", remedy="atoll up, or atoll join STRING")
    chosen = sorted(known, key=lambda state: (state.role == "head", state.name))
    if wanted is not None:
        chosen = [s for s in chosen if wanted == s.name or same_address(wanted, s.gcs_address, s.door)]
    names = ", ".join(f"{state.name} ({state.gcs_address or 'starting'})" for state in chosen or known)
    if not chosen:
        raise ClusterUnreachable(
            f"this machine is not in {wanted!r}, but in {names}",
            place="--cluster",
            remedy="one of these names or addresses, or --all",
        )
    if len(chosen) > 1 and not every:
        raise UserError(f"several are meant: {names}", remedy="--cluster NAME with one of these names, or --all")
    return chosen


def leave_cluster(state: ClusterState, *, now: bool, say: Say) -> None:
    """Ask a supervisor to leave, repeat what it says, and wait until it has ended.

    Raises:
        ClusterUnreachable: it does not listen, or does not end.
    """
    try:
        for line in ask(state.folder, {"do": "leave", "now": now}):
            say(f"{state.name}: {line.get('say', line)}")
    except OSError as error:
        if state.supervisor.is_alive:
            raise ClusterUnreachable(
                f"its supervisor does not listen: {error.strerror}",
                place=str(state.folder),
                remedy=f"kill {state.supervisor.pid}",
            ) from error
    deadline_s = time.monotonic() + END_S
    while state.supervisor.is_alive:
        if time.monotonic() > deadline_s:
            raise ClusterUnreachable(
                f"process {state.supervisor.pid} did not end within {END_S:g} s",
                place=str(state.folder),
                remedy=f"kill {state.supervisor.pid}; the next atoll up or atoll join here cleans up after it",
            )
        time.sleep(POLL_S)
    known_clusters(state.folder.parent)  # one that was killed meanwhile leaves its folder to us
    say(f"{state.name}: left")


def leave_member(member: str, address: str | None, *, now: bool, say: Say) -> None:
    """Let the runs of a cluster let one island go.

    Raises:
        ClusterUnreachable: this machine is not in that cluster, or Ray does not answer.
        UserError: no run has such a member, or it does not leave.
    """
    state = find_cluster(address)
    if state is None:
        raise ClusterUnreachable(
            f"this machine is in no cluster at {address!r}", place="--address", remedy="run it on one that is"
        )
    command = [sys.executable, "-m", "orchestrator.cluster.drain", "--address", state.gcs_address]
    command += ["--node-ip", state.node_ip, "--member", member, "--timeout", str(MEMBER_TIMEOUT_S), *["--now"] * now]
    environment = process_environment(os.environ, cluster_environment(state.token_file, wan=state.wan))
    last: dict[str, object] = {}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = json.loads(line)
            if last["leaving"]:
                say(f"{member} leaves")
    if "done" not in last:
        raise ClusterUnreachable(
            "the cluster does not answer",
            place=state.gcs_address,
            remedy="atoll doctor looks at what is in the way; atoll leave alone takes this machine out",
        )
    if not last["controllers"] or last["unknown"]:
        raise UserError(f"no run has a member {member!r}", place=state.gcs_address, remedy="atoll status names them")
    if not last["done"]:
        raise UserError(f"{member} did not leave within {MEMBER_TIMEOUT_S:g} s", remedy="--now does not wait for it")
    say(f"{member} left")
