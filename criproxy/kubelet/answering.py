"""Answers kubelet's probes of containers that are scaled down, on a listener inside their pod.

The hook hands it the new connections of visitors that probe (`PodNetwork.answer`), as if they had been made to it. What
is a known probe gets the answer that the application gave last. Whatever else it is, the container is woken for it, and
the connection is relayed to the application. Until that is decided, nothing is taken out of the connection's socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, Event, RequestReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError

from criproxy.hook.pod_maps import Visitor, Watched
from criproxy.kernel.sockets import Flow
from criproxy.kubelet import certificate, grpc_health, http1
from criproxy.kubelet.conversation import Conversation, Kind, Probe, Verdict, http_probe, opening
from criproxy.kubelet.probes import Probes
from criproxy.policy import Port

log = logging.getLogger(__name__)

FIRST_SECONDS: Final = 5.0
"""How long a client may think about its first words. After that it is taken for one that waits for the server's."""
CONNECT_SECONDS: Final = 75.0
"""How long the application may take to accept: one that has to be started afresh is given a minute."""
CLOSE_SECONDS: Final = 2.0
"""How long a client may take to close a connection that has its answer."""

_CHUNK: Final = 64 << 10
_OPENING_BYTES: Final = 32 << 10
_LINGER_NOT: Final = struct.pack("ii", 1, 0)
_TLS_ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Answerer(Protocol):
    """A container, as far as its probes are concerned."""

    @property
    def probes(self) -> Probes: ...

    def is_down(self) -> bool:
        """Its application can't be asked now."""

    def awake(self, why: str) -> contextlib.AbstractAsyncContextManager[None]:
        """Brings it back, and keeps it up within the context."""

    async def until_up(self) -> None:
        """Waits, within the context of `awake`, until its application gets what is sent to it."""

    def probed(self, why: str) -> contextlib.AbstractContextManager[None]:
        """Keeps it up within the context, which is no activity. It mustn't be down."""


class Answering:
    """The accept loop of one pod's listeners, on the running event loop."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        container_of: Callable[[Port], Answerer | None],
        visit_of: Callable[[socket.socket], tuple[Flow, Visitor] | None],
        connect: Callable[[Flow, Visitor], Awaitable[socket.socket]],
        relayed: Callable[[Flow, bool], None],
        at_once: int,
    ) -> None:
        """`listeners`: non-blocking; `close` closes them. `container_of`: whose port it is. `visit_of`: an accepted
        connection as it was on its way in, and whose it is; None: it has no business here. `connect`: connects to the
        application in place of a client. `relayed`: told of each connection that is relayed, and of ours to the
        application, and whether they are a probe's as far as is known. Whatever of these raises, the connection is
        reset, and so is what comes when there are `at_once` connections.
        """
        self._listeners = listeners
        self._container_of = container_of
        self._visit_of = visit_of
        self._connect = connect
        self._relayed = relayed
        self._at_once = at_once
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        for listener in listeners:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    async def close(self) -> None:
        """Resets what is left. Can be called twice."""
        for listener in self._listeners:
            if listener.fileno() >= 0:
                self._loop.remove_reader(listener.fileno())
                listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(self._at_once):
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("a connection can't be accepted in place of an application: %s", error.strerror)
                return
            client.setblocking(False)
            if len(self._tasks) >= self._at_once:
                _reset(client)
                continue
            task = self._loop.create_task(self._serve(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket) -> None:
        """A connection, up to its end. Whatever goes wrong, it isn't left hanging."""
        try:
            visit = self._visit(client)
            if visit is not None:
                await visit.receive()
                client.close()
        except* (OSError, EOFError, ProtocolError) as errors:
            log.info("a connection accepted in place of an application ended early: %s", errors.exceptions[0])
        except* Exception:
            log.exception("internal error while a probe was answered")
        finally:
            if client.fileno() >= 0:
                _reset(client)

    def _visit(self, client: socket.socket) -> _Visit | None:
        found = self._visit_of(client)
        if found is None or (answerer := self._container_of(found[0].port)) is None:
            return None
        return _Visit(client, *found, answerer, self._connect, self._relayed)


