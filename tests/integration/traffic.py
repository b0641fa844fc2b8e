"""Traffic for the hook of a pod: a server in it, clients around it, and somebody who parks and wakes."""

import asyncio
import contextlib
import socket
import sys
from asyncio.trsock import TransportSocket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import NamedTuple, TypeVar

import pytest
from specimen import PATIENCE
from topology import POD4, POD6, Topology, family_of, make_socket

from criproxy.hook.network import PodNetwork
from criproxy.hook.pod_maps import Park, Parked
from criproxy.policy import Port

T = TypeVar("T")

HTTP = Port("tcp", 80)
ADDRESSES = [
    pytest.param("peer", POD4, id="peer-v4"),
    pytest.param("peer", POD6, id="peer-v6"),
    pytest.param("node", POD4, id="node-v4"),
    pytest.param("node", POD6, id="node-v6"),
    pytest.param("pod", "127.0.0.1", id="lo-v4"),
    pytest.param("pod", "::1", id="lo-v6"),
    pytest.param("pod", POD4, id="lo-own-address-v4"),
    pytest.param("pod", POD6, id="lo-own-address-v6"),
]


class Client(NamedTuple):
    """As the server sees it, and how many segments that had to send once more until it was connected."""

    address: str
    port: int
    sent_again: int


class Hook:
    """The hook, and what whoever wakes containers does with it."""

    def __init__(self, network: PodNetwork) -> None:
        self.network = network
        self.packets: list[Parked] = []
        self.largest = 0
        """Bytes of the largest frame that was parked."""
        self.wanted = asyncio.Event()
        network.on_parked(self.take)

    def take(self, packet: Parked) -> None:
        self.packets.append(packet)
        self.largest = max(self.largest, len(packet.frame))
        if packet.wakes:
            self.wanted.set()

    async def wakes(self) -> None:
        """Waits until a packet has come that wakes."""
        async with asyncio.timeout(PATIENCE):
            await self.wanted.wait()

    def sleep(self) -> None:
        """All is parked, with the connections that slot 0 has now."""
        flows = [s.flow for s in self.network.sockets(["tcp"]) if s.connected and s.port == HTTP]
        self.network.park(0, Park.ALL, flows)

    def last_activity(self, slot: int = 0) -> float:
        activity = self.network.activity(slot)
        return max(activity.own, activity.others)

    def wake(self, slot: int = 0) -> None:
        while self.packets:
            packets, self.packets = self.packets, []
            self.network.send(packets)
            self.network.poll()
        self.network.park(slot, Park.PASS)
        self.network.poll()
        packets, self.packets = self.packets, []
        self.network.send(packets)
        self.wanted.clear()


@asynccontextmanager
async def serving(net: Topology, greeting: bytes = b"", port: int = 80) -> AsyncIterator[list[Client]]:
    """An echo server in the pod, IPv4 and IPv6, which may speak first. Yields the clients that it sees."""
    clients: list[Client] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address, port = writer.get_extra_info("peername")[:2]
        clients.append(Client(address, port, sent_again(writer.get_extra_info("socket"))))
        writer.write(greeting)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    listener = make_socket(net.pod, socket.AF_INET6)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", port))
    server = await asyncio.start_server(talk, sock=listener)
    try:
        yield clients
    finally:
        server.close()


async def connect(net: Topology, where: str, address: str, port: int = 80) -> socket.socket:
    return await connected(make_socket(getattr(net, where), family_of(address)), address, port)


async def connected(made: socket.socket, address: str, port: int) -> socket.socket:
    """Connects the socket, or closes it and raises."""
    try:
        async with asyncio.timeout(PATIENCE):
            await asyncio.get_running_loop().sock_connect(made, (address, port))
    except BaseException:
        made.close()
        raise
    return made


async def receive(client: socket.socket, size: int, timeout: float = PATIENCE) -> bytes:
    data = b""
    async with asyncio.timeout(timeout):
        while len(data) < size:
            chunk = await asyncio.get_running_loop().sock_recv(client, size - len(data))
            if not chunk:
                break
            data += chunk
    return data


async def send(client: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(client, data)


async def ask(client: socket.socket, data: bytes) -> bytes:
    await send(client, data)
    return await receive(client, len(data))


async def becomes(condition: Callable[[], T], what: str) -> T:
    """Waits until the condition gives something true, and returns that."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not (result := condition()):
        if asyncio.get_running_loop().time() > deadline:
            pytest.fail(f"not within {PATIENCE:g} s: {what} ({result!r})")
        await asyncio.sleep(0.005)
    return result


def sent_again(made: socket.socket | TransportSocket) -> int:
    """How many segments a TCP socket has sent once more (struct tcp_info's tcpi_total_retrans, SYN and SYN-ACK too)."""
    return int.from_bytes(made.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100:], sys.byteorder)


def plain(address: str) -> str:
    return address.removeprefix("::ffff:")


@asynccontextmanager
async def contextmanaged(client: socket.socket) -> AsyncIterator[socket.socket]:
    with closing(client):
        yield client
