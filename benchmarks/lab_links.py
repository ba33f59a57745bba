"""What the emulated links of the lab really do, and what they cost (needs root).

    python benchmarks/lab_links.py                          # everything, about 12 minutes
    python benchmarks/lab_links.py --repeats 1 --seconds 2 --only cost unshaped   # a smoke run

Every figure is the median of ``--repeats`` measurements, with the smallest and the largest behind it. Rates of TCP are
of payload: a full link of 100 Mbit/s carries 96.5, as 1448 of the 1500 bytes of a packet are payload. CPU is that of
the switch, in per cent of one core. The processor is shared with whatever else runs: the load average is recorded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.transport import describe_machine  # noqa: E402
from faults.lab.lab import Lab  # noqa: E402
from faults.lab.measure import fill_streams, send_datagrams  # noqa: E402
from faults.lab.topology import Topology  # noqa: E402
from orchestrator.topology import list_topologies, load_topology  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "lab_links.json"
CONGESTION = ("cubic", "bbr")
NUM_STREAMS = (1, 8)
PAYLOAD_SHARE = 1448 / 1500
VETH_NETWORK = "10.250.250"
Row = dict[str, Any]


def main() -> int:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of one measurement of TCP")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "kernel": os.uname().release,
        "repeats": options.repeats,
        "seconds": options.seconds,
        "load_average": {"before": round(os.getloadavg()[0], 1)},
    }
    for name in options.only:
        print(f"{name}:", flush=True)
        result[name] = []
        for row in PARTS[name](options):
            row["load_average"] = round(os.getloadavg()[0], 1)
            result[name].append(row)
            print("  " + "  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
    result["load_average"]["after"] = round(os.getloadavg()[0], 1)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def unshaped(options: argparse.Namespace) -> Iterable[Row]:
    """One stream between two nodes without any limit: through the switch, and over the kernel's own veth."""
    for congestion in CONGESTION:
        with Lab(_pair(congestion=congestion)) as lab:
            rates, cpu = [], []
            for _ in range(options.repeats):
                before_s = lab.status().cpu_s
                done = fill_streams(lab, "a", "b", seconds=options.seconds, warm_up_s=0.5)
                rates.append(done.goodput_mbit / 1e3)
                cpu.append((lab.status().cpu_s - before_s) / (done.num_bytes * 8e-9))
            yield {
                "through": "switch",
                "congestion": congestion,
                "gbit_per_s": _of(rates),
                "cpu_s_per_gbit": _of(cpu),
                "overruns": sum(lab.status().overruns.values()),
            }
            _join_by_veth(lab, congestion)
            veth = [
                fill_streams(lab, "a", "b", seconds=options.seconds, warm_up_s=0.5, address=f"{VETH_NETWORK}.2")
                for _ in range(options.repeats)
            ]
            yield {
                "through": "veth",
                "congestion": congestion,
                "gbit_per_s": _of(one.goodput_mbit / 1e3 for one in veth),
            }


def cost(options: argparse.Namespace) -> Iterable[Row]:
    """CPU of the switch at 100 Mbit/s, with what makes it dearer, and how exact the rate is."""
    cases: list[tuple[str, int, dict[str, float]]] = [
        ("rate", 1, {}),
        ("rate", 8, {}),
        ("rate, loss 0.1 %", 8, {"loss": 0.001}),
        ("rate, jitter 2 ms", 8, {"jitter_ms": 2}),
    ]
    for congestion in CONGESTION:
        for name, num_streams, extra in cases:
            with Lab(_pair(congestion=congestion, rate_mbit=100, delay_ms=25, **extra)) as lab:
                rates, cpu = [], []
                for _ in range(options.repeats):
                    before_s = lab.status().cpu_s
                    done = fill_streams(lab, "a", "b", seconds=options.seconds, num_streams=num_streams, warm_up_s=1.5)
                    rates.append(done.goodput_mbit / PAYLOAD_SHARE)
                    cpu.append(100 * (lab.status().cpu_s - before_s) / options.seconds)
                yield {
                    "tcp": name,
                    "streams": num_streams,
                    "congestion": congestion,
                    "rate_mbit": _of(rates),
                    "cpu_percent": _of(cpu),
                    **_punctuality(lab),
                }
    with Lab(_pair(rate_mbit=100, delay_ms=25)) as lab:
        rates, cpu = [], []
        for _ in range(options.repeats):
            before_s = lab.status().cpu_s
            num = int(options.seconds * 110e6 / 8 / 1428)
            rates.append(send_datagrams(lab, "a", "b", num=num, rate_mbit=110, idle_s=1).rate_mbit)
            cpu.append(100 * (lab.status().cpu_s - before_s) / options.seconds)
        yield {
            "datagrams": "1,400 bytes, 110 Mbit/s offered",
            "rate_mbit": _of(rates),
            "cpu_percent": _of(cpu),
            **_punctuality(lab),
        }


