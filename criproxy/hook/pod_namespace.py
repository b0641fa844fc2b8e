"""What `network.PodNetwork` changes in a pod's network namespace besides the hook: settings, and a listener."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
from pathlib import Path
from typing import Final

from criproxy.kernel.namespaces import in_network_namespace

_SETTINGS: Final = (
    # What is sent again to lo carries no route: without these the kernel drops 127.0.0.1 and the pod's own addresses
    # as source or target. They concern lo alone, so nothing from outside gets in by them.
    ("/proc/sys/net/ipv4/conf/lo/route_localnet", "0", "1"),
    ("/proc/sys/net/ipv4/conf/lo/accept_local", "0", "1"),
    # CRIU can't dump MPTCP sockets, which Go's servers listen with where they can get them.
    ("/proc/sys/net/mptcp/enabled", "1", "0"),
)
"""(setting, value that is changed, value that it gets); the place in this list is the bit in the pod's map."""

_PORTS: Final = range(61000, 65536)
"""Above those that the kernel hands out by itself, and seldom an application's. Nobody connects to it."""
_TRIES: Final = 16
_QUEUE: Final = 128
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
"""linux/in.h, linux/in6.h; Python has no names for them."""


def change_settings(netns: Path) -> int:
    """Returns the bits of what was changed, for the way back. Raises OSError."""
    return in_network_namespace(netns, _change_settings)


def restore_settings(netns: Path, changed: int) -> None:
    """Undoes what `change_settings` did. Raises OSError."""
    in_network_namespace(netns, lambda: _restore_settings(changed))


def make_listener(netns: Path) -> socket.socket:
    """A TCP socket that the hook can give SYNs for any address and port of the pod: IPv6 with IPv4 in it, or IPv4 alone
    where the pod has no IPv6. It doesn't block. Raises OSError.
    """
    return in_network_namespace(netns, _make_listener)


def _make_listener() -> socket.socket:
    with contextlib.suppress(OSError):
        return listening(socket.AF_INET6, "::1")
    return listening(socket.AF_INET, "127.0.0.1")


def listening(family: socket.AddressFamily, address: str, *, transparent: bool = True) -> socket.socket:
    """A TCP socket at any port of the address, in the calling thread's network namespace. It doesn't block. Raises
    OSError.

    `transparent`: for a hook that sees packets before NAT does. Where a pod has NAT rules (a mesh's), the kernel takes
    a SYN away from a socket whose ports differ from its own, unless that one is transparent.
    """
    for _ in range(_TRIES):
        with contextlib.ExitStack() as stack:
            made = stack.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
            # Its connections have the application's ports, which that one must be able to listen on again.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, transparent)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, transparent)
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                made.bind((address, _PORTS.start + secrets.randbelow(len(_PORTS))))
                made.listen(_QUEUE)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise
            made.setblocking(False)
            stack.pop_all()
            return made
    raise OSError(errno.EADDRINUSE, f"no port of the pod's {address} is free ({_TRIES} from {_PORTS.start} on)")


def _change_settings() -> int:
    changed = 0
    for bit, (path, before, value) in enumerate(_SETTINGS):
        try:
            with open(path) as setting:
                present = setting.read().strip()
            if present == before:
                # Opened anew: the kernel ignores, without an error, what is written behind a setting's first byte.
                with open(path, "w") as setting:
                    setting.write(value)
                changed |= 1 << bit
        except FileNotFoundError:
            continue  # a kernel without MPTCP or IPv4
    return changed


def _restore_settings(changed: int) -> None:
    for bit, (path, before, _) in enumerate(_SETTINGS):
        if changed & 1 << bit:
            with open(path, "w") as setting:
                setting.write(before)
