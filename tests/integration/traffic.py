"""Traffic for the hook of a pod: a server in it, clients around it, and somebody who parks and wakes."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest
from topology import POD4, POD6, Topology, family_of, make_socket

from criproxy.hook.network import PodNetwork
from criproxy.hook.pod_maps import Park, Parked
from criproxy.policy import Port

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
async def serving(net: Topology, greeting: bytes = b"", port: int = 80) -> AsyncIterator[list[tuple[str, int]]]:
    """An echo server in the pod, IPv4 and IPv6, which may speak first. Yields the clients that it sees."""
    clients: list[tuple[str, int]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clients.append(writer.get_extra_info("peername")[:2])
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
    made = make_socket(getattr(net, where), family_of(address))
    async with asyncio.timeout(5):
        await asyncio.get_running_loop().sock_connect(made, (address, port))
    return made


async def receive(client: socket.socket, size: int, timeout: float = 10) -> bytes:
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


def plain(address: str) -> str:
    return address.removeprefix("::ffff:")


@asynccontextmanager
async def contextmanaged(client: socket.socket) -> AsyncIterator[socket.socket]:
    with closing(client):
        yield client
