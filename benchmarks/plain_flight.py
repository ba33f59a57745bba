"""Plain Arrow Flight between two hosts of a lab, over several connections: what a transport of ours is compared with.

    python -m benchmarks.plain_flight serve HOST NUM_BYTES
    python -m benchmarks.plain_flight fetch HOST PORT NUM_BYTES CONNECTIONS REPEATS

Serving prints the port and ends with its stdin. Fetching prints the seconds of each repeat as JSON: every connection
takes an equal share of the bytes at once, in batches of 1 MiB that are dropped unread; connections are warm.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl

from faults.lab.lab import Lab

ROOT = Path(__file__).resolve().parent.parent
BATCH_BYTES = 1 << 20
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
TIMEOUT_S = 120.0


class PlainServer(fl.FlightServerBase):  # type: ignore[misc]
    """Serves as many bytes as the ticket says."""

    def __init__(self, host: str, num_bytes: int) -> None:
        self._data = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)
        super().__init__(f"grpc+tcp://{host}:0")

    def do_get(self, context: Any, ticket: fl.Ticket) -> fl.RecordBatchStream:
        """Stream the first so many bytes."""
        buffer = pa.py_buffer(self._data[: int(ticket.ticket)])
        parts = [buffer[start : start + BATCH_BYTES] for start in range(0, len(buffer), BATCH_BYTES)]
        columns = [pa.Array.from_buffers(pa.uint8(), len(part), [None, part]) for part in parts]
        return fl.RecordBatchStream(pa.table({"bytes": pa.chunked_array(columns)}))


def fetch(host: str, port: int, num_bytes: int, connections: int, repeats: int) -> list[float]:
    """Seconds of each repeat."""
    clients = [fl.FlightClient(f"grpc+tcp://{host}:{port}", generic_options=OWN_CONNECTION) for _ in range(connections)]

    def share(client: fl.FlightClient, wanted: int) -> None:
        for _ in client.do_get(fl.Ticket(str(wanted))):
            pass

    seconds = []
    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(lambda client: share(client, BATCH_BYTES), clients))
        for _ in range(repeats):
            begin_s = time.monotonic()
            list(pool.map(lambda client: share(client, num_bytes // connections), clients))
            seconds.append(time.monotonic() - begin_s)
    return seconds


@contextmanager
def served(lab: Lab, node: str, num_bytes: int) -> Iterator[str]:
    """A server on a node: its port."""
    command = [sys.executable, "-m", "benchmarks.plain_flight", "serve", lab.address(node), str(num_bytes)]
    with lab.popen(node, command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.communicate("", timeout=TIMEOUT_S)


def both_ways(lab: Lab, a: str, b: str, *, num_bytes: int, connections: int, repeats: int) -> list[float]:
    """Seconds for `num_bytes` each way at once, the slower way of each repeat."""
    with served(lab, a, num_bytes) as port_a, served(lab, b, num_bytes) as port_b:
        ways = [(a, b, port_b), (b, a, port_a)]
        fetching = [
            lab.popen(
                here,
                [sys.executable, "-m", "benchmarks.plain_flight", "fetch", lab.address(there), port]
                + [str(number) for number in (num_bytes, connections, repeats)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for here, there, port in ways
        ]
        found = [json.loads(process.communicate(timeout=TIMEOUT_S)[0]) for process in fetching]
    return [max(pair) for pair in zip(*found, strict=True)]


def main(role: str, host: str, *numbers: str) -> None:
    """Play one role."""
    if role == "serve":
        server = PlainServer(host, int(numbers[0]))
        print(server.port, flush=True)
        sys.stdin.read()
        server.shutdown()
    else:
        port, num_bytes, connections, repeats = map(int, numbers)
        print(json.dumps(fetch(host, port, num_bytes, connections, repeats)))


if __name__ == "__main__":
    main(*sys.argv[1:])
