"""The proxy before a fake containerd in the same process: what arrives is what would arrive without it."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from criproxy.api.cri_pb2 import VersionRequest
from criproxy.cri.calls import UNARY, Call, Interceptor, UpstreamError, methods
from criproxy.cri.channel import UNLIMITED, EndpointError, socket_path
from criproxy.cri.proxy import ListenError, Proxy

VERSION = "/runtime.v1.RuntimeService/Version"
EVENTS = "/runtime.v1.RuntimeService/GetContainerEvents"
UNKNOWN = "/some.future.Service/Method"
Behaviour = Callable[[AsyncIterator[bytes], Any], Awaitable[None]]


class Containerd(grpc.GenericRpcHandler):
    """Answers each method with the behaviour given for it, and remembers what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.behaviours: dict[str, Behaviour] = {}
        self.requests: list[tuple[str, bytes]] = []
        self.metadata: list[tuple[tuple[str, str | bytes], ...]] = []
        self.remaining: list[float | None] = []
        self.cancelled = asyncio.Event()
        self.server: aio.Server | None = None

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method not in self.behaviours:
            return None

        async def behave(requests: AsyncIterator[bytes], context: Any) -> None:
            self.metadata.append(tuple(context.invocation_metadata()))
            self.remaining.append(context.time_remaining())

            async def noted() -> AsyncIterator[bytes]:
                async for request in requests:
                    self.requests.append((method, request))
                    yield request

            try:
                await self.behaviours[method](noted(), context)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

        return grpc.stream_stream_rpc_method_handler(behave)

    async def called(self, times: int = 1) -> None:
        """Waits until it was called so often."""
        async with asyncio.timeout(60):
            while len(self.remaining) < times:
                await asyncio.sleep(0.005)

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self.server = aio.server(handlers=[self], options=list(UNLIMITED))
        self.server.add_insecure_port(f"unix://{self.path}")
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(None)
            self.server = None


async def echo(requests: AsyncIterator[bytes], context: Any) -> None:
    async for request in requests:
        await context.write(b"echo " + request)


async def hang(requests: AsyncIterator[bytes], context: Any) -> None:
    await asyncio.Event().wait()


@pytest.fixture
async def containerd(tmp_path: Path) -> AsyncIterator[Containerd]:
    fake = Containerd(tmp_path / "containerd.sock")
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def connect(tmp_path: Path) -> AsyncIterator[Callable[[Path], aio.Channel]]:
    channels = []

    def make(path: Path) -> aio.Channel:
        options = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
        channels.append(aio.insecure_channel(f"unix://{path}", options=options))
        return channels[-1]

    yield make
    for channel in channels:
        await channel.close()


@pytest.fixture
async def proxied(
    containerd: Containerd, tmp_path: Path, connect: Callable[[Path], aio.Channel]
) -> AsyncIterator[aio.Channel]:
    async with Proxy(f"unix://{tmp_path}/criproxy.sock", f"unix://{containerd.path}", grace=0.5) as proxy:
        yield connect(proxy.path)


async def outcome(channel: aio.Channel, method: str, request: bytes = b"", **options: Any) -> dict[str, Any]:
    """All that a client can see of a call."""
    call: Any
    messages = []
    try:
        if method in UNARY:
            call = channel.unary_unary(method)(request, **options)
            messages.append(await call)
        else:
            call = channel.unary_stream(method)(request, **options)
            async for message in call:
                messages.append(message)
    except aio.AioRpcError:
        pass
    return {
        "messages": messages,
        "initial": tuple(await call.initial_metadata()),
        "trailing": tuple(await call.trailing_metadata()),
        "code": await call.code(),
        "details": await call.details(),
    }


# --- Passing through ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [VERSION, "/runtime.v1alpha2.ImageService/ListImages", EVENTS, UNKNOWN])
async def test_bytes_are_carried_as_they_are_whatever_the_method(containerd, proxied, method):
    containerd.behaviours[method] = echo
    not_even_protobuf = bytes(range(256))

    assert (await outcome(proxied, method, not_even_protobuf))["messages"] == [b"echo " + not_even_protobuf]
    assert containerd.requests == [(method, not_even_protobuf)]


@pytest.mark.parametrize("method", [VERSION, UNKNOWN])
async def test_an_empty_message_is_a_message(containerd, proxied, method):
    containerd.behaviours[method] = echo
    assert (await outcome(proxied, method, b""))["messages"] == [b"echo "]


