"""A client of the lab's applications: it asks, checks the answer, and tells when its first byte was there.

Times are seconds, taken around the system calls: for a new connection from before connect() on, for an open one from
before send() on, to the return of the first recv() that brings something.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from lab import LabError
from lab.closing import Closing

TIMEOUT = 20.0


@dataclass(frozen=True)
class Request:
    """What is sent, and what has to come back."""

    data: bytes
    wanted: bytes
    body: Callable[[bytes], bytes | None]
    """The body of an answer, None as long as it isn't there as a whole."""


class Connection(Closing):
    """An open TCP connection to an application of the lab."""

    def __init__(self, address: str, port: int, *, timeout: float = TIMEOUT) -> None:
        """Raises OSError, TimeoutError among them."""
        self._where = f"{address}:{port}"
        self._began = time.monotonic()
        self._socket = socket.create_connection((address, port), timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: Request) -> float:
        """Seconds from now to the first byte of the answer. Raises LabError if it isn't what is wanted, or OSError."""
        return self._ask(request, time.monotonic())

    def _ask(self, request: Request, began: float) -> float:
        self._socket.sendall(request.data)
        received = self._socket.recv(65536)
        seconds = time.monotonic() - began
        while (body := request.body(received)) is None:
            data = self._socket.recv(65536)
            if not data:
                raise LabError(f"{self._where} closed the connection after {received[-200:]!r}")
            received += data
        if body != request.wanted:
            raise LabError(f"{self._where} answered {body[:200]!r} instead of {request.wanted[:200]!r}")
        return seconds

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True)
class Service:
    """Where an application listens, and a request whose answer says that it is the same as ever."""

    address: str
    port: int
    request: Request

    def first_byte(self, *, timeout: float = TIMEOUT) -> float:
        """Seconds from a new connection's first packet to the first byte of the answer. Raises LabError, OSError."""
        with Connection(self.address, self.port, timeout=timeout) as connection:
            return connection._ask(self.request, connection._began)

    def wait(self, *, timeout: float = TIMEOUT) -> None:
        """Until it listens and answers. Raises LabError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.first_byte()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise LabError(
                        f"{self.address}:{self.port} doesn't answer within {timeout:g} s: {error}"
                    ) from error
                time.sleep(0.02)


def redis(*words: str | bytes, wanted: str | bytes = b"OK") -> Request:
    """A command of redis and what it has to answer: a status, a number or a string."""
    encoded = [word.encode() if isinstance(word, str) else word for word in words]
    parts = [b"*%d\r\n" % len(encoded), *(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)]
    return Request(b"".join(parts), wanted.encode() if isinstance(wanted, str) else wanted, _redis_body)


def _redis_body(received: bytes) -> bytes | None:
    line, end, rest = received.partition(b"\r\n")
    if not end:
        return None
    if not line.startswith(b"$"):
        # An error keeps its sign, so that it isn't taken for a status.
        return line if line.startswith(b"-") else line[1:]
    size = int(line[1:])
    if size < 0:
        return b"(nil)"
    return rest[:size] if len(rest) >= size + 2 else None


def http(path: str = "/", *, wanted: str) -> Request:
    """A GET and the body that it has to bring."""
    return Request(f"GET {path} HTTP/1.1\r\nHost: lab\r\n\r\n".encode(), wanted.encode(), _http_body)


def _http_body(received: bytes) -> bytes | None:
    head, end, rest = received.partition(b"\r\n\r\n")
    if not end:
        return None
    status, *headers = head.split(b"\r\n")
    if status.split()[1] != b"200":
        return status
    sizes = [int(value) for name, _, value in (line.partition(b":") for line in headers) if name == b"Content-Length"]
    return rest if not sizes or len(rest) >= sizes[0] else None
