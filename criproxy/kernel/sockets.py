"""The sockets of a pod's network namespace, as sock_diag(7) tells them: of every process in it, and of none.

A socket that no process holds has inode 0: a handshake under way, or a connection that the kernel closes by itself.
Connections which wait to be accepted have inode 0 as well; their listener counts them in `receive_queue`.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Final, Literal

from criproxy.kernel.netlink import Netlink, attributes
from criproxy.policy import Port

Address = tuple[str, int]
"""IP address and port. IPv4-mapped IPv6 addresses are told as the IPv4 address they are."""

Proto = Literal["tcp", "udp"]
PROTOS: Final[tuple[Proto, Proto]] = ("tcp", "udp")

STATES: Final = (
    "",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "SYN_RECV",
    "CLOSE",
)
"""Names by the kernel's numbers (include/net/tcp_states.h). UDP: ESTABLISHED if connected, else CLOSE."""

_CONNECTED: Final = frozenset(
    {"ESTABLISHED", "SYN_SENT", "FIN_WAIT1", "FIN_WAIT2", "CLOSE_WAIT", "LAST_ACK", "CLOSING"}
)

_SOCK_DIAG_BY_FAMILY: Final = 20
_INET_DIAG_INFO: Final = 2
_REQUEST: Final = struct.Struct("=BBBxI48x")
_ANSWER: Final = struct.Struct("=BBxx2s2s16s16s16xII4xI")
_INODE: Final = struct.Struct("=I")
_UNIX_REQUEST: Final = struct.Struct("=BBxxIII8x")
_UNIX_ANSWER: Final = struct.Struct("=BBBxI8x")
_UNIX_SHOW: Final = 1 | 2 | 4
"""UDIAG_SHOW_NAME, _VFS, _PEER; the answer's attributes have the numbers 0, 1 and 2."""
_UNIX_SHUTDOWN: Final = 6
_LAST_DATA_SENT, _LAST_DATA_RECEIVED = 44, 52  # in struct tcp_info
_MAPPED: Final = bytes(10) + b"\xff\xff"


@dataclass(frozen=True)
class Flow:
    """A connection, seen from the pod."""

    proto: Proto
    local: Address
    remote: Address

    @property
    def port(self) -> Port:
        """The local port."""
        return Port(self.proto, self.local[1])


@dataclass(frozen=True)
class Socket:
    proto: Proto
    state: str
    """One of STATES."""
    local: Address
    remote: Address
    inode: int
    """As in /proc/PID/fd; 0: no process holds it (any more, or not yet)."""
    receive_queue: int
    """Bytes that the application hasn't read; for a listener the connections that wait to be accepted."""
    send_queue: int
    """Bytes that the peer hasn't acknowledged; for a listener the length that its queue may have."""
    last_received: int | None
    """TCP: milliseconds since payload came in last, in the ticks of the kernel's timer (1 to 10 ms).

    If none did: since the start of the connection, or its restore. Retransmissions of what is there don't count.
    """
    last_sent: int | None
    """TCP: milliseconds since payload was sent last, also again. If none was: since the start, or restore."""

    @property
    def port(self) -> Port:
        """The local port."""
        return Port(self.proto, self.local[1])

    @property
    def listening(self) -> bool:
        return self.state == "LISTEN"

    @property
    def connected(self) -> bool:
        """It has a peer: also half closed, also a connected UDP socket. A handshake that comes in isn't one yet."""
        return self.state in _CONNECTED

    @property
    def flow(self) -> Flow:
        return Flow(self.proto, self.local, self.remote)


def sockets(
    diag: Netlink,
    protos: Sequence[Proto] = PROTOS,
    *,
    inodes: Set[int] | None = None,
    states: Sequence[str] = STATES,
) -> list[Socket]:
    """All sockets of the namespace that `diag` (a NETLINK_SOCK_DIAG socket) was made in. Raises OSError.

    Of those inodes alone, or in those states: where there are thousands of others that takes half the time, or none.
    """
    wanted = sum(1 << number for number, name in enumerate(STATES) if name in states)
    families = (socket.AF_INET, socket.AF_INET6)
    return [found for proto in protos for family in families for found in _dump(diag, proto, family, inodes, wanted)]


@dataclass(frozen=True)
class UnixSocket:
    inode: int
    """As in /proc/PID/fd; 0: it waits to be accepted."""
    peer: int
    """The inode of the other end, wherever that is; 0: none, or one that isn't accepted yet."""
    listening: bool
    name: str
    """Its path as it was given to bind(2); `@…` for an abstract name; empty if it has none."""
    device: tuple[int, int] | None
    """Major and minor number of the file system that its path is in; None if it has none."""
    waiting: bool = False
    """It is connected to one that isn't accepted yet, by whomever."""


def unix(diag: Netlink) -> list[UnixSocket]:
    """All unix sockets that were made in the namespace of `diag`. Raises OSError."""
    body = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0xFFFFFFFF, 0, _UNIX_SHOW)
    return [_unix(message) for message in diag.dump(_SOCK_DIAG_BY_FAMILY, body)]


def _unix(message: bytes) -> UnixSocket:
    _family, _kind, state, inode = _UNIX_ANSWER.unpack_from(message)
    name, device, peer, shut = "", None, 0, 0
    for kind, value in attributes(message[_UNIX_ANSWER.size :]):
        if kind == 0:
            name = value.rstrip(b"\0").replace(b"\0", b"@").decode(errors="replace")
        elif kind == 1:
            number = struct.unpack_from("=I", value, 4)[0]  # the kernel's own form of a device number
            device = (number >> 20, number & 0xFFFFF)
        elif kind == 2:
            peer = struct.unpack_from("=I", value)[0]
        elif kind == _UNIX_SHUTDOWN:
            shut = value[0]
    # An end that is gone has no inode either, and has shut both directions.
    waiting = STATES[state] == "ESTABLISHED" and not peer and not shut
    return UnixSocket(inode, peer, STATES[state] == "LISTEN", name, device, waiting)


def _dump(diag: Netlink, proto: Proto, family: int, inodes: Set[int] | None, states: int) -> Iterator[Socket]:
    tcp = proto == "tcp"
    body = _REQUEST.pack(
        family,
        socket.IPPROTO_TCP if tcp else socket.IPPROTO_UDP,
        1 << (_INET_DIAG_INFO - 1) if tcp else 0,
        states,
    )
    for message in diag.dump(_SOCK_DIAG_BY_FAMILY, body):
        if inodes is not None and _INODE.unpack_from(message, _ANSWER.size - _INODE.size)[0] not in inodes:
            continue
        found, state, sport, dport, source, target, received, sent, inode = _ANSWER.unpack_from(message)
        last_sent = last_received = None
        if tcp and state not in (3, 6, 10, 12):  # TIME_WAIT, handshakes and listeners have no such clocks
            for kind, value in attributes(message[_ANSWER.size :]):
                if kind == _INET_DIAG_INFO and len(value) >= _LAST_DATA_RECEIVED + 4:
                    last_sent = struct.unpack_from("=I", value, _LAST_DATA_SENT)[0]
                    last_received = struct.unpack_from("=I", value, _LAST_DATA_RECEIVED)[0]
        yield Socket(
            proto,
            STATES[state] if state < len(STATES) else str(state),
            (address(found, source), int.from_bytes(sport, "big")),
            (address(found, target), int.from_bytes(dport, "big")),
            inode,
            received,
            sent,
            last_received,
            last_sent,
        )


def address(family: int, raw: bytes) -> str:
    """From its bytes, in network order; `family` AF_INET or AF_INET6."""
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, raw[:4])
    if raw.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)
