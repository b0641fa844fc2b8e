"""A container's share of the host's network, for a pod that uses it (hostNetwork).

New connections are held back as in a pod's network (`host_network.HostNetwork`), what is established can't be: while a
connection is open the container isn't scaled down, unless it is to end them (`connections: close`). What they are used
for is known from the kernel's clocks of the container's own sockets.
"""

from __future__ import annotations

import time
from typing import Any, Final

from criproxy.hook.gate import Gate, described
from criproxy.hook.host_network import HostNetwork
from criproxy.hook.pod_maps import Park, Visitor
from criproxy.kernel.sockets import Flow, Socket
from criproxy.kubelet.probes import Probes

_CLOCK_SECONDS: Final = 0.05
"""Two looks at a clock of the kernel's differ by a tick or two, though nothing has happened in between."""


class HostGate(Gate):
    def __init__(self, network: HostNetwork, slot: int, probes: Probes, **settings: Any) -> None:
        """As for `Gate`."""
        self._host = network
        self._used: dict[Flow, float] = {}
        """The open connections, and when something was said on each (monotonic seconds)."""
        self._latest = 0.0
        super().__init__(network, slot, probes, **settings)

    def last_activity(self) -> float:
        now = time.monotonic()
        if not self._probing_at(now):
            used = {s.flow: self._said(s, now) for s in self._connections()}
            if self._used.keys() - used.keys():
                self._latest = now  # when it was closed, and what was said before, nobody has seen
            self._used = used
            said = [moment for moment in used.values() if not self._probing_at(moment)]
            self._latest = max(self._latest, *said, 0.0)
        return max(super().last_activity(), self._latest)

    def unsettled(self) -> str | None:
        return super().unsettled() or (self.hanging() if self._preserve else None)

    def hanging(self) -> str | None:
        for s in self._connections():
            incoming = s.port in self._ports | self._quiet_ports
            which = f"from {described(s)} to port {s.local[1]}" if incoming else f"to {described(s)}"
            return (
                f"a connection {which} is open, which can't be kept in the host's network without its container "
                "(criproxy.io/connections: close ends it when it is idle)"
            )
        return None

    def park_new(self) -> None:
        self._network.park(self._slot, Park.NEW)

    def park_all(self) -> None:
        self._network.park(self._slot, Park.ALL)
        # Those that are ended with its processes aren't used by anybody then.
        self._used = {}

    def _look(self, own: list[Socket]) -> None:
        listening = [s for s in own if s.listening]
        if listening:
            self._host.listens(self._slot, {(s.local[0], s.port) for s in listening})
            # Whoever is accepted there in its place is sure to find it.
            self._network.answer(self._slot, {s.port: (Visitor.KUBELET,) for s in listening})

    def _connections(self) -> list[Socket]:
        """Its open TCP connections, without ours in the place of probes."""
        own = [s for s in self._network.sockets(["tcp"], self._socket_inodes()) if s.connected]
        probing = self._host.probing(self._slot, {s.flow for s in own})
        return [s for s in own if s.flow not in probing]

    def _said(self, s: Socket, now: float) -> float:
        moment = now - min(s.last_received or 0, s.last_sent or 0) / 1000
        known = self._used.get(s.flow, 0.0)
        return moment if moment > known + _CLOCK_SECONDS else known
