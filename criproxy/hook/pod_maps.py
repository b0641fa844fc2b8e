"""What lies in the maps of a pod's hook: keys and values as `bpf/pod.h` lays them out, and what they mean.

Bytes come in and go out here alone; `network.PodNetwork` has the maps themselves.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from criproxy.hook import packet
from criproxy.kernel import sockets
from criproxy.kernel.sockets import Flow
from criproxy.policy import Port

SLOTS: Final = 16
"""Containers per pod that have a slot."""
FLOWS: Final = 16384
"""Connections that a pod's slots can keep while they are parked."""
LAYOUT: Final = 4

U32: Final = struct.Struct("=I")
POD: Final = struct.Struct("=4I")
"""Layout, how many slots are parked, bits of the settings that were changed, bits of the slots with an exec probe."""
SLOT: Final = struct.Struct("=8Q")
OTHERS: Final = struct.Struct("=2Q")
LINK: Final = struct.Struct("=III")
"""Mark, whether the qdisc is ours, length of the link header."""
_PORT: Final = struct.Struct("=2sBx")
_OWNER: Final = struct.Struct("=II")
_FOUR: Final = struct.Struct("=16s16s2s2sB3x")
_FLOW: Final = struct.Struct("=6I")
_TALK: Final = struct.Struct("=2Q4I")
_VISIT: Final = struct.Struct("=5I4B")
_RECORD: Final = struct.Struct("=HBx4IHBBQ")
_COPY: Final = struct.Struct("=40s4IQ3B5x")
_QUIET: Final = 1
_ANSWERED: Final = 0x100
_OURS: Final = 2
_STATED, _TIMESTAMPS = 1, 2
_FIN, _SYN, _RST = 1, 2, 4

ADDRESS_BYTES: Final = 16
FOUR_BYTES: Final = _FOUR.size

MAPS: Final[dict[str, tuple[int, int]]] = {
    "pod": (4, POD.size),
    "modes": (4, 4),
    "slots": (4, SLOT.size),
    "others": (4, OTHERS.size),
    "ports": (_PORT.size, _OWNER.size),
    "flows": (_FOUR.size, _FLOW.size),
    "talks": (_FOUR.size, _TALK.size),
    "replay": (4, 4),
    "links": (4, LINK.size),
    "visits": (_FOUR.size, _VISIT.size),
    "listener": (4, 8),
}
"""The maps by name, with the sizes of their keys and values in bytes."""
RING: Final = "parked"
WATCHED: Final = "watched"
"""The ring buffer of the packets that were copied."""

_NUMBERS: Final[dict[sockets.Proto, int]] = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_NAMES: Final = {number: name for name, number in _NUMBERS.items()}
_MAPPED: Final = bytes(10) + b"\xff\xff"


class Park(IntEnum):
    """What happens to the packets of a slot."""

    PASS = 0
    NEW = 1
    """SYNs to its ports are parked."""
    ALL = 2
    """So are TCP of its flows and UDP to its ports; TCP packets that say nothing new are answered or dropped."""
    WAKE = 3
    """As ALL, but TCP packets without news pass: the sockets are there again. `PodNetwork.send()` sets it."""


class Visitor(IntEnum):
    """Whose connections are looked at before they count as activity: they may be probes."""

    KUBELET = 0
    LOOPBACK = 1
    """Over `lo`: its first payload has `kube-probe/` in its first 512 bytes, or its client closes it without any."""
    COMMAND = 2
    """Over `lo`, opened while an exec probe was under way."""
    ANYBODY = 3
    """In the host's network, whoever's isn't kubelet's: it is looked at no further, and wakes."""


@dataclass(frozen=True)
class Watched:
    """A packet of a visitor's connection, copied on its way to the application or back."""

    slot: int
    flow: Flow
    """`local` is the server's end, whichever way the packet went."""
    visitor: Visitor
    incoming: bool
    """From the client."""
    seq: int
    syn: bool
    fin: bool
    rst: bool
    payload: bytes
    """Its first 2048 bytes."""
    length: int
    """Of the payload in all. More than `payload` has: too long, or one of more than 16 packets in its direction."""
    time: float
    """time.monotonic() when it came by."""


@dataclass(frozen=True)
class Parked:
    """A packet that was taken out of its way."""

    slot: int
    ifindex: int
    """The link that it came in on, and goes to again."""
    frame: bytes
    proto: sockets.Proto
    syn: bool
    fin: bool
    rst: bool
    payload: int
    """Bytes of payload."""
    gso_size: int
    """Not 0: several segments, with this many bytes of payload each, in one frame."""
    time: float
    """time.monotonic() when it was parked."""
    probe: bool = False
    """The SYN of a connection for the listener (`PodNetwork.answer`), which wasn't there. Sent again once it is, it
    gets there."""

    @property
    def wakes(self) -> bool:
        """Whether somebody waits for the application: a new connection or data. A connection's end doesn't."""
        if self.probe:
            return False
        return self.proto == "udp" or self.syn or (self.payload > 0 and not self.rst)

    def __str__(self) -> str:
        names = [name for name in ("syn", "fin", "rst") if getattr(self, name)]
        return " ".join([packet.describe(self.frame), *names, f"{self.payload} bytes"])