@pytest.mark.parametrize("method", [VERSION, UNKNOWN])
async def test_a_method_that_containerd_does_not_know_fails_as_it_does_there(containerd, proxied, connect, method):
    direct = await outcome(connect(containerd.path), method)
    assert direct["code"] is grpc.StatusCode.UNIMPLEMENTED
    assert await outcome(proxied, method) == direct


@pytest.mark.parametrize("method", [VERSION, UNKNOWN])
async def test_messages_beyond_16_mib_pass_in_both_directions(containerd, proxied, method):
    containerd.behaviours[method] = echo
    large = os.urandom(1 << 20) * 20
    assert (await outcome(proxied, method, large))["messages"] == [b"echo " + large]


METADATA = (
    ("plain", "one"),
    ("repeated", "first"),
    ("repeated", "second"),
    ("binary-bin", b"\x00\xff\x80, bytes"),
    ("binary-bin", b""),
    ("long", "x" * 60_000),
)


@pytest.mark.parametrize("method", [VERSION, UNKNOWN])
async def test_metadata_reaches_containerd_as_without_the_proxy(containerd, proxied, connect, method):
    containerd.behaviours[method] = echo
    await outcome(connect(containerd.path), method, metadata=METADATA)
    await outcome(proxied, method, metadata=METADATA)

    direct, through = (
        sorted((key, str(value)) for key, value in metadata if key != "user-agent") for metadata in containerd.metadata
    )
    assert through == direct
    assert len(through) == len(METADATA)


@pytest.mark.parametrize("method", [VERSION, UNKNOWN])
async def test_metadata_reaches_the_client_as_without_the_proxy(containerd, proxied, connect, method):
    async def decorated(requests: AsyncIterator[bytes], context: Any) -> None:
        await context.send_initial_metadata((("head", "1"), *METADATA))
        await context.write(b"answer")
        context.set_trailing_metadata((("tail", "1"), *METADATA))

    containerd.behaviours[method] = decorated
    direct = await outcome(connect(containerd.path), method)
    assert len(direct["initial"]) == len(METADATA) + 1
    assert await outcome(proxied, method) == direct


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
@pytest.mark.parametrize("method", [VERSION, UNKNOWN])
async def test_an_error_keeps_code_message_details_and_metadata(containerd, proxied, connect, method, code):
    async def fail(requests: AsyncIterator[bytes], context: Any) -> None:
        await context.send_initial_metadata((("head", "1"),))
        trailing = (("grpc-status-details-bin", b"\x08\x05\x12\x00\xff"), ("tail", "a"), ("tail", "b"))
        await context.abort(code, "größer: 100 % of\nthe quota " + "y" * 20_000, trailing)

    containerd.behaviours[method] = fail
    direct, through = await outcome(connect(containerd.path), method), await outcome(proxied, method)
    assert direct["code"] is code
    if method not in UNARY:  # grpc.aio itself loses it now and then, also in this test's own client
        del direct["initial"], through["initial"]
    assert through == direct


async def test_a_stream_arrives_message_by_message(containerd, proxied):
    proceed = asyncio.Event()

    async def events(requests: AsyncIterator[bytes], context: Any) -> None:
        await context.send_initial_metadata((("head", "1"),))
        for number in range(3):
            await proceed.wait()
            proceed.clear()
            await context.write(b"%d" % number)
        context.set_trailing_metadata((("tail", "1"),))

    containerd.behaviours[EVENTS] = events
    async with asyncio.timeout(5):
        call = proxied.unary_stream(EVENTS)(b"")
        assert tuple(await call.initial_metadata()) == (("head", "1"),)
        for number in range(3):
            proceed.set()
            assert await call.read() == b"%d" % number
        assert await call.read() is aio.EOF
        assert tuple(await call.trailing_metadata()) == (("tail", "1"),)


