"""Streams between a client and a server on the loopback, relayed, and what is held while they live."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import pytest

from criproxy.cri import streaming
from criproxy.cri.streaming import Streaming

HOSTS = ["127.0.0.1", "::1"]
_opened: list[socket.socket] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


class Server:
    """containerd's streaming server: it takes connections, and the test is the rest of it."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.socket(family)
        _opened.append(self.listener)
        self.listener.bind((host, 0))
        self.listener.listen()
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        self.url = f"https://{shown}:{self.port}/exec/t%2Fken?a=b;c"

    async def accept(self) -> socket.socket:
        connection, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(self.listener), 60)
        _opened.append(connection)
        return connection


class Hold:
    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def stack(self) -> contextlib.AsyncExitStack:
        stack = contextlib.AsyncExitStack()
        stack.callback(self.left.set)
        return stack

    @property
    def held(self) -> bool:
        return not self.left.is_set()

    async def let_go(self) -> None:
        await asyncio.wait_for(self.left.wait(), 60)


@pytest.fixture
def server() -> Server:
    return Server("127.0.0.1")


@pytest.fixture
def hold() -> Hold:
    return Hold()


@pytest.fixture
async def streams() -> AsyncIterator[Streaming]:
    made = Streaming()
    yield made
    await made.close()


async def dial(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname
    client = socket.socket(socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET)
    _opened.append(client)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (parts.hostname, parts.port))
    return client


async def connected(streams: Streaming, server: Server, hold: Hold) -> tuple[socket.socket, socket.socket]:
    client = await dial(streams.url(server.url, await hold.stack()))
    return client, await server.accept()


async def read(end: socket.socket) -> bytes:
    """What has come; empty at the end. Raises ConnectionResetError."""
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(end, 1 << 16), 60)


async def to_the_end(end: socket.socket) -> None:
    while await read(end):
        pass


async def send(end: socket.socket, data: bytes) -> None:
    await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(end, data), 60)


def reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


async def fill(end: socket.socket) -> int:
    """Sends until nobody takes any more."""
    sent = 0
    with contextlib.suppress(TimeoutError):
        while True:
            await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(end, bytes(1 << 16)), 0.3)
            sent += 1 << 16
    return sent


@pytest.mark.parametrize("host", HOSTS)
async def test_only_the_port_of_the_url_is_another(host: str, streams: Streaming, hold: Hold) -> None:
    server = Server(host)
    given = streams.url(server.url, await hold.stack())
    port = urlsplit(given).port
    assert port != server.port
    assert given == server.url.replace(f":{server.port}/", f":{port}/")
    client = await dial(given)
    upstream = await server.accept()
    await send(client, b"question")
    assert await read(upstream) == b"question"
    await send(upstream, b"answer")
    assert await read(client) == b"answer"


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1:10010/exec/t", "http://node-1:10010/exec/t", "http://127.0.0.1/exec/t", "", "http://[::1"]
)
async def test_what_can_not_be_relayed_goes_past_us_and_is_held_for_a_moment(url: str, hold: Hold) -> None:
    streams = Streaming(unseen_seconds=0.5)
    assert streams.url(url, await hold.stack()) == url
    await asyncio.sleep(0)
    assert hold.held
    await hold.let_go()


async def test_held_until_both_ends_have_ended(streams: Streaming, server: Server, hold: Hold) -> None:
    client, upstream = await connected(streams, server, hold)
    await send(upstream, b"hello")
    assert await read(client) == b"hello"
    # One direction ends, the other goes on.
    client.shutdown(socket.SHUT_WR)
    assert await read(upstream) == b""
    await send(upstream, b"the rest")
    assert await read(client) == b"the rest"
    assert hold.held
    upstream.close()
    assert await read(client) == b""
    await hold.let_go()


