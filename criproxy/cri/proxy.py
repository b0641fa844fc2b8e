"""The gRPC proxy between kubelet and containerd: bytes in, the same bytes out, whatever the method.

On the wire a unary answer is a stream of one, so one kind of handler carries every method, known or not:

- from the client as a stream of messages, because only such a handler sees whether a second one comes (it is refused:
  no CRI method streams from the client, and with a unary handler grpc would drop it without a word);
- to containerd as unary_stream, because a stream_stream call that containerd ends at once comes back as INTERNAL in
  about one case of eight.

CRI's methods that are known to be unary go to containerd as unary_unary, which takes fewer turns of the event loop
(a fifth of the time). Methods in `intercept` do the same, with an interceptor (see calls.py) between the two.

What grpc keeps to itself doesn't pass: user-agent, which it writes anew, and the metadata grpc-trace-bin and
grpc-tags-bin, which it doesn't show (nobody in Kubernetes sends them). Initial metadata of a streaming call that fails
before its first message may be lost, for the same reason; containerd sends none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from criproxy.cri.calls import UNARY, Abort, Answer, Call, CallError, Interceptor, Metadata, UpstreamError
from criproxy.cri.channel import UNLIMITED, Channel, socket_path
from criproxy.cri.listen import ListenError, Listening, listen

log = logging.getLogger(__name__)

_Context = aio.ServicerContext[bytes, bytes]
_Result = TypeVar("_Result")

_GOODBYE: Final = "criproxy is shutting down"

# In the place of a (de)serialiser: bytes as they are. (The stubs don't know that it may be None.)
_RAW: Final[Any] = None

# How long a client may take from its message to the end of its sending side. Unary and server-streaming clients send
# both together; one that waits for an answer in between streams, and that is refused.
_HALF_CLOSE: Final = 5.0  # seconds

_SERVER_OPTIONS: Final = (
    *UNLIMITED,
    # grpc-go pings as often as it likes to measure bandwidth; the default would end the connection for it.
    ("grpc.http2.max_ping_strikes", 0),
)


class Proxy:
    """Serves CRI at `listen` (a unix socket, mode 0600) from containerd at `runtime_endpoint`.

    `async with Proxy(…):` serves until the block ends. `intercept` maps full method names (see calls.methods) to
    interceptors. `grace` is how many seconds calls under way may still take when it stops; streams end at once.
    """

    def __init__(
        self,
        listen: str,
        runtime_endpoint: str,
        intercept: Mapping[str, Interceptor] | None = None,
        grace: float = 5.0,
    ) -> None:
        self.path: Final = socket_path(listen)
        if self.path == socket_path(runtime_endpoint):
            raise ListenError(f"{self.path} is containerd's own socket; listen on another and point kubelet at that")
        self._upstream = Channel(runtime_endpoint)
        self._intercept = dict(intercept or {})
        self._grace = grace
        self._calls: dict[asyncio.Task[Any], bool] = {}  # the tasks of calls under way: is it a stream?
        self._ending: set[asyncio.Task[Any]] = set()  # those that the shutdown ends
        self._closing = False
        self._server: aio.Server | None = None
        self._socket: Listening | None = None

    async def __aenter__(self) -> Proxy:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Serves from now on. Raises ListenError."""
        server = aio.server(handlers=[_AnyMethod(self._handler)], options=list(_SERVER_OPTIONS))
        self._socket = await listen(server, self.path)
        self._server = server

    async def close(self) -> None:
        """Ends within about `grace` seconds: streams at once, other calls when they are done, the rest by force.

        Those that didn't end by themselves get UNAVAILABLE, at which clients try again.
        """
        self._closing = True
        server, self._server = self._server, None
        if server is not None:
            if self._socket is not None:
                self._socket.remove()
            stopping = asyncio.ensure_future(server.stop(self._grace + 1))
            self._end(task for task, streams in self._calls.items() if streams)
            if self._calls:
                await asyncio.wait(list(self._calls), timeout=self._grace)
            self._end(self._calls)
            await stopping
        await self._upstream.close()

    def _end(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        for task in list(tasks):
            if task not in self._ending:
                self._ending.add(task)
                task.cancel()

    # --- A call -------------------------------------------------------------------------------------------------

    def _handler(self, method: str) -> grpc.RpcMethodHandler[bytes, bytes]:
        interceptor = self._intercept.get(method)
        if interceptor is None and method not in UNARY:

            async def pass_stream(requests: AsyncIterator[bytes], context: _Context) -> None:
                await self._serve(method, context, self._stream(method, requests, context))

            return grpc.stream_stream_rpc_method_handler(pass_stream)

        async def pass_unary(requests: AsyncIterator[bytes], context: _Context) -> bytes:
            return await self._serve(method, context, self._unary(method, requests, context, interceptor))

        return grpc.stream_unary_rpc_method_handler(pass_unary)

    async def _serve(self, method: str, context: _Context, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Counts the call among those under way, and turns what is raised into its status."""
        task = _this_task()
        self._calls[task] = _streams(method)
        try:
            if not self._closing:
                return await work
            work.close()
            failure: CallError = Abort(grpc.StatusCode.UNAVAILABLE, _GOODBYE)
        except CallError as error:
            failure = error
        except asyncio.CancelledError:
            if task not in self._ending:
                raise  # the client has gone; grpc knows
            task.uncancel()
            failure = Abort(grpc.StatusCode.UNAVAILABLE, _GOODBYE)
        except Exception as error:
            log.exception("%s failed inside criproxy", method)
            failure = Abort(grpc.StatusCode.INTERNAL, f"criproxy: {type(error).__name__}: {error}")
        finally:
            del self._calls[task]
            self._ending.discard(task)
        # A status that is set instead would take an empty message along.
        await context.abort(failure.code, failure.message, failure.trailing_metadata)
        raise failure  # not reached: abort raises

    async def _stream(self, method: str, requests: AsyncIterator[bytes], context: _Context) -> None:
        request = await _only_message(method, requests)
        call: aio.UnaryStreamCall[bytes, bytes] = self._upstream.ready().unary_stream(method, _RAW, _RAW)(
            request, timeout=context.time_remaining(), metadata=_without_agent(context.invocation_metadata())
        )
        try:
            if initial := tuple(await call.initial_metadata()):
                await context.send_initial_metadata(initial)
            messages = 0
            async for message in call:
                await context.write(message)
                messages += 1
                if messages == 2:
                    self._calls[_this_task()] = True
            context.set_details(await call.details() or "")  # OK may have a message too
            context.set_trailing_metadata(tuple(await call.trailing_metadata()))
        except aio.AioRpcError as error:
            raise _upstream_error(error) from None
        finally:
            call.cancel()

    async def _unary(
        self, method: str, requests: AsyncIterator[bytes], context: _Context, interceptor: Interceptor | None
    ) -> bytes:
        request = await _only_message(method, requests)
        metadata = _without_agent(context.invocation_metadata())

        async def send(data: bytes) -> Answer:
            call: aio.UnaryUnaryCall[bytes, bytes] = self._upstream.ready().unary_unary(method, _RAW, _RAW)(
                data, timeout=context.time_remaining(), metadata=metadata
            )
            try:
                response = await call
                return Answer(response, tuple(await call.initial_metadata()), tuple(await call.trailing_metadata()))
            except aio.AioRpcError as error:
                raise _upstream_error(error) from None
            finally:
                call.cancel()

        try:
            answer: Answer | None
            if interceptor is None:
                answer = passed = await send(request)
                response = passed.response
            else:
                call = Call(method, request, send, metadata, context.time_remaining)
                try:
                    response = await interceptor(call)
                except DecodeError:
                    if call.answer is not None:
                        raise
                    # Not protobuf, or not what protobuf takes in Python (Go lets strings pass that aren't UTF-8):
                    # what it is worth is containerd's to say.
                    log.warning("%s: the request can't be read here and goes on untouched", method)
                    response = await call.forward()
                answer = call.answer
        except UpstreamError as error:
            if error.initial_metadata:
                await context.send_initial_metadata(error.initial_metadata)
            raise
        if answer is not None:
            if answer.initial_metadata:
                await context.send_initial_metadata(answer.initial_metadata)
            if answer.trailing_metadata:
                context.set_trailing_metadata(answer.trailing_metadata)
        return response


class _AnyMethod(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # it takes none outside of the stubs
    """Takes every method of every service, without (de)serialisers: messages are bytes on both sides."""

    def __init__(self, handler: Callable[[str], grpc.RpcMethodHandler[bytes, bytes]]) -> None:
        self._handler = handler

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return self._handler(handler_call_details.method)


async def _only_message(method: str, requests: AsyncIterator[bytes]) -> bytes:
    """The one message of a call whose client has said that there is no other."""
    messages = aiter(requests)
    request = await anext(messages, None)
    more = None
    if request is not None:
        try:
            async with asyncio.timeout(_HALF_CLOSE):
                more = await anext(messages, None)
        except TimeoutError:
            more = b""
    if request is None or more is not None:
        raise Abort(
            grpc.StatusCode.UNIMPLEMENTED,
            f"criproxy carries calls with one request message, and the client of {method} sends a stream of them",
        )
    return request


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _streams(method: str) -> bool:
    """Whether CRI answers this method with a stream. Others are known for one by their second message."""
    name = method.rpartition("/")[2]
    return name == "GetContainerEvents" or name.startswith("Stream")


def _without_agent(metadata: aio.Metadata | None) -> Metadata:
    """The client's metadata but for user-agent, which grpc fills in itself and refuses to repeat."""
    return tuple((key, value) for key, value in metadata or () if key != "user-agent")


def _upstream_error(error: aio.AioRpcError) -> UpstreamError:
    trailing = tuple(cast(aio.Metadata, error.trailing_metadata()))
    return UpstreamError(error.code(), error.details() or "", trailing, tuple(error.initial_metadata()))
