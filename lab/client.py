"""A client of the lab's applications: it asks, checks the answer, and tells when its first byte was there.

Times are seconds of a monotonic clock, taken around the system calls: for a new connection from before connect() on,
for an open one from before send() on, to the return of the first recv() that brings something.
"""

import socket
import time
from dataclasses import dataclass
from types import TracebackType

from lab import LabError

TIMEOUT = 30.0


@dataclass(frozen=True)
class Request:
    """What is sent, and what the answer has to end with."""

    data: bytes
    answer: bytes


class Connection:
    """An open TCP connection to an application of the lab."""

    def __init__(self, address: str, port: int) -> None:
        """Raises OSError, TimeoutError among them."""
        self._where = f"{address}:{port}"
        self._began = time.monotonic()
        self._socket = socket.create_connection((address, port), TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: Request) -> float:
        """Seconds from here to the first byte of the answer. Raises LabError if that isn't the right one, OSError."""
        return self._ask(request, time.monotonic())

    def _ask(self, request: Request, began: float) -> float:
        self._socket.sendall(request.data)
        data = self._socket.recv(65536)
        first = time.monotonic() - began
        received = data
        while data and not received.endswith(request.answer):
            data = self._socket.recv(65536)
            received += data
        if not received.endswith(request.answer):
            raise LabError(f"{self._where} answered {received[-200:]!r} instead of {request.answer!r}")
        return first

    def __enter__(self) -> "Connection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()


def first_byte(address: str, port: int, request: Request) -> float:
    """Seconds from the first packet of a new connection to the first byte of the answer. Raises as Connection does."""
    with Connection(address, port) as connection:
        return connection._ask(request, connection._began)


def redis(*words: str | bytes, answer: bytes) -> Request:
    """A command of redis, whose answer's last line has to be `answer` (without the line's end)."""
    encoded = [word.encode() if isinstance(word, str) else word for word in words]
    parts = [b"*%d\r\n" % len(encoded), *(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)]
    return Request(b"".join(parts), answer + b"\r\n")


def http(path: str = "/", *, answer: bytes) -> Request:
    """A GET whose answer's body has to end with `answer`."""
    return Request(f"GET {path} HTTP/1.1\r\nHost: lab\r\n\r\n".encode(), answer)