class _Visit:
    """One connection."""

    def __init__(
        self,
        client: socket.socket,
        flow: Flow,
        visitor: Visitor,
        answerer: Answerer,
        connect: Callable[[Flow, Visitor], Awaitable[socket.socket]],
        relayed: Callable[[Flow, bool], None],
    ) -> None:
        self._client = client
        self._flow = flow
        self._visitor = visitor
        self._answerer = answerer
        self._dial = connect
        self._relayed = relayed
        self._loop = asyncio.get_running_loop()

    async def receive(self) -> None:
        wants = Verdict.OTHER if self._visitor is Visitor.ANYBODY else await self._opening()
        if isinstance(wants, Probe):
            if wants.kind is Kind.TCP:
                # Gone already, and accepted by the kernel: that is all the answer that it wants. Also seen where no TCP
                # probe is known: kubelet's client goes on connecting after an HTTP probe's time is over, then closes.
                if not self._answerer.is_down():
                    with self._answerer.probed(str(wants)):
                        (await self._connect()).close()
                return
            if self._answerer.is_down() and await self._answer(wants):
                return
        await self._relay(_Plain(self._client), wants)

    async def _opening(self) -> Probe | Verdict:
        """What the client wants, by the bytes that are in its socket, and stay there."""
        data = b""
        wants: Probe | Verdict = Verdict.UNDECIDED
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_SECONDS):
                while wants is Verdict.UNDECIDED:
                    more = await self._peek(len(data) + 1)
                    ended = len(more) == len(data)
                    data = more
                    wants = opening(data, ended, self._flow.port, self._visitor)
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        return wants

    async def _peek(self, size: int) -> bytes:
        """What is there, when it is `size` bytes or the client has ended."""
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
        readable = asyncio.Event()
        self._loop.add_reader(self._client.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            self._loop.remove_reader(self._client.fileno())
        try:
            return self._client.recv(_OPENING_BYTES, socket.MSG_PEEK)
        except ConnectionResetError:
            if size > 1:
                raise
            return b""  # connected and closed, in the rude way

    # --- a known probe -----------------------------------------------------------------------------------------

    async def _answer(self, probe: Probe) -> bool:
        """Gives the application's last answer; False: there is none, and the client has been told nothing."""
        if probe.kind is Kind.GRPC:
            await self._answer_grpc()
            return True
        known = self._answerer.probes.known(probe)
        if known is None:
            return False
        if probe.kind is Kind.TLS:
            await self._answer_tls(probe)
            return True
        if known.again is None:
            return False
        # Closed with something unread in it, a socket would reset the connection, and the answer might be lost.
        await self._loop.sock_recv(self._client, _OPENING_BYTES)
        await self._last_words(known.again)
        return True

    async def _last_words(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._client, data)
        with contextlib.suppress(OSError):  # it may be gone by now, or stay for too long
            self._client.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(CLOSE_SECONDS):
                while await self._loop.sock_recv(self._client, _CHUNK):
                    pass

    async def _answer_grpc(self) -> None:
        """What is asked isn't known before the server's first words. If it is no known probe, the container is woken,
        and HTTP/2 has a way to say "nothing was done, ask again on a new connection" (RFC 9113, 6.8)."""
        http2 = H2Connection(H2Configuration(client_side=False))
        http2.initiate_connection()
        calls: dict[int, bytes] = {}
        answered = 0
        while True:
            try:
                await self._loop.sock_sendall(self._client, http2.data_to_send())
                async with asyncio.timeout(FIRST_SECONDS):
                    data = await self._loop.sock_recv(self._client, _CHUNK)
            except TimeoutError:
                http2.close_connection(last_stream_id=answered)
                await self._last_words(http2.data_to_send())
                return
            except ConnectionError:
                if not answered:
                    raise
                return  # a probe has its answer, and says no more than that it is gone
            if not data:
                return
            for event in http2.receive_data(data):
                if isinstance(event, ConnectionTerminated):
                    return
                if isinstance(event, StreamReset):
                    calls.pop(event.stream_id, None)
                elif asked := self._grpc_call(event, calls):
                    stream, service = asked
                    if service is None or not self._is_known(service):
                        async with self._answerer.awake(f"a gRPC call on {self._flow.port}"):
                            http2.close_connection(last_stream_id=answered)
                            await self._last_words(http2.data_to_send())
                        return
                    headers = [(":status", "200"), ("content-type", "application/grpc")]
                    http2.send_headers(stream, headers)
                    http2.send_data(stream, grpc_health.serving())
                    http2.send_headers(stream, [("grpc-status", "0")], end_stream=True)
                    answered = stream

    def _grpc_call(self, event: Event, calls: dict[int, bytes]) -> tuple[int, str | None] | None:
        """A call that is complete, or is no health check: its stream and the service that it asks for."""
        if isinstance(event, RequestReceived):
            if (b":path", grpc_health.PATH.encode()) not in event.headers:
                return event.stream_id, None
            calls[event.stream_id] = b""
        elif isinstance(event, DataReceived):
            if event.stream_id in calls:
                calls[event.stream_id] += event.data
        elif isinstance(event, StreamEnded) and event.stream_id in calls:
            try:
                return event.stream_id, grpc_health.service(calls.pop(event.stream_id))
            except grpc_health.NotUnderstood:
                return event.stream_id, None
        return None

    def _is_known(self, service: str) -> bool:
        probe = Probe(self._flow.port, self._visitor, Kind.GRPC, service)
        return self._answerer.is_down() and self._answerer.probes.known(probe) is not None

    async def _answer_tls(self, probe: Probe) -> None:
        """A hook of kubelet's can be told from a probe only within the handshake that it gets from us."""
        client = await _Secure.accept(self._client)
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                try:
                    head = await client.reader.readuntil(b"\r\n\r\n")
                except asyncio.IncompleteReadError as error:
                    if not error.partial:
                        return  # the probe's time was over: kubelet's client ends the handshake all the same
                    raise
            request = http1.request(head)
            known = request is not None and http_probe(request, self._flow.port, self._visitor) is not None
            if known and self._answerer.is_down():
                await client.write(_TLS_ANSWER)
            else:
                await self._relay(client, Verdict.OTHER, head)
        except (http1.NotHttp, asyncio.LimitOverrunError) as error:
            raise EOFError(f"what is said over TLS isn't HTTP: {error}") from error
        finally:
            await client.close()

    # --- anything else -----------------------------------------------------------------------------------------

    async def _relay(self, client: _End, wants: Probe | Verdict, first: bytes = b"") -> None:
        """Wakes the container and passes on what either side says, until both have ended.

        The container is held awake until the application has answered: from then on this connection is one like any
        other of the pod. `first` goes ahead of what the client will say. The answer to a probe is remembered.
        """
        lesson = _Lesson(self._answerer.probes, self._flow, self._visitor) if isinstance(wants, Probe) else None
        why = str(wants) if lesson else f"a connection from {self._who()} to {self._flow.port}"
        async with contextlib.AsyncExitStack() as hold, contextlib.AsyncExitStack() as connection:
            if lesson is not None and not self._answerer.is_down():
                hold.enter_context(self._answerer.probed(why))
            else:
                if self._answerer.is_down():
                    log.info("%s is woken by %s", self._flow.local[0], why)
                await hold.enter_async_context(self._answerer.awake(why))
            own = await self._connect()
            connection.callback(own.close)
            self._tell(own, lesson)
            application = await _Secure.connect(own) if isinstance(client, _Secure) else _Plain(own)
            connection.push_async_callback(application.close)
            await application.write(first)
            answered = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(client, application, True, lesson, None))
                group.create_task(self._pass_on(application, client, False, lesson, answered))
                await answered.wait()
                await hold.aclose()

    async def _pass_on(
        self, source: _End, sink: _End, incoming: bool, lesson: _Lesson | None, began: asyncio.Event | None
    ) -> None:
        data = b"?"
        while data:
            data = await source.read()
            if lesson is not None:
                lesson.hear(incoming, data)
            if began is not None:
                began.set()
            await (sink.write(data) if data else sink.end())

    async def _connect(self) -> socket.socket:
        async with asyncio.timeout(CONNECT_SECONDS):
            # Its processes may be there, but its packets not let through yet: the hook would lead ours back to us.
            await self._answerer.until_up()
            own = await self._dial(self._flow, self._visitor)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return own

    def _tell(self, own: socket.socket, lesson: _Lesson | None) -> None:
        """What the relayed connection and ours to the application are, now and if they turn out to be no probe's."""
        flows = (self._flow, Flow("tcp", self._flow.local, own.getsockname()[:2]))

        def tell(probe: bool) -> None:
            for flow in flows:
                self._relayed(flow, probe)

        tell(lesson is not None)
        if lesson is not None:
            lesson.on_other = lambda: tell(False)

    def _who(self) -> str:
        if self._visitor is Visitor.ANYBODY:
            return self._flow.remote[0]
        return "kubelet" if self._visitor is Visitor.KUBELET else "within the pod"


