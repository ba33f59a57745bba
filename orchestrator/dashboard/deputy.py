"""The buttons of a dashboard that reads a run's files: the run's controller is asked by a process that knows Ray.

It starts with the first button that is pressed, and ends when none was for two minutes or with the dashboard. Nothing
of the run's Ray is in the dashboard's own process.
"""

from __future__ import annotations

import json
import os
import sys

from orchestrator.cluster.operator import Operator
from orchestrator.dashboard.feed import ACTIONS
from orchestrator.errors import UserError
from orchestrator.rundir import RunDir, read_json

ANSWER_S = 40.0


class Deputy:
    """Asks for actions on the run in a directory. `chaos`: members may be killed."""

    def __init__(self, directory: RunDir, *, chaos: bool) -> None:
        """Nothing is started before `act`."""
        self._directory = directory
        self._actions = tuple(name for name in ACTIONS if chaos or name != "kill")
        self._operator = Operator(self._command, answer_s=ANSWER_S)

    def able(self) -> tuple[str, ...]:
        """What can be asked for while the run goes on: it says in its directory where its Ray is."""
        return self._actions if self._directory.cluster_file.exists() else ()

    def act(self, action: str, member: str, by: str) -> str:
        """Ask, and return what came of it."""
        from orchestrator.client import unpack

        where = read_json(self._directory.cluster_file)
        if not where or action not in self._actions:
            return f"refused: {action} is not available in this run"
        args = {"action": action, "member": member, "by": by}
        reply = json.loads(self._operator.answer(json.dumps({"do": "act", "run": where["run"], "args": args})))
        try:
            return str(unpack(reply))
        except UserError as error:
            return f"not done: {error.message}"

    def close(self) -> None:
        """End the process that asks, if there is one."""
        self._operator.close()

    def _command(self) -> tuple[list[str], dict[str, str]] | None:
        where = read_json(self._directory.cluster_file)
        if not where:
            return None
        address, node_ip = str(where["address"]), str(where["node_ip"])
        command = [sys.executable, "-m", "orchestrator.operate", "--address", address, "--node-ip", node_ip]
        return command, _environment(address, local=bool(where["local"]))


def _environment(address: str, *, local: bool) -> dict[str, str]:
    """Of a driver of that Ray, as `orchestrator.client` sets it for its own process."""
    from orchestrator.cluster.ray_node import cluster_environment, process_environment
    from orchestrator.cluster.state import find_cluster
    from orchestrator.launch import LOOPBACK_ONLY, RAY_ENVIRONMENT

    known = None if local else find_cluster(address)
    if known is not None:
        return process_environment(os.environ, cluster_environment(known.token_file, wan=known.wan))
    return process_environment(os.environ, {**RAY_ENVIRONMENT, LOOPBACK_ONLY: "0"} if local else {})
