from __future__ import annotations

import json
import socket
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from faults.lab.processes import myself
from orchestrator.cluster.control import Control, ask
from orchestrator.cluster.drain import DONE, LATE, drain, what_ends
from orchestrator.cluster.leave import choose
from orchestrator.cluster.state import ClusterState
from orchestrator.errors import ClusterUnreachable, UserError

pytestmark = pytest.mark.timeout(20)

# ---------------------------------------------------------------- which one


def known(name: str, role: str = "node", gcs: str = "10.0.0.1:6379") -> ClusterState:
    return ClusterState(
        folder=Path("/s") / name,
        role=role,
        door="10.0.0.1:4321",
        supervisor=myself(),
        ray_folder=Path("/r"),
        node_ip="10.0.0.2",
        wan=False,
        gcs_address=gcs,
    )


def test_the_only_one_needs_no_name() -> None:
    assert [state.name for state in choose([known("a")], None, every=False)] == ["a"]


def test_several_need_one_or_all_and_heads_come_last() -> None:
    all_three = [known("head", "head"), known("a"), known("b", gcs="10.0.0.9:1")]
    with pytest.raises(UserError, match=r"several are meant: a .*, b .*, head") as caught:
        choose(all_three, None, every=False)
    assert "--all" in str(caught.value.remedy)
    assert [state.name for state in choose(all_three, None, every=True)] == ["a", "b", "head"]
    assert [state.name for state in choose(all_three, "head", every=False)] == ["head"]
    assert [state.name for state in choose(all_three, "10.0.0.9:1", every=False)] == ["b"]
    assert [state.name for state in choose(all_three, "10.0.0.1:6379", every=True)] == ["a", "head"]


def test_none_is_an_error_of_its_own() -> None:
    with pytest.raises(ClusterUnreachable, match="in no cluster"):
        choose([], None, every=True)
    with pytest.raises(ClusterUnreachable, match="not in 'x', but in a"):
        choose([known("a")], "x", every=True)


# ---------------------------------------------------------------- the line to a supervisor


def test_a_question_is_answered_and_a_leave_is_told_until_the_end(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)  # far longer than a socket's path may be
    deep.mkdir(parents=True)
    asked = threading.Event()

    def answer(request: Mapping[str, object]) -> Mapping[str, object] | None:
        if request.get("do") == "leave":
            asked.set()
            return None
        return {"got": request}

    control = Control(deep, answer)
    control.start()
    assert stat.S_IMODE((deep / "control.sock").stat().st_mode) == 0o600
    assert list(ask(deep, {"do": "status"}, timeout_s=10)) == [{"got": {"do": "status"}}]
    heard: list[object] = []
    listener = threading.Thread(target=lambda: heard.extend(ask(deep, {"do": "leave"}, timeout_s=10)))
    listener.start()
    assert asked.wait(10)
    while not control.tell("one"):
        pass
    control.tell("two")
    control.close()
    listener.join(timeout=10)
    assert not listener.is_alive()
    assert heard == [{"say": "one"}, {"say": "two"}]
    with pytest.raises(OSError):
        list(ask(deep, {"do": "status"}, timeout_s=10))


@pytest.mark.parametrize("data", [b"garbage\n", b"\n", b"[1]\n", b"\xff\xfe\n", b"x" * 10_000])
def test_garbage_on_the_line_is_answered(tmp_path: Path, data: bytes) -> None:
    control = Control(tmp_path, lambda request: {"error": f"what is {dict(request)}"})
    control.start()
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(10)
        line.connect(str(tmp_path / "control.sock"))
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        assert "error" in json.loads(line.makefile("rb").readline())
    control.close()


# ---------------------------------------------------------------- drain

Answers = dict[str, list[Mapping[str, Sequence[str]] | None]]


def run_drain(answers: Answers, timeout_s: float = 10.0) -> tuple[int, list[dict[str, object]]]:
    """Answers of each controller, poll by poll; the last one is repeated."""
    now, said = [0.0], list[dict[str, object]]()

    def leave(name: str) -> Mapping[str, Sequence[str]] | None:
        return answers[name].pop(0) if len(answers[name]) > 1 else answers[name][0]

    def pause(seconds: float) -> None:
        now[0] += seconds

    code = drain(answers, leave, said.append, timeout_s=timeout_s, clock=lambda: now[0], pause=pause)
    return code, said


def leaving(*names: str, unknown: Sequence[str] = ()) -> Mapping[str, Sequence[str]]:
    return {"leaving": names, "unknown": unknown}


def test_without_runs_nothing_has_to_leave() -> None:
    assert run_drain({}) == (DONE, [{"done": True, "controllers": 0, "leaving": [], "unknown": []}])


def actor(name: str, node: str = "here", state: str = "ALIVE") -> dict[str, object]:
    return {"Name": name, "State": state, "Address": {"NodeID": node}}


def test_what_hands_nothing_over_is_said_before() -> None:
    actors = [
        actor("island/pipe/peer-1/n1"),
        actor("island/pipe/trainer-0/n2"),
        actor("island/pipe/peer-0/n3", node="there"),
        actor("island/pipe/peer-2/n4", state="DEAD"),
        actor("island/run-1/island-0/n5"),
        actor("controller/pipe", node="there"),
        actor("controller/run-1"),
        actor(""),
    ]
    [controller] = what_ends(actors, "here")
    assert controller.startswith("the controller of run-1 is on this machine") and "--run run-1" in controller
    assert what_ends(actors, "elsewhere") == []


def test_all_runs_are_waited_for_and_each_change_is_said_once() -> None:
    code, said = run_drain({"a": [leaving("x", "y"), leaving("y"), leaving("y"), leaving()], "b": [leaving()]})
    assert code == DONE
    assert [line["leaving"] for line in said] == [["x", "y"], ["y"], []]
    assert said[-1]["done"] is True


def test_a_run_that_ends_meanwhile_is_waited_for_no_longer() -> None:
    assert run_drain({"a": [leaving("x"), None]})[0] == DONE


def test_who_does_not_leave_is_named() -> None:
    code, said = run_drain({"a": [leaving("x")], "b": [leaving()]}, timeout_s=3)
    assert code == LATE
    assert said[-1] == {"done": False, "controllers": 2, "leaving": ["x"], "unknown": []}


def test_a_name_is_unknown_if_no_run_has_it() -> None:
    assert run_drain({"a": [leaving(unknown=["m"])], "b": [leaving("m"), leaving()]})[1][-1]["unknown"] == []
    assert run_drain({"a": [leaving(unknown=["m"])], "b": [leaving(unknown=["m"])]})[1][-1]["unknown"] == ["m"]
