"""Frames with right, unfilled and wrong checksums. What is right is computed word by word, as RFC 1071 has it."""

import socket
import struct

import pytest

from criproxy.hook.packet import Corrupt, describe, endpoints, layout, prepare, with_link_header

V4 = (socket.inet_aton("10.0.0.1"), socket.inet_aton("10.0.0.2"))
V6 = (socket.inet_pton(socket.AF_INET6, "fd00::1"), socket.inet_pton(socket.AF_INET6, "fd00::2"))
TCP, UDP = 6, 17


def folded(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(addresses: tuple[bytes, bytes], proto: int, length: int) -> bytes:
    return b"".join(addresses) + struct.pack("!II", length, proto)


def transport(proto: int, payload: bytes, checksum: int) -> bytes:
    if proto == TCP:
        return struct.pack("!HHIIBBHHH", 4711, 80, 1, 2, 0x50, 0x18, 512, checksum, 0) + payload
    return struct.pack("!HHHH", 4711, 80, 8 + len(payload), checksum) + payload


def frame(
    addresses: tuple[bytes, bytes],
    proto: int,
    payload: bytes,
    checksum: str | int = "right",
    extensions: bytes = b"",
    first: int | None = None,
    fragment: int = 0,
    padding: int = 0,
    options: bytes = b"",
) -> bytes:
    """An Ethernet frame. `checksum`: right, partial (the pseudo header's sum alone) or a number."""
    length = len(transport(proto, payload, 0))
    partial = folded(pseudo(addresses, proto, length))
    right = ~folded(pseudo(addresses, proto, length) + transport(proto, payload, 0)) & 0xFFFF
    if right == 0 and proto == UDP:
        right = 0xFFFF
    number = {"right": right, "partial": partial}.get(checksum, 0) if isinstance(checksum, str) else checksum
    body = options + extensions + transport(proto, payload, number)
    if len(addresses[0]) == 4:
        size = 5 + len(options) // 4
        head = struct.pack("!BBHHHBBH", 0x40 | size, 0, 20 + len(body), 7, fragment, 64, proto, 0) + b"".join(addresses)
        head = head[:10] + struct.pack("!H", ~folded(head + options) & 0xFFFF) + head[12:]
        ethertype = b"\x08\x00"
    else:
        head = struct.pack("!IHBB", 6 << 28, len(body), proto if first is None else first, 64) + b"".join(addresses)
        ethertype = b"\x86\xdd"
    return bytes(12) + ethertype + head + body + bytes(padding)


CASES = [
    pytest.param(addresses, proto, payload, id=f"{'v4' if addresses is V4 else 'v6'}-{proto}-{len(payload)}")
    for addresses in (V4, V6)
    for proto in (TCP, UDP)
    for payload in (b"", b"x", b"hello world", bytes(range(256)) * 200, b"\xff" * 1001, bytes(64))
]


@pytest.mark.parametrize(("addresses", "proto", "payload"), CASES)
def test_a_right_checksum_stays(addresses: tuple[bytes, bytes], proto: int, payload: bytes) -> None:
    good = frame(addresses, proto, payload)
    assert prepare(good) == [good]


@pytest.mark.parametrize(("addresses", "proto", "payload"), CASES)
def test_an_unfilled_checksum_is_filled(addresses: tuple[bytes, bytes], proto: int, payload: bytes) -> None:
    assert prepare(frame(addresses, proto, payload, "partial")) == [frame(addresses, proto, payload)]


@pytest.mark.parametrize(("addresses", "proto", "payload"), CASES)
def test_a_wrong_checksum_is_refused(addresses: tuple[bytes, bytes], proto: int, payload: bytes) -> None:
    bad = bytearray(frame(addresses, proto, payload))
    bad[-1] ^= 0x5A
    with pytest.raises(Corrupt):
        prepare(bytes(bad))


def test_every_checksum_is_right_or_not() -> None:
    """Of all values of the field one is right, one unfilled; and a sum of 0 is told apart from none."""
    payload = b"any"
    good = frame(V4, TCP, payload)
    accepted = []
    for number in range(0x10000):
        try:
            assert prepare(frame(V4, TCP, payload, number)) == [good]
        except Corrupt:
            continue
        accepted.append(number)
    assert len(accepted) == 2


def test_udp_without_checksum_stays() -> None:
    none = frame(V4, UDP, b"query", 0)
    assert prepare(none) == [none]


def test_udp_whose_sum_is_zero() -> None:
    """0 would mean none: it is sent as 0xFFFF."""
    start = folded(pseudo(V4, UDP, 10) + transport(UDP, b"\0\0", 0))
    payload = struct.pack("!H", 0xFFFF - start)
    (filled,) = prepare(frame(V4, UDP, payload, "partial"))
    assert filled == frame(V4, UDP, payload)
    assert filled[-4:-2] == b"\xff\xff"


def test_padding_is_not_summed() -> None:
    padded = frame(V4, TCP, b"", "partial", padding=6)
    assert prepare(padded) == [frame(V4, TCP, b"", padding=6)]


def test_ipv4_options() -> None:
    assert prepare(frame(V4, TCP, b"data", "partial", options=b"\x01" * 8)) == [
        frame(V4, TCP, b"data", options=b"\x01" * 8)
    ]


@pytest.mark.parametrize(
    ("first", "extensions"),
    [
        (0, bytes([TCP, 0]) + bytes(6)),
        (60, bytes([0, 1]) + bytes(14) + bytes([TCP, 0]) + bytes(6)),
        (51, bytes([TCP, 4]) + bytes(22)),
        (44, bytes([TCP, 0, 0, 0]) + bytes(4)),
    ],
    ids=["hop-by-hop", "destination and hop-by-hop", "authentication", "fragment that is whole"],
)
def test_ipv6_extension_headers(first: int, extensions: bytes) -> None:
    unfilled = frame(V6, TCP, b"data", "partial", first=first, extensions=extensions)
    assert prepare(unfilled) == [frame(V6, TCP, b"data", first=first, extensions=extensions)]


def test_more_extension_headers_than_are_walked() -> None:
    chain = bytes(8 * 9) + bytes([TCP, 0]) + bytes(6)
    odd = frame(V6, TCP, b"data", "partial", first=0, extensions=chain)
    assert layout(odd) is None
    assert prepare(odd) == [odd]


@pytest.mark.parametrize(
    "fragmented",
    [
        frame(V4, UDP, b"first", 0x1234, fragment=0x2000),
        frame(V4, UDP, b"later", 0x1234, fragment=0x2010),
        frame(V6, UDP, b"first", 0x1234, first=44, extensions=bytes([UDP, 0, 0, 1]) + bytes(4)),
        frame(V6, UDP, b"later", 0x1234, first=44, extensions=bytes([UDP, 0, 0, 9]) + bytes(4)),
    ],
)
def test_fragments_stay_as_they_are(fragmented: bytes) -> None:
    assert prepare(fragmented) == [fragmented]


@pytest.mark.parametrize("addresses", [V4, V6])
def test_datagrams_that_travelled_as_one(addresses: tuple[bytes, bytes]) -> None:
    payload = bytes(range(250)) * 10
    parts = prepare(frame(addresses, UDP, payload, "partial"), gso_size=1000)
    assert [
        part[-len(p) :] for part, p in zip(parts, (payload[:1000], payload[1000:2000], payload[2000:]), strict=True)
    ]
    assert len(parts) == 3
    for number, part in enumerate(parts):
        assert prepare(part) == [part]
        found = layout(part)
        assert found is not None
        assert found.end == len(part)
        assert part[found.transport + 8 :] == payload[number * 1000 : number * 1000 + 1000]
        if addresses is V4:
            assert folded(part[14:34]) == 0xFFFF
            assert part[18:20] == struct.pack("!H", 7 + number)


def test_tcp_segments_that_travelled_as_one_stay_one() -> None:
    assert len(prepare(frame(V4, TCP, bytes(5000), "partial"), gso_size=1000)) == 1


@pytest.mark.parametrize("cut", range(60))
def test_a_truncated_frame_is_left_alone(cut: int) -> None:
    for good in (frame(V4, TCP, b"x" * 10, "partial"), frame(V6, TCP, b"x" * 10, "partial")):
        assert prepare(good[:cut]) == [good[:cut]]


def test_what_is_not_ip_is_left_alone() -> None:
    arp = bytes(12) + b"\x08\x06" + bytes(46)
    assert prepare(arp) == [arp]
    assert endpoints(arp) is None


def test_description() -> None:
    assert describe(frame(V4, TCP, b"")) == "tcp 10.0.0.1:4711 → 10.0.0.2:80"
    assert describe(frame(V6, UDP, b"")) == "udp [fd00::1]:4711 → [fd00::2]:80"


def test_links_without_a_header() -> None:
    whole = frame(V6, TCP, b"x")
    assert with_link_header(whole[14:]) == whole
    whole = frame(V4, TCP, b"x")
    assert with_link_header(whole[14:]) == whole
