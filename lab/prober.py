"""Kubelet's probes: all four kinds, each at its period, from a process in a cgroup of its own, as kubelet's are.

    probes = [prober.Http("live", pod.ip, 80, "/healthz"), prober.Exec.of("ping", container, "redis-cli", "ping")]
    with Prober(containerd, probes) as kubelets:
        kubelets.wait_for_success()
        ...
        assert kubelets.failures() == []

What is sent, and what counts as a success, is taken from kubelet's `pkg/probe` (1.36). Where it differs: redirects
aren't followed, and timeouts are per wait instead of for all of a probe.
"""

import contextlib
import functools
import http.client
import itertools
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import grpc

from criproxy.api import cri_pb2 as cri
from lab import CHECKOUT, LabError, cgroups
from lab.console import sentence
from lab.containerd import Containerd
from lab.kubelet import PATIENCE, TIMEOUT, Container
from lab.process import Service

USER_AGENT = "kube-probe/1.36"
# kubelet reads no more of an answer, and closes.
_MOST_BYTES = 10 * 1024
_CHECK = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # HealthCheckResponse: field 1, `status`
# SO_LINGER as kubelet sets it for its probes: at most one second.
_LINGER = struct.pack("ii", 1, 1)
_numbers = itertools.count(1)


class Failed(Exception):
    """A probe's answer that says no."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """`period` and `timeout` in seconds, the names as in a pod's spec."""

    period: float = 1.0
    timeout: float = 1.0

    def make(self) -> str:
        """Probe once, and return what came back. Raises Failed, or what says that nothing came back."""
        raise NotImplementedError


@dataclass(frozen=True)
class Http(Probe):
    """GET; 200 to 399 is a success. Over TLS no certificate is verified, and no server name is sent."""

    name: str
    address: str
    port: int
    path: str = "/"
    headers: Mapping[str, str] = field(default_factory=dict)
    tls: bool = False

    def make(self) -> str:
        connection = http.client.HTTPConnection(self.address, self.port, timeout=self.timeout)
        with contextlib.closing(connection):
            connection.sock = _connect(self.address, self.port, self.timeout)
            if self.tls:
                connection.sock = _unverified().wrap_socket(connection.sock)
            connection.putrequest("GET", self.path, skip_host=True, skip_accept_encoding=True)
            host = f"[{self.address}]" if ":" in self.address else self.address
            sent = {"Host": f"{host}:{self.port}", "User-Agent": USER_AGENT, "Accept": "*/*", **self.headers}
            for key, value in (sent | {"Connection": "close"}).items():
                connection.putheader(key, value)
            connection.endheaders()
            answer = connection.getresponse()
            body = answer.read(_MOST_BYTES)
        if not 200 <= answer.status < 400:
            raise Failed(f"HTTP {answer.status}: {body[:200]!r}")
        return f"HTTP {answer.status}, {len(body)} bytes"


@dataclass(frozen=True)
class Tcp(Probe):
    """Connect, and close."""

    name: str
    address: str
    port: int

    def make(self) -> str:
        _connect(self.address, self.port, self.timeout).close()
        return "connected"


