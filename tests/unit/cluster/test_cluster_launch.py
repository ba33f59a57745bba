"""How a run finds the cluster that `run.address` names, before Ray is imported."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.lab.processes import myself
from orchestrator import launch
from orchestrator.cluster.state import ClusterState, create
from orchestrator.errors import ClusterUnreachable, UserError

TOKEN = "ef" * 32


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment of the test's own, with its own state directory."""
    own = {"ATOLL_STATE_DIR": str(tmp_path / "state"), "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "old"}
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(own)
    yield own
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def address() -> Iterator[str]:
    """Something that listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def known(tmp_path: Path, address: str) -> ClusterState:
    wanted = ClusterState(
        folder=tmp_path / "state" / "head-1",
        role="head",
        door="127.0.0.1:1",
        supervisor=myself(),
        ray_folder=tmp_path / "ray",
        node_ip="127.0.0.2",
        wan=True,
        gcs_address=address,
    )
    return create(wanted, TOKEN)


def test_auto_without_a_cluster_says_how_to_start_one() -> None:
    with pytest.raises(ClusterUnreachable, match="in no cluster") as caught:
        launch.enter_cluster("auto")
    assert caught.value.exit_code == 4
    assert caught.value.remedy == "atoll up"


@pytest.mark.parametrize("named", [True, False])
def test_the_cluster_of_this_machine_brings_its_token(tmp_path: Path, address: str, named: bool) -> None:
    state = known(tmp_path, address)
    assert launch.enter_cluster(address if named else "auto") == state
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(state.token_file)
    assert os.environ["RAY_health_check_failure_threshold"] == "12"
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_another_cluster_takes_the_token_that_is_given(address: str) -> None:
    os.environ["ATOLL_TOKEN"] = TOKEN
    assert launch.enter_cluster(address) is None
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("token", TOKEN)


def test_another_cluster_without_a_token_is_open(address: str) -> None:
    assert launch.enter_cluster(address) is None
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize("text", ["foo", "127.0.0.1", "127.0.0.1:99999", ":6379", "127.0.0.1:x", "local"])
def test_what_is_no_address_is_said_before_ray_says_it(text: str) -> None:
    with pytest.raises(UserError, match="is no address of a Ray cluster") as caught:
        launch.enter_cluster(text, asked="--address")
    assert caught.value.place == "--address" and caught.value.exit_code == 2


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    known(tmp_path, closed)
    with pytest.raises(ClusterUnreachable, match="no Ray cluster answers"):
        launch.enter_cluster("auto")
