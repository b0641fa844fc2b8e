"""The hook of a pod that uses the host's network (hostNetwork): whose connections come, and who takes them meanwhile.

In there packets can't be parked for one pod alone: all pods' forwarded ones pass, some before NAT has said whose they
are, and the links' settings are the node's. So `bpf/host.c` sits where the kernel looks for a listening socket. While
a slot is parked, in whatever mode, each new connection to its ports is the listener's (`listen`); whoever accepts it
wakes the container and relays it (kubelet/answering.py). Established connections can't be parked: host_gate.py sees to
it that there are none.

Kubelet's connections go to the listener while the container runs, too: what they are isn't known before they say it,
and copies of packets (as of a pod's) are not to be had. Ours to the application in their place count as nothing until
somebody says that they are no probe's.

One program per pod, with pins of its own: what is attached goes with its pins. Nothing else of the host is changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from criproxy import LIBEXEC
from criproxy.hook import keeper, pod_maps, pod_namespace
from criproxy.hook.pod_maps import U32, Activity, Counters, Park, Parked, Stream, Talk, Visitor, Watched
from criproxy.hook.slots import NetworkError, Slots, checked, closing
from criproxy.kernel import netlink
from criproxy.kernel.bpf import BpfError, Map, NetnsLink, Pinned, load_object, unpin
from criproxy.kernel.netlink import Netlink
from criproxy.kernel.processes import Process
from criproxy.kernel.sockets import Flow
from criproxy.kubelet import connections as kubelet
from criproxy.policy import Port
from criproxy.run import CommandError

log = logging.getLogger(__name__)

OBJECT: Final = LIBEXEC / "host.bpf.o"
LAYOUT: Final = 1

_OURS: Final = Path("/proc/self/ns/net")
_HOST: Final = struct.Struct("=2I")
"""Layout, bits of the slots with an exec probe."""
_KEEPER: Final = struct.Struct("=3I4xQ")
"""Its pid, its descriptors for IPv4 and IPv6 (0: none), and when it was started."""
_LAST: Final = struct.Struct("=Q")
_PORT_BYTES, _OWNER_BYTES = 4, 8
MAPS: Final[dict[str, tuple[int, int]]] = {
    "host": (4, _HOST.size),
    "keeper": (4, _KEEPER.size),
    "modes": (4, 4),
    "slots": (4, _LAST.size),
    "ports": (_PORT_BYTES, _OWNER_BYTES),
    "places": (pod_maps.ADDRESS_BYTES + _PORT_BYTES, 4),
    "relays": (pod_maps.FOUR_BYTES, 4),
    "visits": (pod_maps.FOUR_BYTES, 4),
    "listeners": (4, 8),
}
_PROGRAM, _LINK = "incoming", "link"
_FAMILIES: Final = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
"""In the order of the listeners' map."""
_ANYWHERE: Final = bytes(pod_maps.ADDRESS_BYTES)
_PARKED, _PROBED = 0, 2
"""Where it has those that get what is parked, and those that get kubelet's while the container runs."""


def of_pod(pid: int) -> Path:
    """The network of a pod in the host's; `pid`: of the pod's first process, which the hook's keeper ends with."""
    return Path(f"/proc/{pid}/ns/net")


def is_hosts(netns: Path) -> bool:
    """Whether it is one that `of_pod` has named."""
    return netns.match("/proc/*/ns/net")


