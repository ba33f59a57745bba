"""`ray start`, in a process that does not outlive its supervisor: `python -m orchestrator.cluster.ray_process PID ...`.

Ray's own processes end with theirs already; this closes the gap above them. A node that starts slowly is waited for.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from orchestrator.node_wait import node_starts, patient

PR_SET_PDEATHSIG = 1


def end_with(supervisor: int) -> None:
    """Ask the kernel for SIGTERM at the death of the supervisor, which started this process."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor:
        sys.exit("the supervisor is gone already")


def main() -> None:
    """Tie this process to the supervisor, then become `ray`."""
    end_with(int(sys.argv[1]))
    sys.argv = ["ray", *sys.argv[2:]]
    from ray._private import services
    from ray.scripts.scripts import main as ray_main

    services.get_node = patient(services.get_node, node_starts)
    ray_main()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