async def test_no_one_else_is_let_in_once_the_server_has_answered(
    streams: Streaming, server: Server, hold: Hold
) -> None:
    url = streams.url(server.url, await hold.stack())
    # Somebody who tries ports takes nothing away from the client.
    (await dial(url)).close()
    assert await read(await server.accept()) == b""
    client, upstream = await dial(url), await server.accept()
    await send(upstream, b"101")
    assert await read(client) == b"101"
    # Refused, or reset if the kernel had taken it before the listener was closed.
    with pytest.raises(ConnectionError):
        await read(await dial(url))
    assert hold.held


async def test_nobody_came(server: Server, hold: Hold) -> None:
    url = Streaming(token_seconds=0.1).url(server.url, await hold.stack())
    await hold.let_go()
    with pytest.raises(ConnectionRefusedError):
        await dial(url)


async def test_a_stream_outlives_the_time_in_which_it_may_begin(server: Server, hold: Hold) -> None:
    client, upstream = await connected(Streaming(token_seconds=1.0), server, hold)
    await asyncio.sleep(1.2)
    assert hold.held
    client.close()
    upstream.close()
    await hold.let_go()


async def test_a_server_that_is_gone(streams: Streaming, server: Server, hold: Hold) -> None:
    url = streams.url(server.url, await hold.stack())
    server.listener.close()
    assert await read(await dial(url)) == b""


@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_reset_is_a_reset_on_the_other_side(who: str, streams: Streaming, server: Server, hold: Hold) -> None:
    client, upstream = await connected(streams, server, hold)
    await send(upstream, b"hello")
    assert await read(client) == b"hello"
    dying, other = (client, upstream) if who == "client" else (upstream, client)
    reset(dying)
    with pytest.raises(ConnectionResetError):
        await read(other)
    await hold.let_go()


async def test_what_was_said_before_a_reset_is_delivered(streams: Streaming, server: Server, hold: Hold) -> None:
    client, upstream = await connected(streams, server, hold)
    # A server that doesn't read the client's last words resets the connection by its close.
    await send(client, b"never read")
    await send(upstream, b"exit status")
    await asyncio.sleep(0.1)
    upstream.close()
    assert await read(client) == b"exit status"
    with contextlib.suppress(ConnectionResetError):
        assert await read(client) == b""
    client.close()
    await hold.let_go()


async def test_who_reads_slowly_slows_the_sender_down(streams: Streaming, server: Server, hold: Hold) -> None:
    client, upstream = await connected(streams, server, hold)
    data = os.urandom(24 << 20)
    sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(upstream, data))
    await asyncio.sleep(0.3)
    assert not sending.done()
    received = bytearray()
    while len(received) < len(data):
        received += await read(client)
    await sending
    assert received == data


async def test_a_client_that_dies_while_the_server_takes_nothing(
    monkeypatch: pytest.MonkeyPatch, streams: Streaming, server: Server, hold: Hold
) -> None:
    monkeypatch.setattr(streaming, "LAST_SECONDS", 0.2)
    client, upstream = await connected(streams, server, hold)
    await send(upstream, b"hello")
    assert await fill(client)
    reset(client)
    await hold.let_go()
    with pytest.raises(ConnectionResetError):
        await to_the_end(upstream)


@pytest.mark.parametrize("when", ["awaited", "idle", "stuck"])
async def test_they_end_with_the_daemon(when: str, streams: Streaming, server: Server, hold: Hold) -> None:
    before = descriptors()
    url = streams.url(server.url, await hold.stack())
    if when == "awaited":
        await asyncio.sleep(0.05)
        await asyncio.wait_for(streams.close(), 60)
        with pytest.raises(ConnectionRefusedError):
            await dial(url)
    else:
        client, upstream = await dial(url), await server.accept()
        if when == "stuck":
            await fill(client)
        await asyncio.wait_for(streams.close(), 60)
        with contextlib.suppress(ConnectionResetError):
            await to_the_end(client)
        upstream.close()
    while _opened[1:]:  # all but the server's
        _opened.pop().close()
    assert not hold.held
    assert descriptors() == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
