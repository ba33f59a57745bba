"""Why there is no run: what is said of the newest job, of which none, and with which exit code a wait for it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import UserError
from orchestrator.job_ends import FailedJob, last_words, newest_failure
from orchestrator.operate import choose
from orchestrator.submit import Job

REFUSED = """\
Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):
starting in /runs/nobody; Ray and the islands take some seconds ...
error: the cluster at '10.0.0.1:6379' has room for 0 islands (resource atoll_worker) on machines with
the label zone=c, the run has 1
  place: run.labels
  try:   atoll join ... --label zone=c on such a machine; labels there are zone=a, zone=b
"""


def row(start_ms: int, status: str = "FAILED", **values: Any) -> dict[str, Any]:
    return {"start_time": start_ms, "end_time": start_ms + 5000, "status": status, "message": REFUSED, **values}


def test_the_newest_job_says_why_it_failed_and_what_would_help() -> None:
    jobs = {"old": row(1000, message="error: something else"), "new": row(1_800_000_000_000, driver_exit_code=2)}
    failure = newest_failure(jobs)
    assert failure is not None and (failure.job, failure.exit_code) == ("new", 2)
    assert failure.why.startswith("the cluster at '10.0.0.1:6379' has room for 0 islands")
    assert failure.why.endswith("on machines with the label zone=c, the run has 1")
    assert failure.remedy == "atoll join ... --label zone=c on such a machine; labels there are zone=a, zone=b"
    sentence = "the newest job there, new, failed at 2027-01-15 08:00:05 UTC with exit code 2: the cluster at"
    assert failure.sentence().startswith(sentence)


@pytest.mark.parametrize(
    "newest",
    [
        row(3000, "RUNNING"),
        row(3000, "SUCCEEDED", driver_exit_code=0),
        row(3000, "STOPPED"),
        row(3000, driver_exit_code=3),  # the run was stopped, and can be resumed
        row(0),  # it has not begun
    ],
)
def test_of_a_newest_job_that_goes_on_or_was_ended_on_purpose_nothing_is_said(newest: dict[str, Any]) -> None:
    older = {} if newest["start_time"] == 0 else {"old": row(1000, driver_exit_code=2)}
    assert newest_failure({**older, "new": newest}) is None


def test_last_words_of_atoll_of_others_and_of_none() -> None:
    text = "error: first\n  try:   a\nerror: the run failed: all members died\nwhy: /runs/a/logs\n"
    assert last_words(text) == ("the run failed: all members died", "")
    assert last_words("Traceback ...\nValueError: 3\n\n") == ("ValueError: 3", "")
    assert last_words("") == ("it said nothing", "")


def test_who_misses_a_run_is_told_of_the_job_that_should_have_been_it() -> None:
    failure = FailedJob(job="raysubmit_1", exit_code=None, ended="then", why="no place", remedy="a smaller run.islands")
    with pytest.raises(UserError, match="no run goes on there; the newest job there, raysubmit_1, failed at") as raised:
        choose([], None, lambda: failure)
    assert raised.value.remedy == "a smaller run.islands"
    with pytest.raises(UserError, match="no run 'b' goes on there; the newest job there"):
        choose(["a"], "b", lambda: failure)
    with pytest.raises(UserError, match="no run 'b' goes on there") as raised:
        choose(["a"], "b", lambda: None)
    assert raised.value.message == "no run 'b' goes on there"
    assert raised.value.remedy == "--run with one of these: a"
    assert choose(["a", "b"], "b", _never) == "b" and choose(["a"], None, _never) == "a"
    with pytest.raises(UserError, match="several runs go on there: a, b"):
        choose(["a", "b"], None, _never)


def _never() -> FailedJob | None:
    raise AssertionError("nobody misses a run")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),  # bad input, as the driver found
        ("FAILED", 3, 3),  # atoll stop: for Ray a failure
        ("FAILED", 4, 4),
        ("FAILED", -9, 1),
        ("FAILED", None, 1),  # its environment could not be made
        ("STOPPED", None, 3),
    ],
)
def test_a_wait_ends_with_the_exit_code_of_the_run(status: str, code: int | None, expected: int) -> None:
    details = SimpleNamespace(status=SimpleNamespace(value=status), driver_exit_code=code)
    client: Any = SimpleNamespace(get_job_info=lambda job: details)
    assert Job(id="job", address="http://h:1", run_dir="/runs/a", client=client).exit_code() == expected
