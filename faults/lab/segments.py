"""Cut the large frames of TCP segmentation offload into the packets that a real wire would carry. Pure.

A frame is what a TAP device with a virtio header gives: 10 bytes of header (flags, gso type, header length, gso size,
start and place of the checksum), then Ethernet. With offload on, the kernel hands over up to 64 KB of TCP at once and
leaves the checksum to whoever segments. Loss and jitter decide on every packet; those that stay together in time travel
on as one frame, which is a valid offload frame again and costs far less than its packets would.

Layouts: Linux `include/uapi/linux/virtio_net.h`; RFC 791 and RFC 9293 for the fields that change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from struct import Struct

VNET_BYTES = 10
ETHERNET_BYTES = 14
OVERHEAD_BYTES = VNET_BYTES + ETHERNET_BYTES
NEEDS_CHECKSUM = 1
GSO_NONE = 0
GSO_TCPV4 = 1

Buffer = bytes | bytearray | memoryview
Run = tuple[int, int]
"""Packets of a frame: the number of the first one, and that of the one behind the last."""

VNET = Struct("<BBHHHH")
_FIN_PSH = 0x09
_CWR = 0x80
_TCP = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where things are in an offload frame; offsets from the start of the virtio header.

    Attributes:
        ip, tcp, payload: where the IP header, the TCP header and the data begin.
        gso_size: bytes of data in one packet.
        num_packets: packets that the frame stands for.
    """

    ip: int
    tcp: int
    payload: int
    gso_size: int
    num_packets: int


def on_the_wire(frame: Buffer, length: int) -> tuple[int, int]:
    """The packets that the first `length` bytes of a buffer, one frame, stand for: how many, and their bytes together.

    Bytes are those of the IP packets, headers included, Ethernet not.
    """
    if frame[1] == GSO_NONE:
        return 1, length - OVERHEAD_BYTES
    _, _, _, gso_size, csum_start, _ = VNET.unpack_from(frame)
    payload = VNET_BYTES + csum_start + (frame[VNET_BYTES + csum_start + 12] >> 4) * 4
    num_packets = -((payload - length) // gso_size) or 1
    return num_packets, length - OVERHEAD_BYTES + (num_packets - 1) * (payload - OVERHEAD_BYTES)


def layout(frame: Buffer, length: int) -> Layout:
    """Find the headers of an offload frame in the first `length` bytes of a buffer.

    Raises:
        ValueError: it is not TCP over IPv4, the only offload that the switch asks for.
    """
    _, gso_type, _, gso_size, csum_start, _ = VNET.unpack_from(frame)
    if gso_type & 0x7F != GSO_TCPV4 or gso_size == 0:
        raise ValueError(f"unexpected offload: gso type {gso_type}, size {gso_size}")
    ip, tcp = OVERHEAD_BYTES, VNET_BYTES + csum_start
    payload = tcp + (frame[tcp + 12] >> 4) * 4
    num = -(-(length - payload) // gso_size)
    return Layout(ip=ip, tcp=tcp, payload=payload, gso_size=gso_size, num_packets=max(1, num))


def take_runs(frame: bytes, runs: Sequence[Run]) -> list[bytes]:
    """Runs of the packets of a frame, each as a frame of its own; a run of the whole is the frame itself."""
    if frame[1] == GSO_NONE:
        return [frame for _ in runs]
    parts = layout(frame, len(frame))
    whole = (0, parts.num_packets)
    return [frame if run == whole else _take(frame, parts, *run) for run in runs]


def runs_of(num_packets: int, max_packets: int) -> list[Run]:
    """All packets, in runs of at most `max_packets`."""
    return [(start, min(start + max_packets, num_packets)) for start in range(0, num_packets, max_packets)]


def runs_without(num_packets: int, lost: Sequence[int]) -> list[Run]:
    """The runs that are left between those packets (by number, in order) that are lost."""
    bounds = [-1, *lost, num_packets]
    return [(before + 1, after) for before, after in pairwise(bounds) if after > before + 1]


def _take(frame: bytes, parts: Layout, start: int, end: int) -> bytes:
    """Packets `start` to `end` of an offload frame, as a frame of its own."""
    size = parts.gso_size
    data = frame[parts.payload + start * size : parts.payload + end * size]
    head = bytearray(frame[: parts.payload])
    is_one = end - start == 1
    flags, _, _, _, csum_start, csum_offset = VNET.unpack_from(frame)
    # The length that the kernel gave is only a hint, and it refuses one that is beyond the end of the frame.
    header_bytes = parts.payload - VNET_BYTES
    VNET.pack_into(head, 0, flags, frame[1] * (not is_one), header_bytes, size * (not is_one), csum_start, csum_offset)
    _renumber(head, parts, start=start, is_last=end == parts.num_packets)
    _resize(head, parts, num_data_bytes=len(data), csum_offset=csum_offset)
    return bytes(head) + data


def _renumber(head: bytearray, parts: Layout, *, start: int, is_last: bool) -> None:
    """Move the TCP sequence number and the IP id on; FIN and PSH belong to the last packet, CWR to the first."""
    ip_id = int.from_bytes(head[parts.ip + 4 : parts.ip + 6])
    head[parts.ip + 4 : parts.ip + 6] = ((ip_id + start) & 0xFFFF).to_bytes(2)
    sequence = int.from_bytes(head[parts.tcp + 4 : parts.tcp + 8])
    head[parts.tcp + 4 : parts.tcp + 8] = ((sequence + start * parts.gso_size) & 0xFFFFFFFF).to_bytes(4)
    if not is_last:
        head[parts.tcp + 13] &= ~_FIN_PSH
    if start > 0:
        head[parts.tcp + 13] &= ~_CWR


def _resize(head: bytearray, parts: Layout, *, num_data_bytes: int, csum_offset: int) -> None:
    """Set the IP length and checksum, and the sum of the pseudo header that stands for the TCP checksum."""
    ip, tcp = parts.ip, parts.tcp
    head[ip + 2 : ip + 4] = (parts.payload - ip + num_data_bytes).to_bytes(2)
    head[ip + 10 : ip + 12] = b"\0\0"
    head[ip + 10 : ip + 12] = (~ones_sum(head[ip:tcp]) & 0xFFFF).to_bytes(2)
    tcp_bytes = parts.payload - tcp + num_data_bytes
    pseudo = bytes(head[ip + 12 : ip + 20]) + bytes((0, _TCP)) + tcp_bytes.to_bytes(2)
    head[tcp + csum_offset : tcp + csum_offset + 2] = ones_sum(pseudo).to_bytes(2)


def ones_sum(data: bytes | bytearray) -> int:
    """The ones' complement sum of 16-bit words (RFC 1071), not complemented."""
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0")) for at in range(0, len(data), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total
