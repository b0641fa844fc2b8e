"""One connection of kubelet's (or a mesh's agent) that was watched: whether it is a probe, and how it was answered.

A probe is an HTTP request of `kube-probe/…`, a gRPC health check, a TLS connection that names no server, or a
connection that is opened and closed without a word. Packets come as the hook has copied them: doubled, out of order,
cut, or not at all. What they say is a container's or its client's, and bounded here in whatever it costs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final

from criproxy.hook.pod_maps import Visitor, Watched
from criproxy.kubelet import grpc_health, http1, tls_hello
from criproxy.policy import Port

DIRECTION_BYTES: Final = 32 << 10
"""Kept of one direction of a connection at most, until it is understood."""
_PIECES: Final = 16
"""Of one direction, that wait for others or are known to be missing."""
_REQUESTS: Final = 16
"""Of one connection that are taken for probes: as many as packets of it that are copied."""
_PROBE_AGENT: Final = "kube-probe/"
_VARYING: Final = ("x-request-id", "traceparent", "tracestate", "b3", "x-b3-", "x-envoy-", "x-forwarded-", "forwarded")
"""Beginnings of headers that a mesh's agent adds, each time with another value: they don't tell probes apart."""


class Verdict(Enum):
    UNDECIDED = "undecided"
    PROBE = "probe"
    OTHER = "other"


class Kind(StrEnum):
    HTTP = "HTTP"
    GRPC = "gRPC"
    TLS = "HTTPS"
    TCP = "TCP"
    CONNECT = "connect"
    """Not a probe as such: a connection that wasn't accepted, so that nobody knows which it would have been."""


@dataclass(frozen=True)
class Probe:
    """What tells one probe from another."""

    port: Port
    visitor: Visitor
    kind: Kind
    asks: str = ""
    """HTTP: method and target; gRPC: the service."""
    headers: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        whose = "kubelet's" if self.visitor is Visitor.KUBELET else "the forwarded"
        where = f":{self.port.number}"
        match self.kind:
            case Kind.HTTP:
                method, _, target = self.asks.partition(" ")
                return f"{whose} HTTP probe {method} {where}{shortened(target)}"
            case Kind.GRPC:
                return f"{whose} gRPC probe of {where}" + (f' (service "{shortened(self.asks)}")' if self.asks else "")
            case Kind.CONNECT:
                return f"{whose} connection to {where}"
            case _:
                return f"{whose} {self.kind} probe of {where}"


@dataclass(frozen=True)
class Result:
    ok: bool
    said: str
    """Goes after `…was last`, for people."""
    again: bytes | None = None
    """HTTP: the message for whoever asks the same. Of the other kinds a success says all."""


def shortened(text: str) -> str:
    """For people, who may look at it on a terminal: no control characters, not too long."""
    text = "".join(c if c.isprintable() else "?" for c in text[:100])
    return text if len(text) < 80 else text[:77] + "..."


def http_probe(request: http1.Request, port: Port, visitor: Visitor) -> Probe | None:
    """The probe that an HTTP request is, or None. `kube-lifecycle/` is a hook's, which wants to be obeyed."""
    if not request.header("user-agent").startswith(_PROBE_AGENT) or request.has_body:
        return None
    headers = tuple(sorted(h for h in request.headers if h[0] != "user-agent" and not h[0].startswith(_VARYING)))
    return Probe(port, visitor, Kind.HTTP, f"{request.method} {request.target}", headers)


def opening(data: bytes, ended: bool, port: Port, visitor: Visitor) -> Probe | Verdict:
    """What a client wants whose connection begins with `data`, or that it can't be a probe. Of a gRPC probe the service
    isn't known yet. `ended`: it says no more."""
    try:
        probe = _opening(data, ended, port, visitor)
    except ValueError:
        return Verdict.OTHER
    return Verdict.OTHER if ended and probe is Verdict.UNDECIDED else probe