class HostNetwork(Slots):
    """The hook of one pod. Closing it leaves the hook at work; `detach()` takes it away."""

    VISITORS: Final = 1024
    """Connections that the listener may have at once."""

    def __init__(self, netns: Path, pins: Path) -> None:
        """For `attach` and `adopt`. Opens what is pinned. Raises BpfError, NetworkError."""
        self.netns = netns
        self.pins = pins
        self.corrupt = 0
        self.repairs = 0
        """How often `problem` has attached the program again: what came meanwhile was not seen."""
        self._parked: list[socket.socket | None] = []
        """The listeners for what is held back, in the order of _FAMILIES; none as long as nobody listens."""
        self._addresses: dict[int, dict[Port, set[bytes]]] = {}
        """At which addresses each slot's application listens, by port."""
        self._probing: dict[Flow, socket.socket] = {}
        """Ours to an application, in a probe's place."""
        with contextlib.ExitStack() as stack:
            super().__init__(stack, pins, MAPS, "host", LAYOUT)
            self._places = dict(self._maps["places"].items())
            for key, value in self._places.items():
                self._found(U32.unpack(value)[0], *_place_of(key))
            try:
                self._inode = os.stat(netns).st_ino
            except OSError as error:
                raise NetworkError(f"The host's network {netns} can't be found: {error.strerror}") from error
            if self._inode != os.stat(_OURS).st_ino:
                raise NetworkError("It is the host's network (hostNetwork), and criproxy is in another one")
            self._diag = closing(stack, Netlink(netlink.NETLINK_SOCK_DIAG))
            self._resources = stack.pop_all()

    @classmethod
    def attach(cls, netns: Path, pins: Path) -> Self:
        """Attaches a hook; `pins` as for `PodNetwork.attach`. Raises BpfError or NetworkError; nothing stays then."""
        load_object(OBJECT, pins, {}, tuple(MAPS), (_PROGRAM,), kubelet.shared_maps(pins.parent))
        try:
            self = cls(netns, pins)
        except BaseException:
            unpin(pins)
            raise
        try:
            self._hook()
            # Last: without it nobody takes the rest for finished.
            self._set(LAYOUT, 0)
        except BaseException:
            self.detach()
            raise
        return self

    @classmethod
    def adopt(cls, netns: Path, pins: Path) -> Self:
        """Finds the hook that an earlier daemon left, slots and modes as they were. Raises BpfError, NetworkError."""
        self = cls(netns, pins)
        try:
            self._check_finished()
            for key, _ in self._maps["relays"].items():
                self._maps["relays"].delete(key)
            self._hook()
        except BaseException:
            self.close()
            raise
        return self

    @staticmethod
    def is_pinned(pins: Path) -> bool:
        """Whether what is pinned there is such a hook, or was to be one."""
        return (pins / _PROGRAM).exists() or (pins / "relays").exists()

    @staticmethod
    def discard(pins: Path) -> None:
        """Removes the hook, and ends its keeper."""
        with contextlib.suppress(BpfError), contextlib.closing(Map(pins / "keeper", *MAPS["keeper"])) as kept:
            process, _ = _kept(kept.get(U32.pack(0)) or bytes(_KEEPER.size))
            keeper.end(process)
        unpin(pins)

    @staticmethod
    def strip(netns: Path) -> None:
        """Nothing is there without its pin."""

    # --- slots -------------------------------------------------------------------------------------------------

    def assign(self, slot: int, ports: Collection[Port], quiet: Collection[Port] = ()) -> None:
        """As in a pod, but for what another pod has already."""
        others = self._others()
        if not ports and not quiet:
            self._addresses.pop(slot, None)  # the next container may listen elsewhere
        super().assign(slot, [p for p in ports if p not in others], [p for p in quiet if p not in others])
        self._place(slot)

    def listens(self, slot: int, places: Collection[tuple[str, Port]]) -> None:
        """At which addresses the slot's application listens, for its ports: connections to others aren't its. A port of
        which nothing was said has all. Raises BpfError.
        """
        self._addresses.pop(slot, None)
        for address, port in places:
            self._found(slot, pod_maps.address(address), port)
        self._place(slot)

    def _found(self, slot: int, address: bytes, port: Port) -> None:
        self._addresses.setdefault(slot, {}).setdefault(port, set()).add(address)

    def _place(self, slot: int) -> None:
        known = self._addresses.get(slot, {})
        ports, quiet = self.ports(slot)
        wanted = {
            address + port.number.to_bytes(2, "big") + bytes(2): U32.pack(slot)
            for port in ports | quiet
            for address in known.get(port, {_ANYWHERE})
        }
        self._reconcile("places", self._places, wanted, slot)

    def refusal(self, ports: Collection[Port]) -> str | None:
        """Why these ports can't be a slot's, in words, or None. Raises OSError."""
        others = self._others()
        return next(
            (
                f"port {port} of the host's network is another pod's already (sandbox {others[port][:13]})"
                for port in sorted(ports)
                if port in others
            ),
            None,
        )

    def _others(self) -> dict[Port, str]:
        """The ports of the other pods in the host's network, and those pods' ids. Their pins tell, also when their
        daemon hasn't adopted them yet."""
        found = {}
        for folder in self.pins.parent.iterdir():
            if folder != self.pins and self.is_pinned(folder):
                with contextlib.suppress(BpfError), contextlib.closing(Map(folder / "ports", *MAPS["ports"])) as ports:
                    found.update({pod_maps.port_of(key): folder.name for key, _ in ports.items()})
        return found

    def room(self, slot: int) -> int:
        """Nothing is kept of connections."""
        return sys.maxsize

    def park(self, slot: int, mode: Park, flows: Iterable[Flow] = ()) -> None:
        """Whether new connections to the slot's ports are the listener's (any mode but Park.PASS). Raises BpfError."""
        self._maps["modes"].set(U32.pack(checked(slot)), U32.pack(mode))

    def activity(self, slot: int) -> Activity:
        """When a connection to the slot's ports came last; what is said on it isn't seen."""
        return Activity(_LAST.unpack(self._get("slots", slot))[0] / 1e9, 0.0, 0.0, 0.0)

    def watch_commands(self, slot: int, on: bool) -> None:
        """Whether an exec probe is under way in the slot's container: connections from the host itself that come
        meanwhile may be its command's, and don't count. Raises BpfError.
        """
        layout, commands = self._settings()
        commands = commands | 1 << checked(slot) if on else commands & ~(1 << checked(slot))
        self._set(layout, commands)

    # --- the listener, and ours in the place of what it gets ---------------------------------------------------

    def listen(self) -> list[socket.socket]:
        """Those that get the connections that are held back, and kubelet's. They don't block. What is held back waits,
        once they are closed, for who calls this next; kubelet's reaches the application. Raises OSError, BpfError or
        CommandError.
        """
        process, numbers = _kept(self._get("keeper", 0))
        probed: list[socket.socket | None] = []
        try:
            try:
                back = iter(keeper.take_back(process, [number for number in numbers if number]))
                self._parked = [next(back) if number else None for number in numbers]
            except ProcessLookupError:
                self._parked = [_listening(family, address) for family, address in _FAMILIES]
                self._keep()
            probed += [_listening(family, address) for family, address in _FAMILIES]
            for place, one in [*enumerate(self._parked, _PARKED), *enumerate(probed, _PROBED)]:
                if one is not None:
                    self._maps["listeners"].set(U32.pack(place), one.fileno().to_bytes(8, sys.byteorder))
        except BaseException:
            for one in (*self._parked, *probed):
                if one is not None:
                    one.close()
            self._parked = []  # so that `problem` tells
            raise
        return [one for one in (*self._parked, *probed) if one is not None]

    def _keep(self) -> None:
        process = keeper.keep([one for one in self._parked if one is not None], int(self.netns.parts[2]))
        numbers = [0 if one is None else one.fileno() for one in self._parked]
        self._maps["keeper"].set(U32.pack(0), _KEEPER.pack(process.pid, *numbers, process.start_time))

    def accepted(self, connection: socket.socket) -> tuple[Flow, Visitor]:
        """What a connection that the listener accepted is, and whose. Raises OSError or BpfError."""
        flow = Flow("tcp", connection.getsockname()[:2], connection.getpeername()[:2])
        key = pod_maps.four(flow)
        visitor = Visitor.ANYBODY if self._maps["visits"].get(key) is None else Visitor.KUBELET
        self._maps["visits"].delete(key)
        # IPv4 addresses on an IPv6 socket are told as what they are; a link's own address goes with its link.
        return (flow if "%" in flow.local[0] else pod_maps.flow(key)), visitor

    async def connect(self, flow: Flow, visitor: Visitor) -> socket.socket:
        """A connection of ours to the application, at and from the address that its client has dialled. It counts as
        nothing until `relayed` says otherwise. Raises OSError, BpfError.
        """
        family, *_, target = socket.getaddrinfo(*flow.local, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0]
        own = socket.socket(family, socket.SOCK_STREAM)
        try:
            own.setblocking(False)
            # Its port has to be known before the SYN is there, or that would be led back to us.
            own.bind((target[0], 0, *target[2:]))
            relay = Flow("tcp", flow.local, own.getsockname()[:2])
            self._probing[relay] = own
            key = pod_maps.four(relay)
            self._maps["relays"].set(key, bytes(4))
            try:
                await asyncio.get_running_loop().sock_connect(own, target)
            finally:
                self._maps["relays"].delete(key)
        except BaseException as error:
            own.close()
            if isinstance(error, ConnectionRefusedError):
                self._refused(flow.port)
            raise
        return own

    def _refused(self, port: Port) -> None:
        """The application doesn't listen there (any more): as long as that isn't seen again, kubelet is refused, too,
        rather than accepted by us."""
        key = pod_maps.port(port)
        for slot, answered in self._answered.items():
            if answered.pop(key, None):
                self.answer(slot, {pod_maps.port_of(port): visitors for port, visitors in answered.items()})

    def relayed(self, flow: Flow, probe: bool) -> None:
        """What one of ours is, as far as is known."""
        if not probe:
            self.not_a_probe(flow)

    def not_a_probe(self, flow: Flow) -> None:
        """One of ours is like any other connection of the application."""
        self._probing.pop(flow, None)

    def probing(self, slot: int, flows: Collection[Flow]) -> set[Flow]:
        """Which of the connections are ours in a probe's place. `flows`: all that the slot's application has."""
        ports, quiet = self.ports(slot)
        closed = [flow for flow, own in self._probing.items() if own.fileno() < 0 and flow.port in ports | quiet]
        for flow in closed:
            if flow not in flows:
                del self._probing[flow]
        return self._probing.keys() & flows

    # --- the hook itself ---------------------------------------------------------------------------------------

    def problem(self) -> str | None:
        """Checks that the program is attached, and repairs. Returns a sentence if it isn't, or if nobody would take
        what it holds back; None if all is well."""
        try:
            self.repairs += self._hook()
            if not self._parked:
                return "Nobody listens in place of the pod's containers, so no connection could wake them"
            if not _kept(self._get("keeper", 0))[0].alive():
                log.warning("%s: somebody has ended what keeps its listeners open; it is started again", self.pins.name)
                self._keep()
        except (OSError, BpfError, CommandError) as error:
            return f"The hook in the host's network can't be put back: {error}"
        return None

    def _hook(self) -> bool:
        """Attaches the program unless it is. Returns whether it has."""
        pin = self.pins / _LINK
        with contextlib.suppress(FileNotFoundError):
            pin.stat()
            with contextlib.closing(NetnsLink(pin)) as link:
                if link.netns() == self._inode:
                    return False
            pin.unlink()
        with contextlib.closing(Pinned(self.pins / _PROGRAM)) as program:
            NetnsLink.attach(program, self.netns, pin).close()
        return True

    def detach(self) -> None:
        """Takes the hook away, keeper and pins included. Closes."""
        self.close()
        self.discard(self.pins)

    def _settings(self) -> tuple[int, int]:
        """Layout and commands."""
        layout, commands = _HOST.unpack(self._get("host", 0))
        return layout, commands

    def _set(self, layout: int, commands: int) -> None:
        self._maps["host"].set(U32.pack(0), _HOST.pack(layout, commands))

    def close(self) -> None:
        """Lets go of the hook, which goes on as it is. Can be called twice."""
        self._resources.close()

    # --- what a pod's own network has, and the host's hasn't: packets ------------------------------------------

    def on_parked(self, callback: Callable[[Parked], None]) -> None: ...

    def on_watched(self, callback: Callable[[Watched], None]) -> None: ...

    def off_parked(self) -> None: ...

    def poll(self) -> None: ...

    def send(self, packets: Sequence[Parked]) -> int:
        return 0

    def stand_in(self, slot: int, streams: Mapping[Flow, Stream]) -> None: ...

    def sockets_stay(self, slot: int) -> None: ...

    def commands(self, slot: int) -> list[Flow]:
        return []

    def talk(self, flow: Flow) -> Talk | None:
        return None

    def talks(self) -> dict[Flow, Talk]:
        return {}

    def counters(self, slot: int) -> Counters:
        return Counters(parked=0, parked_bytes=0, overflowed=0, dropped=0, quiet=0, answered=0)


def _place_of(key: bytes) -> tuple[bytes, Port]:
    number = key[pod_maps.ADDRESS_BYTES : pod_maps.ADDRESS_BYTES + 2]
    return key[: pod_maps.ADDRESS_BYTES], Port("tcp", int.from_bytes(number, "big"))


def _kept(value: bytes) -> tuple[Process, tuple[int, int]]:
    """The keeper, and its descriptors."""
    pid, four, six, since = _KEEPER.unpack(value)
    return Process(pid, since), (four, six)


def _listening(family: socket.AddressFamily, address: str) -> socket.socket | None:
    """None where the host hasn't that family."""
    try:
        return pod_namespace.listening(family, address, transparent=False)
    except OSError as error:
        if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return None
        raise
