"""A container's share of its pod's network: its ports, what is parked for it, and whether it is quiet.

The pod's hook (`Network`) is shared by the pod's containers; a gate is one slot of it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Final, Protocol

from criproxy.hook import packet
from criproxy.hook.pod_maps import Activity, Counters, Park, Parked, Stream, Talk, Visitor, Watched
from criproxy.kernel.bpf import BpfError
from criproxy.kernel.sockets import PROTOS, Flow, Proto, Socket
from criproxy.kubelet.probes import Probes, Verdict
from criproxy.policy import Port

log = logging.getLogger(__name__)

QUIET_SECONDS: Final = 1.0
"""How long a request to a quiet port, which is under way when all else is idle, holds a scale-down up."""

OPEN_ROUNDS: Final = 8
"""How often `open` delivers what came in while it delivered, before it lets everything pass: who sends without a pause
mustn't hold up everybody else."""


class Network(Protocol):
    """What a gate needs of its pod's hook; network.py says what each does, host_network.py what it doesn't there."""

    corrupt: int

    def ports(self, slot: int) -> tuple[frozenset[Port], frozenset[Port]]: ...

    def all_ports(self) -> frozenset[Port]: ...

    def assign(self, slot: int, ports: Collection[Port], quiet: Collection[Port] = ()) -> None: ...

    def room(self, slot: int) -> int: ...

    def park(self, slot: int, mode: Park, flows: Iterable[Flow] = ()) -> None: ...

    def stand_in(self, slot: int, streams: Mapping[Flow, Stream]) -> None: ...

    def sockets_stay(self, slot: int) -> None: ...

    def poll(self) -> None: ...

    def send(self, packets: Sequence[Parked]) -> int: ...

    def sockets(self, protos: Sequence[Proto] = PROTOS, inodes: Set[int] | None = None) -> list[Socket]: ...

    def handshakes(self) -> list[Socket]: ...

    def activity(self, slot: int) -> Activity: ...

    def talk(self, flow: Flow) -> Talk | None: ...

    def talks(self) -> Mapping[Flow, Talk]: ...

    def counters(self, slot: int) -> Counters: ...

    def answer(self, slot: int, ports: Mapping[Port, Collection[Visitor]]) -> None: ...

    def not_a_probe(self, flow: Flow) -> None: ...

    def watch_commands(self, slot: int, on: bool) -> None: ...

    def commands(self, slot: int) -> list[Flow]: ...


