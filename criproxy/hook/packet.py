"""Frames as they are parked and sent again: their checksums, and what they are.

A packet of a sender on the same machine has no checksum yet: the field holds the pseudo header's sum, and a network
card would do the rest (CHECKSUM_PARTIAL in the kernel's include/linux/skbuff.h). That state isn't in the bytes, so it
is lost when they are copied: here the checksum is filled in. One that is already there is verified, because the kernel
takes what arrives over lo for good, so that a packet which was damaged on the wire would reach the application.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Final

ETHERNET: Final = 14
"""Length of an Ethernet header in bytes."""

TCP: Final = socket.IPPROTO_TCP
UDP: Final = socket.IPPROTO_UDP

_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AH, _DESTINATION = 0, 43, 44, 51, 60
_EXTENSIONS: Final = 8


class Corrupt(Exception):
    """The packet was damaged on its way: the kernel would have dropped it, and so must we."""


@dataclass(frozen=True)
class Layout:
    """Where things are in a frame (offsets in bytes from its start)."""

    network: int
    transport: int
    end: int
    """Of the IP packet; behind it Ethernet may have padding."""
    proto: int
    version: int
    verifiable: bool
    """False for a fragment, or a routing header on its way: the checksum covers what isn't here."""


def layout(frame: bytes) -> Layout | None:
    """Describes an Ethernet frame; None unless it is TCP or UDP over IPv4 or IPv6, whole up to its ports."""
    if len(frame) < ETHERNET + 20:
        return None
    ethertype = frame[12:14]
    if ethertype == b"\x08\x00":
        return _layout4(frame)
    return _layout6(frame) if ethertype == b"\x86\xdd" else None


def _layout4(frame: bytes) -> Layout | None:
    total, fragment = struct.unpack_from("!2xH2xH", frame, ETHERNET)
    proto = frame[ETHERNET + 9]
    transport = ETHERNET + (frame[ETHERNET] & 0xF) * 4
    end = ETHERNET + total if total else len(frame)
    if frame[ETHERNET] >> 4 != 4 or fragment & 0x1FFF:
        return None
    return _checked(frame, Layout(ETHERNET, transport, end, proto, 4, not fragment & 0x2000))


def _layout6(frame: bytes) -> Layout | None:
    if len(frame) < ETHERNET + 40 or frame[ETHERNET] >> 4 != 6:
        return None
    length = struct.unpack_from("!4xH", frame, ETHERNET)[0]
    end = ETHERNET + 40 + length if length else len(frame)
    proto = frame[ETHERNET + 6]
    transport = ETHERNET + 40
    verifiable = True
    for _ in range(_EXTENSIONS):
        if proto not in (_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AH, _DESTINATION) or transport + 8 > len(frame):
            break
        following, size = frame[transport], frame[transport + 1]
        if proto == _FRAGMENT:
            fragment = struct.unpack_from("!2xH", frame, transport)[0]
            if fragment & 0xFFF8:
                return None
            verifiable = verifiable and not fragment & 1
            transport += 8
        else:
            if proto == _ROUTING and frame[transport + 3]:  # the last address isn't in the fixed header yet
                verifiable = False
            transport += (size + 2) * 4 if proto == _AH else (size + 1) * 8
        proto = following
    return _checked(frame, Layout(ETHERNET, transport, end, proto, 6, verifiable))


def _checked(frame: bytes, found: Layout) -> Layout | None:
    header = {TCP: 20, UDP: 8}.get(found.proto)
    if header is None or found.transport + header > found.end or found.end > len(frame):
        return None
    return found


def prepare(frame: bytes, gso_size: int = 0) -> list[bytes]:
    """What has to be sent so that the receiver gets what was parked: the frame with its checksum.

    `gso_size` not 0 says that the frame holds several segments of that many bytes of payload. TCP is a stream and takes
    them as one; UDP datagrams are taken apart again. Frames which aren't TCP or UDP come back as they are.
    Raises Corrupt.
    """
    found = layout(frame)
    if found is None or not found.verifiable:
        return [frame]
    if found.proto == UDP and gso_size and found.end - found.transport - 8 > gso_size:
        return _datagrams(_filled(frame, found), found, gso_size)
    return [_filled(frame, found)]


def _filled(frame: bytes, found: Layout) -> bytes:
    where = found.transport + (16 if found.proto == TCP else 6)
    field = int.from_bytes(frame[where : where + 2], "big")
    if field == 0 and found.proto == UDP and found.version == 4:
        return frame  # a sender over IPv4 may leave it out
    pseudo = _pseudo(frame, found)
    total = pseudo + _sum(frame, found.transport, found.end)
    if total % 0xFFFF == 0:
        return frame
    if field % 0xFFFF != pseudo % 0xFFFF:
        raise Corrupt("the packet's checksum is wrong")
    return _with_checksum(frame, where, total - field, found.proto)