async def test_a_stream_that_fails_delivers_what_came_before(containerd, proxied, connect):
    async def events(requests: AsyncIterator[bytes], context: Any) -> None:
        for number in range(50):
            await context.write(b"%d" % number)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too slow")

    containerd.behaviours[EVENTS] = events
    through = await outcome(proxied, EVENTS)
    assert through["messages"] == [b"%d" % number for number in range(50)]
    assert (through["code"], through["details"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too slow")


@pytest.mark.parametrize("method", [VERSION, EVENTS])
async def test_the_deadline_is_passed_on(containerd, proxied, method):
    containerd.behaviours[method] = echo
    await outcome(proxied, method, timeout=30)
    await outcome(proxied, method)
    with_deadline, without = containerd.remaining
    assert 0 < with_deadline <= 31  # gRPC rounds up at each step
    assert without is None


@pytest.mark.parametrize("method", [VERSION, EVENTS])
async def test_a_passed_deadline_ends_the_call_on_both_sides(containerd, proxied, method):
    containerd.behaviours[method] = hang
    assert (await outcome(proxied, method, timeout=0.2))["code"] is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(containerd.cancelled.wait(), 60)


@pytest.mark.parametrize("method", [VERSION, EVENTS])
async def test_a_client_that_cancels_cancels_the_call_in_containerd(containerd, proxied, method):
    entered = asyncio.Event()

    async def wait(requests: AsyncIterator[bytes], context: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    containerd.behaviours[method] = wait
    call = proxied.unary_stream(method)(b"")
    await asyncio.wait_for(entered.wait(), 60)
    call.cancel()
    await asyncio.wait_for(containerd.cancelled.wait(), 60)


async def test_a_client_whose_connection_ends_cancels_the_call_in_containerd(containerd, tmp_path, connect):
    containerd.behaviours[EVENTS] = hang
    async with Proxy(f"unix://{tmp_path}/criproxy.sock", f"unix://{containerd.path}") as proxy:
        client = connect(proxy.path)
        call = client.unary_stream(EVENTS)(b"")
        await containerd.called()
        await client.close()
        assert call.cancelled()
        await asyncio.wait_for(containerd.cancelled.wait(), 60)


@pytest.mark.parametrize("method", [VERSION, EVENTS])
async def test_containerd_going_away_ends_the_calls(containerd, proxied, connect, method):
    containerd.behaviours[method] = hang
    calls = [asyncio.create_task(outcome(channel, method)) for channel in (connect(containerd.path), proxied)]
    await containerd.called(2)
    await containerd.stop()
    direct, through = await asyncio.wait_for(asyncio.gather(*calls), 60)
    assert through["code"] is direct["code"]


@pytest.mark.parametrize("method", [VERSION, UNKNOWN])
async def test_a_second_request_message_is_refused_and_nothing_is_forwarded(containerd, proxied, method):
    containerd.behaviours[method] = echo
    call = proxied.stream_stream(method)(iter([b"one", b"two"]))
    with pytest.raises(aio.AioRpcError) as raised:
        await call.read()
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert method in raised.value.details()
    assert containerd.requests == []


async def test_a_client_that_keeps_its_sending_side_open_is_refused(containerd, proxied, monkeypatch):
    monkeypatch.setattr("criproxy.cri.proxy._HALF_CLOSE", 0.1)
    containerd.behaviours[UNKNOWN] = echo
    call = proxied.stream_stream(UNKNOWN)()
    await call.write(b"one")
    assert await asyncio.wait_for(call.code(), 60) is grpc.StatusCode.UNIMPLEMENTED
    assert containerd.requests == []


async def test_a_call_without_any_message_is_refused(containerd, proxied):
    call = proxied.stream_stream(UNKNOWN)()
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_many_calls_at_once_keep_to_their_own(containerd, proxied):
    async def slow_echo(requests: AsyncIterator[bytes], context: Any) -> None:
        await asyncio.sleep(0.02)
        await echo(requests, context)

    containerd.behaviours[VERSION] = containerd.behaviours[UNKNOWN] = slow_echo
    answers = await asyncio.gather(
        *(outcome(proxied, (VERSION, UNKNOWN)[number % 2], b"%d" % number) for number in range(200))
    )
    assert [answer["messages"] for answer in answers] == [[b"echo %d" % number] for number in range(200)]


# --- containerd down and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [VERSION, EVENTS])
async def test_without_containerd_calls_fail_at_once_and_work_at_once_when_it_is_back(containerd, proxied, method):
    containerd.behaviours[method] = echo
    for _ in range(3):
        await containerd.stop()
        for _ in range(5):
            # Whoever waits for it would do so until the deadline.
            assert (await outcome(proxied, method, timeout=30))["code"] is grpc.StatusCode.UNAVAILABLE
        await containerd.start()
        # And whoever remembers that it was away would fail.
        assert (await outcome(proxied, method, b"x", timeout=30))["messages"] == [b"echo x"]


async def test_it_starts_before_containerd_does(containerd, tmp_path, connect):
    await containerd.stop()
    containerd.path.unlink(missing_ok=True)
    containerd.behaviours[VERSION] = echo
    async with Proxy(f"unix://{tmp_path}/criproxy.sock", f"unix://{containerd.path}") as proxy:
        client = connect(proxy.path)
        assert (await outcome(client, VERSION))["code"] is grpc.StatusCode.UNAVAILABLE
        await containerd.start()
        assert (await outcome(client, VERSION, b"x"))["messages"] == [b"echo x"]


async def test_a_containerd_that_is_slow_to_take_a_connection_is_waited_for(containerd, tmp_path, connect):
    """As one is that gets too little processor time, for a moment."""
    containerd.behaviours[VERSION] = echo

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)
        onward, back = await asyncio.open_unix_connection(containerd.path)
        await asyncio.gather(pump(reader, back), pump(onward, writer))

    server = await asyncio.start_unix_server(relay, tmp_path / "slow.sock")
    async with Proxy(f"unix://{tmp_path}/criproxy.sock", f"unix://{tmp_path}/slow.sock") as proxy:
        assert (await outcome(connect(proxy.path), VERSION, b"x"))["messages"] == [b"echo x"]
    server.close()


# --- The socket --------------------------------------------------------------------------------------------------


def proxy_at(path: Path) -> Proxy:
    return Proxy(f"unix://{path}", f"unix://{path.parent}/no-containerd.sock", grace=0.1)


async def test_the_socket_is_for_its_owner_only_from_its_first_instant(tmp_path, monkeypatch):
    modes = []
    server = type(aio.server())
    original = server.add_insecure_port

    def add_insecure_port(self: Any, address: str) -> int:
        port = original(self, address)
        modes.append(stat.S_IMODE(os.stat(address.removeprefix("unix://")).st_mode))
        return port

    monkeypatch.setattr(server, "add_insecure_port", add_insecure_port)
    before = os.umask(0o022)
    try:
        async with proxy_at(tmp_path / "new" / "criproxy.sock") as proxy:
            assert stat.S_IMODE(proxy.path.stat().st_mode) == 0o600
            assert [path.name for path in proxy.path.parent.iterdir()] == ["criproxy.sock"]
            assert os.umask(0o022) == 0o022
        assert modes == [0o600]
        assert list((tmp_path / "new").iterdir()) == []
    finally:
        os.umask(before)


async def test_a_stale_socket_is_replaced(tmp_path):
    path = tmp_path / "criproxy.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    stale = path.stat().st_ino
    async with proxy_at(path):
        assert path.stat().st_ino != stale
        assert socket.socket(socket.AF_UNIX).connect_ex(os.fspath(path)) == 0


async def test_a_live_socket_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "criproxy.sock"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(os.fspath(path))
        live.listen(1)
        inode = path.stat().st_ino
        with pytest.raises(ListenError, match=r"criproxy\.sock is in use"):
            await proxy_at(path).start()
        assert path.stat().st_ino == inode
        assert [entry.name for entry in tmp_path.iterdir()] == ["criproxy.sock"]


async def test_a_second_proxy_is_refused_and_the_first_goes_on(containerd, proxied, tmp_path):
    containerd.behaviours[VERSION] = echo
    with pytest.raises(ListenError, match="is in use"):
        await proxy_at(tmp_path / "criproxy.sock").start()
    assert (await outcome(proxied, VERSION, b"x"))["messages"] == [b"echo x"]


async def test_what_is_no_socket_is_never_removed(tmp_path):
    path = tmp_path / "criproxy.sock"
    path.write_text("precious")
    with pytest.raises(ListenError, match="isn't a socket"):
        await proxy_at(path).start()
    assert path.read_text() == "precious"


async def test_a_path_that_no_socket_can_have_is_named(tmp_path):
    with pytest.raises(ListenError, match="too long"):
        await proxy_at(tmp_path / ("x" * 100) / "criproxy.sock").start()


async def test_containerds_own_socket_is_refused():
    with pytest.raises(ListenError, match="point kubelet"):
        Proxy("/run/containerd/containerd.sock", "unix:///run/containerd/containerd.sock")


async def test_a_socket_that_another_has_put_there_survives_the_end(tmp_path):
    path = tmp_path / "criproxy.sock"
    async with proxy_at(path):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_endpoints():
    for endpoint in ("unix:///run/x.sock", "unix:/run/x.sock", "/run/x.sock"):
        assert socket_path(endpoint) == Path("/run/x.sock")
    for endpoint in ("tcp://127.0.0.1:1", "run/x.sock", "unix://x.sock", ""):
        with pytest.raises(EndpointError, match="isn't a unix socket"):
            socket_path(endpoint)


# --- The end -----------------------------------------------------------------------------------------------------


async def test_at_the_end_a_call_may_finish_and_a_stream_is_told_to_come_back(containerd, tmp_path, connect):
    proceed, entered = asyncio.Event(), asyncio.Event()

    async def slow(requests: AsyncIterator[bytes], context: Any) -> None:
        entered.set()
        await proceed.wait()
        await context.write(b"done")

    async def two_then_hang(requests: AsyncIterator[bytes], context: Any) -> None:
        await context.write(b"1")
        await context.write(b"2")
        await asyncio.Event().wait()

    containerd.behaviours |= {VERSION: slow, EVENTS: hang, UNKNOWN: two_then_hang}
    proxy = Proxy(f"unix://{tmp_path}/criproxy.sock", f"unix://{containerd.path}", grace=5)
    await proxy.start()
    client = connect(proxy.path)
    call, events, unknown = (asyncio.create_task(outcome(client, method)) for method in (VERSION, EVENTS, UNKNOWN))
    async with asyncio.timeout(60):
        await entered.wait()
        # The unknown one is known for a stream by its second message.
        while sum(proxy._calls.values()) < 2:
            await asyncio.sleep(0.005)

    closing = asyncio.create_task(proxy.close())
    for stream in (events, unknown):
        ended = await asyncio.wait_for(stream, 60)
        assert (ended["code"], ended["details"]) == (grpc.StatusCode.UNAVAILABLE, "criproxy is shutting down")
    assert not call.done()
    assert not proxy.path.exists()
    proceed.set()
    assert (await asyncio.wait_for(call, 60))["messages"] == [b"done"]
    await asyncio.wait_for(closing, 60)


@pytest.mark.parametrize("intercepted", [False, True])
async def test_a_call_that_does_not_end_is_ended(containerd, tmp_path, connect, intercepted):
    async def pass_on(call: Call) -> bytes:
        return await call.forward()

    containerd.behaviours[VERSION] = hang
    endpoint = f"unix://{tmp_path}/criproxy.sock"
    proxy = Proxy(endpoint, f"unix://{containerd.path}", {VERSION: pass_on} if intercepted else {}, grace=0.2)
    await proxy.start()
    call = asyncio.create_task(outcome(connect(proxy.path), VERSION))
    await containerd.called()
    await asyncio.wait_for(proxy.close(), 60)
    assert (await asyncio.wait_for(call, 60))["code"] is grpc.StatusCode.UNAVAILABLE
    await asyncio.wait_for(containerd.cancelled.wait(), 60)


# --- Interceptors ------------------------------------------------------------------------------------------------


@pytest.fixture
async def serve(
    containerd: Containerd, tmp_path: Path, connect: Callable[[Path], aio.Channel]
) -> AsyncIterator[Callable[[Interceptor], Awaitable[aio.Channel]]]:
    """A proxy with one interceptor for Version in both versions of CRI."""
    proxies = []
    containerd.behaviours |= dict.fromkeys(methods("Version"), echo)

    async def start(interceptor: Interceptor) -> aio.Channel:
        proxy = Proxy(
            f"unix://{tmp_path}/criproxy.sock",
            f"unix://{containerd.path}",
            dict.fromkeys(methods("Version"), interceptor),
        )
        proxies.append(proxy)
        await proxy.start()
        return connect(proxy.path)

    yield start
    for proxy in proxies:
        await proxy.close()


@pytest.mark.parametrize("method", methods("Version"))
async def test_an_interceptor_that_forwards_changes_nothing(containerd, serve, connect, method):
    async def decorated(requests: AsyncIterator[bytes], context: Any) -> None:
        await context.send_initial_metadata((("head", "1"), *METADATA))
        async for request in requests:
            await context.write(request)
        context.set_trailing_metadata((("tail", "1"), *METADATA))

    seen = []

    async def pass_on(call: Call) -> bytes:
        seen.append(call)
        return await call.forward()

    containerd.behaviours[method] = decorated
    request = bytes(range(256)) * 100
    direct = await outcome(connect(containerd.path), method, request, metadata=METADATA)
    assert await outcome(await serve(pass_on), method, request, metadata=METADATA, timeout=30) == direct
    assert containerd.requests == [(method, request)] * 2
    (call,) = seen
    assert (call.method, call.name, call.request) == (method, "Version", request)
    assert sorted(map(str, call.metadata)) == sorted(map(str, METADATA))
    assert call.remaining() == pytest.approx(30, abs=2)


async def test_an_interceptor_may_change_the_request_and_the_response(containerd, serve):
    async def change(call: Call) -> bytes:
        return (await call.forward(b"other")) + b"!"

    assert (await outcome(await serve(change), VERSION, b"mine"))["messages"] == [b"echo other!"]
    assert containerd.requests == [(VERSION, b"other")]


async def test_an_interceptor_may_answer_by_itself(containerd, serve):
    async def answer(call: Call) -> bytes:
        return b"from here"

    assert (await outcome(await serve(answer), VERSION))["messages"] == [b"from here"]
    assert containerd.requests == []


async def test_an_interceptor_may_refuse(serve):
    async def refuse(call: Call) -> bytes:
        call.abort(grpc.StatusCode.INVALID_ARGUMENT, "criproxy.io/ports-map: 'x' isn't a port")

    result = await outcome(await serve(refuse), VERSION)
    assert result["code"] is grpc.StatusCode.INVALID_ARGUMENT
    assert result["details"] == "criproxy.io/ports-map: 'x' isn't a port"


async def fail_with_details(requests: AsyncIterator[bytes], context: Any) -> None:
    await context.send_initial_metadata((("head", "1"),))
    await context.abort(grpc.StatusCode.NOT_FOUND, "no such", (("grpc-status-details-bin", b"\xff\x00"),))


async def test_containerds_error_leaves_an_interceptor_as_it_came(containerd, serve, connect):
    async def pass_on(call: Call) -> bytes:
        return await call.forward()

    containerd.behaviours[VERSION] = fail_with_details
    direct = await outcome(connect(containerd.path), VERSION)
    assert await outcome(await serve(pass_on), VERSION) == direct


async def test_an_interceptor_may_handle_containerds_error(containerd, serve):
    async def mend(call: Call) -> bytes:
        with pytest.raises(UpstreamError, match=r"^NOT_FOUND: no such$") as raised:
            await call.forward()
        assert raised.value.trailing_metadata == (("grpc-status-details-bin", b"\xff\x00"),)
        return b"mended"

    containerd.behaviours[VERSION] = fail_with_details
    assert (await outcome(await serve(mend), VERSION))["messages"] == [b"mended"]


async def test_an_interceptors_own_failure_is_an_internal_error_with_its_name(serve, caplog):
    async def broken(call: Call) -> bytes:
        raise ZeroDivisionError("oh")

    result = await outcome(await serve(broken), VERSION)
    assert result["code"] is grpc.StatusCode.INTERNAL
    assert result["details"] == "criproxy: ZeroDivisionError: oh"
    assert f"{VERSION} failed inside criproxy" in caplog.text


async def test_a_request_that_an_interceptor_cannot_read_goes_on_untouched(containerd, serve):
    async def read(call: Call) -> bytes:
        VersionRequest.FromString(call.request)
        raise AssertionError

    not_utf8 = b"\x0a\x01\xff"
    assert (await outcome(await serve(read), VERSION, not_utf8))["messages"] == [b"echo " + not_utf8]
    assert containerd.requests == [(VERSION, not_utf8)]


async def test_a_client_that_cancels_cancels_the_interceptor_and_containerd(containerd, serve):
    cancelled = asyncio.Event()

    async def watch(call: Call) -> bytes:
        try:
            return await call.forward()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    containerd.behaviours[VERSION] = hang
    client = await serve(watch)
    call = client.unary_unary(VERSION)(b"")
    await containerd.called()
    call.cancel()
    await asyncio.wait_for(cancelled.wait(), 60)
    await asyncio.wait_for(containerd.cancelled.wait(), 60)


def test_methods_are_named_for_each_version_of_cri():
    assert methods("Version") == ("/runtime.v1.RuntimeService/Version", "/runtime.v1alpha2.RuntimeService/Version")
    assert methods("ImageStatus")[0] == "/runtime.v1.ImageService/ImageStatus"
    assert all(method in UNARY for method in methods("CreateContainer"))
    for no_unary_method in ("CreateContainers", "GetContainerEvents"):
        with pytest.raises(KeyError):
            methods(no_unary_method)
