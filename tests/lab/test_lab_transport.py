"""Our own transport between two hosts, over links that are slow, long and lossy."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plain_flight import both_ways
from faults.lab.lab import Lab
from orchestrator.topology import load_topology
from tests.lab.support import first_good, python

ROOT = Path(__file__).resolve().parents[2]
NUM_BYTES = 12 << 20
CONNECTIONS = 4
AT_LEAST = 0.8
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
FETCH = """
import json, sys, time
import numpy as np
from workers.store import BlobStore
from workers.transport.flight import FlightTransport
host, address, num_bytes, connections = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
transport = FlightTransport(BlobStore(), host=host, token="t", num_connections=connections)
transport.start()
if sys.argv[5] == "warm":  # as in a run
    transport.fetch(address, ["piece"], timeout_s=40, max_bytes=num_bytes)
begin_s = time.monotonic()
(blob,) = transport.fetch(address, ["piece"], timeout_s=40, max_bytes=num_bytes)
seconds = time.monotonic() - begin_s
expected = np.random.default_rng(1).integers(0, 256, num_bytes, dtype=np.uint8)
print(json.dumps({"seconds": seconds, "same": bool((blob.data == expected).all())}))
transport.stop()
"""


@pytest.mark.slow
def test_a_blob_crosses_a_slow_link_at_its_speed_and_unharmed(lab_root: Path) -> None:
    """12 MiB in four connections over slow-pair, first as it is, then with packets lost on the way."""
    with Lab(load_topology("slow-pair"), root=lab_root) as lab, serving(lab, "a") as address:
        clean = first_good(lambda: fetched(lab, "b", address), lambda one: NUM_BYTES * 8e-6 / one["seconds"] > 60)
        lab.set("a:b", loss=0.002)
        lossy = fetched(lab, "b", address, warm=False)
        counted = lab.status().link("a>b")
    assert clean["same"] and lossy["same"]
    rate_mbit = NUM_BYTES * 8e-6 / clean["seconds"]
    assert 60 < rate_mbit < 100, "the link, and nothing else, sets the speed"
    assert counted.num_bytes > 2 * NUM_BYTES and counted.dropped_loss > 0


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["two-regions", "slow-pair"])
def test_our_transport_is_as_fast_as_plain_flight(name: str, lab_root: Path) -> None:
    """What an exchange does with its links: both ways at once, over as many warm connections, digests checked."""
    with Lab(load_topology(name), root=lab_root) as lab, ThreadPoolExecutor() as pool, ExitStack() as stack:
        a, b = lab.nodes
        at_a, at_b = (stack.enter_context(serving(lab, node)) for node in (a, b))

        def ratio() -> float:
            ways = [pool.submit(fetched, lab, here, there) for here, there in ((a, at_b), (b, at_a))]
            ours = max(way.result()["seconds"] for way in ways)
            plain = both_ways(lab, a, b, num_bytes=NUM_BYTES, connections=CONNECTIONS, repeats=2)
            return plain[1] / ours  # the first one warms

        found = first_good(ratio, lambda one: one >= AT_LEAST)
    print(f"{name}: {found:.2f} of the speed of plain Flight")
    assert found >= AT_LEAST


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


def fetched(lab: Lab, node: str, address: str, *, warm: bool = True) -> dict[str, Any]:
    """Fetch the blob on a node, once before if `warm`: how long it took, and whether it is what is served."""
    fetch = python(FETCH, lab.address(node), address, NUM_BYTES, CONNECTIONS, "warm" if warm else "cold")
    done = lab.run(node, fetch, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
