"""The bar of long commands: on a terminal only, gone afterwards, and out of the way of what fails."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import orchestrator.waiting
from orchestrator.cli.main import main
from orchestrator.cluster.join_string import JoinString
from orchestrator.cluster.tokens import new_token
from orchestrator.errors import ClusterUnreachable
from orchestrator.waiting import waiting

PLACE = str(JoinString(host="127.0.0.1", port=9, token=new_token()))
WAIT_S = 30.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def until_shown(stream: Terminal, text: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while text not in stream.getvalue():
        assert time.monotonic() < deadline_s, f"waited for {text!r}: {stream.getvalue()!r}"
        time.sleep(0.01)


def test_a_bar_shows_how_much_is_done_and_goes() -> None:
    stream = Terminal()
    with waiting("counting", 4, stream=stream, after_s=0) as done:
        done(1)
        until_shown(stream, "counting")
        until_shown(stream, " 25 %")
    assert stream.getvalue().endswith("\x1b[2K"), "the line is erased"
    assert "waiting" not in [thread.name for thread in threading.enumerate()]


def test_what_has_no_end_in_sight_shows_that_it_works() -> None:
    stream = Terminal()
    with pytest.raises(RuntimeError, match="broken"), waiting("thinking", stream=stream, after_s=0):
        until_shown(stream, "thinking")
        raise RuntimeError("broken")
    assert "%" not in stream.getvalue()


def test_nothing_is_written_where_nobody_looks_or_nothing_takes_long() -> None:
    pipe, quick = io.StringIO(), Terminal()
    with waiting("counting", 4, stream=pipe, after_s=0) as done:
        done(4)
    with waiting("quick", stream=quick):
        pass
    assert pipe.getvalue() == quick.getvalue() == ""


def test_what_is_printed_meanwhile_arrives_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    with waiting("counting", 4, stream=stream, after_s=0):
        until_shown(stream, "counting")
        print("a line of the result")
    assert pipe.getvalue() == "a line of the result\n" and "result" not in stream.getvalue()


def test_one_inside_another_leaves_the_line_to_it() -> None:
    stream = Terminal()
    with waiting("outer", stream=stream, after_s=0):
        with waiting("inner", stream=stream, after_s=0):
            until_shown(stream, "outer")
        assert "waiting" in [thread.name for thread in threading.enumerate()]
    assert "inner" not in stream.getvalue()
    with waiting("afterwards", stream=stream, after_s=0):
        until_shown(stream, "afterwards")


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", PLACE],
        ["runs", "--at", PLACE],
        ["pause", PLACE],
        ["resume", PLACE],
        ["save", PLACE],
        ["stop", PLACE],
        ["set", "codec.name=int4", "--at", PLACE],
        ["rollback", "--to", "1", "--at", PLACE],
        ["unban", "island-1", "--at", PLACE],
        ["logs", "--at", PLACE],
        ["stack", "island-1", "--at", PLACE],
        ["dashboard", "--address", PLACE],
        ["chaos", "kill:island-1"],
        ["leave", "island-1"],
        ["doctor", PLACE],
    ],
    ids=lambda arguments: arguments[0],
)
def test_who_asks_a_cluster_that_takes_its_time_sees_that_something_happens(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cluster answers only when there is something on the terminal; then it has no such run."""
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    (tmp_path / "runs" / "latest" / "config.toml").touch()
    monkeypatch.chdir(tmp_path)
    stream = Terminal()
    asked = []

    def slow(*_: Any, **__: Any) -> dict[str, Any]:
        asked.append(True)
        until_shown(stream, "\x1b[")
        raise ClusterUnreachable("nobody there", remedy="wait")

    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(orchestrator.waiting, "SHOWN_AFTER_S", 0.0)
    monkeypatch.setattr("orchestrator.cli.cluster.hide_token", lambda place: None)
    for module in ("operate", "dashboard"):
        monkeypatch.setattr(f"orchestrator.cli.{module}.hide_token", lambda place: None)
    monkeypatch.setattr("orchestrator.client.call", slow)
    monkeypatch.setattr("orchestrator.attach.attach", slow)
    monkeypatch.setattr("orchestrator.cluster.leave.find_cluster", slow)
    monkeypatch.setattr("orchestrator.cluster.door_client.visit", slow)
    code = main(arguments)
    assert asked and code == (1 if arguments[0] == "doctor" else 4), stream.getvalue()
    assert "waiting" not in [thread.name for thread in threading.enumerate()]


def test_a_command_shows_it_on_a_terminal_and_prints_its_result_alone(tmp_path: Path) -> None:
    near, far = pty.openpty()
    command = [sys.executable, "-m", "orchestrator.cli.main", "simulate", "--seeds", "400", "--workers", "1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=far, env=environment)
    os.close(far)
    said = b""
    while b"seeds" not in said or b"%" not in said:
        said += os.read(near, 65536)
    process.terminate()
    process.wait(timeout=WAIT_S)
    os.close(near)
    assert (tmp_path / "out").read_text() == ""
