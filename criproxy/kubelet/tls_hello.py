"""The first message of a TLS connection, and its server name (RFC 8446, 4.1.2; RFC 6066, 3): pure, and no cryptography.

Kubelet's probes have none, as it connects to an address; an API server's calls of webhooks do.
"""

from __future__ import annotations

from typing import Final

HELLO_BYTES: Final = 16 << 10
"""The longest that is read. Post-quantum key shares make 2 KiB of it."""
_RECORDS: Final = 64
"""No more are looked at: a container could keep us busy with empty ones."""
HANDSHAKE: Final = 22
APPLICATION_DATA: Final = 23
_CLIENT_HELLO: Final = 1
_SERVER_NAME: Final = 0


class NotTls(ValueError):
    pass


def server_name(data: bytes | bytearray) -> bytes | None:
    """The name that the client wants; empty if it says none. None: the message isn't complete. Raises NotTls."""
    message = bytearray()
    offset = 0
    # A message may be spread over several records.
    for _ in range(_RECORDS):
        record = bytes(data[offset : offset + 5])
        if not b"\x16\x03".startswith(record[:2]):
            raise NotTls("it doesn't begin with a handshake")
        size = int.from_bytes(record[3:5], "big")
        if offset + 5 + size > HELLO_BYTES:
            raise NotTls(f"its first message is longer than {HELLO_BYTES} bytes")
        if len(record) < 5 or offset + 5 + size > len(data):
            return None
        message += data[offset + 5 : offset + 5 + size]
        offset += 5 + size
        if not size or message[0] != _CLIENT_HELLO:
            raise NotTls("its first message isn't a client's")
        if len(message) >= 4 and len(message) >= 4 + int.from_bytes(message[1:4], "big"):
            break
    else:
        raise NotTls(f"its first message is spread over more than {_RECORDS} records")
    body = _Reader(bytes(message[4 : 4 + int.from_bytes(message[1:4], "big")]))
    body.take(2 + 32)  # version, random
    body.vector(1)  # session
    body.vector(2)  # ciphers
    body.vector(1)  # compression
    if not body.left:
        return b""
    extensions = _Reader(body.vector(2))
    while extensions.left:
        kind = extensions.number(2)
        content = extensions.vector(2)
        if kind == _SERVER_NAME:
            return content
    return b""


def records(data: bytes | bytearray) -> list[int]:
    """The types of the first records that begin in `data`."""
    found: list[int] = []
    offset = 0
    while offset + 5 <= len(data) and len(found) < _RECORDS:
        found.append(data[offset])
        offset += 5 + int.from_bytes(data[offset + 3 : offset + 5], "big")
    return found


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise NotTls("a length in its first message is wrong")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """What stands behind its length, a number of `size` bytes."""
        return self.take(self.number(size))
