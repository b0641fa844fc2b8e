"""The listener that answers kubelet's probes of a sleeping container: real sockets, TLS and gRPC, on loopback.

The hook's part is played by the test: clients connect to the listener itself, and what is relayed is led to the
application's own port.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest

from criproxy.hook.pod_maps import Visitor
from criproxy.kernel.bpf import BpfError
from criproxy.kernel.sockets import Flow
from criproxy.kubelet import answering, certificate, grpc_health
from criproxy.kubelet.answering import Answering
from criproxy.kubelet.conversation import Kind, Probe, Result
from criproxy.kubelet.probes import Probes
from criproxy.policy import Port

AGENT = "kube-probe/1.36"
STORED = b"HTTP/1.1 200 OK\r\nx-from: memory\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"


class Pod:
    """A container that may sleep, its application, and the listener in front of it."""

    def __init__(self) -> None:
        self.probes = Probes(None)
        self.down = True
        self.held: list[str] = []
        self.woken: list[str] = []
        self.visitor: Visitor | None = Visitor.KUBELET
        self.known = True
        self.relayed: list[tuple[Flow, bool]] = []
        self.probing: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self.application: Any = None
        self.answering = Answering(
            [self.listener],
            self.container_of,
            self.visit_of,
            self.connect,
            relayed=lambda flow, probe: self.relayed.append((flow, probe)),
            at_once=2,
        )

    def visit_of(self, client: socket.socket) -> tuple[Flow, Visitor] | None:
        if self.visitor is None:
            return None
        return Flow("tcp", client.getsockname(), client.getpeername()), self.visitor

    def container_of(self, port: Port) -> Pod | None:
        return self if self.known and port.number == self.port else None

    def is_down(self) -> bool:
        return self.down

    @contextlib.asynccontextmanager
    async def awake(self, why: str) -> AsyncIterator[None]:
        self.woken.append(why)
        self.held.append(why)
        await asyncio.sleep(0.02)
        self.down = False
        try:
            yield
        finally:
            self.held.remove(why)

    async def until_up(self) -> None:
        assert not self.down

    @contextlib.contextmanager
    def probed(self, why: str) -> Iterator[None]:
        assert not self.down
        self.probing.append(why)
        yield

    async def connect(self, flow: Flow, visitor: Visitor) -> socket.socket:
        assert (flow.port.number, visitor) == (self.port, self.visitor)
        made = socket.socket()
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, self.application)
        return made

    async def serve(self, handler: Callable[..., Awaitable[None]], tls: bool = False) -> None:
        """The application."""
        context = certificate.server() if tls else None
        server = await asyncio.start_server(handler, "127.0.0.1", 0, ssl=context)
        self.application = server.sockets[0].getsockname()

    def know(self, kind: Kind, asks: str = "", headers: tuple[tuple[str, str], ...] = ()) -> None:
        again = STORED if kind is Kind.HTTP else None
        self.probes.learn(Probe(Port("tcp", self.port), Visitor.KUBELET, kind, asks, headers), Result(True, "", again))


@pytest.fixture
async def pod() -> AsyncIterator[Pod]:
    made = Pod()
    yield made
    await made.answering.close()
    assert made.held == []


async def ask(pod: Pod, request: bytes) -> bytes:
    """What comes back until the other side ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.port)
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return answer


async def ask_nothing(pod: Pod) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.port)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return answer


def get(target: str = "/healthz", agent: str = AGENT) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: x\r\nUser-Agent: {agent}\r\nConnection: close\r\n\r\n".encode()


