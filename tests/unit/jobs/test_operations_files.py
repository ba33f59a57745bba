"""Logs of machines that share nothing, archives of runs, stacks, the door's child, places of other runs."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from orchestrator.bundle import HIDDEN, without_secrets, write_bundle
from orchestrator.client import unpack
from orchestrator.cluster.door import Door
from orchestrator.cluster.door_client import call
from orchestrator.cluster.join_string import JoinString
from orchestrator.cluster.operator import Operator
from orchestrator.cluster.tokens import new_token
from orchestrator.errors import ClusterUnreachable, UserError
from orchestrator.log_files import tail_of
from orchestrator.log_shipping import LogCopy, read_piece
from orchestrator.places import without_others
from orchestrator.rundir import RunDir
from workers.stack import add_stack, dump_stack


def copy_of(far: Path, near: Path, **limits: int) -> LogCopy:
    async def read(offset: int, num_bytes: int) -> bytes:
        return read_piece(far, offset, num_bytes)

    return LogCopy(path=near, read=read, **limits)


def test_a_log_is_copied_as_it_grows_and_stays_when_its_machine_is_gone(tmp_path: Path) -> None:
    far, near = tmp_path / "far.log", tmp_path / "logs" / "island-1-1.log"
    far.write_bytes(b"a" * 2500)
    copy = copy_of(far, near, piece_bytes=1000)
    assert asyncio.run(copy.grow()) == 2500
    assert asyncio.run(copy.grow()) == 0
    with far.open("ab") as file:
        file.write(b"more\n")
    # Another life of the controller goes on where the copy ends.
    assert asyncio.run(copy_of(far, near).grow()) == 5
    assert near.read_bytes() == far.read_bytes()
    far.unlink()
    assert near.read_bytes().endswith(b"more\n")


def test_a_copy_has_a_bound_and_says_so(tmp_path: Path) -> None:
    far, near = tmp_path / "far.log", tmp_path / "near.log"
    far.write_bytes(b"b" * 5000)
    copy = copy_of(far, near, limit_bytes=2000, piece_bytes=1500)
    asyncio.run(copy.grow())
    asyncio.run(copy.grow())
    assert near.read_bytes().startswith(b"b" * 2000 + b"\n... this log is longer than 2000 bytes")
    assert near.stat().st_size < 2200


def test_the_end_of_a_log_by_member_and_incarnation(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("controller", "island-1-1", "island-1-2", "island-11-1"):
        (logs / f"{name}.log").write_text(f"first of {name}\nlast of {name}\n")
    add_stack(logs, "island-1.2", "a stack")
    assert tail_of(tmp_path, None)["text"].endswith("last of controller\n")
    assert tail_of(tmp_path, "island-1")["name"] == "island-1.2"
    assert tail_of(tmp_path, "island-1.1")["text"].startswith("first of island-1-1")
    assert tail_of(tmp_path, "island-1", max_bytes=25)["text"] == "last of island-1-2\n"
    with pytest.raises(UserError) as raised:
        tail_of(tmp_path, "island-7")
    assert "island-11.1" in str(raised.value.remedy)


def test_the_stack_of_a_process_is_kept_beside_its_log(tmp_path: Path) -> None:
    text = dump_stack(os.getpid())
    assert "test_the_stack_of_a_process" in text or text.startswith("no stack: "), text
    path = add_stack(tmp_path, "island-0.1", text)
    assert path.name == "island-0.1.stack.txt" and path.read_text().startswith(text[:10])
    assert dump_stack(2**22 + 1).startswith("no stack: ")


@pytest.mark.parametrize(
    ("said", "secret"),
    [
        ("atoll join atoll://0123456789abcdef0123456789abcdef@10.0.0.1:4000", "0123456789abcdef0123456789abcdef"),
        (f"token {'ab' * 32} was used", "ab" * 32),
        ("WANDB_API_KEY=sk-12345", "sk-12345"),
        ("  password: hunter2", "hunter2"),
        ('snapshots = "s3://AKIA12:wJalrXUtnFEMI@models/demo"', "wJalrXUtnFEMI"),
        ('snapshots = "s3://models/demo?access_key=AKIA12&region=eu"', "AKIA12"),
        ("command = \"curl -H 'Authorization: Bearer abc.def-123' https://page.example\"", "abc.def-123"),
    ],
)
def test_what_looks_like_a_secret_is_left_out(said: str, secret: str) -> None:
    clean = without_secrets(said.encode()).decode()
    assert secret not in clean and HIDDEN in clean


def test_a_bundle_tells_everything_but_parameters_and_secrets(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run-1")
    run.logs.mkdir(parents=True)
    (run.snapshots / "v3").mkdir(parents=True)
    (run.snapshots / "v3" / "anchor.safetensors").write_bytes(b"weights")
    (run.snapshots / "v3" / "manifest.json").write_text("{}")
    run.config.write_text("[run]\nname = 'x'\n")
    run.journal.write_text('{"hash": "' + "ab" * 16 + '"}\n')
    run.log("island-0", 1).write_text(f"joined with {'cd' * 32}\n")
    path, names = write_bundle(run, tmp_path / "out.tar.gz")
    assert {"config.toml", "journal.jsonl", "logs/island-0-1.log", "snapshots/v3/manifest.json", "bundle.json"} == set(
        names
    )
    with tarfile.open(path) as archive:
        assert all(name.startswith("run-1/") for name in archive.getnames())
        log = archive.extractfile("run-1/logs/island-0-1.log")
        journal = archive.extractfile("run-1/journal.jsonl")
        assert log is not None and journal is not None
        assert log.read() == f"joined with {HIDDEN}\n".encode()
        assert journal.read() == run.journal.read_bytes()


def test_places_that_other_runs_use_are_not_ours() -> None:
    total = {"a": 4, "b": 2, "c": 1}
    available = {"a": 1, "b": 0, "c": 1}
    assert without_others(total, available, {}) == {"a": 1, "b": 0, "c": 1}
    assert without_others(total, available, {"x": "a", "y": "a", "z": "b"}) == {"a": 3, "b": 1, "c": 1}
    # An island that was just placed is not in the figures yet.
    assert without_others(total, {"a": 4, "b": 2, "c": 1}, {"x": "c"}) == total
    assert without_others(total, {}, {}) == total


ECHO = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        sys.exit(3)
    if request["do"] == "hang":
        import time
        time.sleep(60)
    print(json.dumps({"ok": request}), flush=True)
"""


