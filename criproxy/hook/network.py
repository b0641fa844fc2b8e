"""The hook in a pod's network namespace: who was used when, and packets that are parked and sent again.

`bpf/pod.c` does the work in the kernel, once per pod, and goes on without us: its programs and maps are pinned in the
folder `pins`, so that a new daemon finds everything (`adopt`), parked packets included. Each container that may be
scaled down has a *slot* of the hook (0 to SLOTS - 1), with ports of its own and a mode of its own.

A slot is parked and woken like this:

    network.park(slot, Park.NEW)            # new connections wait, existing ones go on
    network.park(slot, Park.ALL, flows)     # once sockets() shows no handshake: everything waits
    …                                       # the callback gets each packet; `wakes` says which one to wake for
    network.send(packets); network.poll()   # in their order, past the parking, until nothing is left
    network.park(slot, Park.PASS)
    network.poll(); network.send(…)         # what came in between

Visitors (`pod_maps.Visitor`: kubelet, above all) are looked at before their connections count as activity. While the
slot runs they reach the application, and `on_watched` gets copies; `not_a_probe` makes one count. While it is parked
`listen` has the connections that `answer` names.

This file is long, for it is all that is done to a pod's maps, which tell one story; what lies in them, and what else
is changed in a pod, is in pod_maps.py and pod_namespace.py.

Not thread-safe: one thread at a time. `attach`, `adopt` and `problem` may run in another thread than the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from criproxy import LIBEXEC
from criproxy.hook import packet, pod_maps, pod_namespace
from criproxy.hook.pod_maps import (
    FLOWS,
    LAYOUT,
    LINK,
    MAPS,
    OTHERS,
    POD,
    RING,
    SLOT,
    U32,
    WATCHED,
    Activity,
    Counters,
    Park,
    Parked,
    Stream,
    Talk,
    Visitor,
    Watched,
)
from criproxy.hook.slots import NetworkError, Slots, checked, closing
from criproxy.kernel import netlink
from criproxy.kernel.bpf import BpfError, Pinned, RingBuffer, load_object, unpin
from criproxy.kernel.namespaces import in_network_namespace
from criproxy.kernel.netlink import DIRECTIONS, Direction, Link, Netlink
from criproxy.kernel.sockets import Flow
from criproxy.kubelet import connections as kubelet
from criproxy.policy import Port

log = logging.getLogger(__name__)

OBJECT: Final = LIBEXEC / "pod.bpf.o"

RING_BYTES: Final = 1 << 19
"""Default size of the ring buffer: seven of the largest GSO packets, or 340 of 1500 bytes. Allocated for each pod."""

PREFERENCE: Final = 7
"""Where our filters are in a link's list. Before others', so that a packet which is sent again passes theirs once."""
HANDLE: Final = 0xC71
NAME: Final = "criproxy"


class PodNetwork(Slots):
    """The hook of one pod. Closing it leaves the hook at work; `detach()` takes it away."""

    VISITORS: Final = 64
    """Connections that the listener may have at once."""

    def __init__(self, netns: Path, pins: Path) -> None:
        """For `attach` and `adopt`. Opens what is pinned. Raises BpfError, NetworkError."""
        self.netns = netns
        self.pins = pins
        self.corrupt = 0
        """Parked packets whose checksum was wrong, and which therefore weren't sent again."""
        self.repairs = 0
        """How often `problem` has hooked a link that had no hook: what passed it meanwhile was not seen."""
        self._on_parked: Callable[[Parked], None] | None = None
        self._on_watched: Callable[[Watched], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._links: dict[int, Link] = {}
        self._marks: dict[int, int] = {}
        with contextlib.ExitStack() as stack:
            super().__init__(stack, pins, MAPS, "pod", LAYOUT)
            self._ring = closing(stack, RingBuffer(closing(stack, Pinned(pins / RING))))
            self._watched = closing(stack, RingBuffer(closing(stack, Pinned(pins / WATCHED))))
            self._programs = {name: _program_id(pins / name) for name in DIRECTIONS}
            self._route, self._diag, self._sender = _open_sockets(stack, netns)
            self._flows: dict[bytes, bytes] = dict(self._maps["flows"].items())
            self._resources = stack.pop_all()

    @classmethod
    def attach(cls, netns: Path, pins: Path, *, ring_bytes: int = RING_BYTES) -> Self:
        """Puts a hook into the network namespace `netns`; `pins`: a folder to be made on a bpf file system, beside the
        one that `kubelet.Kubelet` has there.

        `ring_bytes` (a power of two, 4096 or more) bounds what is parked and not yet read. Raises BpfError or
        NetworkError; nothing stays behind then.
        """
        if ring_bytes < 4096 or ring_bytes & (ring_bytes - 1):
            raise NetworkError(f"The ring buffer can't have {ring_bytes} bytes (a power of two from 4096 on)")
        # Once pinned, the rest is as after a restart of the daemon.
        load_object(
            OBJECT, pins, {RING: ring_bytes}, (*MAPS, RING, WATCHED), DIRECTIONS, kubelet.shared_maps(pins.parent)
        )
        try:
            self = cls(netns, pins)
        except BaseException:
            unpin(pins)
            raise
        try:
            changed = pod_namespace.change_settings(netns)
            self._maps["pod"].set(U32.pack(0), POD.pack(LAYOUT, 0, changed, 0))
            self._hook()
        except BaseException as error:
            self.detach()
            if isinstance(error, OSError):
                raise NetworkError(f"Cannot attach to the pod's network {netns}: {error.strerror or error}") from error
            raise
        return self

    @classmethod
    def adopt(cls, netns: Path, pins: Path) -> Self:
        """Finds the hook that an earlier daemon left. Slots, modes and parked packets are as they were.

        Raises BpfError or NetworkError if it isn't (wholly) there, or is another version's: `discard(pins)` and
        `attach` are the way out then.
        """
        self = cls(netns, pins)
        try:
            self._check_finished()
            for key, value in self._maps["links"].items():
                self._marks[U32.unpack(key)[0]] = LINK.unpack(value)[0]
            self._hook()
        except OSError as error:
            self.close()
            raise NetworkError(f"Cannot adopt the hook in {netns}: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise
        return self

    @staticmethod
    def discard(pins: Path) -> None:
        """Removes the pins of a pod that is gone; its hook went with its network namespace."""
        unpin(pins)

    @staticmethod
    def strip(netns: Path) -> None:
        """Removes the filters of a hook that nobody can take over: what it parks would stay parked. Raises OSError."""

        def remove() -> None:
            with Netlink(netlink.NETLINK_ROUTE) as route:
                for link in netlink.links(route):
                    for direction in DIRECTIONS:
                        netlink.delete_filter(route, link.index, direction, PREFERENCE, HANDLE)

        in_network_namespace(netns, remove)

    # --- slots -------------------------------------------------------------------------------------------------

    def park(self, slot: int, mode: Park, flows: Iterable[Flow] = ()) -> None:
        """Sets the slot's mode; `flows` are its established connections, incoming and outgoing (Park.ALL), and those
        given before aren't its any more. TCP of others isn't parked, whatever its port, but for new connections.

        Takes effect for packets that come in after the call. Raises BpfError.
        """
        wanted = {pod_maps.four(flow): pod_maps.flow_value(checked(slot)) for flow in flows}
        if mode is not Park.PASS:
            self._reconcile("flows", self._flows, wanted, slot)
        layout, before, changed, commands = POD.unpack(self._get("pod", 0))
        parking = before - (self.mode(slot) is not Park.PASS) + (mode is not Park.PASS)
        if parking > before:  # the shortcut for running pods is closed first, and opened last
            self._maps["pod"].set(U32.pack(0), POD.pack(layout, parking, changed, commands))
        self._maps["modes"].set(U32.pack(slot), U32.pack(mode))
        if parking < before:
            self._maps["pod"].set(U32.pack(0), POD.pack(layout, parking, changed, commands))
        if mode is Park.PASS:
            self._reconcile("flows", self._flows, wanted, slot)

    def room(self, slot: int) -> int:
        """How many connections `park` can take for the slot."""
        others = [value for value in self._flows.values() if U32.unpack_from(value)[0] != slot]
        return FLOWS - len(others)

    def refusal(self, ports: Collection[Port]) -> str | None:
        """Why these ports can't be a slot's, in words, or None: the pod's network is its own."""
        return None

    def stand_in(self, slot: int, streams: Mapping[Flow, Stream]) -> None:
        """The slot's sockets are gone for a while: the hook answers their peers' keep-alives, for those that `park` was
        told of. It ends with the next `park` of another mode. Raises BpfError.
        """
        table = self._maps["flows"]
        for flow, stream in streams.items():
            key = pod_maps.four(flow)
            if (known := self._flows.get(key)) is not None and U32.unpack_from(known)[0] == checked(slot):
                self._flows[key] = pod_maps.flow_value(slot, stream)
                table.set(key, self._flows[key])

    def activity(self, slot: int) -> Activity:
        """When the slot's ports and flows, and the rest of the pod, had traffic last."""
        received, sent = SLOT.unpack(self._get("slots", slot))[:2]
        others_received, others_sent = OTHERS.unpack(self._get("others", 0))
        return Activity(received / 1e9, sent / 1e9, others_received / 1e9, others_sent / 1e9)

    def talks(self) -> dict[Flow, Talk]:
        """TCP connections of the pod, whoever's, and when they were used last. Of the 2048 latest. Raises BpfError."""
        return {pod_maps.flow(key): pod_maps.talk(value) for key, value in self._maps["talks"].items()}

    def talk(self, flow: Flow) -> Talk | None:
        """When a connection was used last; None if it isn't among the 2048 latest. Raises BpfError."""
        value = self._maps["talks"].get(pod_maps.four(flow))
        return None if value is None else pod_maps.talk(value)

    def counters(self, slot: int) -> Counters:
        return Counters(*SLOT.unpack(self._get("slots", slot))[2:])

    # --- parked packets ----------------------------------------------------------------------------------------

    def on_parked(self, callback: Callable[[Parked], None]) -> None:
        """Calls `callback` on the running event loop for each packet that is or gets parked, in their order."""
        self._on_parked = callback
        self._read(self._ring)

    def on_watched(self, callback: Callable[[Watched], None]) -> None:
        """As `on_parked`, for copies of what visitors and the application say to each other."""
        self._on_watched = callback
        self._read(self._watched)

    def _read(self, ring: RingBuffer) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(ring.fileno(), self.poll)

    def poll(self) -> None:
        """Hands all packets that were copied or parked until now to the callbacks, without waiting for the event loop.

        The copies come first: they were made before, as who is parked says nothing more.
        """
        if self._on_watched is not None:
            for record in self._watched.read():
                try:
                    self._on_watched(pod_maps.watched(record))
                except Exception:
                    log.exception("a packet of %s was not looked at", self.netns)
        if self._on_parked is not None:
            for record in self._ring.read():
                try:
                    self._on_parked(pod_maps.parked(record))
                except Exception:
                    log.exception("a parked packet of %s was lost", self.netns)

    def send(self, packets: Sequence[Parked]) -> int:
        """Sends packets again to the links that they came from, in this order. They pass whatever the mode is.

        Slots in Park.ALL go to Park.WAKE with it: whoever sends has the sockets back, and the first thing that follows
        a SYN is the client's ACK, which must reach them. Those for the listener change nothing.

        Returns how many were delivered to their link; damaged ones aren't (see `corrupt`), nor those without a link.
        """
        for slot in {parked.slot for parked in packets if not parked.probe}:
            if self.mode(slot) is Park.ALL:
                self._maps["modes"].set(U32.pack(slot), U32.pack(Park.WAKE))
        delivered = 0
        for parked in packets:
            mark = self._marks.get(parked.ifindex)
            if mark is None:
                log.warning("%s: the link of a parked packet is gone: %s", self.netns, parked)
                continue
            try:
                frames = packet.prepare(parked.frame, parked.gso_size)
                for frame in frames:
                    self._sender.sendmsg([frame], [(socket.SOL_SOCKET, socket.SO_MARK, U32.pack(mark))])
                delivered += 1
            except packet.Corrupt as error:
                self.corrupt += 1
                log.info("%s: %s isn't sent again: %s", self.netns, parked, error)
            except OSError as error:
                log.warning("%s: cannot send %s again: %s", self.netns, parked, error.strerror)
        return delivered

    def sockets_stay(self, slot: int) -> None:
        """The slot is in Park.ALL, and the kernel keeps its sockets: TCP packets without news pass (Park.WAKE)."""
        self._maps["modes"].set(U32.pack(checked(slot)), U32.pack(Park.WAKE))

    # --- visitors, which may be kubelet's probes ---------------------------------------------------------------

    def not_a_probe(self, flow: Flow) -> None:
        """A watched connection (`Watched.flow`) counts as activity from now on, and isn't copied. Raises BpfError."""
        self._maps["visits"].delete(pod_maps.four(flow))

    def relayed(self, flow: Flow, probe: bool) -> None:
        """A connection that the listener had, or ours to the application in its place: looked at already, if it is a
        probe's. Raises BpfError.
        """
        self.not_a_probe(flow)

    def watch_commands(self, slot: int, on: bool) -> None:
        """Whether an exec probe is under way in the slot's container: connections over `lo` that are opened meanwhile
        may be its command's, and don't count as activity. Raises BpfError.
        """
        layout, parking, changed, commands = POD.unpack(self._get("pod", 0))
        commands = commands | 1 << checked(slot) if on else commands & ~(1 << checked(slot))
        self._maps["pod"].set(U32.pack(0), POD.pack(layout, parking, changed, commands))

    def commands(self, slot: int) -> list[Flow]:
        """Connections over `lo` that were opened while an exec probe was under way; `local` is the server's end.

        Also closed ones. Those that are still open when the command has ended aren't its own: see `not_a_probe`.
        Raises BpfError.
        """
        visits = self._visits()
        return [flow for flow, (visitor, slots, _) in visits if visitor is Visitor.COMMAND and slots >> slot & 1]

    def listen(self) -> list[socket.socket]:
        """A listener in the pod, which gets the connections that `answer` names; one at a time.

        IPv6 with IPv4 in it where the pod has IPv6, else IPv4 alone. It doesn't block; whoever closes it has those
        connections parked. Raises OSError or BpfError.
        """
        made = pod_namespace.make_listener(self.netns)
        try:
            self._maps["listener"].set(U32.pack(0), made.fileno().to_bytes(8, sys.byteorder))
        except BaseException:
            made.close()
            raise
        return [made]

    async def connect(self, flow: Flow, visitor: Visitor) -> socket.socket:
        """A connection of ours to an application of the pod, at the address that its client has dialled; from the
        client's own where that is the pod's. Raises OSError.
        """
        family = socket.AF_INET6 if ":" in flow.local[0] else socket.AF_INET
        own = in_network_namespace(self.netns, lambda: socket.socket(family))
        try:
            own.setblocking(False)
            if visitor is Visitor.LOOPBACK:
                with contextlib.suppress(OSError):
                    own.bind((flow.remote[0], 0))
            await asyncio.get_running_loop().sock_connect(own, flow.local)
        except BaseException:
            own.close()
            raise
        return own

    def accepted(self, connection: socket.socket) -> tuple[Flow, Visitor] | None:
        """What a connection that the listener accepted was on its way in; None: it came to the listener's own address.

        The flow's port is the one that the visitor asked for: rules in the pod (REDIRECT) may have given the socket
        another one. Raises OSError or BpfError.
        """
        key = pod_maps.four(Flow("tcp", connection.getsockname()[:2], connection.getpeername()[:2]))
        # IPv4 addresses on an IPv6 socket are told as what they are.
        peer = pod_maps.flow(key)
        # One entry for the wire's address and port, unless it was rewritten.
        if (value := self._maps["visits"].get(key)) is not None:
            visitor, _, ours = pod_maps.visit(value)
            return (peer, visitor) if ours else None
        for flow, (visitor, _, ours) in self._visits():
            if ours and flow.remote == peer.remote:
                return flow, visitor
        return None

    def _visits(self) -> list[tuple[Flow, tuple[Visitor, int, bool]]]:
        return [(pod_maps.flow(key), pod_maps.visit(value)) for key, value in self._maps["visits"].items()]

    # --- the hook itself ---------------------------------------------------------------------------------------

    def problem(self) -> str | None:
        """Checks that each link has its hook, and repairs: links that came later get one, a removed one is put back.

        Returns a sentence if a link stays without; None if all is well.
        """
        try:
            return self._hook(checking=True)
        except (OSError, BpfError) as error:
            return f"The hook in the pod's network can't be checked: {error}"

    def _hook(self, checking: bool = False) -> str | None:
        """Hooks every link that isn't hooked. Raises the first error, or tells it when `checking`."""
        trouble: str | None = None
        programs: dict[Direction, Pinned] = {}
        found = {link.index: link for link in netlink.links(self._route)}
        for index in set(self._marks) - set(found):
            self._forget(index)
        try:
            for link in found.values():
                missing = [direction for direction in DIRECTIONS if not self._hooked(link, direction)]
                if not missing and link.index in self._marks:
                    continue
                if checking and missing and link.index in self._marks:
                    log.warning("%s: somebody removed the hook from %s; it is put back", self.netns, link.name)
                try:
                    for direction in missing:
                        if direction not in programs:
                            programs[direction] = Pinned(self.pins / direction)
                    self._hook_link(link, missing, programs)
                    self.repairs += checking and bool(missing)
                except OSError as error:
                    if not checking:
                        raise
                    trouble = f"The link {link.name} of the pod can't be hooked: {error.strerror}"
        finally:
            for program in programs.values():
                program.close()
        self._links = found
        return trouble

    def _hooked(self, link: Link, direction: Direction) -> bool:
        return any(
            (f.kind, f.preference, f.handle, f.program) == ("bpf", PREFERENCE, HANDLE, self._programs[direction])
            for f in netlink.filters(self._route, link.index, direction)
        )

    def _hook_link(self, link: Link, missing: Collection[Direction], programs: dict[Direction, Pinned]) -> None:
        made = netlink.add_clsact(self._route, link.index) if missing else False
        key = U32.pack(link.index)
        if (known := self._maps["links"].get(key)) is not None:
            made = made or bool(LINK.unpack(known)[1])
        if link.index not in self._marks:
            # Random, and kept in the maps alone: a container with CAP_NET_RAW may set marks, but has to guess.
            self._marks[link.index] = secrets.randbits(32) or 1
        mark = self._marks[link.index]
        self._maps["replay"].set(U32.pack(mark), key)
        self._maps["links"].set(key, LINK.pack(mark, made, link.header))
        for direction in missing:
            netlink.add_filter(
                self._route, link.index, direction, PREFERENCE, HANDLE, programs[direction].fileno(), NAME
            )

    def _forget(self, index: int) -> None:
        mark = self._marks.pop(index)
        self._maps["replay"].delete(U32.pack(mark))
        self._maps["links"].delete(U32.pack(index))

    def detach(self) -> None:
        """Takes the hook away: filters, qdiscs that were ours, settings, pins. What is parked is lost. Closes."""
        try:
            known = {U32.unpack(key)[0]: LINK.unpack(value) for key, value in self._maps["links"].items()}
            for link in netlink.links(self._route):
                if link.index in known:
                    self._unhook(link.index, bool(known[link.index][1]))
            changed = POD.unpack(self._get("pod", 0))[2]
            if changed:
                pod_namespace.restore_settings(self.netns, changed)
        except FileNotFoundError:
            pass  # the namespace file is gone: the pod is, and its settings with it
        except (OSError, BpfError) as error:
            log.warning("%s: the hook isn't removed completely: %s", self.netns, error)
        finally:
            self.close()
            unpin(self.pins)

    def _unhook(self, index: int, made: bool) -> None:
        for direction in DIRECTIONS:
            netlink.delete_filter(self._route, index, direction, PREFERENCE, HANDLE)
        if made and not any(netlink.filters(self._route, index, direction) for direction in DIRECTIONS):
            netlink.delete_clsact(self._route, index)

    def off_parked(self) -> None:
        """Ends `on_parked` and `on_watched`, on the same event loop. Parked packets stay in the ring."""
        if self._loop is not None:
            for ring in (self._ring, self._watched):
                self._loop.remove_reader(ring.fileno())
            self._loop = self._on_parked = self._on_watched = None

    def close(self) -> None:
        """Lets go of the hook, which goes on as it is. Can be called twice."""
        self.off_parked()
        self._resources.close()


def _program_id(path: Path) -> int:
    program = Pinned(path)
    try:
        return program.id()
    finally:
        program.close()


def _open_sockets(stack: contextlib.ExitStack, netns: Path) -> tuple[Netlink, Netlink, socket.socket]:
    """The sockets that live in the pod's namespace: for links and filters, for its sockets, for sending again."""

    def make() -> tuple[Netlink, Netlink, socket.socket]:
        route = closing(stack, Netlink(netlink.NETLINK_ROUTE))
        diag = closing(stack, Netlink(netlink.NETLINK_SOCK_DIAG))
        # Protocol 0: it receives nothing, and costs the pod's other packets nothing.
        sender = closing(stack, socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0))
        sender.setblocking(False)
        sender.bind(("lo", 0))
        return route, diag, sender

    try:
        return in_network_namespace(netns, make)
    except OSError as error:
        raise NetworkError(f"Cannot enter the pod's network namespace {netns}: {error.strerror or error}") from error
