from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest

from orchestrator.cluster import doctor, door
from orchestrator.cluster.door import Door
from orchestrator.cluster.join_string import JoinString
from orchestrator.cluster.preflight import check_join
from orchestrator.cluster.tokens import new_token
from orchestrator.cluster.versions import my_versions
from orchestrator.errors import ClusterUnreachable, UserError

pytestmark = pytest.mark.timeout(20)

HOST = "127.0.0.1"


@pytest.fixture
def info() -> dict[str, object]:
    return {"versions": asdict(my_versions()), "wan": False}


@pytest.fixture
def place(info: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> Iterator[JoinString]:
    """A door, and something that listens where Ray would."""
    monkeypatch.setattr(door, "POLL_S", 0.02)
    monkeypatch.setattr(doctor, "TRANSFER_BYTES", 1024 * 1024)
    with socket.create_server((HOST, 0)) as ray:
        info["gcs_address"] = f"{HOST}:{ray.getsockname()[1]}"
        opened = Door(token=new_token(), info=lambda: info, host=HOST)
        opened.start()
        yield JoinString(host=HOST, port=opened.port, token=opened.token)
        opened.close()


def failed(place: JoinString) -> list[str]:
    checks = list(doctor.examine(place))
    assert all(check.remedy for check in checks if not check.ok)
    return [check.name for check in checks if not check.ok]


def closed_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def test_a_sound_cluster(place: JoinString) -> None:
    assert failed(place) == []
    admission = check_join(place, node_ip=None, wan=False)
    assert admission.node_ip == "127.0.0.2"
    assert check_join(place, node_ip="127.0.0.7", wan=False).node_ip == "127.0.0.7"
    for other, error in (
        ("192.0.2.7", "192.0.2.7 is no address of this machine"),
        ("no-such.invalid", "is no address"),
    ):
        with pytest.raises(UserError, match=error) as caught:
            check_join(place, node_ip=other, wan=False)
        assert caught.value.place == "--node-ip"


def test_the_form_of_the_codecs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_codecs().found == "compiled (numba)"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check = doctor.check_codecs()
    assert check.ok and "torch" in check.found and "atoll[fast]" in check.remedy


def test_no_door() -> None:
    assert failed(JoinString(host=HOST, port=closed_port(), token=new_token())) == ["door"]


def test_wrong_token(place: JoinString) -> None:
    assert failed(replace(place, token=new_token())) == ["token"]


def test_other_versions(place: JoinString, info: dict[str, object]) -> None:
    info["versions"] = asdict(replace(my_versions(), ray="1.0"))
    assert failed(place) == ["versions"]
    with pytest.raises(UserError, match=r"cannot join: Ray is .* here and 1\.0 there"):
        check_join(place, node_ip=None, wan=False)


def test_ray_is_out_of_reach(place: JoinString, info: dict[str, object]) -> None:
    info["gcs_address"] = f"{HOST}:{closed_port()}"
    assert failed(place) == ["Ray"]
    with pytest.raises(ClusterUnreachable, match="the door answers, but Ray does not"):
        check_join(place, node_ip=None, wan=False)
    info["gcs_address"] = ""
    with pytest.raises(ClusterUnreachable, match="the cluster is starting"):
        check_join(place, node_ip=None, wan=False)


def test_no_way_back(place: JoinString, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "dial", lambda host, port: {"host": host, "port": port, "reached": False, "why": "no"})
    assert failed(place) == ["way back"]
    with pytest.raises(ClusterUnreachable, match=f"cannot reach this machine at {HOST}: no"):
        check_join(place, node_ip=None, wan=False)


def test_a_joiner_takes_the_profile_of_the_cluster(place: JoinString, info: dict[str, object]) -> None:
    with pytest.raises(UserError, match="started without it"):
        check_join(place, node_ip=None, wan=True)
    info["wan"] = True
    assert check_join(place, node_ip=None, wan=False).wan


def test_a_clock_that_differs_is_shown_and_fails_nothing(place: JoinString, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CLOCK_S", -1.0)
    [clock] = [check for check in doctor.examine(place) if check.name == "clock"]
    assert clock.ok
    assert "NTP" in clock.remedy
