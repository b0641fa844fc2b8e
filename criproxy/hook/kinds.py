"""Which hook a pod gets: one in a network of its own, or one in the host's (hostNetwork)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from criproxy.hook.gate import Gate, Network
from criproxy.hook.host_gate import HostGate
from criproxy.hook.host_network import HostNetwork, is_hosts
from criproxy.hook.network import PodNetwork
from criproxy.hook.pod_maps import Park, Parked, Visitor, Watched
from criproxy.kernel.sockets import Flow, UnixSocket
from criproxy.policy import Port


class Hook(Network, Protocol):
    """What a sandbox needs of its hook; network.py says what each does, host_network.py what is different there."""

    repairs: int

    @property
    def VISITORS(self) -> int: ...

    @classmethod
    def attach(cls, netns: Path, pins: Path) -> Self: ...

    @classmethod
    def adopt(cls, netns: Path, pins: Path) -> Self: ...

    @staticmethod
    def discard(pins: Path) -> None: ...

    @staticmethod
    def strip(netns: Path) -> None: ...

    def problem(self) -> str | None: ...

    def detach(self) -> None: ...

    def close(self) -> None: ...

    def refusal(self, ports: Collection[Port]) -> str | None: ...

    def mode(self, slot: int) -> Park: ...

    def unix_sockets(self) -> list[UnixSocket]: ...

    def on_parked(self, callback: Callable[[Parked], None]) -> None: ...

    def on_watched(self, callback: Callable[[Watched], None]) -> None: ...

    def off_parked(self) -> None: ...

    def listen(self) -> list[socket.socket]: ...

    def accepted(self, connection: socket.socket) -> tuple[Flow, Visitor] | None: ...

    async def connect(self, flow: Flow, visitor: Visitor) -> socket.socket: ...

    def relayed(self, flow: Flow, probe: bool) -> None: ...


class Kind(NamedTuple):
    network: type[Hook]
    gate: type[Gate]
    parks_packets: bool
    """Whether what comes on an established connection can wait, too."""


_POD = Kind(PodNetwork, Gate, parks_packets=True)
_HOST = Kind(HostNetwork, HostGate, parks_packets=False)


def kind(netns: Path) -> Kind:
    """`netns`: as in a sandbox's record."""
    return _HOST if is_hosts(netns) else _POD


def discard(pins: Path) -> None:
    """Removes the hook of a pod that is gone, or of which nothing is known."""
    (_HOST if HostNetwork.is_pinned(pins) else _POD).network.discard(pins)
