"""Our own transport between two hosts, over links that are slow, long and lossy."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from faults.lab.lab import Lab
from orchestrator.topology import load_topology
from tests.lab.support import first_good, python

ROOT = Path(__file__).resolve().parents[2]
NUM_BYTES = 12 << 20
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
host, address, num_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
transport = FlightTransport(BlobStore(), host=host, token="t", num_connections=4)
transport.start()
transport.warm(address, timeout_s=20)
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
    with Lab(load_topology("slow-pair"), root=lab_root) as lab:
        serve = python(SERVE, lab.address("a"), NUM_BYTES)
        with lab.popen("a", serve, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            assert address.startswith(f"grpc+tcp://{lab.address('a')}:")
            fetch = python(FETCH, lab.address("b"), address, NUM_BYTES)

            def measure() -> dict[str, Any]:
                done = lab.run("b", fetch, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
                assert done.returncode == 0, done.stderr
                found: dict[str, Any] = json.loads(done.stdout)
                return found

            clean = first_good(measure, lambda one: NUM_BYTES * 8e-6 / one["seconds"] > 60)
            lab.set("a:b", loss=0.002)
            lossy = measure()
            server.communicate("")
        counted = lab.status().link("a>b")
    assert clean["same"] and lossy["same"]
    rate_mbit = NUM_BYTES * 8e-6 / clean["seconds"]
    assert 60 < rate_mbit < 100, "the link, and nothing else, sets the speed"
    assert counted.num_bytes > 2 * NUM_BYTES and counted.dropped_loss > 0