def _opening(data: bytes, ended: bool, port: Port, visitor: Visitor) -> Probe | Verdict:
    if not data:
        return Probe(port, visitor, Kind.TCP) if ended else Verdict.UNDECIDED
    if data[0] == tls_hello.HANDSHAKE:
        name = tls_hello.server_name(data)
        if name is None:
            return Verdict.UNDECIDED
        return Verdict.OTHER if name else Probe(port, visitor, Kind.TLS)
    if data.startswith(grpc_health.PREFACE):
        return Probe(port, visitor, Kind.GRPC)
    if grpc_health.PREFACE.startswith(data):
        return Verdict.UNDECIDED
    request = http1.request(data)
    return Verdict.UNDECIDED if request is None else http_probe(request, port, visitor) or Verdict.OTHER


class Half:
    """One direction, put together by its sequence numbers: `data` is what is known without a gap."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False
        self._first: int | None = None
        """Sequence number of the direction's first byte. The numbers that follow count from there."""
        self._at = 0
        """Where `data` begins."""
        self._seen = 0
        self._later: dict[int, bytes] = {}
        self._missing: set[int] = set()
        """Where something begins that won't come: a packet is copied up to a length only."""

    @property
    def seen(self) -> int:
        """Bytes from the beginning of `data` on that were sent, whether they are known or not."""
        return self._seen - self._at

    @property
    def stuck(self) -> bool:
        """`data` won't grow."""
        return self.ended or len(self.data) >= DIRECTION_BYTES or self._at + len(self.data) in self._missing

    def add(self, packet: Watched) -> None:
        begin = packet.seq + packet.syn
        if self._first is None:
            self._first = begin
        offset = (begin - self._first + (1 << 31)) % (1 << 32) - (1 << 31)
        self.ended = self.ended or packet.fin or packet.rst
        if not packet.length or packet.rst:
            return
        self._seen = max(self._seen, offset + packet.length)
        known = offset + len(packet.payload)
        if len(self._later) < _PIECES and len(packet.payload) > len(self._later.get(offset, b"")):
            self._later[offset] = packet.payload
        if len(packet.payload) < packet.length and len(self._missing) < _PIECES:
            self._missing.add(known)
        self._join()

    def take(self, size: int) -> None:
        """What comes first is done with, also as far as it isn't known."""
        del self.data[:size]
        self._at += size
        if not self.data:
            self._join()

    def _join(self) -> None:
        for offset in sorted(self._later):
            end = self._at + len(self.data)
            if offset > end:
                break
            piece = self._later.pop(offset)[end - offset :]
            self.data += piece[: DIRECTION_BYTES - len(self.data)]


