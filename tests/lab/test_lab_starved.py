"""A link of 10 Mbit/s: what is said while a joiner fetches its state is heard in time, because that fetch is paced."""

from __future__ import annotations

import json
import statistics
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from faults.lab.lab import Lab
from orchestrator.topology import load_topology
from tests.lab.support import first_good, python

ROOT = Path(__file__).resolve().parents[2]
LINK_BYTES_PER_S = 10e6 / 8
NUM_BYTES = 1 << 20
SERVE = """
import sys
import numpy as np
from workers.store import BlobStore
from workers.transport.flight import FlightTransport
store = BlobStore()
store.put("state", np.random.default_rng(1).integers(0, 256, int(sys.argv[2]), dtype=np.uint8))
transport = FlightTransport(store, host=sys.argv[1], token="t", link_share=0.5, link_bytes_per_s=float(sys.argv[3]))
transport.start()
print(transport.address, flush=True)
sys.stdin.read()
transport.stop()
"""
# Heartbeats from the donor to the controller: the same way as the state. All nodes share one clock.
HEAR = """
import json, socket, sys, time
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
stream, _ = listener.accept()
delays = []
for line in stream.makefile("rb"):
    delays.append((float(line), time.monotonic() - float(line)))
print(json.dumps(delays), flush=True)
"""
SAY = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as stream:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end_s = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end_s:
        stream.sendall(f"{time.monotonic()}\\n".encode().rjust(400, b" "))
        time.sleep(0.02)
"""
FETCH = """
import json, sys, time
import numpy as np
from workers.store import BlobStore
from workers.transport.flight import FlightTransport
transport = FlightTransport(BlobStore(), host=sys.argv[1], token="t", num_connections=4)
transport.start()
transport.warm(sys.argv[2], timeout_s=20)
begin_s = time.monotonic()
fetched = transport.fetch(sys.argv[2], ["state"], timeout_s=40, max_bytes=int(sys.argv[3]), background=int(sys.argv[4]))
end_s = time.monotonic()
expected = np.random.default_rng(1).integers(0, 256, int(sys.argv[3]), dtype=np.uint8)
print(json.dumps({"begin_s": begin_s, "end_s": end_s, "same": bool((fetched[0].data == expected).all())}))
transport.stop()
"""
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}


def fetch_while_speaking(lab: Lab, address: str, *, background: int) -> tuple[float, list[float]]:
    """Seconds of the fetch, and the delays of the heartbeats meanwhile."""
    with ExitStack() as stack:
        ear = stack.enter_context(lab.popen("b", python(HEAR, lab.address("b")), **PIPES))
        assert ear.stdout is not None
        port = ear.stdout.readline().strip()
        fetch = stack.enter_context(
            lab.popen("b", python(FETCH, lab.address("b"), address, NUM_BYTES, background), **PIPES)
        )
        mouth = stack.enter_context(lab.popen("a", python(SAY, lab.address("b"), port, 30.0), **PIPES))
        done = json.loads(fetch.communicate(timeout=50)[0])
        mouth.terminate()  # what it said is on its way
        mouth.communicate(timeout=30)
        delays = json.loads(ear.communicate(timeout=30)[0])
    during = sorted(delay for sent_s, delay in delays if done["begin_s"] <= sent_s <= done["end_s"])
    assert done["same"] and len(during) > 25
    return done["end_s"] - done["begin_s"], during


@pytest.mark.slow
def test_heartbeats_are_heard_while_a_state_crosses_a_starved_link(lab_root: Path) -> None:
    with Lab(load_topology("starved"), root=lab_root) as lab:
        serve = python(SERVE, lab.address("a"), NUM_BYTES, LINK_BYTES_PER_S)
        with lab.popen("a", serve, **PIPES) as server:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            _, crowded = fetch_while_speaking(lab, address, background=0)
            paced_s, delays = first_good(
                lambda: fetch_while_speaking(lab, address, background=1), lambda one: p99(one[1]) < 0.2
            )
            server.communicate("")
    assert p99(crowded) > 0.15, "the link was not full: this shows nothing"
    assert p99(delays) < 1.0, "a member is suspect after 2.5 s"
    assert statistics.median(delays) < 0.7 * statistics.median(crowded)
    assert NUM_BYTES / paced_s < 0.55 * LINK_BYTES_PER_S, "more than its share of the link"
    assert NUM_BYTES / paced_s > 0.35 * LINK_BYTES_PER_S, "its share of the link is not used"


def p99(delays: list[float]) -> float:
    return delays[int(0.99 * len(delays))]