@dataclass(frozen=True)
class Grpc(Probe):
    """grpc.health.v1.Health/Check, on a new connection each time; SERVING is a success."""

    name: str
    address: str
    port: int
    service: str = ""

    def make(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        options = [
            ("grpc.primary_user_agent", USER_AGENT),
            # A connection is shared by all channels to a place otherwise, and proxies are taken from the environment.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        name = self.service.encode()
        request = b"\x0a" + bytes([len(name)]) + name if name else b""
        with grpc.insecure_channel(f"{host}:{self.port}", options=options) as channel:
            check = channel.unary_unary(_CHECK, request_serializer=bytes, response_deserializer=bytes)
            answer = check(request, timeout=self.timeout)
        if answer != _SERVING:
            raise Failed(f"not SERVING: {answer!r}")
        return "SERVING"


@dataclass(frozen=True)
class Exec(Probe):
    """ExecSync; exit code 0 is a success. `endpoint` is the CRI socket, `container` the id."""

    name: str
    endpoint: str
    container: str
    command: Sequence[str]

    @classmethod
    def of(cls, name: str, container: Container, *command: str, period: float = 1.0, timeout: float = 1.0) -> "Exec":
        return cls(name, container.pod.kubelet.endpoint, container.id, command, period=period, timeout=timeout)

    def make(self) -> str:
        # CRI counts in whole seconds, and so does a pod's spec.
        request = cri.ExecSyncRequest(container_id=self.container, cmd=self.command, timeout=max(1, int(self.timeout)))
        call = _channel(self.endpoint).unary_unary(
            "/runtime.v1.RuntimeService/ExecSync",
            request_serializer=cri.ExecSyncRequest.SerializeToString,
            response_deserializer=cri.ExecSyncResponse.FromString,
        )
        answer = call(request, timeout=request.timeout + TIMEOUT)
        output: str = (answer.stdout + answer.stderr).decode(errors="replace")[:200]
        if answer.exit_code:
            raise Failed(f"exit code {answer.exit_code}: {output}")
        return output


KINDS: Mapping[str, type[Probe]] = {kind.__name__: kind for kind in (Http, Tcp, Grpc, Exec)}
AnyProbe = Http | Tcp | Grpc | Exec


def _connect(address: str, port: int, timeout: float) -> socket.socket:
    connection = socket.create_connection((address, port), timeout)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
    return connection


@functools.cache
def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@functools.cache
def _channel(endpoint: str) -> grpc.Channel:
    return grpc.insecure_channel(endpoint)


@dataclass(frozen=True)
class Result:
    """Of one probe: `time` is time.monotonic() at its beginning, `seconds` how long it took, `output` for people."""

    name: str
    time: float
    seconds: float
    success: bool
    output: str


class Prober:
    """See the module's text. The process that probes lives as long as the block."""

    def __init__(self, lab: Containerd, probes: Sequence[AnyProbe]) -> None:
        self._cgroup = lab.kubelet_cgroup
        self._probes = probes
        name = f"prober-{next(_numbers)}"
        self._log = lab.logs / f"{name}.log"
        self._results = lab.logs / f"{name}.jsonl"
        self._service: Service | None = None

    def __enter__(self) -> "Prober":
        self._results.touch()
        probes = json.dumps([{"kind": type(probe).__name__, **asdict(probe)} for probe in self._probes])
        argv = [sys.executable, "-m", "lab.prober", self._cgroup, str(self._results), probes]
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        self._service = Service("the prober", argv, self._log, env=environment)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._service:
            self._service.stop()
            self._service = None

    def results(self, name: str = "", *, since: float = 0.0) -> list[Result]:
        """Of the probe of this name, or of all: those that began at `since` (time.monotonic()) or later. Raises
        LabError if the prober has ended by itself."""
        if self._service and self._service.returncode is not None:
            raise LabError(f"The prober ended with {self._service.returncode}:\n{self._service.tail()}")
        written = self._results.read_text()
        # The last line may be half there.
        lines = written[: written.rfind("\n") + 1].splitlines()
        found = (Result(**json.loads(line)) for line in lines)
        return [result for result in found if name in ("", result.name) and result.time >= since]

    def failures(self, *, since: float = 0.0) -> list[Result]:
        return [result for result in self.results(since=since) if not result.success]

    def wait_for_success(self, *, timeout: float = PATIENCE) -> None:
        """Until the last result of every probe is a success: the pods are ready. Raises LabError after seconds."""
        deadline = time.monotonic() + timeout
        while True:
            last = {result.name: result for result in self.results()}
            if all(probe.name in last and last[probe.name].success for probe in self._probes):
                return
            if time.monotonic() > deadline:
                raise LabError(f"Probes without success after {timeout:g} s; the last: {list(last.values())}")
            time.sleep(0.05)


def main(cgroup: str, results: str, probes: str) -> None:
    # Before the first socket: the kernel remembers which cgroup one was made in.
    cgroups.join(cgroup, os.getpid())
    lock = threading.Lock()
    with Path(results).open("a") as out:

        def write(result: Result) -> None:
            with lock:
                print(json.dumps(asdict(result)), file=out, flush=True)

        threads = []
        for settings in json.loads(probes):
            probe = KINDS[settings.pop("kind")](**settings)
            threads.append(threading.Thread(target=_repeat, args=(settings["name"], probe, write)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _repeat(name: str, probe: Probe, write: Callable[[Result], None]) -> None:
    following = time.monotonic()
    while True:
        began = time.monotonic()
        try:
            success, output = True, probe.make()
        except (grpc.RpcError, Failed, OSError, http.client.HTTPException) as error:
            success, output = False, sentence(error)
        write(Result(name, began, time.monotonic() - began, success, output))
        # As a ticker: one that took too long isn't made up for.
        following = max(following + probe.period, time.monotonic())
        time.sleep(max(0.0, following - time.monotonic()))


if __name__ == "__main__":
    main(*sys.argv[1:])
