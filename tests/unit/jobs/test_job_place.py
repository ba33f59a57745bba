"""Where jobs go: what a door says of it, what is said where nothing takes them, and what a command line may name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.cli import submit as command
from orchestrator.cluster.door import Door
from orchestrator.cluster.door_client import JobPlace, job_place
from orchestrator.cluster.job_server import JobServer, JobServerArguments
from orchestrator.cluster.join_string import JoinString
from orchestrator.cluster.tokens import new_token, write_token
from orchestrator.errors import ClusterUnreachable, UserError
from orchestrator.launch import set_ray_environment
from orchestrator.submit import submit_run

TOKEN = new_token()
THERE = {"address": "http://127.0.0.2:8265", "python": "/venv/bin/python", "folder": "/work"}


@contextmanager
def door(jobs: object) -> Iterator[JoinString]:
    opened = Door(token=TOKEN, info=dict, host="127.0.0.1", jobs=jobs)  # type: ignore[arg-type]
    opened.start()
    try:
        yield JoinString(host="127.0.0.1", port=opened.port, token=TOKEN)
    finally:
        opened.close()


def test_a_door_says_where_jobs_go_to_who_knows_the_token() -> None:
    with door(lambda: THERE) as place:
        assert job_place(place) == JobPlace(**THERE)
        with pytest.raises(UserError, match="not that of this cluster"):
            job_place(JoinString(host=place.host, port=place.port, token=new_token()))


def test_a_job_server_that_does_not_start_is_told_to_who_asked() -> None:
    def broken() -> dict[str, object]:
        raise ClusterUnreachable("Ray's job server ended while it started:\nport 8265 is taken", remedy="another one")

    with door(broken) as place, pytest.raises(ClusterUnreachable, match="port 8265 is taken") as raised:
        job_place(place)
    assert "job_server.log" in str(raised.value.remedy)


def test_a_process_that_ends_at_once_leaves_its_last_words_and_can_be_tried_again(tmp_path: Path) -> None:
    arguments = JobServerArguments(
        host="127.0.0.1", port=0, gcs_address="127.0.0.1:1", ray_folder=tmp_path, token=TOKEN
    )
    server = JobServer({**os.environ, "PYTHONHOME": str(tmp_path)}, tmp_path / "job_server.log")
    for _ in range(2):
        with pytest.raises(ClusterUnreachable, match=r"ended while it started:\n.*(?s:.*)encodings") as raised:
            server.address(arguments)
        assert "--jobs-port" in str(raised.value.remedy)
    server.close()


def test_what_an_address_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_token(tmp_path / "token", TOKEN)
    assert command._place(None, None) is None
    assert command._place("http://h:8265", None) == "http://h:8265"
    assert command._place("h:4000", tmp_path / "token") == JoinString(host="h", port=4000, token=TOKEN)
    with pytest.raises(UserError, match="its token is missing"):
        command._place("h:4000", None)
    with pytest.raises(ClusterUnreachable, match="in no cluster"):
        command._place("auto", None)
    with pytest.raises(UserError, match="which cluster") as raised:
        submit_run("debug", address=None)
    assert "what atoll up printed" in str(raised.value.remedy)


def test_a_run_that_is_submitted_to_nowhere_says_what_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.job_submission", _Nobody)  # type: ignore[arg-type]
    with pytest.raises(ClusterUnreachable, match="no job server of Ray answers") as raised:
        submit_run("debug", address="http://127.0.0.1:1")
    assert "the join string of atoll up" in str(raised.value.remedy)


class _Nobody:
    @staticmethod
    def JobSubmissionClient(address: str) -> None:
        raise ConnectionError(f"Failed to connect to Ray at address: {address}.")


def test_how_a_cluster_of_somebody_else_is_entered_stays_as_it_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"RAY_AUTH_MODE": "token"})
    set_ray_environment("10.0.0.1:6379")
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    set_ray_environment(None)
    assert os.environ["RAY_AUTH_MODE"] == "disabled", "a Ray of our own is on this machine alone"