class Conversation:
    def __init__(self, port: Port, visitor: Visitor) -> None:
        self.verdict = Verdict.UNDECIDED
        self.last = 0.0
        """Monotonic seconds of its last packet."""
        self._port = port
        self._visitor = visitor
        self._client = Half()
        self._server = Half()
        self._talk: _Talk | None = None
        self._opened: int | None = None
        """The sequence number of the client's SYN."""
        self._accepted = False
        self._closed = False

    def has(self, packet: Watched) -> bool:
        """Whether a packet with the same addresses and ports is of this connection: a SYN may begin another one."""
        return not (packet.incoming and packet.syn) or self._opened == packet.seq

    def under_way(self) -> Probe | None:
        """What waits for an answer, or has yet to say what it wants."""
        if self._closed:
            return None
        if self._talk is None or not self._talk.begun:
            return Probe(self._port, self._visitor, Kind.CONNECT)
        return self._talk.asked

    def add(self, packet: Watched) -> list[tuple[Probe, Result]]:
        """The next packet; returns results that have become known by it. A later one of the same probe counts."""
        self.last = max(self.last, packet.time)
        if self._closed:
            return []
        if packet.incoming and packet.syn:
            self._opened = packet.seq
        self._accepted = self._accepted or not (packet.incoming or packet.rst)
        (self._client if packet.incoming else self._server).add(packet)
        try:
            results = list(self._follow())
        except ValueError:
            self.verdict = Verdict.OTHER
            self._close()
            return []
        if packet.fin or packet.rst:
            results += self._ended(packet)
        return results

    def _follow(self) -> Iterator[tuple[Probe, Result]]:
        if self._talk is None:
            self._talk = self._recognised()
        if self._talk is not None:
            yield from self._talk.follow(self._client, self._server)
            if self._talk.begun:
                self.verdict = Verdict.PROBE

    def _recognised(self) -> _Talk | None:
        """By the client's first bytes. Raises ValueError if it can't be a probe."""
        begin = bytes(self._client.data[: len(grpc_health.PREFACE)])
        if not begin:
            if self._client.stuck and self._client.seen:
                raise ValueError("its first bytes aren't known")
            return None
        if begin[0] == tls_hello.HANDSHAKE:
            return _Tls(self._port, self._visitor)
        if begin == grpc_health.PREFACE:
            self._client.take(len(begin))
            return _Health(self._port, self._visitor)
        if grpc_health.PREFACE.startswith(begin) and not self._client.stuck:
            return None
        return _Http(self._port, self._visitor)

    def _ended(self, packet: Watched) -> list[tuple[Probe, Result]]:
        """One side has said its last word."""
        unanswered = Result(False, "given up without an answer" if packet.incoming else "closed without an answer")
        results = []
        if self._talk is not None:
            asked = self.under_way()
            if asked is not None:
                results = [(asked, unanswered)]
                self._talk.asked = None
                self._close()
        elif self._opened is not None and packet.incoming and self._accepted:
            results = [(Probe(self._port, self._visitor, Kind.TCP), Result(True, "accepted"))]
            self.verdict = Verdict.PROBE
            self._close()
        elif self._opened is not None and packet.rst and not packet.incoming:
            said = "reset" if self._accepted else "refused"
            results = [(Probe(self._port, self._visitor, Kind.CONNECT), Result(False, said))]
            self.verdict = Verdict.PROBE
            self._close()
        if packet.rst or (self._client.ended and self._server.ended):
            self._close()
        return results

    def _close(self) -> None:
        """Nothing more can become known; what comes late is still known to be of this one."""
        self._closed = True
        self._client, self._server = Half(), Half()


class _Talk(ABC):
    """What is spoken on a connection."""

    def __init__(self, port: Port, visitor: Visitor) -> None:
        self.begun = False
        """It is known to be a probe's."""
        self.asked: Probe | None = None
        """Not answered yet."""
        self._port = port
        self._visitor = visitor

    @abstractmethod
    def follow(self, client: Half, server: Half) -> Iterator[tuple[Probe, Result]]:
        """The results that have become known. Raises ValueError where it is no probe's (any more)."""

    def _ask(self, probe: Probe) -> None:
        self.begun = True
        self.asked = probe

    def _answered(self, result: Result) -> Iterator[tuple[Probe, Result]]:
        if self.asked is not None:
            yield self.asked, result
        self.asked = None


class _Http(_Talk):
    """One request after the other, on the same connection."""

    def __init__(self, port: Port, visitor: Visitor) -> None:
        super().__init__(port, visitor)
        self._answering: Probe | None = None
        """Its answer isn't complete."""
        self._lost = False
        self._requests = 0

    def follow(self, client: Half, server: Half) -> Iterator[tuple[Probe, Result]]:
        while not self._lost:
            if self._answering is None and not self._next(client):
                return
            assert self._answering is not None
            try:
                answer = http1.answer(server.data, server.seen, stuck=server.stuck, ended=server.ended)
            except http1.NotHttp:
                self._lost = True
                yield from self._answered(Result(False, "answered with something that isn't HTTP"))
                return
            if answer is None:
                return
            if self.asked is not None or answer.size is not None:
                self.asked = None
                yield self._answering, Result(200 <= answer.status < 400, f"answered {answer.status}", answer.again)
            if answer.size is None:
                return
            server.take(answer.size)
            self._answering = None

    def _next(self, client: Half) -> bool:
        if not client.data:
            return False
        request = http1.request(client.data)
        if request is None:
            if client.stuck:
                raise ValueError("its request can't be known wholly")
            return False
        probe = http_probe(request, self._port, self._visitor)
        self._requests += 1
        if probe is None or self._requests > _REQUESTS:
            raise ValueError("it isn't a probe's request")
        client.take(request.size)
        self._ask(probe)
        self._answering = probe
        return True


