"""Makes the files in cluster_configs/env from what `atoll up` sets: `python -m orchestrator.cluster.env_file`."""

from __future__ import annotations

import shlex
from pathlib import Path

from orchestrator.cluster.ray_node import WAN_PROFILE, cluster_environment

FOLDER = Path(__file__).resolve().parents[2] / "cluster_configs" / "env"
# A path of one machine, and what only a supervisor may set: it has let the islands leave before.
LEFT_OUT = frozenset({"RAY_AUTH_TOKEN_PATH", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"})
HEAD = """\
# Environment of every Ray process of a cluster {where}, for those who start Ray themselves:
#     set -a; . cluster_configs/env/{name}.env; set +a; export RAY_AUTH_TOKEN_PATH=FILE; ray start ...
# `atoll up{option}` and `atoll join` set the same by themselves: this file is made from their code, and a test
# compares them. The same file on all nodes, and in the shell that runs `atoll train`.
"""
PATIENCE = "# A slow link is no dead node: Ray's verdict, after about five minutes, kills processes."


def env_file(*, wan: bool) -> str:
    """The text of `wan.env` or `lan.env`, for a shell to read."""
    where = "over slow or unreliable links" if wan else "in one building"
    lines = []
    for key, value in cluster_environment(Path("unused"), wan=wan).items():
        if key == next(iter(WAN_PROFILE)):
            lines.append(PATIENCE)
        if key not in LEFT_OUT:
            lines.append(f"{key}={shlex.quote(value)}")
    head = HEAD.format(where=where, name="wan" if wan else "lan", option=" --wan" if wan else "")
    return head + "\n".join(lines) + "\n"


def main() -> None:
    """Write both files."""
    for wan in (False, True):
        (FOLDER / f"{'wan' if wan else 'lan'}.env").write_text(env_file(wan=wan), encoding="utf-8")


if __name__ == "__main__":
    main()
