"""What a run does between two hosts, over links that are slow, long and lossy: a fetch, and whole exchanges."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.exchange import Nodes, measure_exchange, measure_flight
from faults.lab.lab import Lab
from orchestrator.topology import load_topology
from tests.lab.support import first_good, python

ROOT = Path(__file__).resolve().parents[2]
NUM_BYTES = 6 << 20
CONNECTIONS = 4
PARAMS, ROUNDS = 3_000_000, 3
BARS = {"two-regions": (5, 0.7), "slow-pair": (0, 0.7)}
"""Of each topology: one-way delays that belong to the optimum, and the share of the optimum that is asked for."""
SERVE = """
import sys
import numpy as np
from workers.store import BlobStore
from workers.transport.flight import FlightTransport
store = BlobStore()
store.put("piece", np.random.default_rng(1).integers(0, 256, int(sys.argv[2]), dtype=np.uint8))
transport = FlightTransport(store, host=sys.argv[1], token="t")
transport.start()
print(transport.address, flush=True)
sys.stdin.read()
transport.stop()
"""
# Once to open the connections, as in a run; once over the link as it is; once, when told so, while it loses packets.
FETCH = """
import json, sys, time
import numpy as np
from workers.store import BlobStore
from workers.transport.flight import FlightTransport
host, address, num_bytes, connections = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
transport = FlightTransport(BlobStore(), host=host, token="t", num_connections=connections)
transport.start()
expected = np.random.default_rng(1).integers(0, 256, num_bytes, dtype=np.uint8)
transport.fetch(address, ["piece"], timeout_s=40, max_bytes=num_bytes)
for line in sys.stdin:
    begin_s = time.monotonic()
    (blob,) = transport.fetch(address, ["piece"], timeout_s=40, max_bytes=num_bytes)
    seconds = time.monotonic() - begin_s
    print(json.dumps({"seconds": seconds, "same": bool((blob.data == expected).all())}), flush=True)
transport.stop()
"""


@pytest.mark.slow
def test_a_blob_crosses_a_slow_link_at_its_speed_and_unharmed(lab_root: Path) -> None:
    """6 MiB in four connections over slow-pair, first as it is, then with packets lost on the way."""
    with Lab(load_topology("slow-pair"), root=lab_root) as lab, serving(lab, "a") as address:
        fetch = python(FETCH, lab.address("b"), address, NUM_BYTES, CONNECTIONS)
        with lab.popen("b", fetch, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as fetcher:
            clean = first_good(lambda: fetched(fetcher), lambda one: NUM_BYTES * 8e-6 / one["seconds"] > 60)
            before = lab.status().link("a>b")
            lab.set("a:b", loss=0.002)
            lossy = fetched(fetcher)
            after = lab.status().link("a>b")
            fetcher.communicate("", timeout=20)
    assert clean["same"] and lossy["same"]
    rate_mbit = NUM_BYTES * 8e-6 / clean["seconds"]
    assert 60 < rate_mbit < 100, "the link, and nothing else, sets the speed"
    assert after.num_bytes - before.num_bytes > NUM_BYTES and before.dropped_loss == 0 < after.dropped_loss


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_an_exchange_on_two_regions_and_on_slow_pair_takes_hardly_longer_than_its_bytes(lab_root: Path) -> None:
    """A production controller, two members, 12 MB each way, from the first offer to the last application.

    Against plain Flight with as many connections and bytes, both ways at once, and where distance counts the five
    messages that an exchange needs. Of so few bytes the messages, and TCP that begins slowly, take most of the time:
    the bars are for this size (it reaches 0.81 to 0.88). `make bench` asks for 0.90 and 0.93 of 200 MB; what it
    finds is in benchmarks/results/exchange.json.
    Both topologies at once, as their links take most of the time, and starting processes the rest.
    """

    def all_good(found: dict[str, float]) -> bool:
        return all(found[name] >= least for name, (_, least) in BARS.items())

    def measure() -> dict[str, float]:
        with ThreadPoolExecutor() as pool:
            return dict(zip(BARS, pool.map(lambda name: of_optimum(name, lab_root), BARS), strict=True))

    found = first_good(measure, all_good)
    print(f"of the optimum: {found}")
    assert all_good(found), found


def of_optimum(name: str, root: Path) -> float:
    """The optimum of an exchange on a topology, as a share of what one takes."""
    topology = load_topology(name)
    num_delays, _ = BARS[name]
    with Lab(topology, root=root) as lab:
        exchanges = measure_exchange(nodes_of(lab), "fp32", PARAMS, ROUNDS)
        plain_s = statistics.median(measure_flight(nodes_of(lab), 4 * PARAMS, ROUNDS))
    assert exchanges["bytes_per_param"] == pytest.approx(4.0, rel=0.02)
    optimum_s = plain_s + num_delays * sum(link.delay_ms for link in topology.links.values()) / 1e3
    return optimum_s / statistics.median(exchanges["seconds"])


def nodes_of(lab: Lab) -> Nodes:
    """The two hosts of a lab as the roles of the benchmark know them."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    a, b = lab.nodes
    return Nodes(
        addresses=(lab.address(a), lab.address(b)), start=lambda node, argv: lab.popen(lab.nodes[node], argv, **pipes)
    )


@contextmanager
def serving(lab: Lab, node: str) -> Iterator[str]:
    """The address of a transport on a node that serves the blob."""
    serve = python(SERVE, lab.address(node), NUM_BYTES)
    with lab.popen(node, serve, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address.startswith(f"grpc+tcp://{lab.address(node)}:")
        yield address
        server.communicate("", timeout=20)


def fetched(fetcher: subprocess.Popen[str]) -> dict[str, Any]:
    """Have the blob fetched once more: how long it took, and whether it is what is served."""
    assert fetcher.stdin is not None and fetcher.stdout is not None
    fetcher.stdin.write("again\n")
    fetcher.stdin.flush()
    found: dict[str, Any] = json.loads(fetcher.stdout.readline())
    return found
