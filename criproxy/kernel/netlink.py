"""The few netlink requests that the hook needs, synchronous, on a socket that stays in the namespace of its making.

pyroute2 isn't used here: its 0.9 series runs an event loop of its own inside every call, which can't be done on the
daemon's event loop, and these calls are on the way of a scale-down. Sources: rtnetlink(7), sock_diag(7), and the
kernel's include/uapi/linux/{netlink,rtnetlink,pkt_sched,pkt_cls}.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal

NETLINK_ROUTE: Final = 0
NETLINK_SOCK_DIAG: Final = 4

_SOL_NETLINK: Final = 270
_NETLINK_EXT_ACK: Final = 11

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_MULTI, _DUMP_INTR, _CAPPED, _ACK_TLVS = 0x2, 0x10, 0x100, 0x200
_CREATE, _EXCL, _REPLACE = 0x400, 0x200, 0x100

_RTM_NEWLINK, _RTM_GETLINK = 16, 18
_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_GETQDISC = 36, 37, 38
_RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 44, 45, 46

_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _TCA_BPF_ID = 6, 7, 8, 11
_TCA_BPF_FLAG_ACT_DIRECT: Final = 1
_IFLA_IFNAME: Final = 3

_CLSACT: Final = 0xFFFFFFF1
_HEADER: Final = struct.Struct("=IHHII")
_TCMSG: Final = struct.Struct("=BxxxiIII")
_IFINFO: Final = struct.Struct("=BxHiII")

Direction = Literal["ingress", "egress"]
DIRECTIONS: Final[tuple[Direction, Direction]] = ("ingress", "egress")
_PARENTS: Final[dict[Direction, int]] = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}

_ETHERNET_LIKE: Final = frozenset({1, 772, 801, 802, 803})
"""ARPHRD_ETHER, ARPHRD_LOOPBACK and the wireless ones: links whose packets begin with an Ethernet header."""


@dataclass(frozen=True)
class Link:
    index: int
    name: str
    header: int
    """Length of the link header in bytes: 14, or 0 where packets begin with the IP header."""


@dataclass(frozen=True)
class Filter:
    kind: str
    preference: int
    handle: int
    program: int
    """The kernel's id of the eBPF program; 0 for filters of another kind."""


class Netlink:
    """One netlink socket, bound to the network namespace of the thread that makes it; usable from any other."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            # The kernel answers within the request's send(); silence is a bug, and must not hang the daemon.
            self._socket.settimeout(5)
            self._socket.bind((0, 0))
        except OSError:
            self._socket.close()
            raise
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def request(self, kind: int, body: bytes, flags: int = 0) -> None:
        """A request that is answered with yes or no. Raises OSError with the kernel's reason."""
        for _ in self._exchange(kind, body, flags | _ACK):
            pass

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """All objects of a kind, each message without its netlink header. Raises OSError."""
        for _ in range(8):
            answers = []
            interrupted = False
            for flags, answer in self._exchange(kind, body, _DUMP):
                interrupted |= bool(flags & _DUMP_INTR)
                answers.append(answer)
            if not interrupted:
                break
        # A table that changes eight times in a row: what was seen of it last is as true as it gets.
        return answers

    def _exchange(self, kind: int, body: bytes, flags: int) -> Iterator[tuple[int, bytes]]:
        self._sequence += 1
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, self._sequence, 0) + body)
        while True:
            data = self._socket.recv(1 << 17)
            position = 0
            while position + _HEADER.size <= len(data):
                length, answer, answer_flags, sequence, _ = _HEADER.unpack_from(data, position)
                message = data[position + _HEADER.size : position + length]
                position += (length + 3) & ~3
                if sequence != self._sequence:  # left over from a request that was given up
                    continue
                if answer == _NLMSG_ERROR:
                    self._check(message, answer_flags)
                    return
                if answer == _NLMSG_DONE:
                    code = struct.unpack_from("=i", message)[0] if len(message) >= 4 else 0
                    if code < 0:
                        raise OSError(-code, os.strerror(-code))
                    return
                yield answer_flags, message

    @staticmethod
    def _check(message: bytes, flags: int) -> None:
        code, echoed = struct.unpack_from("=iI", message)
        if code == 0:
            return
        text = os.strerror(-code)
        if flags & _ACK_TLVS:
            # The kernel's own words, behind the request that it echoes (its header alone when capped).
            start = 4 + (_HEADER.size if flags & _CAPPED else (echoed + 3) & ~3)
            if reason := dict(attributes(message[start:])).get(1):
                text += f" ({reason.rstrip(bytes(1)).decode(errors='replace')})"
        raise OSError(-code, text)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The (kind, value) pairs of a list of netlink attributes."""
    position = 0
    while position + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, position)
        if length < 4:
            return
        yield kind & 0x3FFF, data[position + 4 : position + length]
        position += (length + 3) & ~3


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def links(route: Netlink) -> list[Link]:
    """All links of the namespace."""
    found = []
    for message in route.dump(_RTM_GETLINK, _IFINFO.pack(0, 0, 0, 0, 0)):
        _, kind, index, _, _ = _IFINFO.unpack_from(message)
        name = dict(attributes(message[_IFINFO.size :])).get(_IFLA_IFNAME, b"")
        found.append(Link(index, _text(name), 14 if kind in _ETHERNET_LIKE else 0))
    return found


def add_clsact(route: Netlink, link: int) -> bool:
    """Makes a link's clsact qdisc. False if there is one already. Raises OSError, for one if an `ingress` qdisc
    is in its place (which would take filters for egress as well, and run them on ingress)."""
    body = _TCMSG.pack(0, link, 0xFFFF0000, _CLSACT, 0) + _attribute(_TCA_KIND, b"clsact\0")
    try:
        route.request(_RTM_NEWQDISC, body, _CREATE | _EXCL)
    except FileExistsError:
        for message in route.dump(_RTM_GETQDISC, _TCMSG.pack(0, link, 0, 0, 0)):
            _, index, _, parent, _ = _TCMSG.unpack_from(message)
            kind = _text(dict(attributes(message[_TCMSG.size :])).get(_TCA_KIND, b""))
            if index == link and parent == _CLSACT and kind != "clsact":
                raise OSError(errno.EBUSY, f"somebody's {kind} qdisc is in clsact's place") from None
        return False
    return True


def delete_clsact(route: Netlink, link: int) -> None:
    """Removes a link's clsact qdisc with all its filters, if it is there. Raises OSError."""
    body = _TCMSG.pack(0, link, 0xFFFF0000, _CLSACT, 0) + _attribute(_TCA_KIND, b"clsact\0")
    _unless_gone(route, _RTM_DELQDISC, body)


