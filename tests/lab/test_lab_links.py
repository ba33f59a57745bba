"""What the links of a lab do to real packets."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from faults.lab.errors import LabError
from faults.lab.lab import Lab
from faults.lab.measure import fill_streams, send_datagrams
from faults.lab.namespaces import has_rto_max
from faults.lab.schedule import LinkChange
from faults.lab.topology import Topology
from orchestrator.topology import load_topology
from tests.lab.support import first_good, pair, python

# A TCP segment of 1500 bytes carries 1448 of payload.
PAYLOAD_SHARE = 1448 / 1500
SERVE_DIGEST = """
import hashlib, socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
stream, _ = listener.accept()
digest = hashlib.sha256()
while data := stream.recv(1 << 20):
    digest.update(data)
print(digest.hexdigest())
"""
SEND = """
import random, socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as stream:
    stream.sendall(random.Random(3).randbytes(int(sys.argv[3])))
"""
KNOCK = """
import socket, sys
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"knock", (sys.argv[1], 9))
"""
BOTH_ENDS = """
import socket, sys
if len(sys.argv) == 2:
    listener = socket.create_server((sys.argv[1], 0))
    print(listener.getsockname()[1], flush=True)
    stream, _ = listener.accept()
else:
    stream = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print(stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\\0").decode())
"""


def test_delay_of_an_idle_link_is_within_a_millisecond(lab_root: Path) -> None:
    with Lab(pair(delay_ms=50, rate_mbit=1000), root=lab_root) as lab:
        found = first_good(
            lambda: send_datagrams(lab, "a", "b", num=200, size=100, rate_mbit=0.2, idle_s=0.5),
            lambda one: abs(one.delay_ms - 50) < 1 and abs(one.delay_p99_ms - 50) < 1 and one.num_received == 200,
        )
    assert (found.delay_ms, found.delay_p99_ms) == (pytest.approx(50, abs=1), pytest.approx(50, abs=1))
    assert (found.num_received, found.num_swapped) == (200, 0)


@pytest.mark.parametrize("congestion", ["cubic", "bbr"])
def test_rate_of_tcp_is_within_five_per_cent(congestion: str, lab_root: Path) -> None:
    with Lab(pair(congestion=congestion, rate_mbit=100, delay_ms=5), root=lab_root) as lab:
        found = first_good(
            lambda: fill_streams(lab, "a", "b", seconds=2, warm_up_s=0.5),
            lambda one: abs(one.goodput_mbit / PAYLOAD_SHARE / 100 - 1) < 0.05,
        )
    assert found.congestion == congestion
    assert found.goodput_mbit / PAYLOAD_SHARE == pytest.approx(100, rel=0.05)


def test_rate_of_datagrams_and_the_queue_in_front_of_it(lab_root: Path) -> None:
    """More than fits: the rate is the link's, the rest is dropped, and what passes has waited in a full queue."""
    with Lab(pair(rate_mbit=20, delay_ms=10, queue_ms=100), root=lab_root) as lab:
        found = first_good(
            lambda: send_datagrams(lab, "a", "b", num=3000, rate_mbit=30, idle_s=0.5),
            lambda one: abs(one.rate_mbit / 20 - 1) < 0.05 and abs(one.delay_ms - 110) < 5,
        )
        counted = lab.status().link("a>b")
    assert found.rate_mbit == pytest.approx(20, rel=0.05)
    assert found.delay_ms == pytest.approx(110, abs=5)
    assert counted.dropped_queue > 300


def test_loss_is_within_a_tenth_over_a_hundred_thousand_datagrams(lab_root: Path) -> None:
    with Lab(pair(loss=0.01), root=lab_root) as lab:
        found = send_datagrams(lab, "a", "b", num=100_000, rate_mbit=300, idle_s=0.5)
        status = lab.status()
    assert status.overruns == {"a": 0, "b": 0}, "loss that nobody asked for"
    assert found.loss == pytest.approx(0.01, rel=0.1)
    assert status.link("a>b").dropped_loss == found.num_sent - found.num_received


def test_jitter_delays_and_keeps_the_order(lab_root: Path) -> None:
    with Lab(pair(delay_ms=20, jitter_ms=10), root=lab_root) as lab:
        found = first_good(
            # Further apart than the jitter: none is held up by the one before.
            lambda: send_datagrams(lab, "a", "b", num=150, size=100, rate_mbit=0.1, idle_s=0.5),
            lambda one: abs(one.delay_ms - 25) < 1.5 and one.max_delay_ms < 32,
        )
    assert found.num_swapped == 0
    assert found.min_delay_ms == pytest.approx(20, abs=1.5)
    assert found.delay_ms == pytest.approx(25, abs=1.5)
    assert 27 < found.max_delay_ms < 32


def test_directions_of_a_home_line_differ(lab_root: Path) -> None:
    """20 Mbit/s up and 100 down: the sender's line is the narrow one, until it is widened."""
    with Lab(load_topology("home-uplinks"), root=lab_root) as lab:
        narrow = first_good(
            lambda: send_datagrams(lab, "home-1", "home-2", num=2000, rate_mbit=30, idle_s=0.5).rate_mbit,
            lambda rate: abs(rate / 20 - 1) < 0.05,
        )
        lab.set("home-1", up_mbit=None, queue_ms=1000)
        lab.set("home-2", queue_ms=1000)
        wide = first_good(
            lambda: send_datagrams(lab, "home-1", "home-2", num=8000, rate_mbit=150, idle_s=1.2).rate_mbit,
            lambda rate: abs(rate / 100 - 1) < 0.05,
        )
    assert narrow == pytest.approx(20, rel=0.05)
    assert wide == pytest.approx(100, rel=0.05)


def test_bytes_survive_loss_jitter_and_segmentation(lab_root: Path) -> None:
    """Frames of 64 KB are cut where a packet is lost or late; what TCP makes of it is what was sent."""
    num_bytes = 8 << 20
    with Lab(pair(congestion="bbr", rate_mbit=200, delay_ms=2, jitter_ms=1, loss=0.005), root=lab_root) as lab:
        with lab.popen("b", python(SERVE_DIGEST, lab.address("b")), stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            lab.run("a", python(SEND, lab.address("b"), port, num_bytes), check=True, timeout=30)
            digest = server.stdout.read().strip()
        link = lab.status().link("a>b")
    import random

    assert digest == hashlib.sha256(random.Random(3).randbytes(num_bytes)).hexdigest()
    assert link.num_packets > num_bytes / 1448, "counted as packets of the wire"
    assert 0.002 < link.dropped_loss / link.num_packets < 0.01


def test_cuts_of_a_node_a_region_a_pair_and_one_way(lab_root: Path) -> None:
    regions = {"us": {"nodes": ["us-1", "us-2"]}, "eu": {"nodes": ["eu-1"]}, "asia": {"nodes": ["asia-1"]}}
    topology = Topology.model_validate({"regions": regions, "links": {"us:eu": {"delay_ms": 5}}})

    with Lab(topology, root=lab_root) as lab:

        def reaches(source: str, target: str) -> bool:
            try:
                return send_datagrams(lab, source, target, num=3, size=100, rate_mbit=1, idle_s=0.2).num_received == 3
            except LabError:
                return False

        def is_stopped(source: str, target: str) -> bool:
            """Whether a packet ends at a cut: sooner seen than that it does not come."""
            before = sum(link.dropped_cut for link in lab.status().links)
            lab.run(source, python(KNOCK, lab.address(target)), check=True, timeout=20)
            return sum(link.dropped_cut for link in lab.status().links) > before

        lab.cut("us")
        assert is_stopped("us-2", "eu-1") and is_stopped("asia-1", "us-1")
        assert reaches("us-1", "us-2"), "a region goes on inside"
        assert reaches("eu-1", "asia-1")
        lab.heal("us:eu")
        assert reaches("us-2", "eu-1")
        assert lab.status().cut == (
            ("us-1", "asia-1"), ("us-2", "asia-1"), ("asia-1", "us-1"), ("asia-1", "us-2"),
        )  # fmt: skip
        lab.heal()
        lab.cut("eu-1>us-1")
        assert is_stopped("eu-1", "us-1") and reaches("us-1", "eu-1")
        assert lab.status().cut == (("eu-1", "us-1"),)
        lab.cut("us-2")
        assert ("us-2", "us-1") in lab.status().cut
        lab.heal()
        assert lab.status().cut == ()


def test_a_cut_is_silent_and_a_connection_survives_it(lab_root: Path) -> None:
    """Nobody is told: what is sent meanwhile is sent again once the link is back."""
    with Lab(pair(delay_ms=1), root=lab_root) as lab:
        with lab.popen("b", python(SERVE_DIGEST, lab.address("b")), stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            lab.cut("a:b")
            with lab.popen("a", python(SEND, lab.address("b"), port, 100_000)) as client:
                lab.play(
                    [
                        LinkChange(at_s=0.3, action="set", target="a:b", values={"rate_mbit": 50.0}),
                        LinkChange(at_s=0.5, action="heal", target="a:b"),
                    ]
                )
                assert client.wait(timeout=20) == 0
            assert len(server.stdout.read().strip()) == 64
        assert lab.status().link("a up").dropped_cut > 0
        with pytest.raises(LabError, match=r"no link is called 'a>c'.*one of a up, a down"):
            lab.status().link("a>c")
        assert lab.status().link("a>b").rate_mbit == 50


def test_both_ends_of_a_connection_use_the_congestion_control_of_their_node(lab_root: Path) -> None:
    topology = Topology.model_validate(
        {"congestion": "cubic", "regions": {"p": {"nodes": ["a", "b"]}}, "nodes": {"b": {"congestion": "reno"}}}
    )
    with Lab(topology, root=lab_root) as lab:
        with lab.popen("b", python(BOTH_ENDS, lab.address("b")), stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            client = lab.run("a", python(BOTH_ENDS, lab.address("b"), port), capture_output=True, text=True, timeout=20)
            assert (client.stdout.strip(), server.stdout.read().strip()) == ("cubic", "reno")


@pytest.mark.skipif(not has_rto_max(), reason="this kernel has no net.ipv4.tcp_rto_max_ms (Linux 6.15)")
def test_tcp_waits_no_longer_than_the_topology_says(lab_root: Path) -> None:
    topology = Topology.model_validate({"rto_max_ms": 3000, "regions": {"p": {"nodes": ["a", "b"]}}})
    look = ["cat", "/proc/sys/net/ipv4/tcp_rto_max_ms"]
    with Lab(topology, root=lab_root) as lab:
        found = [lab.run(node, look, capture_output=True, text=True, timeout=20).stdout for node in ("a", "b")]
    here = subprocess.run(look, capture_output=True, text=True, timeout=20, check=True).stdout
    assert found == ["3000\n", "3000\n"]
    assert here != "3000\n", "only the nodes are changed"


def test_an_unshaped_pair_is_fast(lab_root: Path) -> None:
    """10 Gbit/s is what the benchmark shows; a busy machine must reach a good part of it in a second."""
    with Lab(pair(congestion="cubic"), root=lab_root) as lab:
        found = first_good(
            lambda: fill_streams(lab, "a", "b", seconds=1, warm_up_s=0.2), lambda one: one.goodput_mbit > 5000
        )
    assert found.goodput_mbit > 3000


def test_the_switch_costs_little(lab_root: Path) -> None:
    """Under 15 % of a core at 100 Mbit/s is what the benchmark shows; other work on the machine makes it dearer."""
    with Lab(pair(congestion="cubic", rate_mbit=100, delay_ms=25), root=lab_root) as lab:

        def measure() -> float:
            before_s = lab.status().cpu_s
            done = fill_streams(lab, "a", "b", seconds=2.0)
            assert done.num_bytes > 10e6
            return (lab.status().cpu_s - before_s) / done.seconds

        share = first_good(measure, lambda one: one < 0.15)
        before_s = lab.status().cpu_s
        lab.run("a", ["sleep", "0.5"], check=True, timeout=20)
        idle_s = lab.status().cpu_s - before_s
    assert share < 0.3
    assert idle_s < 0.01, "nothing to do costs nothing"
