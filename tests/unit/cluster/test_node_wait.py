"""How long a node may take to start, and what tells that it does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from orchestrator import node_wait
from orchestrator.node_wait import node_starts, patient

pytestmark = pytest.mark.timeout(30)


class Head:
    """Knows the node after so many questions."""

    def __init__(self, after: int) -> None:
        self.left = after

    def get_node(self, address: str, node_id: str) -> dict[str, str]:
        self.left -= 1
        if self.left >= 0:
            raise RuntimeError(f"no node {node_id} at {address}")
        return {"address": address, "node": node_id}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_wait, "POLL_S", 0.0)


def test_a_node_that_starts_is_waited_for() -> None:
    ask = patient(Head(3).get_node, lambda: True)
    assert ask("h:1", "n") == {"address": "h:1", "node": "n"}


def test_one_that_has_ended_or_takes_for_ever_is_not() -> None:
    head = Head(3)
    with pytest.raises(RuntimeError, match="no node n at h:1"):
        patient(head.get_node, lambda: False)("h:1", "n")
    assert head.left == 2, "asked once"
    with pytest.raises(RuntimeError, match="no node n at h:1"):
        patient(Head(10**9).get_node, lambda: True, timeout_s=0.0)("h:1", "n")


def test_a_node_is_a_child_of_that_name_that_runs() -> None:
    assert not node_starts()
    script = "import sys; open('/proc/self/comm', 'w').write(sys.argv[1]); print(flush=True); input()"
    command = [sys.executable, "-c", script, node_wait.NODE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        assert node_starts()
        child.stdin.close()
        child.wait()
    assert not node_starts()


def test_this_ray_asks_where_the_answer_is_waited_for() -> None:
    """`Node` looks the function up in its module each time, so that the one put there is asked."""
    import inspect

    from ray._private import node, services

    assert "ray._private.services.get_node(" in inspect.getsource(node.Node.__init__)
    assert "raylet_start_wait_time_s = 30" in inspect.getsource(node.Node.__init__), "a later Ray may have a setting"
    assert list(inspect.signature(services.get_node).parameters) == ["gcs_address", "node_id"]