def _with_checksum(frame: bytes, where: int, total: int, proto: int) -> bytes:
    checksum = 0xFFFF - total % 0xFFFF
    if checksum == 0xFFFF and proto == TCP:
        checksum = 0
    return b"".join((frame[:where], checksum.to_bytes(2, "big"), frame[where + 2 :]))


def _sum(frame: bytes, start: int, end: int) -> int:
    """The one's complement sum of 16 bit words, not yet folded. (2^16 is 1 modulo 0xFFFF: a big number's remainder is
    the sum of its 16 bit digits, and Python computes that at the speed of C.)"""
    number = int.from_bytes(frame[start:end], "big")
    return (number << 8 if (end - start) & 1 else number) % 0xFFFF


def _pseudo(frame: bytes, found: Layout) -> int:
    first, last = (12, 20) if found.version == 4 else (8, 40)
    addresses = _sum(frame, found.network + first, found.network + last)
    return addresses + found.proto + found.end - found.transport


def _datagrams(frame: bytes, found: Layout, size: int) -> list[bytes]:
    """UDP segments that travelled as one (UDP_SEGMENT, UDP_GRO) as the datagrams that they are."""
    start = found.transport + 8
    frames = []
    for number, offset in enumerate(range(start, found.end, size)):
        payload = frame[offset : min(offset + size, found.end)]
        head = bytearray(frame[:start])
        struct.pack_into("!H", head, found.transport + 4, 8 + len(payload))
        struct.pack_into("!H", head, found.transport + 6, 0)
        if found.version == 4:
            identity = struct.unpack_from("!H", head, found.network + 4)[0]
            struct.pack_into(
                "!HH", head, found.network + 2, start - found.network + len(payload), (identity + number) & 0xFFFF
            )
            struct.pack_into("!H", head, found.network + 10, 0)
            checksum = 0xFFFF - _sum(bytes(head), found.network, found.transport)
            struct.pack_into("!H", head, found.network + 10, checksum)
        else:
            struct.pack_into("!H", head, found.network + 4, start - found.network - 40 + len(payload))
        single = bytes(head) + payload
        part = Layout(found.network, found.transport, len(single), UDP, found.version, True)
        total = _pseudo(single, part) + _sum(single, part.transport, part.end)
        frames.append(_with_checksum(single, part.transport + 6, total, UDP))
    return frames


def with_link_header(packet: bytes) -> bytes:
    """An IP packet of a link without link headers (tun, ipip) as the Ethernet frame that lo wants."""
    return bytes(12) + (b"\x86\xdd" if packet[:1] and packet[0] >> 4 == 6 else b"\x08\x00") + packet


def endpoints(frame: bytes) -> tuple[int, tuple[str, int], tuple[str, int]] | None:
    """Protocol number, source and target (address, port) of a TCP or UDP frame; None for others."""
    found = layout(frame)
    if found is None:
        return None
    source, target = struct.unpack_from("!HH", frame, found.transport)
    size, first, family = (4, 12, socket.AF_INET) if found.version == 4 else (16, 8, socket.AF_INET6)
    start = found.network + first
    return (
        found.proto,
        (socket.inet_ntop(family, frame[start : start + size]), source),
        (socket.inet_ntop(family, frame[start + size : start + 2 * size]), target),
    )


def describe(frame: bytes) -> str:
    """One line for logs: `tcp 10.1.0.2:4711 → 10.1.0.3:80`."""
    if (found := endpoints(frame)) is None:
        return f"{len(frame)} bytes that aren't TCP or UDP"
    proto, source, target = found
    hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in (source, target)]
    return f"{'tcp' if proto == TCP else 'udp'} {hosts[0]} → {hosts[1]}"


def identity(frame: bytes, payload: int) -> bytes | None:
    """The same for a TCP segment and its retransmission, as long as it isn't cut otherwise; None for what isn't TCP.

    `payload`: how many bytes of payload it has.
    """
    found = layout(frame)
    if found is None or found.proto != TCP:
        return None
    size, first = (4, 12) if found.version == 4 else (16, 8)
    addresses = frame[found.network + first : found.network + first + 2 * size]
    ports_and_sequence = frame[found.transport : found.transport + 8]
    return b"".join(
        (addresses, ports_and_sequence, frame[found.transport + 13 : found.transport + 14], b"%d" % payload)
    )
