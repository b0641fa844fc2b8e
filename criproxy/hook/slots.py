"""What the hooks of all pods have in their maps, wherever they sit: slots, each with its ports and its mode."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Final, Protocol, TypeVar

from criproxy.hook import pod_maps
from criproxy.hook.pod_maps import SLOTS, U32, Park, Visitor
from criproxy.kernel import sockets
from criproxy.kernel.bpf import Map
from criproxy.kernel.netlink import Netlink
from criproxy.kernel.sockets import Socket, UnixSocket
from criproxy.policy import Port


class _Closable(Protocol):
    def close(self) -> None: ...


_Resource = TypeVar("_Resource", bound=_Closable)


class NetworkError(Exception):
    """The hook can't be put into (or found in) a network namespace. One sentence for people."""


def closing(stack: contextlib.ExitStack, resource: _Resource) -> _Resource:
    stack.callback(resource.close)
    return resource


class Slots:
    """`ports` says which port is which slot's, `modes` what becomes of its packets."""

    pins: Path
    _diag: Netlink
    """A NETLINK_SOCK_DIAG socket in the hook's network namespace; whoever inherits from here opens it."""

    def __init__(
        self, stack: contextlib.ExitStack, pins: Path, maps: Mapping[str, tuple[int, int]], settings: str, layout: int
    ) -> None:
        """Opens the maps, by name with the sizes of keys and values, which `stack` closes. `settings`: the one that
        begins with the layout, 0 as long as the hook isn't finished. Raises BpfError, or NetworkError if they have
        another version's layout.
        """
        self._maps: Final = {name: closing(stack, Map(pins / name, key, value)) for name, (key, value) in maps.items()}
        found = U32.unpack_from(self._get(settings, 0))[0]
        if found not in (0, layout):
            raise NetworkError(f"The hook pinned in {pins} belongs to another version of criproxy (layout {found})")
        self._finished: Final[bool] = found == layout
        """Whether it was when this object was made."""
        self._ports: Final[dict[bytes, bytes]] = dict(self._maps["ports"].items())
        self._answered: Final[dict[int, dict[bytes, Collection[Visitor]]]] = {}
        for key, value in self._ports.items():
            slot, _ = pod_maps.owner_of(value)
            self._answered.setdefault(slot, {})[key] = pod_maps.answered_of(value)

    def _check_finished(self) -> None:
        """Raises NetworkError if a daemon has ended while it made the hook."""
        if not self._finished:
            raise NetworkError(f"The hook pinned in {self.pins} was never finished")

    def assign(self, slot: int, ports: Collection[Port], quiet: Collection[Port] = ()) -> None:
        """Says which local ports are the slot's, instead of those that were before.

        Traffic of `quiet` ports neither counts as activity nor wakes; it is dropped while the slot is parked.
        A port that another slot had moves to this one. Raises BpfError.
        """
        self._assign(slot, {pod_maps.port(port): port in quiet for port in (*ports, *quiet)})

    def _assign(self, slot: int, quiet: Mapping[bytes, bool]) -> None:
        """The slot's ports, as they are in the map, and whether they are quiet."""
        answered = self._answered.get(checked(slot), {})
        wanted = {key: pod_maps.owner(slot, quiet=quiet[key], answered=answered.get(key, ())) for key in quiet}
        self._reconcile("ports", self._ports, wanted, slot)

    def answer(self, slot: int, ports: Mapping[Port, Collection[Visitor]]) -> None:
        """Whose new connections to which of the slot's ports go to the listener (`listen`), instead of what was said
        before. Raises BpfError.
        """
        self._answered[checked(slot)] = {pod_maps.port(port): visitors for port, visitors in ports.items()}
        self._assign(slot, {key: quiet for key, (owner, quiet) in self._owners() if owner == slot})

    def _owners(self) -> list[tuple[bytes, tuple[int, bool]]]:
        return [(key, pod_maps.owner_of(value)) for key, value in self._ports.items()]

    def ports(self, slot: int) -> tuple[frozenset[Port], frozenset[Port]]:
        """What was assigned to the slot, also by an earlier daemon: ports, and quiet ports."""
        found = [(pod_maps.port_of(key), owner) for key, owner in self._owners()]
        return (
            frozenset(port for port, owner in found if owner == (slot, False)),
            frozenset(port for port, owner in found if owner == (slot, True)),
        )

    def all_ports(self) -> frozenset[Port]:
        """Every port that is a slot's."""
        return frozenset(map(pod_maps.port_of, self._ports))

    def sockets(self, protos: Sequence[sockets.Proto] = sockets.PROTOS, inodes: Set[int] | None = None) -> list[Socket]:
        """The TCP and UDP sockets of the network, all or those of the inodes. Raises OSError."""
        return sockets.sockets(self._diag, protos, inodes=inodes)

    def handshakes(self) -> list[Socket]:
        """The TCP connections of the network that come in and aren't established yet. Raises OSError."""
        return sockets.sockets(self._diag, ["tcp"], states=["SYN_RECV"])

    def unix_sockets(self) -> list[UnixSocket]:
        """All unix sockets that were made in the network. Raises OSError."""
        return sockets.unix(self._diag)

    def mode(self, slot: int) -> Park:
        """The slot's mode, also as an earlier daemon left it."""
        return Park(U32.unpack(self._get("modes", slot))[0])

    def _get(self, name: str, index: int) -> bytes:
        value = self._maps[name].get(U32.pack(index))
        if value is None:
            raise NetworkError(f"The hook has no slot {index} (0 to {SLOTS - 1})")
        return value

    def _reconcile(self, name: str, known: dict[bytes, bytes], wanted: dict[bytes, bytes], slot: int) -> None:
        """Makes the slot's entries of a map those in `wanted`; `known` is what the map holds."""
        table = self._maps[name]
        for key, value in wanted.items():
            if known.get(key) != value:
                table.set(key, value)
                known[key] = value
        for key in [key for key, value in known.items() if key not in wanted and U32.unpack_from(value)[0] == slot]:
            table.delete(key)
            del known[key]


def checked(slot: int) -> int:
    """The number of a slot that there is. Raises NetworkError."""
    if not 0 <= slot < SLOTS:
        raise NetworkError(f"The hook has no slot {slot} (0 to {SLOTS - 1})")
    return slot