class _Lesson:
    """What a relayed probe says and is told, as if the hook had seen it."""

    def __init__(self, probes: Probes, flow: Flow, visitor: Visitor) -> None:
        self._probes = probes
        self._flow = flow
        self._visitor = visitor
        self._conversation = Conversation(flow.port, visitor)
        self._next = {True: 0, False: 0}
        self.on_other: Callable[[], None] = lambda: None
        """Called once, when it turns out to be no probe."""

    def hear(self, incoming: bool, data: bytes) -> None:
        """`data`: empty at the end."""
        now = time.monotonic()
        packet = Watched(
            0, self._flow, self._visitor, incoming, self._next[incoming], False, not data, False, data, len(data), now
        )
        self._next[incoming] += len(data)
        before = self._conversation.verdict
        for probe, result in self._conversation.add(packet):
            self._probes.learn(probe, result)
        if self._conversation.verdict is Verdict.OTHER is not before:
            self.on_other()


class _End(ABC):
    """One side of a relayed connection."""

    @abstractmethod
    async def read(self) -> bytes:
        """What comes next; empty at the end. Raises OSError."""

    @abstractmethod
    async def write(self, data: bytes) -> None: ...

    @abstractmethod
    async def end(self) -> None:
        """Nothing more will be written."""

    @abstractmethod
    async def close(self) -> None: ...


