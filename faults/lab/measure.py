"""What a link of a lab really does, measured between two of its nodes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

from faults.lab import probe
from faults.lab.errors import LabError
from faults.lab.lab import Lab

END_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Datagrams:
    """What became of datagrams in one direction.

    Attributes:
        num_sent, num_received: distinct datagrams.
        num_swapped: datagrams that came before one with a smaller number.
        rate_mbit: of IP packets, from the first arrival to the last.
        delay_ms, delay_p99_ms: one way, median and 99th percentile.
    """

    num_sent: int
    num_received: int
    num_swapped: int
    rate_mbit: float
    delay_ms: float
    delay_p99_ms: float
    min_delay_ms: float
    max_delay_ms: float

    @property
    def loss(self) -> float:
        """Share of the datagrams that did not come."""
        return 1 - self.num_received / self.num_sent


@dataclass(frozen=True, kw_only=True, slots=True)
class Streams:
    """What TCP streams reached together: million bits of payload a second, and their congestion control.

    `seconds`: from the first byte to the last one. That is longer than was sent for: what waited in the senders'
    buffers arrives too.
    """

    goodput_mbit: float
    num_bytes: int
    seconds: float
    congestion: str


def send_datagrams(
    lab: Lab, source: str, target: str, *, num: int, size: int = 1400, rate_mbit: float, idle_s: float = 3.0
) -> Datagrams:
    """Send `num` datagrams with `size` bytes of payload at `rate_mbit` and see what comes.

    `idle_s`: how long after the last arrival to give up on the rest, should nothing come any more; longer than the
    link's longest delay.
    """
    receiving = ["receive", lab.address(target), num, idle_s]
    with _started(lab, target, receiving) as (receiver, port):
        sender = lab.popen(source, _probe("send", lab.address(target), port, num, size, rate_mbit), **_PIPES)
        try:
            result = _finish(receiver)
            if sender.poll():
                _finish(sender)  # says why
        finally:
            sender.kill()  # it may still say that it is over
            sender.communicate()
    if not result["num_received"]:
        raise LabError(f"none of {num} datagrams came from {source} to {target}")
    delays = sorted(value / 1e3 for value in result["delays_us"])
    return Datagrams(
        num_sent=num,
        num_received=result["numbers"],
        num_swapped=result["num_swapped"],
        rate_mbit=result["rate_mbit"],
        delay_ms=statistics.median(delays),
        delay_p99_ms=delays[int(len(delays) * 0.99)],
        min_delay_ms=delays[0],
        max_delay_ms=delays[-1],
    )


def fill_streams(
    lab: Lab,
    source: str,
    target: str,
    *,
    seconds: float,
    num_streams: int = 1,
    warm_up_s: float = 0.0,
    address: str | None = None,
) -> Streams:
    """Send as much as TCP gets through in `seconds`; the first `warm_up_s` do not count.

    `address`: another one of the target than that in the lab.
    """
    host = address or lab.address(target)
    with _started(lab, target, ["sink", host, num_streams, warm_up_s]) as (sink, port):
        arguments = ("stream", host, port, seconds, num_streams)
        sent = _finish(lab.popen(source, _probe(*arguments), **_PIPES))
        result = _finish(sink)
    return Streams(**result, congestion=sent["congestion"])


_PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@contextmanager
def _started(lab: Lab, node: str, arguments: list[Any]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A receiving role with its port; ended when the block fails."""
    process = lab.popen(node, _probe(*arguments), **_PIPES)
    try:
        line = cast("IO[str]", process.stdout).readline()
        if not line:
            _finish(process)
        yield process, json.loads(line)["port"]
    finally:
        process.kill()
        process.communicate()


def _probe(*arguments: Any) -> list[str]:
    return [sys.executable, "-IS", probe.__file__, *map(str, arguments)]


def _finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The last line of a probe, which is its result."""
    output, errors = process.communicate(timeout=END_TIMEOUT_S)
    if process.returncode != 0:
        raise LabError(f"a probe failed: {errors.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1]) if output.strip() else {}
    return result
