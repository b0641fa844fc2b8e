"""The client's side of exec, attach and port-forward: a WebSocket (RFC 6455) in Kubernetes' channel protocol.

Every message starts with the number of its channel: 0 to 3 are stdin, stdout, stderr and the final status for exec and
attach; for port-forward there are two for each port, data and errors, and the first message of each names the port.
Only what the tests need: no TLS, no extensions.
"""

import base64
import contextlib
import json
import os
import socket
import struct
from collections.abc import Sequence
from urllib.parse import urlsplit

from lab import LabError
from lab.closing import Closing

_BINARY, _CLOSE, _PING, _PONG = 2, 8, 9, 10
STDIN, STDOUT, STDERR, STATUS = 0, 1, 2, 3


class Stream(Closing):
    """An open stream. `read()` collects output by channel; times in seconds."""

    def __init__(self, connection: socket.socket, received: bytes) -> None:
        self._connection = connection
        self._received = received
        self._closed = False
        self.channels: dict[int, bytes] = {}

    @classmethod
    def open(cls, url: str, *, ports: Sequence[int] = (), timeout: float = 60.0) -> "Stream":
        """Connect to a URL that Exec, Attach or PortForward answered. Raises LabError if the server refuses."""
        parts = urlsplit(url)
        connection = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 80), timeout)
        query = "&".join([parts.query, *(f"port={port}" for port in ports)]).strip("&")
        target = f"{parts.path}?{query}" if query else parts.path
        protocol = "v4.channel.k8s.io"
        connection.sendall(
            f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Protocol: {protocol}\r\n\r\n".encode()
        )
        answer = b""
        while b"\r\n\r\n" not in answer:
            data = connection.recv(65536)
            if not data:
                break
            answer += data
        head, _, rest = answer.partition(b"\r\n\r\n")
        if b" 101 " not in head.split(b"\r\n")[0]:
            connection.close()
            raise LabError(f"The streaming server refused: {answer.decode(errors='replace')}")
        stream = cls(connection, rest)
        if ports:
            # Each channel's first message is the port's number, two bytes.
            while len(stream.channels) < 2 * len(ports):
                stream._receive()
            stream.channels = dict.fromkeys(stream.channels, b"")
        return stream

    def write(self, data: bytes, channel: int = STDIN) -> None:
        self._send(_BINARY, bytes([channel]) + data)

    def read_until(self, wanted: bytes, channel: int = STDOUT, *, timeout: float = 60.0) -> bytes:
        """What the channel has brought once `wanted` is in it. Raises LabError if the stream ends, or TimeoutError."""
        self._connection.settimeout(timeout)
        while wanted not in self.channels.get(channel, b""):
            if not self._receive():
                raise LabError(f"The stream ended without {wanted!r}; it brought {self.channels}")
        return self.channels[channel]

    def read_all(self, *, timeout: float = 60.0) -> dict[int, bytes]:
        """Read until the other side closes; what each channel brought."""
        self._connection.settimeout(timeout)
        while self._receive():
            pass
        return self.channels

    def exit_code(self) -> int:
        """Read to the end, and return the command's exit code as the final status tells it."""
        status = json.loads(self.read_all().get(STATUS) or b"{}")
        if status.get("status") == "Success":
            return 0
        causes = status.get("details", {}).get("causes", [])
        for cause in causes:
            if cause.get("reason") == "ExitCode":
                return int(cause["message"])
        raise LabError(f"The stream ended without an exit code: {status}")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            # The other side may have been faster.
            with contextlib.suppress(OSError):
                self._send(_CLOSE, b"")
            self._connection.close()

    def _send(self, kind: int, data: bytes) -> None:
        length = len(data)
        if length < 126:
            size = bytes([0x80 | length])
        elif length <= 0xFFFF:
            size = struct.pack(">BH", 0x80 | 126, length)
        else:
            size = struct.pack(">BQ", 0x80 | 127, length)
        # Clients have to mask; a mask of zeros leaves the data as it is.
        self._connection.sendall(bytes([0x80 | kind]) + size + bytes(4) + data)

    def _receive(self) -> bool:
        """One message into its channel; False at the end."""
        kind, length = self._exactly(1), self._exactly(1)
        if not kind or not length:
            return False
        size = length[0] & 0x7F
        if size >= 126:
            size = int.from_bytes(self._exactly(2 if size == 126 else 8), "big")
        data = self._exactly(size)
        if kind[0] & 0xF == _CLOSE:
            return False
        if kind[0] & 0xF == _PING:
            self._send(_PONG, data)
        elif data:
            self.channels[data[0]] = self.channels.get(data[0], b"") + data[1:]
        return True

    def _exactly(self, size: int) -> bytes:
        while len(self._received) < size:
            data = self._connection.recv(65536)
            if not data:
                return b""
            self._received += data
        taken, self._received = self._received[:size], self._received[size:]
        return taken