class _Plain(_End):
    def __init__(self, own: socket.socket) -> None:
        self._socket = own
        self._loop = asyncio.get_running_loop()

    async def read(self) -> bytes:
        return await self._loop.sock_recv(self._socket, _CHUNK)

    async def write(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._socket, data)

    async def end(self) -> None:
        with contextlib.suppress(OSError):  # a peer that is gone shows where it is read from
            self._socket.shutdown(socket.SHUT_WR)

    async def close(self) -> None:
        self._socket.close()


class _Secure(_End):
    """TLS. An end of one direction is an end of both."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    @classmethod
    async def accept(cls, own: socket.socket) -> _Secure:
        """The socket is its from then on."""
        context = await asyncio.to_thread(certificate.server)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(_CHUNK)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, own, ssl=context, ssl_handshake_timeout=FIRST_SECONDS, ssl_shutdown_timeout=CLOSE_SECONDS
        )
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    @classmethod
    async def connect(cls, own: socket.socket) -> _Secure:
        """The socket is its from then on."""
        reader, writer = await asyncio.open_connection(
            sock=own, ssl=certificate.client(), server_hostname="", ssl_shutdown_timeout=CLOSE_SECONDS
        )
        return cls(reader, writer)

    async def read(self) -> bytes:
        return await self.reader.read(_CHUNK)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def end(self) -> None:
        self._writer.close()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _reset(client: socket.socket) -> None:
    """So that its peer learns that nobody will answer."""
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    client.close()
