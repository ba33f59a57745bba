"""How long one exchange between two peers takes, against plain Arrow Flight and torch's gloo in the same run.

    python -m benchmarks.exchange                     # 50 M parameters on loopback and, as root, on links of the lab
    python -m benchmarks.exchange --large             # 200 M parameters as well
    python -m benchmarks.exchange --params 1000000 --places loopback --dry     # a smoke run

An exchange is measured from the first offer to the last application of its result, with warm connections: production
controller, members, codecs and transport (`benchmarks/exchange_roles.py`). "Flight" is the same payload bytes both ways
at once over 8 connections, unread; "gloo" is an all-reduce of the same tensor in fp32. Each case is kept as soon as it
is measured and not measured again in a later call with the same commit; the exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Any, cast

from benchmarks.common import RESULTS, ROOT, environment

KEPT = RESULTS / "exchange.json"
BITS = {"fp32": 32.0, "int8": 8 + 32 / 4096, "int4": 4 + 32 / 256}
WITHIN = 0.02  # payload bytes against the formula
ROLES = [sys.executable, "-m", "benchmarks.exchange_roles"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Two nodes with a link; `targets`: figure of a row -> least value, by codec."""

    name: str
    one_way_s: float
    targets: dict[str, dict[str, float]]


PLACES = {
    place.name: place
    for place in (
        Place(name="loopback", one_way_s=0.0, targets={"fp32": {"over_gloo": 0.5}}),
        Place(
            name="two-regions", one_way_s=0.05,
            targets={"fp32": {"of_optimum": 0.90, "over_gloo": 5.0}, "int4": {"over_gloo": 15.0}},
        ),
        Place(name="slow-pair", one_way_s=0.025, targets={"fp32": {"of_flight": 0.93}}),
    )
}  # fmt: skip
LARGE_TARGETS = {"two-regions": {"fp32": {"over_gloo": 6.0}, "int4": {"over_gloo": 25.0}}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """Addresses of the two nodes, and how a process is started on each."""

    addresses: tuple[str, str]
    start: Callable[[int, Sequence[str]], subprocess.Popen[str]]


@contextmanager
def nodes_of(place: str) -> Iterator[Nodes]:
    """This machine twice, or the first and the last node of a lab's topology."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    if place == "loopback":
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        yield Nodes(addresses=("127.0.0.1",) * 2, start=lambda node, argv: subprocess.Popen(argv, env=env, **pipes))
        return
    from faults.lab.lab import Lab
    from orchestrator.topology import load_topology

    with Lab(load_topology(place)) as lab:
        ends = lab.nodes[0], lab.nodes[-1]
        yield Nodes(
            addresses=(lab.address(ends[0]), lab.address(ends[1])),
            start=lambda node, argv: cast("subprocess.Popen[str]", lab.popen(ends[node], argv, **pipes)),
        )


class Roles:
    """Processes of one measurement; what is left of them ends with the block."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Roles:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def start(self, node: int, role: str, **options: object) -> subprocess.Popen[str]:
        """Start a role on a node."""
        arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        process = self.nodes.start(node, [*ROLES, role, "--host", self.nodes.addresses[node], *arguments])
        self.processes.append(process)
        return process


def line_of(process: subprocess.Popen[str]) -> str:
    """Next line of a role; raises RuntimeError if it has ended."""
    line = cast("IO[str]", process.stdout).readline()
    if not line:
        raise RuntimeError(f"a role ended with exit code {process.wait()}: {process.args}")
    return line.strip()


def tell(process: subprocess.Popen[str], text: str) -> None:
    """A line to a role."""
    stdin = cast("IO[str]", process.stdin)
    stdin.write(text + "\n")
    stdin.flush()


def measure_exchange(nodes: Nodes, codec: str, params: int, rounds: int) -> dict[str, Any]:
    """Seconds of each exchange but the first, and payload bytes a parameter and round of one member."""
    with Roles(nodes) as roles:
        controller = roles.start(0, "controller", rounds=rounds + 1)
        port = line_of(controller)
        common = {"controller": nodes.addresses[0], "port": port, "params": params, "codec": codec}
        peers = [roles.start(rank, "peer", rank=rank, rounds=rounds + 1, **common) for rank in range(2)]
        ends = [json.loads(line_of(process)) for process in peers]
        reason = json.loads(line_of(controller))["reason"]
    if ends[0]["digest"] != ends[1]["digest"] or reason != "done":
        raise RuntimeError(f"the exchange did not come out right: {reason}, digests {[end['digest'] for end in ends]}")
    seconds = [
        max(end["applied"][str(n + 1)] for end in ends) - min(end["offered"][str(n)] for end in ends)
        for n in range(1, rounds + 1)
    ]
    # Version 0 is fetched by the one that did not make it: anchor and momentum.
    state_bytes = 2 * 4 * params
    sent = sum(end["bytes_sent"] for end in ends) - state_bytes
    return {"seconds": seconds, "bytes_per_param": sent / (2 * params * (rounds + 1))}


def measure_flight(nodes: Nodes, num_bytes: int, rounds: int) -> list[float]:
    """Seconds until both have what the other sent, as often."""
    with Roles(nodes) as roles:
        both = [roles.start(node, "flight", bytes=num_bytes, rounds=rounds) for node in range(2)]
        ports = [line_of(process) for process in both]
        for node, process in enumerate(both):
            tell(process, f"grpc+tcp://{nodes.addresses[1 - node]}:{ports[1 - node]}")
        for _ in range(rounds + 2):
            for process in both:
                assert line_of(process) == "ready"
            for process in both:
                tell(process, "go")
        return _spans([json.loads(line_of(process)) for process in both])


def measure_gloo(nodes: Nodes, params: int, rounds: int) -> list[float]:
    """Seconds of an all-reduce, as often."""
    with Roles(nodes) as roles:
        common = {"controller": nodes.addresses[0], "port": _free_port(), "params": params, "rounds": rounds}
        both = [roles.start(rank, "gloo", rank=rank, **common) for rank in range(2)]
        return _spans([json.loads(line_of(process)) for process in both])


def _spans(ends: Sequence[dict[str, Any]]) -> list[float]:
    times = zip(*(end["times"] for end in ends), strict=True)
    return [max(stop for _, stop in pair) - min(start for start, _ in pair) for pair in times]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure_place(
    place: Place, codecs: Sequence[str], params: int, rounds: int, *, with_gloo: bool = True
) -> Iterator[dict[str, Any]]:
    """One row per codec, each with Flight and gloo measured beside it."""
    for codec in codecs:
        with nodes_of(place.name) as nodes:
            found = measure_exchange(nodes, codec, params, rounds)
            payload = round(BITS[codec] / 8 * params)
            plain = statistics.median(measure_flight(nodes, payload, rounds))
            reduce = statistics.median(measure_gloo(nodes, params, rounds)) if with_gloo else None
        seconds = statistics.median(found["seconds"])
        yield {
            "place": place.name,
            "codec": codec,
            "params": params,
            "seconds": round(seconds, 4),
            "all_seconds": [round(value, 4) for value in found["seconds"]],
            "flight_s": round(plain, 4),
            "gloo_s": None if reduce is None else round(reduce, 4),
            "of_optimum": round((plain + 5 * place.one_way_s) / seconds, 3),
            "of_flight": round(plain / seconds, 3),
            "over_gloo": None if reduce is None else round(reduce / seconds, 3),
            "bytes_per_param": round(found["bytes_per_param"], 5),
            "over_formula": round(found["bytes_per_param"] / (BITS[codec] / 8) - 1, 5),
        }


def missed(row: dict[str, Any]) -> list[str]:
    """Targets that a row does not reach, in words."""
    large = LARGE_TARGETS.get(row["place"], {}).get(row["codec"]) if row["params"] >= 200_000_000 else None
    targets = large if large is not None else PLACES[row["place"]].targets.get(row["codec"], {})
    if row["params"] < 50_000_000:
        targets = {}
    out = [f"{name} {row[name]} < {least}" for name, least in targets.items() if row[name] is None or row[name] < least]
    if row["params"] >= 10_000_000 and abs(row["over_formula"]) > WITHIN:
        out.append(f"payload bytes differ from the formula by {100 * row['over_formula']:.1f} %")
    return out


def main() -> int:
    """Measure what is not kept yet, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, default=50_000_000)
    parser.add_argument("--places", nargs="+", choices=list(PLACES), default=None)
    parser.add_argument("--codecs", nargs="+", choices=list(BITS), default=list(BITS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="200 M parameters on two-regions too")
    parser.add_argument("--again", action="store_true", help="measure also what is kept")
    parser.add_argument("--no-gloo", action="store_true", help="leave torch's all-reduce out")
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    options = parser.parse_args()
    where = environment()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() and not options.dry else {"rows": []}
    commit = where["commit"].rstrip("+")  # what is kept here changes the tree
    rows: list[dict[str, Any]] = [] if options.again else [r for r in kept["rows"] if r["commit"] == commit]
    cases = [(place, options.params) for place in options.places or available()]
    cases += [("two-regions", 200_000_000)] if options.large else []
    failed: list[str] = []
    for name, params in cases:
        done = {row["codec"] for row in rows if (row["place"], row["params"]) == (name, params)}
        codecs = [codec for codec in options.codecs if codec not in done]
        for row in measure_place(PLACES[name], codecs, params, options.rounds, with_gloo=not options.no_gloo):
            rows.append({**row, "commit": commit})
            print(json.dumps(row), flush=True)
            if not options.dry:
                places = {place.name: asdict(place) for place in PLACES.values()}
                KEPT.write_text(json.dumps({"environment": where, "places": places, "rows": rows}, indent=1) + "\n")
    for row in rows:
        failed += [f"{row['place']} {row['codec']} {row['params']:,}: {text}" for text in missed(row)]
    for text in failed:
        print(f"missed: {text}", file=sys.stderr)
    return int(bool(failed))


def available() -> list[str]:
    """Loopback, and the links of the lab where one can be made."""
    from faults.lab.namespaces import why_no_lab

    why = why_no_lab()
    if why is not None:
        print(f"note: no lab here ({why}): loopback only", file=sys.stderr)
    return ["loopback"] if why is not None else list(PLACES)


if __name__ == "__main__":
    sys.exit(main())