KEY = (("connection", "close"), ("host", "x"))


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers one request as HTTP, with the request in its body."""
    request = await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(request) + request)
    await writer.drain()
    writer.close()


def in_thread(function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
    return asyncio.wait_for(asyncio.to_thread(function, *arguments), 60)


# --- HTTP ------------------------------------------------------------------------------------------------------


async def test_a_known_probe_gets_its_last_answer(pod: Pod) -> None:
    pod.know(Kind.HTTP, "GET /healthz", KEY)
    for _ in range(3):
        assert await ask(pod, get()) == STORED
    assert pod.woken == []


async def test_a_request_may_come_in_pieces(pod: Pod) -> None:
    pod.know(Kind.HTTP, "GET /healthz", KEY)
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.port)
    for byte in get():
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    assert await asyncio.wait_for(reader.read(), 60) == STORED
    writer.close()


async def test_a_client_of_the_standard_library_is_content(pod: Pod) -> None:
    def probe() -> tuple[int, bytes]:
        client = http.client.HTTPConnection("127.0.0.1", pod.port, timeout=60)
        with contextlib.closing(client):
            client.request("GET", "/healthz", headers={"User-Agent": AGENT})
            answer = client.getresponse()
            return answer.status, answer.read()

    pod.know(Kind.HTTP, "GET /healthz", (("accept-encoding", "identity"), ("host", f"127.0.0.1:{pod.port}")))
    assert await in_thread(probe) == (200, b"ok")


@pytest.mark.parametrize(
    "request_", [get("/other"), get(agent="kube-lifecycle/1.36"), get(agent="curl/8"), b"GET\r\n\r\n"]
)
async def test_anything_else_wakes_and_is_relayed(pod: Pod, request_: bytes) -> None:
    pod.know(Kind.HTTP, "GET /healthz", KEY)
    await pod.serve(echo)
    assert (await ask(pod, request_)).endswith(request_)
    assert len(pod.woken) == 1
    assert [flow.local[1] for flow, _ in pod.relayed] == [pod.port] * 2


async def test_the_answer_to_an_unknown_probe_is_known_from_then_on(pod: Pod) -> None:
    await pod.serve(echo)
    true = await ask(pod, get())
    assert pod.woken == [f"kubelet's HTTP probe GET :{pod.port}/healthz"]
    pod.down = True
    again = await ask(pod, get())
    assert again.split(b"\r\n\r\n", 1)[1] == true.split(b"\r\n\r\n", 1)[1]
    assert len(pod.woken) == 1


async def test_an_application_that_is_up_is_asked_itself(pod: Pod) -> None:
    pod.know(Kind.HTTP, "GET /healthz", KEY)
    pod.down = False
    await pod.serve(echo)
    assert (await ask(pod, get())).endswith(get())
    assert (pod.woken, pod.probing) == ([], [f"kubelet's HTTP probe GET :{pod.port}/healthz"])
    assert [probe for _, probe in pod.relayed] == [True, True]


async def test_what_begins_as_a_probe_and_goes_on_otherwise_is_told(pod: Pod) -> None:
    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    pod.down = False
    await pod.serve(twice)
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.port)
    for agent, known in [(AGENT, [True, True]), ("curl/8", [True, True, False, False])]:
        writer.write(f"GET / HTTP/1.1\r\nUser-Agent: {agent}\r\n\r\n".encode())
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        assert [probe for _, probe in pod.relayed] == known
    assert await asyncio.wait_for(reader.read(), 60) == b""
    writer.close()


async def test_a_tcp_probe_of_an_application_that_is_up_reaches_it(pod: Pod) -> None:
    came = asyncio.Event()

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        writer.close()
        came.set()

    pod.down = False
    await pod.serve(note)
    assert await ask_nothing(pod) == b""
    await asyncio.wait_for(came.wait(), 60)
    assert (pod.woken, pod.probing) == ([], [f"kubelet's TCP probe of :{pod.port}"])


async def test_who_is_nobodys_probe_is_not_waited_for(pod: Pod) -> None:
    """A client that waits for the server's first words."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 ready\n")
        writer.close()

    pod.visitor = Visitor.ANYBODY
    await pod.serve(greet)
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.port)
    assert await asyncio.wait_for(reader.readline(), 60) == b"220 ready\n"
    assert time.monotonic() - began < answering.FIRST_SECONDS
    assert pod.woken == [f"a connection from 127.0.0.1 to {pod.port}/tcp"]
    writer.close()


