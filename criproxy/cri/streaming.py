"""The streams of exec, attach and port-forward: relayed, so that it is known how long each of them lives.

containerd answers these calls with a URL of its streaming server, which kubelet (or crictl) then dials, past criproxy.
Here the answer's URL gets a port of ours at the same address instead, where one stream is waited for and relayed byte
by byte. What protocol it speaks (SPDY, WebSocket, with or without TLS) is the business of its two ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import select
import socket
import struct
from collections.abc import Coroutine
from typing import Any, Final
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

TOKEN_SECONDS: Final = 60.0
"""How long a URL is good for: then containerd forgets its token (cacheTTL in k8s.io/kubelet/pkg/cri/streaming)."""

UNSEEN_SECONDS: Final = 10.0
"""How long a container is held whose stream goes past us: the client has yet to connect."""

LAST_SECONDS: Final = 30.0
"""How long what one of the two ends has said before it was reset may take to be delivered to the other."""

_CHUNK: Final = 1 << 16

_Address = tuple[str, int]


class Streaming:
    """The streams that are waited for, and those under way."""

    def __init__(self, token_seconds: float = TOKEN_SECONDS, unseen_seconds: float = UNSEEN_SECONDS) -> None:
        """As TOKEN_SECONDS and UNSEEN_SECONDS."""
        self._token_seconds = token_seconds
        self._unseen_seconds = unseen_seconds
        self._tasks: set[asyncio.Task[None]] = set()

    def url(self, url: str, hold: contextlib.AsyncExitStack) -> str:
        """The URL to be given to the client in the place of containerd's. Takes `hold` over, and leaves it when the
        stream has ended, or when it is too late for one. What can't be relayed keeps its URL and is held for a moment.
        """
        try:
            server = _address(url)
            listener = _listener(server[0])
        except (OSError, ValueError) as error:
            log.info("a stream goes past us, as its address can't be used here: %s", error)
            self._task(self._unseen(hold))
            return url
        self._task(self._serve(listener, server, hold))
        parts = urlsplit(url)
        host = parts.netloc.rpartition(":")[0]
        return parts._replace(netloc=f"{host}:{listener.getsockname()[1]}").geturl()

    async def close(self) -> None:
        """Ends them all."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _unseen(self, hold: contextlib.AsyncExitStack) -> None:
        async with hold:
            await asyncio.sleep(self._unseen_seconds)

    async def _serve(self, listener: socket.socket, server: _Address, hold: contextlib.AsyncExitStack) -> None:
        answered = asyncio.Event()
        async with hold, asyncio.TaskGroup() as streams:
            with listener:
                accepting = streams.create_task(_accept(listener, server, answered, streams))
                # Not until the first has connected, which may be anybody who tries ports: until the first to whom
                # containerd has said something.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(answered.wait(), self._token_seconds)
                accepting.cancel()
                await asyncio.wait([accepting])

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _address(url: str) -> _Address:
    """Raises ValueError."""
    parts = urlsplit(url)
    if parts.hostname is None or parts.port is None:
        raise ValueError(f'"{parts.netloc}" isn\'t an address with a port')
    return str(ipaddress.ip_address(parts.hostname)), parts.port


def _listener(host: str) -> socket.socket:
    """At a port that was free. Raises OSError if the address isn't this machine's."""
    listener = _socket(host)
    try:
        listener.bind((host, 0))
        listener.listen()
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{host}: {error.strerror}") from None
    return listener


def _socket(host: str) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    made.setblocking(False)
    return made


async def _accept(
    listener: socket.socket, server: _Address, answered: asyncio.Event, streams: asyncio.TaskGroup
) -> None:
    loop = asyncio.get_running_loop()
    try:
        while True:
            client, _ = await loop.sock_accept(listener)
            streams.create_task(_stream(client, server, answered))
    except OSError as error:
        log.error("no more streams are accepted at %s: %s", listener.getsockname(), error)


async def _stream(client: socket.socket, address: _Address, answered: asyncio.Event) -> None:
    with client, _socket(address[0]) as server:
        try:
            await asyncio.get_running_loop().sock_connect(server, address)
        except OSError as error:
            log.warning("containerd's streaming server can't be reached at %s:%d: %s", *address, error)
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await _relay(client, server, answered)


async def _relay(client: socket.socket, server: socket.socket, answered: asyncio.Event) -> None:
    """Returns when both have ended what they send, or when one was reset and the other has been given the rest."""
    pumps = {
        client: asyncio.create_task(_pump(client, server)),
        server: asyncio.create_task(_pump(server, client, answered)),
    }
    both: asyncio.Future[Any] = asyncio.gather(*pumps.values())
    reset: asyncio.Future[Any] = asyncio.create_task(_reset(client, server))
    try:
        await asyncio.wait([both, reset], return_when=asyncio.FIRST_COMPLETED)
        if not both.done():
            await asyncio.wait([pumps[reset.result()]], timeout=LAST_SECONDS)
        if not both.done() or both.exception() is not None or not all(both.result()):
            for end in (client, server):
                # A close is then a reset, for the other end to know.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        # They are through before the sockets are closed, whose numbers the event loop knows as long as they wait.
        for task in (*pumps.values(), reset):
            task.cancel()
        await asyncio.gather(both, *pumps.values(), reset, return_exceptions=True)


async def _pump(source: socket.socket, target: socket.socket, began: asyncio.Event | None = None) -> bool:
    """Carries what comes from `source` to its end, and that end as well; False if `target` was gone before, which may
    have said something that the other pump has yet to carry. Raises OSError if `source` was reset.

    Nothing is kept in between: what the target doesn't take waits in the source.
    """
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK):
        if began is not None:
            began.set()
        try:
            await loop.sock_sendall(target, data)
        except OSError:
            return False
    try:
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return False
    return True


async def _reset(*ends: socket.socket) -> socket.socket:
    """Waits until one was reset, and returns it. It shows even while nobody reads from it."""
    loop = asyncio.get_running_loop()
    seen: asyncio.Future[socket.socket] = loop.create_future()
    by_number = {end.fileno(): end for end in ends}
    with select.epoll() as poll:
        for number in by_number:
            # Errors are reported whatever is asked for. Once: a hang-up, which is reported as well, lasts.
            poll.register(number, select.EPOLLET)

        def look() -> None:
            for number, events in poll.poll(0):
                if events & select.EPOLLERR and not seen.done():
                    seen.set_result(by_number[number])

        loop.add_reader(poll.fileno(), look)
        try:
            return await seen
        finally:
            loop.remove_reader(poll.fileno())
