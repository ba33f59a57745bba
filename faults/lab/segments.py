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
_HALF, _HALVES, _WORD = Struct(">H"), Struct(">HH"), Struct(">I")
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
    if len(runs) == 1 and runs[0] == whole:
        return [frame]
    knife = _Knife(frame, parts)
    return [frame if run == whole else knife.take(*run) for run in runs]


def runs_of(num_packets: int, max_packets: int) -> list[Run]:
    """All packets, in runs of at most `max_packets`."""
    return [(start, min(start + max_packets, num_packets)) for start in range(0, num_packets, max_packets)]


def runs_without(num_packets: int, lost: Sequence[int]) -> list[Run]:
    """The runs that are left between those packets (by number, in order) that are lost."""
    bounds = [-1, *lost, num_packets]
    return [(before + 1, after) for before, after in pairwise(bounds) if after > before + 1]


class _Knife:
    """Takes runs of packets out of one offload frame; what is the same for all runs is worked out once."""

    __slots__ = ("address_sum", "flags", "frame", "header_sum", "id", "parts", "places", "sequence")

    def __init__(self, frame: bytes, parts: Layout) -> None:
        self.frame = frame
        self.parts = parts
        ip, tcp = parts.ip, parts.tcp
        _, self.id = _HALVES.unpack_from(frame, ip + 2)
        (self.sequence,) = _WORD.unpack_from(frame, tcp + 4)
        flags, _, _, _, csum_start, csum_offset = VNET.unpack_from(frame)
        self.flags = flags
        self.places = csum_start, csum_offset
        self.address_sum = ones_sum(frame[ip + 12 : ip + 20]) + _TCP
        # Without its length, its id and its checksum, which each packet has of its own.
        self.header_sum = ones_sum(frame[ip : ip + 2] + frame[ip + 6 : ip + 10] + frame[ip + 12 : tcp])

    def take(self, start: int, end: int) -> bytes:
        """Packets `start` to `end`, as a frame of its own."""
        frame, parts = self.frame, self.parts
        ip, tcp, payload, size = parts.ip, parts.tcp, parts.payload, parts.gso_size
        csum_start, csum_offset = self.places
        head = bytearray(frame[:payload])
        data = frame[payload + start * size : payload + end * size]
        # The length that the kernel gave is only a hint, and it refuses one that is beyond the end of the frame.
        gso = (frame[1], size) if end - start > 1 else (GSO_NONE, 0)
        VNET.pack_into(head, 0, self.flags, gso[0], payload - VNET_BYTES, gso[1], csum_start, csum_offset)
        # The IP id and the TCP sequence number move on; FIN and PSH belong to the last packet, CWR to the first.
        length, ip_id = payload - ip + len(data), (self.id + start) & 0xFFFF
        _HALVES.pack_into(head, ip + 2, length, ip_id)
        _HALF.pack_into(head, ip + 10, ~_folded(self.header_sum + length + ip_id) & 0xFFFF)
        _WORD.pack_into(head, tcp + 4, (self.sequence + start * size) & 0xFFFFFFFF)
        if end < parts.num_packets:
            head[tcp + 13] &= ~_FIN_PSH
        if start > 0:
            head[tcp + 13] &= ~_CWR
        # The sum of the pseudo header stands for the TCP checksum.
        _HALF.pack_into(head, tcp + csum_offset, _folded(self.address_sum + length - (tcp - ip)))
        return bytes(head) + data


def ones_sum(data: bytes | bytearray) -> int:
    """The ones' complement sum of 16-bit words (RFC 1071), not complemented."""
    # 2^16 is 1 modulo 2^16 - 1, so the words of a number add up to the number itself; only 0 has the sum 0.
    value = int.from_bytes(data) << 8 * (len(data) & 1)
    return value % 0xFFFF or (0xFFFF if value else 0)


def _folded(total: int) -> int:
    """A sum of fewer than 65,536 words, with its carries added."""
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)
