"""A container's share of its pod's network: its ports, what is parked for it, and whether it is quiet.

The pod's hook (`network.PodNetwork`) is shared by the pod's containers; a gate is one slot of it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from criproxy.network import Park, Parked, PodNetwork
from criproxy.policy import Port
from criproxy.sockets import Socket

log = logging.getLogger(__name__)


class Gate:
    def __init__(
        self,
        network: PodNetwork,
        slot: int,
        *,
        declared: frozenset[Port],
        socket_inodes: Callable[[], set[int]],
        parking_packets: int,
        parking_bytes: int,
    ) -> None:
        """`socket_inodes` tells which sockets of the pod are the container's; the limits bound what is parked."""
        self._network = network
        self._slot = slot
        self._declared = declared
        self._socket_inodes = socket_inodes
        self._packet_limit, self._byte_limit = parking_packets, parking_bytes
        self._parked: deque[Parked] = deque()
        self._parked_bytes = 0
        self._ports: frozenset[Port] = frozenset()
        self.overflowed = 0
        """Packets that found the parking full. TCP sends them again by itself."""
        self.on_wanted: Callable[[], None] = lambda: None
        self._assign(declared)

    # --- what the hook tells -------------------------------------------------------------------------------

    def park(self, packet: Parked) -> None:
        """Takes a packet that the hook parked for this container."""
        if len(self._parked) >= self._packet_limit or self._parked_bytes + len(packet.frame) > self._byte_limit:
            if not self.overflowed:
                log.warning("slot %d: the parking is full, TCP has to send again", self._slot)
            self.overflowed += 1
        else:
            self._parked.append(packet)
            self._parked_bytes += len(packet.frame)
        if packet.wakes:
            self.on_wanted()

    def last_activity(self) -> float:
        return self._network.last_activity(self._slot)

    # --- what the state machine asks (container.Gate) ------------------------------------------------------

    def silent(self) -> str | None:
        listening = {s.port for s in self._own_sockets() if s.listening}
        missing = {port for port in self._declared if port.proto == "tcp"} - listening
        ports = self._declared | listening
        # Without any, those that it had stay: while it is started afresh, packets for them have to be parked, where the
        # kernel would refuse the connections.
        if ports:
            self._assign(ports)
        if missing:
            return f"doesn't listen on {', '.join(sorted(map(str, missing)))} (yet)"
        if not ports:
            return "listens on no port, so no packet could wake it"
        return None

    def unsettled(self) -> str | None:
        own = self._own_sockets()
        for s in own:
            if s.listening and s.receive_queue:
                return f"a connection to port {s.port} waits to be accepted"
            if not s.listening and s.send_queue:
                return f"data to {s.remote[0]} is not acknowledged yet"
        for s in self._network.sockets():
            # A handshake has no inode yet; its port tells whose it is.
            if s.state == "SYN_RECV" and s.port in self._ports:
                return f"a handshake on port {s.port} is under way"
        return None

    def wanted(self) -> bool:
        return any(packet.wakes for packet in self._parked)

    def park_new(self) -> None:
        self._network.park(self._slot, Park.NEW)

    def park_all(self) -> None:
        # Outgoing connections have ports that are in nobody's list: each is named by its four-tuple.
        flows = [s.flow for s in self._own_sockets() if s.connected]
        self._network.park(self._slot, Park.ALL, flows)

    def sockets_stay(self) -> None:
        self._network.sockets_stay(self._slot)

    def open(self) -> None:
        # While the hook still parks, replayed packets pass it by their mark: what came first is delivered first.
        while self._parked:
            self._send_parked()
            self._network.poll()
        self._network.park(self._slot, Park.PASS)
        self._network.poll()
        self._send_parked()

    def close(self) -> None:
        """The container is gone: its ports are nobody's, what is parked for it is dropped."""
        self._parked.clear()
        self._network.park(self._slot, Park.PASS)
        self._assign(frozenset())

    # --- inside --------------------------------------------------------------------------------------------

    def _send_parked(self) -> None:
        packets = list(self._parked)
        self._parked.clear()
        self._parked_bytes = 0
        if packets:
            self._network.send(packets)

    def _assign(self, ports: frozenset[Port] | set[Port]) -> None:
        if ports != self._ports:
            self._ports = frozenset(ports)
            self._network.assign(self._slot, set(ports))

    def _own_sockets(self) -> list[Socket]:
        inodes = self._socket_inodes()
        return [s for s in self._network.sockets() if s.inode in inodes]
