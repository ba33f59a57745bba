"""A node of Ray that needs long to start is waited for.

Ray gives up one that takes more than 30 s, which on a busy machine is no sign of anything; it has no setting for it,
and asks its head without a pause meanwhile. Its question is replaced by a patient one, in the way of
docs/adr/0063-a-lean-start.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NODE_WAIT_S = 120.0
POLL_S = 0.2
NODE = "raylet"

GetNode = Callable[[str, str], dict[str, Any]]
"""Ray's question to its head for what it knows of a node: `(address, node id)`; RuntimeError where it knows nothing."""


def patient(get_node: GetNode, starts: Callable[[], bool], timeout_s: float = NODE_WAIT_S) -> GetNode:
    """`get_node` asked again while the node starts, for as long."""

    def ask(address: str, node_id: str) -> dict[str, Any]:
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return get_node(address, node_id)
            except RuntimeError:
                if not starts() or time.monotonic() > deadline_s:
                    raise
            time.sleep(POLL_S)

    return ask


def node_starts() -> bool:
    """Whether Ray's process of a node is a child of this one, and runs."""
    return any(name == NODE for name in _children())


def _children() -> Iterator[str]:
    mine = str(os.getpid())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        state, parent = text.rpartition(")")[2].split()[:2]
        if parent == mine and state not in "ZX":
            yield text[text.index("(") + 1 : text.rindex(")")]
