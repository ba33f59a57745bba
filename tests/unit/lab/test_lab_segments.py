from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults.lab.segments import (
    GSO_NONE,
    GSO_TCPV4,
    NEEDS_CHECKSUM,
    OVERHEAD_BYTES,
    VNET,
    VNET_BYTES,
    layout,
    on_the_wire,
    ones_sum,
    runs_of,
    runs_without,
    take_runs,
)

SOURCE, TARGET = socket.inet_aton("10.201.0.1"), socket.inet_aton("10.201.0.2")
FIN, PSH, ACK, CWR = 0x01, 0x08, 0x10, 0x80
CSUM_OFFSET = 16


def offload_frame(
    data: bytes, gso_size: int, *, flags: int = ACK | PSH, sequence: int = 1000, ip_id: int = 7, ip_options: int = 0
) -> bytes:
    """What the kernel hands over: TCP with 12 bytes of options, its checksum open, a header length that is a hint."""
    tcp_start = OVERHEAD_BYTES + 20 + ip_options
    tcp_bytes = 32 + len(data)
    pseudo = ones_sum(SOURCE + TARGET + bytes((0, 6)) + tcp_bytes.to_bytes(2))
    tcp = struct.pack("!HHIIBBHHH", 4000, 5000, sequence, 77, 8 << 4, flags, 512, pseudo, 0) + bytes(range(12))
    total = 20 + ip_options + tcp_bytes
    ihl = (20 + ip_options) // 4
    ip = struct.pack("!BBHHHBBH4s4s", 0x40 | ihl, 0, total, ip_id, 0x4000, 64, 6, 0, SOURCE, TARGET)
    ip += bytes([1] * ip_options)
    ip = ip[:10] + (~ones_sum(ip) & 0xFFFF).to_bytes(2) + ip[12:]
    is_one = len(data) <= gso_size
    gso_type = GSO_NONE if is_one else GSO_TCPV4
    hint = len(ip) + 14 + tcp_bytes
    vnet = VNET.pack(NEEDS_CHECKSUM, gso_type, hint, 0 if is_one else gso_size, tcp_start - VNET_BYTES, CSUM_OFFSET)
    return vnet + bytes(6) + bytes(6) + b"\x08\x00" + ip + tcp + data


def software_segments(frame: bytes) -> list[bytes]:
    """What the receiving kernel makes of a frame: its packets from the IP header on, checksums filled in."""
    _, gso_type, _, gso_size, csum_start, csum_offset = VNET.unpack_from(frame)
    tcp = VNET_BYTES + csum_start
    payload = tcp + (frame[tcp + 12] >> 4) * 4
    data = frame[payload:]
    size = gso_size if gso_type else len(data) or 1
    packets = []
    for number, start in enumerate(range(0, max(1, len(data)), size)):
        part = data[start : start + size]
        is_last = start + size >= len(data)
        ip, header = bytearray(frame[OVERHEAD_BYTES:tcp]), bytearray(frame[tcp:payload])
        ip[2:4] = (len(ip) + len(header) + len(part)).to_bytes(2)
        ip[4:6] = ((int.from_bytes(ip[4:6]) + number) & 0xFFFF).to_bytes(2)
        ip[10:12] = b"\0\0"
        ip[10:12] = (~ones_sum(ip) & 0xFFFF).to_bytes(2)
        header[4:8] = ((int.from_bytes(header[4:8]) + start) & 0xFFFFFFFF).to_bytes(4)
        if not is_last:
            header[13] &= ~(FIN | PSH)
        if number:
            header[13] &= ~CWR
        length = len(header) + len(part)
        header[csum_offset : csum_offset + 2] = b"\0\0"
        pseudo = SOURCE + TARGET + bytes((0, 6)) + length.to_bytes(2)
        header[csum_offset : csum_offset + 2] = (~ones_sum(pseudo + header + part) & 0xFFFF).to_bytes(2)
        packets.append(bytes(ip + header) + part)
    return packets