class Gate:
    def __init__(
        self,
        network: Network,
        slot: int,
        probes: Probes,
        *,
        declared: frozenset[Port],
        quiet: frozenset[Port] = frozenset(),
        preserve: bool = True,
        socket_inodes: Callable[[], set[int]],
        request_timeout: float,
        parking_packets: int,
        parking_bytes: int,
    ) -> None:
        """`socket_inodes` tells which sockets of the pod are the container's; the limits bound what is parked.

        `quiet`: ports of the pod whose traffic neither wakes nor counts. `request_timeout`: seconds for which a request
        without its answer holds the container awake; 0: it doesn't. `preserve`: connections outlive a checkpoint.
        """
        self._network = network
        self._slot = slot
        self._probes = probes
        self._declared = declared
        self._quiet = quiet
        self._preserve = preserve
        self._socket_inodes = socket_inodes
        self._request_timeout = request_timeout
        self._packet_limit, self._byte_limit = parking_packets, parking_bytes
        self._parked: deque[Parked] = deque()
        self._parked_bytes = 0
        self._flows: list[Flow] = []
        self._parked_segments: set[bytes] = set()
        # An adopted slot has them already; what it listened on while it ran can't be seen while it sleeps.
        self._ports, self._quiet_ports = network.ports(slot)
        self._passes = False
        self.overflowed = 0
        """Packets that found the parking full. TCP sends them again by itself."""
        self.on_wanted: Callable[[], None] = lambda: None
        self.on_probing: Callable[[bool], None] = lambda on: None
        self._probing = False
        self._visited = 0.0
        """When a connection that could have been a probe's was known to be none (monotonic seconds)."""
        self._commands = 0
        self._commands_since = 0.0
        self._assign(self._ports | declared - quiet, self._quiet_ports & quiet)

    def owns(self, port: Port) -> bool:
        """Whether packets to it are for this container, quiet ports included: kubelet may probe there, too."""
        return port in self._ports | self._quiet_ports

    # --- what the hook tells -------------------------------------------------------------------------------

    def park(self, parked: Parked) -> None:
        """Takes a packet that the hook parked for this container."""
        # A probe's connection goes to the listener, which wasn't there when it came.
        if self._passes or parked.probe:
            # The hook had seen the mode before `open` changed it, and has put the packet into the ring after that.
            self._network.send([parked])
            return
        segment = packet.identity(parked.frame, parked.payload)
        if parked.rst:
            # Whatever the peer has sent before, it wants no answer to it any more.
            self._drop(packet.endpoints(parked.frame))
        if segment is not None and segment in self._parked_segments:
            log.debug("slot %d: sent once more: %s", self._slot, parked)
        elif len(self._parked) >= self._packet_limit or self._parked_bytes + len(parked.frame) > self._byte_limit:
            if not self.overflowed:
                log.warning("slot %d: the parking is full, TCP has to send again", self._slot)
            self.overflowed += 1
        else:
            self._parked.append(parked)
            self._parked_bytes += len(parked.frame)
            if segment is not None:
                self._parked_segments.add(segment)
        if parked.wakes:
            self.on_wanted()

    def watched(self, packet: Watched) -> None:
        """Takes the copy of a packet of a connection that may be a probe's."""
        if self._probes.watched(packet) is Verdict.OTHER:
            self._network.not_a_probe(packet.flow)
            self._visited = max(self._visited, packet.time)
        self._probed()

    def counters(self) -> Counters:
        """The hook's, and with them what found the parking full here."""
        counters = self._network.counters(self._slot)
        return replace(counters, overflowed=counters.overflowed + self.overflowed)

    @property
    def corrupt(self) -> int:
        """Parked packets of the pod that were damaged, and so not delivered."""
        return self._network.corrupt

    def last_activity(self) -> float:
        # What the hook has copied says whether it is activity.
        self._network.poll()
        activity = self._network.activity(self._slot)
        own = max(activity.own, self._visited)
        return own if activity.others <= own else max(own, self._outgoing(activity))

    @contextlib.contextmanager
    def command(self) -> Iterator[None]:
        """A command of kubelet's runs in the container (an exec probe). Connections that it makes are no activity:
        those that were opened meanwhile and don't outlive it."""
        began = time.monotonic()
        if not self._commands:
            self._commands_since = began
        self._commands += 1
        self._watch_commands()
        try:
            yield
        finally:
            self._probes.spent(began, time.monotonic())
            self._commands -= 1
            self._watch_commands()

    # --- what the state machine asks (container.Gate) ------------------------------------------------------

    def silent(self) -> str | None:
        ports, bound = self._learn_ports()
        if missing := self._declared - bound:
            return f"doesn't listen on {', '.join(sorted(map(str, missing)))} (yet)"
        if not ports:
            return "listens on no port, so no packet could wake it"
        return None

    def unsettled(self) -> str | None:
        if probe := self._probed():
            return probe
        for s in self._network.handshakes():
            # A handshake has no inode yet; its port tells whose it is. Looked for first, for it ends in a queue.
            if s.port in self._ports | self._quiet_ports:
                return f"a handshake on port {s.port} is under way"
        own = self._own_sockets()
        listening = {s.port for s in own if s.listening}
        flows = {s.flow for s in own}
        connected, room = sum(s.connected for s in own), self._network.room(self._slot)
        if connected > room:
            return f"{connected} connections are open, and the pod's hook has room for {room} while it is scaled down"
        for s in own:
            if s.listening and s.receive_queue:
                return f"a connection to port {s.port} waits to be accepted"
            if s.state == "SYN_SENT":
                return f"a connection to {described(s)} is being opened"
            if not s.listening and s.send_queue:
                return f"data to {s.remote[0]} is not acknowledged yet"
            if Flow(s.proto, s.remote, s.local) in flows:
                continue  # it talks to itself (etcd does, over HTTP/2): nobody else waits for an answer to that
            if busy := self._busy(s, incoming=s.port in listening):
                return busy
        return None

    def hanging(self) -> str | None:
        """The hook parks whatever comes."""
        return None

    def wanted(self) -> bool:
        return any(parked.wakes for parked in self._parked)

    def park_new(self) -> None:
        self._passes = False
        self._network.answer(self._slot, self._probes.ports())
        self._network.park(self._slot, Park.NEW)

    def park_all(self) -> None:
        self._passes = False
        # Those that the kernel has a socket of: what has no owner any more the kernel brings to its end by itself.
        self._flows = [s.flow for s in self._own_sockets() if s.connected]
        self._network.park(self._slot, Park.ALL, self._flows)

    def stand_in(self, streams: Mapping[Flow, Stream]) -> None:
        if self._preserve:
            self._network.stand_in(self._slot, streams)
        else:  # the kernel brings its closed connections to their end
            self._network.park(self._slot, Park.ALL, [flow for flow in self._flows if flow.proto == "udp"])

    def sockets_stay(self) -> None:
        self._network.sockets_stay(self._slot)

    def open(self) -> None:
        # While the hook still parks, replayed packets pass it by their mark: what came first is delivered first.
        for _ in range(OPEN_ROUNDS):
            if not self._parked:
                break
            self._send_parked()
            self._network.poll()
        self._network.park(self._slot, Park.PASS)
        self._network.poll()
        self._send_parked()
        self._passes = True

    def close(self) -> None:
        """The container is gone: its ports are nobody's. Who waits for it is refused by the kernel, as without us."""
        self.open()
        # Also what another daemon has assigned to the slot.
        self._ports, self._quiet_ports = frozenset(), frozenset()
        self._network.assign(self._slot, ())

    # --- inside: probes ------------------------------------------------------------------------------------

    def _probed(self) -> str | None:
        """The probe that waits for its answer, in words."""
        probe = self._probes.under_way()
        if (probe is not None) is not self._probing:
            self._probing = not self._probing
            self.on_probing(self._probing)
        return probe

    def _probing_at(self, moment: float) -> bool:
        """Whether a probe was under way then. Its end may be still to come: idleness is looked for a certain time after
        the last activity, and if probes come in the same rhythm, that is in the middle of one each time."""
        return (self._commands > 0 and moment >= self._commands_since) or self._probes.during(moment)

    def _watch_commands(self) -> None:
        try:
            self._network.watch_commands(self._slot, self._commands > 0)
            if not self._commands:
                self._end_commands()
        except (BpfError, OSError) as error:
            # The probe has nothing to do with it.
            log.warning("slot %d: connections of an exec probe can't be told from others: %s", self._slot, error)

    def _end_commands(self) -> None:
        """Connections that are still open aren't those of a command that has ended."""
        if flows := self._network.commands(self._slot):
            open_ones = {s.flow for s in self._network.sockets(["tcp"]) if s.inode}
            for flow in flows:
                if Flow(flow.proto, flow.remote, flow.local) in open_ones:
                    self._network.not_a_probe(flow)
                    self._visited = time.monotonic()

    # --- inside: what is parked ----------------------------------------------------------------------------

    def _send_parked(self) -> None:
        if packets := self._take():
            self._network.send(packets)

    def _take(self) -> list[Parked]:
        packets = list(self._parked)
        self._parked.clear()
        self._parked_segments.clear()
        self._parked_bytes = 0
        return packets

    def _drop(self, connection: object) -> None:
        """Forgets what is parked of a connection (as `packet.endpoints` tells it)."""
        kept = [parked for parked in self._take() if packet.endpoints(parked.frame) != connection]
        for parked in kept:
            self._parked.append(parked)
            self._parked_bytes += len(parked.frame)
            if (segment := packet.identity(parked.frame, parked.payload)) is not None:
                self._parked_segments.add(segment)

    # --- inside: whose is what -----------------------------------------------------------------------------

    def _assign(self, ports: frozenset[Port] | set[Port], quiet: frozenset[Port] | set[Port]) -> None:
        if (ports, quiet) != (self._ports, self._quiet_ports):
            self._ports, self._quiet_ports = frozenset(ports), frozenset(quiet)
            self._network.assign(self._slot, self._ports, self._quiet_ports)

    def _learn_ports(self) -> tuple[frozenset[Port], set[Port]]:
        """Those at which the container is woken, declared or found, and all that it has bound."""
        own = self._own_sockets()
        self._look(own)
        listening = {s.port for s in own if s.listening}
        bound = listening | {s.port for s in own if s.proto == "udp"}
        ports = (self._declared | listening) - self._quiet
        # While it listens nowhere (it sleeps, or is started afresh) those that it had stay: packets for them have to be
        # parked, where the kernel would refuse the connections.
        if bound:
            self._assign(ports, bound & self._quiet)
        return ports, bound

    def _look(self, own: list[Socket]) -> None:
        """The container's sockets, each time that its ports are looked for."""

    def _own_sockets(self) -> list[Socket]:
        return self._network.sockets(inodes=self._socket_inodes())

    def _busy(self, s: Socket, *, incoming: bool) -> str | None:
        """What of a socket without anything in flight shows that the application has something to do, or None."""
        limit = min(QUIET_SECONDS, self._request_timeout) if s.port in self._quiet else self._request_timeout
        now = time.monotonic()
        if s.proto == "udp":
            since = now - self._network.activity(self._slot).received
            return f"a datagram on port {s.port} isn't read yet" if self._unread_datagram(s) and since < limit else None
        if s.state not in ("ESTABLISHED", "CLOSE_WAIT") or s.last_received is None or s.last_sent is None:
            return None
        talk = self._network.talk(s.flow)
        since = now - talk.received if talk is not None and talk.received else s.last_received / 1000
        if since >= limit:
            return None
        # The kernel's clocks have the ticks of its timer: a request within the tick of the last answer looks as if they
        # came together, and so does a connection that was just made, or restored, and has had no request at all. Those
        # of the hook are exact, but take what the kernel has thrown away for a request. They alone know HTTP/2's
        # housekeeping from requests and answers.
        later = s.last_received < s.last_sent if talk is None else talk.received > talk.sent
        if incoming and later and (s.last_received <= s.last_sent or (talk is not None and talk.http2)):
            return f"a request from {described(s)} to port {s.local[1]} waits for its answer since {since:.1f} s"
        if s.receive_queue > (s.state == "CLOSE_WAIT"):  # the end of a connection counts as a byte in the queue
            return f"data from {described(s)} waits to be read since {since:.1f} s"
        return None

    def _unread_datagram(self, s: Socket) -> bool:
        return s.receive_queue > 0 and s.port in self._declared

    def _outgoing(self, activity: Activity) -> float:
        """When a connection that no slot's port explains was used last, unless it is another container's for certain.

        For certain: its socket is there and isn't ours, or it came in to a port on which somebody else listens. What is
        closed by now, and was opened from inside the pod, may have been ours. What is said while a probe is under way
        doesn't count: an application that asks its database whether it is ready would never sleep.
        """
        # What comes to a port that isn't known as its own yet would keep it busy, and so its sockets unlooked at.
        self._learn_ports()
        inodes = self._socket_inodes()
        tcp = [s for s in self._network.sockets(["tcp"]) if s.inode]
        own = {s.flow for s in tcp if s.inode in inodes}
        foreign = {s.flow for s in tcp} - own
        foreign_ports = {s.port for s in tcp if s.listening and s.inode not in inodes}
        slots_ports = self._network.all_ports()
        talks = self._network.talks()
        # A probe began before what is said for its sake: now each of those is known.
        self._network.poll()
        latest, complete = 0.0, False
        for flow, talk in talks.items():
            back = Flow(flow.proto, flow.remote, flow.local)
            if flow.port in slots_ports or (back in talks and back.port in slots_ports):
                continue  # the slot knows it
            complete = complete or talk.last >= activity.others
            if flow.port in self._quiet or (back in talks and back.port in self._quiet):
                continue  # also before it is known who listens there
            may_be_own = flow in own or (flow not in foreign and flow.port not in foreign_ports)
            if may_be_own and not self._probing_at(talk.last):
                latest = max(latest, talk.last)
        return latest if complete else activity.others


class NoGate:
    """In a pod without a hook: nothing is parked, and nothing is known of its packets."""

    def last_activity(self) -> float:
        return 0.0

    def park_new(self) -> None: ...

    def park_all(self) -> None: ...

    def stand_in(self, streams: Mapping[Flow, Stream]) -> None: ...

    def sockets_stay(self) -> None: ...

    def unsettled(self) -> str | None:
        return None

    def silent(self) -> str | None:
        return None

    def hanging(self) -> str | None:
        return None

    def wanted(self) -> bool:
        return False

    def open(self) -> None: ...


def described(s: Socket) -> str:
    """Its peer, for people."""
    host, port = s.remote
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
