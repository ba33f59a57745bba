"""`atoll up --recover-from-members RUN`: the cluster's part of rebuilding a run's journal."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from orchestrator.cluster.ray_node import cluster_environment, process_environment
from orchestrator.cluster.state import ClusterState
from orchestrator.errors import UserError

TIMEOUT_S = 300.0


def recover_run(state: ClusterState, run_id: str, *, force: bool) -> int:
    """Let the controller of a run rebuild its lost journal; the number of its rows.

    Raises:
        UserError: there is no such run in the cluster, or too few members agree.
    """
    place = ["--address", state.gcs_address, "--node-ip", state.node_ip]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.lost_journal", run_id, *place, *["--force"] * force],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=process_environment(os.environ, cluster_environment(state.token_file, wan=state.wan)),
        timeout=TIMEOUT_S,
    )
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        answer = {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    if "error" in answer:
        raise UserError(
            f"the journal of {run_id!r} was not rebuilt: {answer['error']}",
            place="--recover-from-members",
            remedy="the run stays as it is and this can be tried again; --force takes the copies of those who answer; "
            "without members a run goes on from its newest snapshot with atoll train --resume",
        )
    return int(answer["rows"])