def test_a_frame_without_offload_is_one_packet_of_its_own_length() -> None:
    frame = offload_frame(b"x" * 100, 1448)
    assert on_the_wire(frame, len(frame)) == (1, 20 + 32 + 100)


@given(length=st.integers(1, 65000), gso_size=st.integers(500, 1460))
def test_packets_and_bytes_are_those_of_the_wire(length: int, gso_size: int) -> None:
    frame = offload_frame(bytes(length), gso_size)
    packets = software_segments(frame)
    assert on_the_wire(frame, len(frame)) == (len(packets), sum(map(len, packets)))


@given(
    data=st.binary(min_size=1, max_size=9000),
    gso_size=st.integers(300, 1460),
    max_packets=st.integers(1, 12),
    sequence=st.sampled_from([0, 2**32 - 3000, 2**32 - 1]),
    ip_id=st.sampled_from([0, 65530]),
    flags=st.sampled_from([ACK, ACK | PSH, ACK | FIN | PSH, ACK | CWR]),
    ip_options=st.sampled_from([0, 4]),
)
def test_runs_carry_the_same_packets_as_the_whole(
    data: bytes, gso_size: int, max_packets: int, sequence: int, ip_id: int, flags: int, ip_options: int
) -> None:
    frame = offload_frame(data, gso_size, flags=flags, sequence=sequence, ip_id=ip_id, ip_options=ip_options)
    whole = software_segments(frame)
    parts = take_runs(frame, runs_of(len(whole), max_packets))
    assert [packet for part in parts for packet in software_segments(part)] == whole
    assert sum(on_the_wire(part, len(part))[1] for part in parts) == sum(map(len, whole))


@given(length=st.integers(1000, 9000), lost=st.sets(st.integers(0, 20)))
def test_what_is_left_of_a_train_are_the_other_packets(length: int, lost: set[int]) -> None:
    frame = offload_frame(bytes(range(256)) * (length // 256 + 1), 700)
    whole = software_segments(frame)
    gone = sorted(number for number in lost if number < len(whole))
    parts = take_runs(frame, runs_without(len(whole), gone))
    kept = [packet for number, packet in enumerate(whole) if number not in gone]
    assert [packet for part in parts for packet in software_segments(part)] == kept


def test_parts_are_frames_that_the_kernel_takes() -> None:
    frame = offload_frame(bytes(4000), 1000)
    single, double = take_runs(frame, [(0, 1), (1, 3)])
    for part, size in ((single, 0), (double, 1000)):
        flags, gso_type, header_bytes, gso_size, csum_start, csum_offset = VNET.unpack_from(part)
        assert (flags, gso_size, csum_offset) == (NEEDS_CHECKSUM, size, CSUM_OFFSET)
        assert gso_type == (GSO_TCPV4 if size else GSO_NONE)
        assert csum_start + csum_offset + 2 <= header_bytes <= len(part) - VNET_BYTES
        ip = part[OVERHEAD_BYTES : VNET_BYTES + csum_start]
        assert ones_sum(ip) == 0xFFFF, "the IP header must be right as it stands"
        tcp = VNET_BYTES + csum_start
        pseudo = SOURCE + TARGET + bytes((0, 6)) + (len(part) - tcp).to_bytes(2)
        assert int.from_bytes(part[tcp + 16 : tcp + 18]) == ones_sum(pseudo), (
            "the open checksum holds the pseudo header"
        )


def test_the_whole_is_not_copied() -> None:
    frame = offload_frame(bytes(4000), 1000)
    assert take_runs(frame, [(0, 4)])[0] is frame


def test_other_offloads_are_refused() -> None:
    frame = bytearray(offload_frame(bytes(4000), 1000))
    frame[1] = 3
    with pytest.raises(ValueError, match="unexpected offload: gso type 3"):
        layout(frame, len(frame))


def test_runs_cover_everything_once() -> None:
    assert runs_of(5, 2) == [(0, 2), (2, 4), (4, 5)]
    assert runs_without(5, [0, 3]) == [(1, 3), (4, 5)]
    assert runs_without(3, [0, 1, 2]) == []
