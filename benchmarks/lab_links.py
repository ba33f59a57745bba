"""What the emulated links of the lab really do, and what they cost: the parts of `make bench-lab` without Ray.

Every figure is the median of several measurements, with the smallest and the largest behind it. Rates of TCP are of
payload: a full link of 100 Mbit/s carries 96.5, as 1448 of the 1500 bytes of a packet are payload. CPU is that of the
switch, in per cent of one core. `ok` says whether a row is what the lab promises (docs/lab.md): of loss in each
measurement, of all else in the median.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from faults.lab.lab import Lab
from faults.lab.links import Shape
from faults.lab.measure import fill_streams, send_datagrams
from faults.lab.topology import Topology, plan_lab
from orchestrator.topology import list_topologies, load_topology

CONGESTION = ("cubic", "bbr")
NUM_STREAMS = (1, 8)
PAYLOAD_SHARE = 1448 / 1500
VETH_NETWORK = "10.250.250"
LOSSES = (0.001, 0.01, 0.05)
RATE_WITHIN, LOSS_WITHIN, DELAY_WITHIN_MS = 0.05, 0.1, 1.0
AT_LEAST_GBIT, AT_MOST_CPU_PERCENT = 10.0, 15.0
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How often, and how long one measurement of TCP takes."""

    repeats: int = 3
    seconds: float = 6.0


Case = Callable[[Options], Row]


def cases() -> Iterator[tuple[str, Case]]:
    """Name -> measurement, in the order of the result."""
    for congestion in CONGESTION:
        yield f"unshaped {congestion}", lambda options, c=congestion: unshaped(options, c)
    for congestion in CONGESTION:
        for name, num_streams, extra in COST:
            yield (
                f"cost {name}, {num_streams} streams, {congestion}",
                lambda options, c=congestion, n=num_streams, e=extra: cost(options, c, n, e),
            )
    yield "cost datagrams", cost_of_datagrams
    for asked in LOSSES:
        yield f"loss {asked:g}", lambda options, a=asked: loss(options, a)
    for topology in list_topologies():
        for congestion in CONGESTION:
            yield (
                f"topology {topology} {congestion}",
                lambda options, t=topology, c=congestion: one_topology(options, t, c),
            )


def unshaped(options: Options, congestion: str) -> Row:
    """One stream between two nodes without any limit: through the switch, and over the kernel's own veth."""
    with Lab(_pair(congestion=congestion)) as lab:
        rates, cpu = [], []
        for _ in range(options.repeats):
            before_s = lab.status().cpu_s
            done = fill_streams(lab, "a", "b", seconds=options.seconds, warm_up_s=0.5)
            rates.append(done.goodput_mbit / 1e3)
            cpu.append((lab.status().cpu_s - before_s) / (done.num_bytes * 8e-9))
        overruns = sum(lab.status().overruns.values())
        _join_by_veth(lab, congestion)
        veth = [
            fill_streams(lab, "a", "b", seconds=options.seconds, warm_up_s=0.5, address=f"{VETH_NETWORK}.2")
            for _ in range(options.repeats)
        ]
    return {
        "gbit_per_s": spread_of(rates),
        "veth_gbit_per_s": spread_of(one.goodput_mbit / 1e3 for one in veth),
        "cpu_s_per_gbit": spread_of(cpu),
        "overruns": overruns,
        "ok": statistics.median(rates) >= AT_LEAST_GBIT,
    }


COST: tuple[tuple[str, int, dict[str, float]], ...] = (
    ("rate", 1, {}),
    ("rate", 8, {}),
    ("rate, loss 0.1 %", 8, {"loss": 0.001}),
    ("rate, jitter 2 ms", 8, {"jitter_ms": 2}),
)


def cost(options: Options, congestion: str, num_streams: int, extra: dict[str, float]) -> Row:
    """CPU of the switch at 100 Mbit/s, and how exact the rate is."""
    with Lab(_pair(congestion=congestion, rate_mbit=100, delay_ms=25, **extra)) as lab:
        rates, cpu = [], []
        for _ in range(options.repeats):
            before_s = lab.status().cpu_s
            done = fill_streams(lab, "a", "b", seconds=options.seconds, num_streams=num_streams, warm_up_s=1.5)
            rates.append(done.goodput_mbit / PAYLOAD_SHARE)
            cpu.append(100 * (lab.status().cpu_s - before_s) / done.seconds)
        row = {"rate_mbit": spread_of(rates), "cpu_percent": spread_of(cpu), **_punctuality(lab)}
    # A protocol that backs off where packets are lost or late does not fill the link: that is no error of the link.
    exact = bool(extra) or abs(statistics.median(rates) / 100 - 1) < RATE_WITHIN
    return row | {"ok": exact and statistics.median(cpu) < AT_MOST_CPU_PERCENT}


