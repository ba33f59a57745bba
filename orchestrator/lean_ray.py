"""A Ray of our own starts without the parts that nobody asks in a cluster of one machine.

`ray.init` starts a web server, an autoscaler and a reader of logs, whatever `include_dashboard`, `log_to_driver` and a
missing cluster configuration say. They cost the start of a run two seconds, in which Ray waits for the first of them,
and a process each as long as it lasts. There are no options for it: the methods of Ray's `Node` are replaced while it
starts (docs/adr/0063-a-lean-start.md). A node that starts slowly is waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from orchestrator.node_wait import node_starts, patient

# Methods of ray._private.node.Node; tests/unit/cluster/test_lean_ray.py fails where a Ray lacks one of them.
LEFT_OUT = ("start_api_server", "start_monitor", "start_log_monitor")


@contextlib.contextmanager
def lean_start(*, exports_metrics: bool) -> Iterator[None]:
    """`ray.init` within starts a node without them. `exports_metrics`: Ray's own metrics need its whole agent."""
    import ray._private.node as node
    import ray._private.services as services
    import ray._private.utils as utils

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(services, "get_node", patient(services.get_node, node_starts)))
        for name in LEFT_OUT:
            if hasattr(node.Node, name):  # a later Ray may start with all of it, and slower
                stack.enter_context(patch.object(node.Node, name, _nothing))
        if not exports_metrics:
            # What Ray asks to know whether to start an agent with or without its web server.
            stack.enter_context(patch.object(utils, "get_dashboard_dependency_error", _left_out))
        yield


def _nothing(*_: object, **__: object) -> None:
    """In the place of a method that starts a process."""


def _left_out() -> ImportError:
    return ImportError("left out by Atoll")
