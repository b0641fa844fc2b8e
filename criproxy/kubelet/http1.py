"""HTTP/1 as far as a probe needs it, pure: the head of a request, and an answer that is kept to be given again.

The bytes are an application's or a client's: nothing in them is believed. What isn't HTTP raises NotHttp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

HEAD_BYTES: Final = 16 << 10
"""The longest head, of a request or an answer, that is read."""
ANSWER_BYTES: Final = 16 << 10
"""The longest answer that is kept whole; kubelet reads 10 KiB of a probe's body at most (pkg/probe/http)."""
_HEADERS: Final = 128
_INTERIM: Final = 8
_CHUNKS: Final = 64
"""What takes more lines, `1xx` messages or chunks than that isn't looked at: a container could keep us busy with it."""

_METHOD: Final = re.compile(rb"[A-Z]{3,20} ")
_METHOD_SO_FAR: Final = re.compile(rb"[A-Z]{0,20}\Z")
_REQUEST_LINE: Final = re.compile(r"([A-Z]+) ([!-~]+) HTTP/1\.[01]")
_STATUS_LINE: Final = re.compile(r"HTTP/1\.[01] ([1-9][0-9]{2})(?: .*)?")
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")

_OF_THE_CONNECTION: Final = frozenset({"connection", "keep-alive", "proxy-connection", "upgrade"})
_OF_THE_BODY: Final = frozenset({"content-length", "transfer-encoding", "content-encoding", "trailer", "content-md5"})


class NotHttp(ValueError):
    pass


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, in their order."""
    size: int
    """Bytes of the head."""

    def header(self, name: str) -> str:
        """The first of that name (in lower case), or an empty text."""
        return next((value for key, value in self.headers if key == name), "")

    @property
    def has_body(self) -> bool:
        return self.header("content-length") not in ("", "0") or bool(self.header("transfer-encoding"))


@dataclass(frozen=True)
class Answer:
    status: int
    again: bytes
    """What a client is given in its place: a complete message, after which the connection is closed."""
    size: int | None
    """Bytes of the whole message, and of those that led to it (`100 Continue`); None: not known (yet)."""


def request(data: bytes | bytearray) -> Request | None:
    """None: its head isn't complete. Raises NotHttp."""
    if not _METHOD.match(data) and not _METHOD_SO_FAR.match(data):
        raise NotHttp("it doesn't begin with a method")
    if (found := _head(data, 0, False)) is None:
        return None
    line, headers, size = found
    if not (match := _REQUEST_LINE.fullmatch(line)):
        raise NotHttp("its first line isn't a request's")
    return Request(match[1], match[2], headers, size)


def answer(data: bytes | bytearray, total: int, *, stuck: bool, ended: bool) -> Answer | None:
    """The first answer in `data`, to a GET or the like; None: not known yet. Raises NotHttp.

    `total`: how many bytes there were in all, as `data` may be their beginning alone. `stuck`: it won't grow.
    `ended`: and no more were sent.
    """
    offset = 0
    cut = stuck and total > len(data)
    for _ in range(_INTERIM):
        if not b"HTTP/1.".startswith(bytes(data[offset : offset + 7])):
            raise NotHttp("an answer doesn't begin with HTTP/1")
        if (found := _head(data, offset, cut)) is None:
            return None
        line, headers, begin = found
        if not (match := _STATUS_LINE.fullmatch(line)):
            raise NotHttp("its first line isn't an answer's")
        status = int(match[1])
        if status == 101 or status >= 200:
            break
        offset = begin  # more is to come
    else:
        raise NotHttp("it has too many messages before its answer")
    size = None if begin > len(data) else _end(data, begin, status, dict(headers), total, ended)
    whole = size is not None and size <= len(data) and size - offset <= ANSWER_BYTES
    left_out = _OF_THE_CONNECTION if whole else _OF_THE_CONNECTION | _OF_THE_BODY
    lines = [line, *(f"{name}: {value}" for name, value in headers if name not in left_out), "connection: close"]
    body = b""
    if whole:
        body = bytes(data[begin:size])
    elif status not in (204, 304):
        lines.append("content-length: 0")
    return Answer(status, "\r\n".join([*lines, "", ""]).encode("latin-1") + body, size)


def _head(data: bytes | bytearray, begin: int, cut: bool) -> tuple[str, tuple[tuple[str, str], ...], int] | None:
    """First line, headers, and where the head ends. None: it isn't complete. If it is `cut`, the lines that are there
    are taken for all, and its end isn't in `data`."""
    end = data.find(b"\r\n\r\n", begin, begin + HEAD_BYTES)
    if end < 0 and cut:
        end = data.rfind(b"\r\n", begin)
    if end < 0:
        if len(data) - begin >= HEAD_BYTES:
            raise NotHttp(f"its head is longer than {HEAD_BYTES} bytes")
        return None
    first, *lines = data[begin:end].decode("latin-1").split("\r\n")
    headers = []
    if len(lines) > _HEADERS:
        raise NotHttp(f"its head has more than {_HEADERS} lines")
    for line in lines:
        name, colon, value = line.partition(":")
        # A header may not be continued on another line any more (RFC 9112, 5.2), and no probe's is.
        if not colon or not _NAME.fullmatch(name) or "\r" in value or "\n" in value:
            raise NotHttp("a line of its head isn't a header")
        headers.append((name.lower(), value.strip(" \t")))
    return first, tuple(headers), end + 4 if data[end : end + 4] == b"\r\n\r\n" else len(data) + 1


def _end(
    data: bytes | bytearray, begin: int, status: int, headers: dict[str, str], total: int, ended: bool
) -> int | None:
    """Where the message ends whose body begins at `begin` (RFC 9112, 6.3). None: not known (yet)."""
    if status in (204, 304):
        return begin
    if coding := headers.get("transfer-encoding"):
        return _end_of_chunks(data, begin) if coding.lower() == "chunked" else None
    if (length := headers.get("content-length")) is not None:
        if not re.fullmatch(r"[0-9]{1,15}", length):
            raise NotHttp("its Content-Length isn't a number")
        end = begin + int(length)
        return end if end <= total else None
    return total if ended else None


def _end_of_chunks(data: bytes | bytearray, offset: int) -> int | None:
    for _ in range(_CHUNKS):
        if not (match := _CHUNK.match(data, offset)):
            break
        offset = match.end()
        if length := int(match[1], 16):
            offset += length + 2
            if offset > len(data):
                return None
            continue
        # Trailers, up to an empty line.
        if data[offset : offset + 2] == b"\r\n":
            return offset + 2
        end = data.find(b"\r\n\r\n", offset)
        return end + 4 if end >= 0 else None
    return None
