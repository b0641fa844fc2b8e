"""CRI calls that criproxy looks into: what an interceptor is given and may do.

An interceptor takes the place of one unary method. It answers with the response's bytes, its own or those that
`call.forward()` brings from containerd:

    async def version(call: Call) -> bytes:
        return await call.forward()

Whatever it doesn't handle goes on as containerd said it: an UpstreamError that leaves the interceptor reaches the
client with containerd's own code, message and details. When the client cancels or its deadline passes, the
interceptor is cancelled; what must be finished all the same belongs into a task of its owner.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, NoReturn

import grpc

# Keys may repeat; values of keys that end in -bin are bytes.
Metadata = tuple[tuple[str, str | bytes], ...]

VERSIONS: Final = ("runtime.v1", "runtime.v1alpha2")
_UNARY_NAMES: Final = {
    "RuntimeService": (
        "Version", "Status", "RuntimeConfig", "UpdateRuntimeConfig",
        "RunPodSandbox", "StopPodSandbox", "RemovePodSandbox", "PodSandboxStatus", "ListPodSandbox",
        "UpdatePodSandboxResources", "PodSandboxStats", "ListPodSandboxStats", "ListPodSandboxMetrics",
        "CreateContainer", "StartContainer", "StopContainer", "RemoveContainer", "ContainerStatus", "ListContainers",
        "UpdateContainerResources", "ReopenContainerLog", "CheckpointContainer", "ContainerStats",
        "ListContainerStats", "ListMetricDescriptors", "ExecSync", "Exec", "Attach", "PortForward",
    ),
    "ImageService": ("ListImages", "ImageStatus", "PullImage", "RemoveImage", "ImageFsInfo"),
}  # fmt: skip

# Full names of the methods that answer with exactly one message. Others are carried as well, as streams.
UNARY: Final = frozenset(
    f"/{version}.{service}/{name}" for version in VERSIONS for service, names in _UNARY_NAMES.items() for name in names
)


def methods(name: str) -> tuple[str, ...]:
    """The full names of a unary CRI method in each version, all with the same wire format.

    `methods("Version")` is `("/runtime.v1.RuntimeService/Version", "/runtime.v1alpha2.RuntimeService/Version")`.
    Raises KeyError for a name that isn't one, so that a typing error doesn't leave a method unintercepted.
    """
    for service, names in _UNARY_NAMES.items():
        if name in names:
            return tuple(f"/{version}.{service}/{name}" for version in VERSIONS)
    raise KeyError(name)


class CallError(Exception):
    """A status other than OK, as the client is to get it."""

    def __init__(self, code: grpc.StatusCode, message: str, trailing_metadata: Metadata = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.trailing_metadata = trailing_metadata

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class UpstreamError(CallError):
    """containerd's own answer to a forwarded call; UNAVAILABLE when it can't be reached."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        trailing_metadata: Metadata = (),
        initial_metadata: Metadata = (),
    ) -> None:
        super().__init__(code, message, trailing_metadata)
        self.initial_metadata = initial_metadata


class Abort(CallError):
    """An interceptor's refusal."""


@dataclass(frozen=True)
class Answer:
    """What came back for a forwarded call."""

    response: bytes
    initial_metadata: Metadata = ()
    trailing_metadata: Metadata = ()


Send = Callable[[bytes], Awaitable[Answer]]


class Call:
    """One call of one unary method, on its way to containerd.

    `send` carries request bytes to containerd and raises UpstreamError; `remaining` gives the seconds until the
    client's deadline, None without one. Tests make a Call with their own.
    """

    def __init__(
        self,
        method: str,
        request: bytes,
        send: Send,
        metadata: Metadata = (),
        remaining: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.method: Final = method  # the full name: /runtime.v1.RuntimeService/Version
        self.request: Final = request
        self.metadata: Final = metadata
        self.answer: Answer | None = None  # the last one of forward()
        self._send = send
        self._remaining = remaining

    @property
    def name(self) -> str:
        """The method without its service, the same in each version of CRI."""
        return self.method.rpartition("/")[2]

    def remaining(self) -> float | None:
        """Seconds until the client gives up; None when it waits for ever."""
        return self._remaining()

    async def forward(self, request: bytes | None = None) -> bytes:
        """The response of containerd to `request`, or to the client's own bytes; may be called more than once.

        The client gets the initial and trailing metadata of the last answer. Raises UpstreamError.
        """
        self.answer = await self._send(self.request if request is None else request)
        return self.answer.response

    def abort(self, code: grpc.StatusCode, message: str) -> NoReturn:
        """Ends the call with this status; `message` is a sentence for people."""
        raise Abort(code, message)


Interceptor = Callable[[Call], Awaitable[bytes]]