async def test_the_hold_ends_with_the_first_answer_and_the_connection_goes_on(pod: Pod) -> None:
    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line.upper())
        writer.write(b"bye\n")
        writer.close()

    await pod.serve(twice)
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.port)
    writer.write(b"hello\n")
    assert await asyncio.wait_for(reader.readline(), 60) == b"HELLO\n"
    async with asyncio.timeout(60):
        while pod.held:
            await asyncio.sleep(0.01)
    writer.write(b"again\n")
    assert await asyncio.wait_for(reader.readline(), 60) == b"AGAIN\n"
    writer.write_eof()  # half closed, it still hears the rest
    assert await asyncio.wait_for(reader.read(), 60) == b"bye\n"
    writer.close()


async def test_a_megabyte_is_relayed_both_ways(pod: Pod) -> None:
    async def back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    await pod.serve(back)
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.port)
    writer.write(b"PUT " + bytes(1 << 20))
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 60) == b"PUT " + bytes(1 << 20)
    writer.close()


async def test_a_server_that_speaks_first_is_waited_for(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 ready\r\n")
        assert await reader.readline() == b"QUIT\r\n"
        writer.close()

    monkeypatch.setattr(answering, "FIRST_SECONDS", 0.1)
    await pod.serve(greet)
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.port)
    assert await asyncio.wait_for(reader.readline(), 60) == b"220 ready\r\n"
    writer.write(b"QUIT\r\n")
    assert await asyncio.wait_for(reader.read(), 60) == b""
    writer.close()


# --- TCP -------------------------------------------------------------------------------------------------------


def connect_and_close(port: int, linger: int = 1) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, linger))


@pytest.mark.parametrize("linger", [1, 0])
async def test_a_known_tcp_probe_has_its_answer_from_the_kernel(pod: Pod, linger: int) -> None:
    pod.know(Kind.TCP)
    await in_thread(connect_and_close, pod.port, linger)
    await idle(pod)
    assert pod.woken == []


async def test_a_probe_whose_time_is_over_wakes_nobody(pod: Pod) -> None:
    """kubelet gives it up while it connects; its client connects all the same, and closes then."""
    pod.know(Kind.HTTP, "GET /healthz", KEY)
    await in_thread(connect_and_close, pod.port)
    await idle(pod)
    assert pod.woken == []


async def test_nor_one_over_tls(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    pod.know(Kind.TLS)
    with caplog.at_level(logging.INFO):
        assert await ask_tls(pod, b"", ends=True) == b""
        await idle(pod)
    assert pod.woken == []
    assert not caplog.records


async def idle(pod: Pod) -> None:
    """Until every connection has been dealt with."""
    deadline = time.monotonic() + 60
    for _ in range(3):  # the accept may not have been reported yet
        await asyncio.sleep(0.01)
    while pod.answering._tasks:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


# --- TLS -------------------------------------------------------------------------------------------------------


async def ask_tls(pod: Pod, request: bytes, name: str = "", ends: bool = False) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])  # as Go does
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.port, ssl=context, server_hostname=name)
    writer.write(request)
    if ends:
        writer.close()
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return answer


async def test_an_https_probe_is_answered(pod: Pod) -> None:
    pod.know(Kind.TLS)
    assert (await ask_tls(pod, get())).startswith(b"HTTP/1.1 200 OK\r\n")
    assert pod.woken == []


async def test_a_hook_over_tls_reaches_the_application(pod: Pod) -> None:
    pod.know(Kind.TLS)
    await pod.serve(echo, tls=True)
    hook = get(agent="kube-lifecycle/1.36")
    assert (await ask_tls(pod, hook)).endswith(hook)
    assert len(pod.woken) == 1


@pytest.mark.parametrize(("name", "known"), [("", False), ("hook.default.svc", True)])
async def test_tls_that_is_no_known_probe_is_relayed_as_it_is(pod: Pod, name: str, known: bool) -> None:
    if known:
        pod.know(Kind.TLS)
    await pod.serve(echo, tls=True)
    assert (await ask_tls(pod, get(), name)).endswith(get())
    assert len(pod.woken) == 1
    assert pod.probes.ports() == {Port("tcp", pod.port): frozenset({Visitor.KUBELET})}


async def test_a_broken_handshake_ends_the_connection(pod: Pod) -> None:
    pod.know(Kind.TLS)
    hello = ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.check_hostname = False
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
    with contextlib.suppress(ConnectionResetError):
        await ask(pod, hello.read() + b"garbage" * 10)
    await idle(pod)