def cost_of_datagrams(options: Options) -> Row:
    """More datagrams than fit: the rate is exactly the link's, and the switch keeps to its share of a core."""
    with Lab(_pair(rate_mbit=100, delay_ms=25)) as lab:
        rates, cpu = [], []
        for _ in range(options.repeats):
            before_s = lab.status().cpu_s
            num = int(options.seconds * 110e6 / 8 / 1428)
            rates.append(send_datagrams(lab, "a", "b", num=num, rate_mbit=110, idle_s=1).rate_mbit)
            cpu.append(100 * (lab.status().cpu_s - before_s) / options.seconds)
        row = {"offered_mbit": 110, "rate_mbit": spread_of(rates), "cpu_percent": spread_of(cpu), **_punctuality(lab)}
    exact = abs(statistics.median(rates) / 100 - 1) < RATE_WITHIN
    return row | {"ok": exact and statistics.median(cpu) < AT_MOST_CPU_PERCENT}


def loss(options: Options, asked: float) -> Row:
    """100,000 datagrams of 1,400 bytes."""
    found, errors = [], []
    for seed in range(options.repeats):
        with Lab(_pair(loss=asked), seed=seed) as lab:
            one = send_datagrams(lab, "a", "b", num=100_000, rate_mbit=200, idle_s=1)
            found.append(one.loss)
            errors.append(one.num_sent - one.num_received - lab.status().link("a>b").dropped_loss)
    good = all(abs(one / asked - 1) < LOSS_WITHIN for one in found) and max(errors) == 0
    return {"asked": asked, "loss": spread_of(found, digits=5), "lost_elsewhere": max(errors), "ok": good}


def one_topology(options: Options, name: str, congestion: str) -> Row:
    """Between its first and its last node: delay of an idle link, rates of TCP, delay under load."""
    with Lab(load_topology(name).model_copy(update={"congestion": congestion})) as lab:
        return _one_topology(lab, congestion, options)


def _one_topology(lab: Lab, congestion: str, options: Options) -> Row:
    source, target = lab.nodes[0], lab.nodes[-1]
    idle = [
        send_datagrams(lab, source, target, num=400, size=100, rate_mbit=0.15, idle_s=1) for _ in range(options.repeats)
    ]
    asked_ms = 1e3 * one_way_s(lab.topology, source, target)
    row: Row = {
        "congestion": congestion,
        "way": f"{source}>{target}",
        "idle_delay_ms": spread_of(one.delay_ms for one in idle),
        "idle_delay_p99_ms": spread_of(one.delay_p99_ms for one in idle),
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
        row[f"goodput_mbit_{num_streams}"] = spread_of(rates)
        row[f"loaded_delay_ms_{num_streams}"] = spread_of(loaded)
    good = abs(statistics.median(one.delay_ms for one in idle) - asked_ms) < DELAY_WITHIN_MS
    # The 99th percentile, too, has what jitter adds at most.
    jitter_ms = sum(shape.jitter_ms for shape in _way(lab.topology, source, target))
    good &= statistics.median(one.delay_p99_ms for one in idle) < asked_ms + jitter_ms / 2 + DELAY_WITHIN_MS
    if congestion == "cubic" and (rate_mbit := _rate_mbit(lab, source, target)) is not None:
        good &= abs(row["goodput_mbit_8"][0] / (PAYLOAD_SHARE * rate_mbit) - 1) < RATE_WITHIN
    return row | _punctuality(lab) | {"asked_delay_ms": asked_ms, "ok": good}


def _rate_mbit(lab: Lab, source: str, target: str) -> float | None:
    """What streams that fill a way get through; None where nothing limits it, or losses do."""
    shapes = _way(lab.topology, source, target)
    rates = [shape.rate_mbit for shape in shapes if shape.rate_mbit is not None]
    return min(rates) if rates and not any(shape.loss for shape in shapes) else None


def one_way_s(topology: Topology, source: str | None = None, target: str | None = None) -> float:
    """Delay of an idle way, as the topology says: the sender's line, the link, the receiver's line.

    `source`, `target`: unless given, the first node and the last one.
    """
    names = topology.node_names()
    # Jitter adds half of its width on average.
    way = _way(topology, source or names[0], target or names[-1])
    return sum(one.delay_ms + one.jitter_ms / 2 for one in way) / 1e3


def _way(topology: Topology, source: str, target: str) -> list[Shape]:
    """The links between two nodes, in order."""
    plan = plan_lab(topology, "10.0.0.0/24")
    route = next(route for route in plan.routes if (route.source, route.target) == (source, target))
    return [plan.links[name] for name in route.links]


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


def spread_of(values: Iterable[float], *, digits: int = 2) -> list[float]:
    """Median, smallest, largest."""
    found = list(values)
    return [round(value, digits) for value in (statistics.median(found), min(found), max(found))]
