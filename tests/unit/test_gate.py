"""Which ports a container's packets are told by, on a pod's network that only takes notes."""

from __future__ import annotations

from typing import cast

from criproxy.gate import Gate
from criproxy.network import PodNetwork, Port
from criproxy.sockets import Socket

INODE = 7


class Network:
    def __init__(self) -> None:
        self.ports: set[Port] = set()
        self.there: list[Socket] = []

    def assign(self, slot: int, ports: set[Port]) -> None:
        self.ports = ports

    def sockets(self) -> list[Socket]:
        return self.there


def listener(port: int) -> Socket:
    return Socket("tcp", "LISTEN", ("0.0.0.0", port), ("0.0.0.0", 0), INODE, 0, 128, None, None)


def test_an_application_that_is_started_afresh_keeps_its_ports_until_it_listens() -> None:
    network = Network()
    gate = Gate(
        cast(PodNetwork, network),
        0,
        declared=frozenset(),
        socket_inodes=lambda: {INODE},
        parking_packets=8,
        parking_bytes=8192,
    )
    assert gate.silent() == "listens on no port, so no packet could wake it"
    network.there = [listener(80)]
    assert gate.silent() is None
    assert network.ports == {Port("tcp", 80)}
    network.there = []
    assert gate.silent() is not None
    assert network.ports == {Port("tcp", 80)}
    network.there = [listener(81)]
    assert gate.silent() is None
    assert network.ports == {Port("tcp", 81)}
