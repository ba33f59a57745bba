"""What is left out of a Ray of our own."""

from __future__ import annotations

import ray._private.node as node
import ray._private.utils as utils

from orchestrator.lean_ray import LEFT_OUT, lean_start


def test_this_ray_has_what_is_left_out_and_gets_it_back() -> None:
    before = {name: getattr(node.Node, name) for name in LEFT_OUT}
    error = utils.get_dashboard_dependency_error
    with lean_start(exports_metrics=False):
        assert all(getattr(node.Node, name) is not before[name] for name in LEFT_OUT)
        assert isinstance(utils.get_dashboard_dependency_error(), ImportError)
    assert {name: getattr(node.Node, name) for name in LEFT_OUT} == before
    assert utils.get_dashboard_dependency_error is error


def test_an_agent_that_exports_metrics_is_whole() -> None:
    with lean_start(exports_metrics=True):
        assert utils.get_dashboard_dependency_error() is None
