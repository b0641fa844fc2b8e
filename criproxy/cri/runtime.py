"""What the daemon itself asks containerd: the few CRI calls, and one of containerd's own, whose answers it acts on.

kubelet's calls don't pass here (proxy.py carries those). Pids, namespaces and an image's entrypoint aren't part of CRI:
containerd puts them as JSON into the `info` of a verbose answer, in a form that is the same in 1.6 to 2.x:

- ContainerStatus: `pid`, `sandboxID`, `snapshotter`, `snapshotKey`, `runtimeType`, `runtimeSpec` (the OCI
  specification)
- PodSandboxStatus: `pid`, `runtimeSpec`
- ImageStatus: `imageSpec.config` (the OCI image's: Entrypoint, Cmd, Env, WorkingDir, User, StopSignal)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc import aio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_random_exponential

from criproxy.api import containerd_pb2, cri_pb2
from criproxy.cri.channel import Channel

log = logging.getLogger(__name__)

_SERVICE: Final = "/runtime.v1.RuntimeService/"
_IMAGES: Final = "/runtime.v1.ImageService/"
_SNAPSHOTS: Final = "/containerd.services.snapshots.v1.Snapshots/"

# Where containerd's CRI plugin keeps what it creates.
_NAMESPACE: Final = (("containerd-namespace", "k8s.io"),)

# What containerd 1.x says, as UNKNOWN, between opening its socket and having recovered its pods.
_NOT_YET: Final = "server is not initialized yet"

_Response = TypeVar("_Response", bound=Message)
# In the place of a (de)serialiser: the stubs don't know that it may be None.
_RAW: Final[Any] = None


# CRI's `enum Signal` in the order of its numbers, from 1 on (kubernetes/cri-api, pkg/apis/runtime/v1/api.proto). The
# real-time ones follow: SIGRTMIN is 35, SIGRTMIN+15 50, SIGRTMAX-14 51, SIGRTMAX 65.
_SIGNALS: Final = (
    *("SIGABRT", "SIGALRM", "SIGBUS", "SIGCHLD", "SIGCLD", "SIGCONT", "SIGFPE", "SIGHUP", "SIGILL", "SIGINT", "SIGIO"),
    *("SIGIOT", "SIGKILL", "SIGPIPE", "SIGPOLL", "SIGPROF", "SIGPWR", "SIGQUIT", "SIGSEGV", "SIGSTKFLT", "SIGSTOP"),
    *("SIGSYS", "SIGTERM", "SIGTRAP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGUSR1", "SIGUSR2", "SIGVTALRM"),
    *("SIGWINCH", "SIGXCPU", "SIGXFSZ"),
    "SIGRTMIN",
    *(f"SIGRTMIN+{n}" for n in range(1, 16)),
    *(f"SIGRTMAX-{n}" for n in range(14, 0, -1)),
    "SIGRTMAX",
)


def stop_signal(number: int) -> str:
    """The name of a signal by its number in CRI (not the kernel's); empty for 0, the image's own, and unknown ones."""
    return _SIGNALS[number - 1] if 0 < number <= len(_SIGNALS) else ""


class CriError(Exception):
    """containerd didn't give what was asked of it. The text is one sentence for people."""

    def __init__(self, message: str, code: grpc.StatusCode | None = None) -> None:
        super().__init__(message)
        self.code = code


class NotFound(CriError):
    """containerd has no such container, sandbox or image (any more)."""


class Unreachable(CriError):
    """containerd's socket refused, also after the retries."""


class Incomplete(CriError):
    """An answer lacks something that this containerd was expected to tell."""


@dataclass(frozen=True)
class Version:
    name: str  # containerd
    version: str  # 1.6.20~ds1
    api: str  # v1


@dataclass(frozen=True)
class ContainerInfo:
    """A container as containerd sees it."""

    status: cri_pb2.ContainerStatus
    pid: int  # of its first process, in the host's PID namespace; 0 unless it runs
    sandbox_id: str
    snapshotter: str
    snapshot_key: str
    runtime: str  # io.containerd.runc.v2
    spec: Mapping[str, Any] = field(repr=False)  # the OCI runtime specification

    @property
    def running(self) -> bool:
        return self.status.state == cri_pb2.CONTAINER_RUNNING

    @property
    def exited(self) -> bool:
        """status.exit_code, reason and finished_at (nanoseconds since the epoch) count then."""
        return self.status.state == cri_pb2.CONTAINER_EXITED

    @property
    def cgroup(self) -> str:
        """Its cgroup's path as the specification has it: /kubepods/… or slice:prefix:name."""
        return str(_at(self.spec, "linux", "cgroupsPath") or "")


@dataclass(frozen=True)
class SandboxInfo:
    """A pod sandbox as containerd sees it."""

    status: cri_pb2.PodSandboxStatus
    pid: int  # of its pause process, in the host's PID namespace; 0 unless it runs
    netns: Path | None  # None: the host's own network
    spec: Mapping[str, Any] = field(repr=False)

    @property
    def ready(self) -> bool:
        return self.status.state == cri_pb2.SANDBOX_READY


@dataclass(frozen=True)
class ImageConfig:
    """What an image says about the process to run in it."""

    id: str
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()  # KEY=value
    working_dir: str = ""
    user: str = ""  # name or number, with or without :group
    stop_signal: str = ""  # SIGQUIT or a number; empty: SIGTERM


@dataclass(frozen=True)
class Mount:
    """One step of mounting a snapshot, as mount(2) takes it."""

    type: str
    source: str
    options: tuple[str, ...]


class Runtime:
    """A client of the containerd at `endpoint` (unix://…). Made and used on one event loop; close() it.

    `timeout` is what one attempt may take, `patience` how long an unreachable containerd is tried again; both in
    seconds. Only what may be repeated without harm is asked for here. Each call raises CriError.
    """

    def __init__(self, endpoint: str, timeout: float = 10.0, patience: float = 5.0) -> None:
        self._channel = Channel(endpoint)
        self._timeout = timeout
        self._patience = patience

    async def __aenter__(self) -> Runtime:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def version(self) -> Version:
        answer = await self._ask(_SERVICE + "Version", cri_pb2.VersionRequest(), cri_pb2.VersionResponse)
        return Version(answer.runtime_name, answer.runtime_version, answer.runtime_api_version)

    async def info(self) -> Mapping[str, str]:
        """What Status(verbose) tells of the runtime itself; its configuration is among it (see containerd.py)."""
        request = cri_pb2.StatusRequest(verbose=True)
        return (await self._ask(_SERVICE + "Status", request, cri_pb2.StatusResponse)).info

    async def remove_container(self, container_id: str) -> None:
        """Of one that was never started; one that is gone already is no error."""
        request = cri_pb2.RemoveContainerRequest(container_id=container_id)
        await self._ask(_SERVICE + "RemoveContainer", request, cri_pb2.RemoveContainerResponse)

    async def container_status(self, container_id: str) -> ContainerInfo:
        """Raises NotFound when it was removed."""
        request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
        what = f"container {container_id}"
        answer = await self._ask(_SERVICE + "ContainerStatus", request, cri_pb2.ContainerStatusResponse, what)
        info = _info(answer.info, what)
        return ContainerInfo(
            status=answer.status,
            pid=int(info.get("pid") or 0),
            sandbox_id=str(info.get("sandboxID") or ""),
            snapshotter=str(info.get("snapshotter") or ""),
            snapshot_key=str(info.get("snapshotKey") or ""),
            runtime=str(info.get("runtimeType") or ""),
            spec=_at(info, "runtimeSpec") or {},
        )

    async def sandbox_status(self, sandbox_id: str) -> SandboxInfo:
        """Raises NotFound when it was removed."""
        request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
        what = f"pod sandbox {sandbox_id}"
        answer = await self._ask(_SERVICE + "PodSandboxStatus", request, cri_pb2.PodSandboxStatusResponse, what)
        info = _info(answer.info, what)
        spec = _at(info, "runtimeSpec") or {}
        paths = [
            namespace.get("path")
            for namespace in _at(spec, "linux", "namespaces") or ()
            if namespace.get("type") == "network"
        ]
        return SandboxInfo(
            status=answer.status,
            pid=int(info.get("pid") or 0),
            netns=Path(paths[0]) if paths and paths[0] else None,
            spec=spec,
        )

    async def image_status(self, image: str, runtime_handler: str = "") -> ImageConfig:
        """`image` is a reference or an id, as in CreateContainer. Raises NotFound when it isn't on this node."""
        request = cri_pb2.ImageStatusRequest(
            image=cri_pb2.ImageSpec(image=image, runtime_handler=runtime_handler), verbose=True
        )
        what = f"image {image}"
        answer = await self._ask(_IMAGES + "ImageStatus", request, cri_pb2.ImageStatusResponse, what)
        if not answer.HasField("image"):
            # CRI has no error for that.
            raise NotFound(f"containerd has no {what}", grpc.StatusCode.NOT_FOUND)
        config = _at(_info(answer.info, what), "imageSpec", "config")
        if config is None:
            raise Incomplete(f"containerd's answer about {what} has no imageSpec.config")
        return ImageConfig(
            id=answer.image.id,
            entrypoint=tuple(config.get("Entrypoint") or ()),
            cmd=tuple(config.get("Cmd") or ()),
            env=tuple(config.get("Env") or ()),
            working_dir=config.get("WorkingDir") or "",
            user=config.get("User") or "",
            stop_signal=config.get("StopSignal") or "",
        )

    async def list_pod_sandboxes(self) -> list[cri_pb2.PodSandbox]:
        """In any state."""
        answer = await self._ask(
            _SERVICE + "ListPodSandbox", cri_pb2.ListPodSandboxRequest(), cri_pb2.ListPodSandboxResponse
        )
        return list(answer.items)

    async def mounts(self, container: ContainerInfo) -> list[Mount]:
        """How the container's root file system is mounted; it can be looked into before the container starts.

        Raises NotFound when it was removed, and CriError with UNIMPLEMENTED when this isn't containerd.
        """
        what = f"the snapshot of container {container.status.id}"
        if not container.snapshotter or not container.snapshot_key:
            raise Incomplete(f"containerd's answer doesn't name {what}")
        request = containerd_pb2.MountsRequest(snapshotter=container.snapshotter, key=container.snapshot_key)
        answer = await self._ask(_SNAPSHOTS + "Mounts", request, containerd_pb2.MountsResponse, what)
        return [Mount(mount.type, mount.source, tuple(mount.options)) for mount in answer.mounts]

    async def _ask(self, method: str, request: Message, response: type[_Response], what: str = "") -> _Response:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Unreachable),
            stop=stop_after_delay(self._patience),
            wait=wait_random_exponential(multiplier=0.05, max=1.0),
            before_sleep=_log_retry,
            reraise=True,
        )
        data: bytes = await retrying(self._ask_once, method, request.SerializeToString(), what)
        return response.FromString(data)

    async def _ask_once(self, method: str, request: bytes, what: str) -> bytes:
        metadata = _NAMESPACE if method.startswith(_SNAPSHOTS) else ()
        call: aio.UnaryUnaryCall[bytes, bytes] = self._channel.ready().unary_unary(method, _RAW, _RAW)(
            request, timeout=self._timeout, metadata=metadata
        )
        try:
            return await call
        except aio.AioRpcError as error:
            raise self._failure(method, what, error) from None
        finally:
            call.cancel()

    def _failure(self, method: str, what: str, error: aio.AioRpcError) -> CriError:
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.NOT_FOUND:
            return NotFound(f"containerd has no {what}", code)
        if code is grpc.StatusCode.UNAVAILABLE or (code is grpc.StatusCode.UNKNOWN and details == _NOT_YET):
            return Unreachable(f"containerd doesn't answer at {self._channel.path}: {details}", code)
        name = method.rpartition("/")[2] + (f" for {what}" if what else "")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return CriError(f"containerd didn't answer {name} within {self._timeout:g} s", code)
        return CriError(f"containerd failed {name}: {details} ({code.name})", code)


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    wait = state.next_action.sleep if state.next_action else 0.0
    log.warning("%s; trying again in %.2f s (attempt %d)", error, wait, state.attempt_number)


def _info(info: Mapping[str, str], what: str) -> Mapping[str, Any]:
    """The JSON object that containerd adds to a verbose answer."""
    text = info.get("info")  # a map of protobuf answers info["info"] with "" when it isn't there
    if text is None:
        raise Incomplete(f"containerd's answer about {what} has no verbose information")
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise Incomplete(f"containerd's verbose information about {what} isn't JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise Incomplete(f"containerd's verbose information about {what} isn't a JSON object")
    return cast(Mapping[str, Any], parsed)


def _at(value: Any, *keys: str) -> Any:
    """The member at that path, None where one is missing or null."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
