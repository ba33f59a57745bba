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

import pytest

from orchestrator.waiting import waiting

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