# --- gRPC ------------------------------------------------------------------------------------------------------


def check(port: int, service: str = "", path: str = grpc_health.PATH) -> bytes:
    """As kubelet's gRPC probe. Raises grpc.RpcError."""
    options = [("grpc.primary_user_agent", AGENT), ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    message = b"\x0a" + bytes([len(service)]) + service.encode() if service else b""
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        call = channel.unary_unary(path, request_serializer=bytes, response_deserializer=bytes)
        answer: bytes = call(message, timeout=60)
        return answer


class Everything(grpc.GenericRpcHandler):
    """A server that answers SERVING to whatever it is asked."""

    def service(self, details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: b"\x08\x01")


@pytest.fixture
async def grpc_application(pod: Pod) -> AsyncIterator[None]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Everything(),))
    pod.application = ("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    yield
    await server.stop(None)


@pytest.mark.parametrize("service", ["", "readiness"])
async def test_a_grpc_probe_is_answered(pod: Pod, service: str) -> None:
    pod.know(Kind.GRPC, service)
    for _ in range(3):
        assert await in_thread(check, pod.port, service) == b"\x08\x01"
    await idle(pod)
    assert pod.woken == []


@pytest.mark.usefixtures("grpc_application")
@pytest.mark.parametrize(("service", "path"), [("unknown", grpc_health.PATH), ("", "/shop.Orders/List")])
async def test_any_other_call_wakes_and_reaches_the_application(pod: Pod, service: str, path: str) -> None:
    pod.know(Kind.GRPC, "")
    assert await in_thread(check, pod.port, service, path) == b"\x08\x01"
    assert pod.woken


@pytest.mark.usefixtures("grpc_application")
async def test_a_grpc_application_that_is_up_is_asked_itself(pod: Pod) -> None:
    pod.down = False
    assert await in_thread(check, pod.port) == b"\x08\x01"
    await idle(pod)
    assert pod.probes.ports() == {Port("tcp", pod.port): frozenset({Visitor.KUBELET})}


# --- whatever goes wrong ---------------------------------------------------------------------------------------


async def test_who_has_no_business_here_is_reset(pod: Pod) -> None:
    pod.visitor = None
    with pytest.raises(ConnectionResetError):
        await ask(pod, get())
    pod.visitor, pod.known = Visitor.KUBELET, False
    with pytest.raises(ConnectionResetError):
        await ask(pod, get())
    assert pod.woken == []


async def test_what_the_hook_cannot_tell_is_reset(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(client: socket.socket) -> None:
        raise BpfError("no such map")

    monkeypatch.setattr(pod.answering, "_visit_of", gone)
    with pytest.raises(ConnectionResetError):
        await ask(pod, get())


async def test_what_the_application_refuses_is_refused(pod: Pod) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        pod.application = server.getsockname()
    with pytest.raises(ConnectionResetError):
        await ask(pod, get("/other"))


async def test_what_the_application_resets_is_reset(pod: Pod) -> None:
    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    await pod.serve(rude)
    with pytest.raises(ConnectionResetError):
        await ask(pod, get("/other"))


async def test_no_more_connections_at_once_than_that(pod: Pod) -> None:
    pod.know(Kind.HTTP, "GET /healthz", KEY)
    silent = [await asyncio.open_connection("127.0.0.1", pod.port) for _ in range(2)]
    await asyncio.sleep(0.05)
    with pytest.raises(ConnectionResetError):
        await ask(pod, get())
    for _, writer in silent:
        writer.write(get())
    for reader, writer in silent:
        assert await asyncio.wait_for(reader.read(), 60) == STORED
        writer.close()
    await idle(pod)
    assert await ask(pod, get()) == STORED


async def test_closing_resets_what_is_open(pod: Pod) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.port)
    await asyncio.sleep(0.05)
    await pod.answering.close()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 60)
    writer.close()


def test_what_most_nodes_never_need_is_not_loaded() -> None:
    code = "import sys, criproxy.kubelet.answering; print([m for m in sys.modules if m.startswith('cryptography')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