class _Tls(_Talk):
    """What is said can't be seen, but whether there was a handshake, and an answer after it."""

    def __init__(self, port: Port, visitor: Visitor) -> None:
        super().__init__(port, visitor)
        self._said_before: int | None = None
        """Bytes of the server's when the client had its keys."""

    def follow(self, client: Half, server: Half) -> Iterator[tuple[Probe, Result]]:
        if not self.begun:
            name = tls_hello.server_name(client.data)
            if name is None and not client.stuck:
                return
            if name != b"":
                raise ValueError("it names a server")
            self._ask(Probe(self._port, self._visitor, Kind.TLS))
        if server.data and server.data[0] != tls_hello.HANDSHAKE:
            yield from self._answered(Result(False, "answered without a TLS handshake"))
        elif self._said_before is not None and server.seen > self._said_before:
            yield from self._answered(Result(True, "answered"))
        elif self._said_before is None and tls_hello.APPLICATION_DATA in tls_hello.records(client.data):
            self._said_before = server.seen


@dataclass
class _Call:
    probe: Probe
    request: bytes = b""
    answer: bytes = b""


class _Health(_Talk):
    """HTTP/2, of which health checks alone are probes."""

    def __init__(self, port: Port, visitor: Visitor) -> None:
        super().__init__(port, visitor)
        self._requests = grpc_health.Frames()
        self._answers = grpc_health.Frames()
        self._calls: dict[int, _Call] = {}

    def follow(self, client: Half, server: Half) -> Iterator[tuple[Probe, Result]]:
        parts, size = self._requests.read(client.data)
        client.take(size)
        for part in parts:
            yield from self._request(part)
        try:
            parts, size = self._answers.read(server.data)
            server.take(size)
            for part in parts:
                yield from self._answer(part)
        except grpc_health.NotUnderstood:
            yield from self._answered(Result(False, "answered with something that isn't gRPC's"))

    def _request(self, part: grpc_health.Part) -> Iterator[tuple[Probe, Result]]:
        call = self._calls.get(part.stream)
        if call is None:
            if not part.headers:
                return
            if part.headers.get(":path") != grpc_health.PATH or len(self._calls) >= _REQUESTS:
                raise ValueError("it isn't a health check")
            call = self._calls[part.stream] = _Call(Probe(self._port, self._visitor, Kind.GRPC))
            self._ask(call.probe)
        call.request += part.data
        if part.ended:
            call.probe = Probe(self._port, self._visitor, Kind.GRPC, grpc_health.service(call.request))
            self._ask(call.probe)
        elif part.reset:
            del self._calls[part.stream]
            yield from self._answered(Result(False, "given up without an answer"))

    def _answer(self, part: grpc_health.Part) -> Iterator[tuple[Probe, Result]]:
        call = self._calls.get(part.stream)
        if call is None:
            return
        call.answer += part.data
        if not (part.ended or part.reset):
            return
        del self._calls[part.stream]
        self.asked = None
        code = part.headers.get("grpc-status", "")
        if code == "0":
            status = grpc_health.status(call.answer)
            yield call.probe, Result(status == "SERVING", f"answered {status}")
        else:
            said = f"answered with gRPC's status {shortened(code)}" if code else "closed without an answer"
            yield call.probe, Result(False, said)