@pytest.fixture
def operator() -> Operator:
    return Operator(lambda: ([sys.executable, "-c", ECHO], dict(os.environ)), answer_s=1.5)


def test_the_child_answers_ends_and_is_started_again(operator: Operator) -> None:
    try:
        assert json.loads(operator.answer('{"do": "a"}')) == {"ok": {"do": "a"}}
        assert "has ended: exit code 3" in operator.answer('{"do": "die"}')
        assert "within 1.5 s" in operator.answer('{"do": "hang"}')
        assert json.loads(operator.answer('{"do":\n"b"}')) == {"ok": {"do": "b"}}
    finally:
        operator.close()
    assert operator._process is None
    assert "does not run here yet" in Operator(lambda: None).answer("{}")


def test_the_door_answers_about_runs_who_knows_its_token(operator: Operator) -> None:
    token = new_token()
    door = Door(token=token, info=dict, host="127.0.0.1", operate=operator.answer)
    door.start()
    try:
        place = JoinString(host="127.0.0.1", port=door.port, token=token)
        request = {"do": "set", "run": None, "args": {"values": {"codec.name": "int4 & more"}}}
        assert unpack(call(place, request)) == request
        with pytest.raises(UserError):
            call(JoinString(host="127.0.0.1", port=door.port, token=new_token()), request)
    finally:
        door.close()
        operator.close()
    assert [thread.name for thread in threading.enumerate() if thread.name == "door"] == []


def test_errors_from_afar_are_raised_here() -> None:
    with pytest.raises(UserError, match="no such run") as raised:
        unpack({"error": {"message": "no such run", "place": "--run", "remedy": "a, b", "code": 2}})
    assert (raised.value.place, raised.value.remedy) == ("--run", "a, b")
    with pytest.raises(ClusterUnreachable):
        unpack({"error": {"message": "gone", "code": 4}})
