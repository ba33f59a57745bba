"""Packets and bytes between two nodes, timed: `probe.py ROLE ...` (by path on a node; imports nothing of ours).

Called by `faults.lab.measure` alone. All nodes share one machine and so one clock: a packet's delay is the time at
which the kernel received it minus the time of sending that it carries. The receiving roles print their port, then, when
they are done, one JSON object.

    receive HOST NUM IDLE_S      datagrams until NUM came, the sender has said that it is over, or none for IDLE_S
    send HOST PORT NUM SIZE RATE_MBIT
    sink HOST NUM_STREAMS WARM_UP_S
    stream HOST PORT SECONDS NUM_STREAMS
"""

import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

STAMP = struct.Struct("!Iq")
HEADERS_BYTES = 28
OVER = 0xFFFFFFFF
FAREWELLS, FAREWELL_S = 10, 0.05
SELDOM_S = 1e-3
BUFFER_BYTES = 1 << 20
_SO_RCVBUFFORCE = 33
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("@qq")


def receive(host: str, num: str, idle_s: str) -> None:
    """Count datagrams and their delays."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    # As root, beyond the limit of the machine: no datagram is lost here while this process waits for the CPU.
    listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 27)
    listener.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    listener.bind((host, 0))
    _say({"port": listener.getsockname()[1]})
    listener.settimeout(60)
    delays_us: list[float] = []
    numbers: list[int] = []
    num_bytes = 0
    first_ns = last_ns = 0
    while len(numbers) < int(num):
        try:
            data, control, _, _ = listener.recvmsg(2048, 64)
        except TimeoutError:
            break
        listener.settimeout(float(idle_s))
        number, sent_ns = STAMP.unpack_from(data)
        if number == OVER:
            break
        seconds, nanoseconds = _TIMESPEC.unpack(control[0][2])
        last_ns = seconds * 10**9 + nanoseconds
        if numbers:
            num_bytes += len(data) + HEADERS_BYTES
        else:
            first_ns = last_ns
        numbers.append(number)
        delays_us.append((last_ns - sent_ns) / 1e3)
    span_s = (last_ns - first_ns) / 1e9
    num_swapped = sum(later < earlier for earlier, later in pairwise(numbers))
    _say(
        {
            "numbers": len(set(numbers)),
            "num_received": len(numbers),
            "num_swapped": num_swapped,
            "rate_mbit": num_bytes * 8e-6 / span_s if span_s else 0.0,
            "delays_us": delays_us if len(delays_us) <= 10_000 else sorted(delays_us)[:: len(delays_us) // 1000],
        }
    )


def send(host: str, port: str, num: str, size: str, rate_mbit: str) -> None:
    """Send numbered datagrams of `size` bytes, evenly at a rate of IP packets."""
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect((host, int(port)))
    gap_s = (int(size) + HEADERS_BYTES) * 8e-6 / float(rate_mbit)
    padding = bytes(int(size) - STAMP.size)
    if gap_s > SELDOM_S:
        # Where others use the processor, a packet would be sent some time after it was stamped: no delay of the link.
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
    begin_s = time.monotonic()
    for number in range(int(num)):
        wait_s = begin_s + number * gap_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        sender.send(STAMP.pack(number, time.time_ns()) + padding)
    for _ in range(FAREWELLS):  # nothing overtakes: whoever hears one need not wait for what was lost before
        time.sleep(FAREWELL_S)
        with suppress(ConnectionRefusedError):  # it has heard it, and is gone
            sender.send(STAMP.pack(OVER, 0))


def sink(host: str, num_streams: str, warm_up_s: str) -> None:
    """Take TCP streams to their ends; the rate counts from `warm_up_s` after the first byte to the last one."""
    listener = socket.create_server((host, 0), backlog=64)
    _say({"port": listener.getsockname()[1]})
    listener.settimeout(60)
    streams = [listener.accept()[0] for _ in range(int(num_streams))]
    buffer = bytearray(BUFFER_BYTES)
    begin_s = time.monotonic()
    counted = total = 0
    from_s = last_s = begin_s
    while streams:
        for stream in select.select(streams, [], [], 60)[0]:
            received = stream.recv_into(buffer)
            last_s = time.monotonic()
            total += received
            if last_s - begin_s < float(warm_up_s):
                from_s = last_s
            else:
                counted += received
            if not received:
                streams.remove(stream)
    goodput_mbit = counted * 8e-6 / (last_s - from_s) if last_s > from_s else 0.0
    _say({"goodput_mbit": goodput_mbit, "num_bytes": total, "seconds": last_s - begin_s})


def stream(host: str, port: str, seconds: str, num_streams: str) -> None:
    """Fill TCP streams for a time."""
    streams = [socket.create_connection((host, int(port)), timeout=60) for _ in range(int(num_streams))]
    for one in streams:
        one.setblocking(False)
    data = bytes(BUFFER_BYTES)
    num_bytes = 0
    until_s = time.monotonic() + float(seconds)
    while (left_s := until_s - time.monotonic()) > 0:
        for one in select.select([], streams, [], left_s)[1]:
            num_bytes += one.send(data)
    congestion = streams[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
    _say({"num_bytes": num_bytes, "congestion": congestion})


def _say(message: object) -> None:
    print(json.dumps(message), flush=True)


def main(role: str, arguments: list[str]) -> None:
    """Play one role."""
    roles: dict[str, Callable[..., None]] = {"receive": receive, "send": send, "sink": sink, "stream": stream}
    roles[role](*arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