def add_filter(
    route: Netlink, link: int, direction: Direction, preference: int, handle: int, program: int, name: str
) -> None:
    """Attaches an eBPF program (its descriptor) in direct-action mode, replacing one at its place. Raises OSError."""
    options = (
        _attribute(_TCA_BPF_FD, struct.pack("=I", program))
        + _attribute(_TCA_BPF_NAME, name.encode() + b"\0")
        + _attribute(_TCA_BPF_FLAGS, struct.pack("=I", _TCA_BPF_FLAG_ACT_DIRECT))
    )
    body = _filter(link, direction, preference, handle) + _attribute(_TCA_OPTIONS, options)
    route.request(_RTM_NEWTFILTER, body, _CREATE | _REPLACE)


def delete_filter(route: Netlink, link: int, direction: Direction, preference: int, handle: int) -> None:
    """Removes one eBPF filter, if it is there. Raises OSError."""
    _unless_gone(route, _RTM_DELTFILTER, _filter(link, direction, preference, handle))


def filters(route: Netlink, link: int, direction: Direction) -> list[Filter]:
    """What sits on a link's clsact, in the order in which it is run. Empty if there is no clsact. Raises OSError."""
    found = []
    for message in route.dump(_RTM_GETTFILTER, _TCMSG.pack(0, link, 0, _PARENTS[direction], 0)):
        _, _, handle, _, info = _TCMSG.unpack_from(message)
        values = dict(attributes(message[_TCMSG.size :]))
        if handle == 0:  # the kernel names each preference once more, without a filter
            continue
        options = dict(attributes(values.get(_TCA_OPTIONS, b"")))
        program = struct.unpack("=I", options[_TCA_BPF_ID])[0] if _TCA_BPF_ID in options else 0
        found.append(Filter(_text(values.get(_TCA_KIND, b"")), info >> 16, handle, program))
    return found


def _filter(link: int, direction: Direction, preference: int, handle: int) -> bytes:
    info = preference << 16 | socket.htons(3)  # ETH_P_ALL
    return _TCMSG.pack(0, link, handle, _PARENTS[direction], info) + _attribute(_TCA_KIND, b"bpf\0")


def _unless_gone(route: Netlink, kind: int, body: bytes) -> None:
    try:
        route.request(kind, body)
    except OSError as error:
        # Which of them depends on what is missing: the link, the qdisc, the preference or the filter.
        if error.errno not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
            raise
