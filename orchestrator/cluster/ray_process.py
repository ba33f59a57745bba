"""`ray start`, in a process that does not outlive its supervisor: `python -m orchestrator.cluster.ray_process PID ...`.

Ray's own processes end with theirs already; this closes the gap above them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

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
    from ray.scripts.scripts import main as ray_main

    ray_main()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