@dataclass(frozen=True)
class Counters:
    """Packets of a slot since the hook was attached."""

    parked: int
    parked_bytes: int
    overflowed: int
    """Dropped because the ring buffer was full or the packet too large for it. TCP sends them again."""
    dropped: int
    """TCP packets without news (pure ACK, keep-alive) to a slot in Park.ALL that weren't answered."""
    quiet: int
    """Packets to quiet ports that found the slot parked."""
    answered: int
    """Keep-alives of connections whose sockets sleep."""


@dataclass(frozen=True)
class Activity:
    """When there was traffic last, in time.monotonic() seconds; 0.0 for never."""

    received: float
    sent: float
    others_received: float
    """By TCP connections of the pod that no slot explains: outgoing ones, and those of containers without a slot."""
    others_sent: float

    @property
    def own(self) -> float:
        return max(self.received, self.sent)

    @property
    def others(self) -> float:
        return max(self.others_received, self.others_sent)


@dataclass(frozen=True)
class Talk:
    """When a TCP connection had new payload or a SYN last, in time.monotonic() seconds; 0.0 for not seen."""

    received: float
    sent: float
    http2: bool = False
    """What HTTP/2 says for itself (SETTINGS, PING, WINDOW_UPDATE) came by as well, and isn't in these times."""

    @property
    def last(self) -> float:
        return max(self.received, self.sent)


@dataclass(frozen=True)
class Stream:
    """The state of an established TCP connection, as far as an answer to its peer's keep-alive needs it."""

    rcv_nxt: int
    snd_nxt: int
    window: int
    """The window field of its segments: in units of its window scale."""
    tsval: int | None
    """Its clock for timestamps when it was saved, which stands still until it is restored. None: it has none."""


def port(one: Port) -> bytes:
    return _PORT.pack(one.number.to_bytes(2, "big"), _NUMBERS[one.proto])


def port_of(key: bytes) -> Port:
    number, proto = _PORT.unpack(key)
    return Port(_NAMES[proto], int.from_bytes(number, "big"))


def owner_of(value: bytes) -> tuple[int, bool]:
    """The slot, and whether the port is quiet."""
    slot, flags = _OWNER.unpack(value)
    return slot, bool(flags & _QUIET)


def answered_of(value: bytes) -> frozenset[Visitor]:
    """Whose new connections to a port are the listener's."""
    flags = _OWNER.unpack(value)[1]
    return frozenset(visitor for visitor in Visitor if flags & (_ANSWERED << visitor))


def owner(slot: int, *, quiet: bool = False, answered: Iterable[Visitor] = ()) -> bytes:
    return _OWNER.pack(slot, (_QUIET if quiet else 0) | sum(_ANSWERED << visitor for visitor in answered))


def four(flow: Flow) -> bytes:
    (local, local_port), (remote, remote_port) = flow.local, flow.remote
    return _FOUR.pack(
        address(local),
        address(remote),
        local_port.to_bytes(2, "big"),
        remote_port.to_bytes(2, "big"),
        _NUMBERS[flow.proto],
    )


def flow(key: bytes) -> Flow:
    local, remote, local_port, remote_port, proto = _FOUR.unpack(key)
    return Flow(
        _NAMES[proto],
        (_text(local), int.from_bytes(local_port, "big")),
        (_text(remote), int.from_bytes(remote_port, "big")),
    )


def flow_value(slot: int, stream: Stream | None = None) -> bytes:
    if stream is None:
        return _FLOW.pack(slot, 0, 0, 0, 0, 0)
    flags = _STATED if stream.tsval is None else _STATED | _TIMESTAMPS
    return _FLOW.pack(slot, flags, stream.rcv_nxt, stream.snd_nxt, stream.window, stream.tsval or 0)


def talk(value: bytes) -> Talk:
    received, sent, _, _, http2, _ = _TALK.unpack(value)
    return Talk(received / 1e9, sent / 1e9, bool(http2))


def visit(value: bytes) -> tuple[Visitor, int, bool]:
    """Whose connection it is, the bits of the slots whose command may have opened it, whether the listener has it."""
    _slot, _flags, commands, _first, _answer, visitor, state, _in, _out = _VISIT.unpack(value)
    return Visitor(visitor), commands, state == _OURS


def watched(record: bytes) -> Watched:
    key, slot, seq, length, copied, time_ns, visitor, incoming, flags = _COPY.unpack_from(record)
    return Watched(
        slot,
        flow(key),
        Visitor(visitor),
        bool(incoming),
        seq,
        bool(flags & _SYN),
        bool(flags & _FIN),
        bool(flags & _RST),
        record[_COPY.size : _COPY.size + copied],
        length,
        time_ns / 1e9,
    )


def parked(record: bytes) -> Parked:
    slot, probe, ifindex, length, header, payload, gso_size, proto, flags, time_ns = _RECORD.unpack_from(record)
    frame = record[_RECORD.size : _RECORD.size + length]
    return Parked(
        slot,
        ifindex,
        frame if header else packet.with_link_header(frame),
        _NAMES[proto],
        bool(flags & _SYN),
        bool(flags & _FIN),
        bool(flags & _RST),
        payload,
        gso_size,
        time_ns / 1e9,
        bool(probe),
    )


def address(text: str) -> bytes:
    """IPv6 or IPv4-mapped."""
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
    return _MAPPED + socket.inet_pton(socket.AF_INET, text)


def _text(raw: bytes) -> str:
    if raw.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)
