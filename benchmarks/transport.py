"""How fast blobs travel between two processes of this machine, against plain Arrow Flight in the same run.

    python benchmarks/transport.py                      # 5 pairs of 20 s each per number of connections
    python benchmarks/transport.py --seconds 2 --json   # a smoke run

"plain" is a Flight stream of the same bytes in 1 MiB batches that the client drops unread: no copy, digest or token,
one connection. "atoll" is `FlightTransport.fetch`: its own memory, digest checked. A pair measures one after the other,
in alternating order; the ratio is the median over the pairs. The exit code is 1 below ``--at-least`` MB/s.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from workers.store import BlobStore  # noqa: E402
from workers.transport.flight import FlightTransport  # noqa: E402
from workers.transport.wire import BATCH_BYTES  # noqa: E402


class PlainServer(fl.FlightServerBase):  # type: ignore[misc]
    """Flight as its manual shows it."""

    def __init__(self, data: np.ndarray) -> None:
        buffer = pa.py_buffer(data)
        starts = range(0, len(data), BATCH_BYTES)
        columns = [
            pa.Array.from_buffers(pa.uint8(), len(b), [None, b]) for b in (buffer[s : s + BATCH_BYTES] for s in starts)
        ]
        self._table = pa.table({"bytes": pa.chunked_array(columns)})
        super().__init__("grpc+tcp://127.0.0.1:0")

    def do_get(self, context: Any, ticket: fl.Ticket) -> fl.FlightDataStream:
        """Stream the table."""
        del context, ticket
        return fl.RecordBatchStream(self._table)


def main() -> int:
    """Start the serving process, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="size of the blob")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each measurement")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--at-least", type=float, default=0.0, metavar="MB/S", help="fail below this median")
    parser.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--serve", metavar="TOKEN", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.mib)
    token = secrets.token_hex(16)
    child = [sys.executable, __file__, "--serve", token, "--mib", str(options.mib)]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        addresses = json.loads(server.stdout.readline())
        rows = [measure(addresses, token, k, options) for k in options.connections]
        server.communicate("")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "mib": options.mib,
        "rows": rows,
    }
    if options.keep:
        from benchmarks.common import keep

        keep("transport", result)
    if options.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return int(any(row["atoll_mb_per_s"] < options.at_least for row in rows))


def serve(token: str, mib: int) -> int:
    """Serve the same bytes both ways until stdin is closed."""
    data = np.random.default_rng(0).integers(0, 256, mib << 20, dtype=np.uint8)
    store = BlobStore()
    store.put("blob", data)
    transport, plain = FlightTransport(store, host="127.0.0.1", token=token), PlainServer(data)
    transport.start()
    print(json.dumps({"atoll": transport.address, "plain": f"grpc+tcp://127.0.0.1:{plain.port}"}), flush=True)
    sys.stdin.read()
    transport.stop()
    plain.shutdown()
    return 0


def measure(addresses: dict[str, str], token: str, num_connections: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians over all pairs for one number of connections."""
    num_bytes = options.mib << 20
    client = FlightTransport(BlobStore(), host="127.0.0.1", token=token, num_connections=num_connections)
    client.start()
    flight = fl.FlightClient(addresses["plain"])

    def atoll() -> None:
        client.fetch(addresses["atoll"], ["blob"], timeout_s=60, max_bytes=num_bytes)

    def plain() -> None:
        for _ in flight.do_get(fl.Ticket(b"")):
            pass

    for warm_up in (atoll, plain, atoll, plain):
        warm_up()
    pairs = []
    for index in range(options.pairs):
        order = (atoll, plain) if index % 2 == 0 else (plain, atoll)
        speeds = {call: mb_per_s(call, num_bytes, options.seconds) for call in order}
        pairs.append((speeds[atoll], speeds[plain]))
    client.stop()
    ratios = [ours / theirs for ours, theirs in pairs]
    return {
        "num_connections": num_connections,
        "atoll_mb_per_s": round(statistics.median(ours for ours, _ in pairs)),
        "plain_mb_per_s": round(statistics.median(theirs for _, theirs in pairs)),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "pairs": options.pairs,
        "seconds": options.seconds,
    }


def mb_per_s(call: Callable[[], None], num_bytes: int, seconds: float) -> float:
    """Return the speed of as many calls as fit into ``seconds`` (MB = 1e6 bytes)."""
    began_s = time.perf_counter()
    num_calls = 0
    while (elapsed_s := time.perf_counter() - began_s) < seconds:
        call()
        num_calls += 1
    return num_calls * num_bytes / 1e6 / elapsed_s


def describe_machine() -> str:
    """Return processor, cores and system in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {platform.system()}"


def print_table(result: dict[str, Any]) -> None:
    """Print the result for people."""
    print(f"{result['mib']} MiB blobs on loopback, {result['machine']}, {result['date']}")
    print("connections   atoll MB/s   plain MB/s   ratio (spread)")
    for row in result["rows"]:
        low, high = row["ratio_spread"]
        speeds = f"{row['atoll_mb_per_s']:13} {row['plain_mb_per_s']:12}"
        print(f"{row['num_connections']:11}{speeds}   {row['ratio']:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    sys.exit(main())