def loss(options: argparse.Namespace) -> Iterable[Row]:
    """100,000 datagrams of 1,400 bytes."""
    for asked in (0.001, 0.01, 0.05):
        found, errors = [], []
        for seed in range(options.repeats):
            with Lab(_pair(loss=asked), seed=seed) as lab:
                one = send_datagrams(lab, "a", "b", num=100_000, rate_mbit=200, idle_s=1)
                found.append(one.loss)
                errors.append(one.num_sent - one.num_received - lab.status().link("a>b").dropped_loss)
        yield {"asked": asked, "loss": _of(found, digits=5), "lost_elsewhere": max(errors)}


def topologies(options: argparse.Namespace) -> Iterable[Row]:
    """Each topology between its first and its last node: delay of an idle link, rates of TCP, delay under load."""
    for name in list_topologies():
        for congestion in CONGESTION:
            topology = load_topology(name).model_copy(update={"congestion": congestion})
            with Lab(topology) as lab:
                yield _one_topology(lab, name, congestion, options)


def _one_topology(lab: Lab, name: str, congestion: str, options: argparse.Namespace) -> Row:
    source, target = lab.nodes[0], lab.nodes[-1]
    idle = [
        send_datagrams(lab, source, target, num=100, size=100, rate_mbit=0.05, idle_s=1) for _ in range(options.repeats)
    ]
    row: Row = {
        "topology": name,
        "congestion": congestion,
        "way": f"{source}>{target}",
        "idle_delay_ms": _of(one.delay_ms for one in idle),
        "idle_delay_p99_ms": _of(one.delay_p99_ms for one in idle),
    }
    warm_up_s = min(10 * idle[0].delay_ms / 1e3, 6.0) + 0.5
    for num_streams in NUM_STREAMS:
        rates, loaded = [], []
        for _ in range(options.repeats):
            with ThreadPoolExecutor() as pool:
                seconds = options.seconds + warm_up_s
                streams = pool.submit(
                    fill_streams, lab, source, target, seconds=seconds, num_streams=num_streams, warm_up_s=warm_up_s
                )
                num = int(20 * seconds)
                probe = send_datagrams(lab, source, target, num=num, size=100, rate_mbit=20 * 128 * 8e-6, idle_s=2)
            rates.append(streams.result().goodput_mbit)
            loaded.append(probe.delay_ms)
        row[f"goodput_mbit_{num_streams}"] = _of(rates)
        row[f"loaded_delay_ms_{num_streams}"] = _of(loaded)
    return row | _punctuality(lab)


def _pair(*, congestion: str | None = None, **link: float) -> Topology:
    regions = {"pair": {"nodes": ["a", "b"]}}
    return Topology.model_validate(
        {"congestion": congestion, "regions": regions, "links": {"a:b": link} if link else {}}
    )


def _join_by_veth(lab: Lab, congestion: str) -> None:
    """A second way between a and b, which does not pass the switch: what this machine can do at all."""
    names = [lab.namespace(node) for node in ("a", "b")]
    subprocess.run(
        ["ip", "link", "add", "veth", "netns", names[0], "type", "veth", "peer", "name", "veth", "netns", names[1]],
        check=True,
    )
    for number, name in enumerate(names, start=1):
        address = f"{VETH_NETWORK}.{number}"
        for command in (
            f"addr add {address}/24 dev veth",
            "link set veth up",
            f"route replace {VETH_NETWORK}.0/24 dev veth src {address} congctl {congestion}",
        ):
            subprocess.run(["ip", "-n", name, *command.split()], check=True)


def _punctuality(lab: Lab) -> Row:
    status = lab.status()
    share = status.num_late / status.num_frames if status.num_frames else 0.0
    return {
        "late_percent": round(100 * share, 3),
        "worst_late_ms": status.worst_late_ms,
        "overruns": sum(status.overruns.values()),
    }


def _of(values: Iterable[float], *, digits: int = 2) -> list[float]:
    """Median, smallest, largest."""
    found = list(values)
    return [round(value, digits) for value in (statistics.median(found), min(found), max(found))]


def _short(value: object) -> str:
    if isinstance(value, list):
        median, low, high = value
        return f"{median:g} ({low:g} to {high:g})"
    return str(value)


PARTS: dict[str, Callable[[argparse.Namespace], Iterable[Row]]] = {
    "unshaped": unshaped,
    "cost": cost,
    "loss": loss,
    "topologies": topologies,
}

if __name__ == "__main__":
    sys.exit(main())
