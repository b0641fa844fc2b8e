"""gRPC's health check (grpc.health.v1) on the wire: HTTP/2 that is listened to, one direction at a time. Pure.

Both directions must have been heard from their beginning: headers are told by what was said before (HPACK). The bytes
are an application's or a client's: nothing in them is believed. What can't be followed raises NotUnderstood.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import DecodeError
from hpack import Decoder, HPACKError
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import ContinuationFrame, DataFrame, Frame, HeadersFrame, RstStreamFrame

from criproxy.api import health_pb2 as health

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client begins with (RFC 9113, 3.4)."""
PATH: Final = "/grpc.health.v1.Health/Check"

_HEADER: Final = 9
_FRAME_BYTES: Final = 16 << 10
_FRAMES: Final = 128
"""What takes more of them isn't listened to any more: a container could keep us busy with it."""
_TABLE_BYTES: Final = 64 << 10
"""What a peer may have allowed the other to remember; we may not have heard it."""
_SERVING: Final = health.HealthCheckResponse.SERVING


class NotUnderstood(ValueError):
    pass


@dataclass(frozen=True)
class Part:
    """What a frame says of a stream."""

    stream: int
    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    ended: bool = False
    reset: bool = False


class Frames:
    """The frames of one direction, the client's preface left out."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._decoder.max_allowed_table_size = _TABLE_BYTES
        self._frames = 0
        self._unfinished: HeadersFrame | None = None
        self._block = b""

    def read(self, data: bytes | bytearray) -> tuple[list[Part], int]:
        """What the whole frames at the beginning of `data` say, and their size in bytes."""
        parts: list[Part] = []
        offset = 0
        try:
            while offset + _HEADER <= len(data):
                frame, size = Frame.parse_frame_header(memoryview(bytes(data[offset : offset + _HEADER])))
                if size > _FRAME_BYTES:
                    raise NotUnderstood(f"a frame is longer than {_FRAME_BYTES} bytes")
                if offset + _HEADER + size > len(data):
                    break
                self._frames += 1
                if self._frames > _FRAMES:
                    raise NotUnderstood(f"it has more than {_FRAMES} frames")
                offset += _HEADER
                frame.parse_body(memoryview(bytes(data[offset : offset + size])))
                offset += size
                parts += self._said(frame)
        except (HyperframeError, HPACKError) as error:
            raise NotUnderstood(f"it isn't HTTP/2: {error}") from error
        return parts, offset

    def _said(self, frame: Frame) -> Iterator[Part]:
        if isinstance(frame, HeadersFrame):
            self._unfinished, self._block = frame, frame.data
        elif isinstance(frame, ContinuationFrame):
            self._block += frame.data
            if len(self._block) > _FRAME_BYTES:
                raise NotUnderstood(f"headers are longer than {_FRAME_BYTES} bytes")
        elif isinstance(frame, DataFrame):
            yield Part(frame.stream_id, data=frame.data, ended="END_STREAM" in frame.flags)
        elif isinstance(frame, RstStreamFrame):
            yield Part(frame.stream_id, reset=True)
        if self._unfinished is not None and "END_HEADERS" in frame.flags:
            headers = {
                bytes(name).decode("latin-1"): bytes(value).decode("latin-1")
                for name, value in self._decoder.decode(self._block, raw=True)
            }
            ended = "END_STREAM" in self._unfinished.flags
            yield Part(self._unfinished.stream_id, headers=headers, ended=ended)
            self._unfinished, self._block = None, b""


def service(data: bytes) -> str:
    """Whose health a request asks for; empty for the whole server's. Raises NotUnderstood."""
    try:
        return health.HealthCheckRequest.FromString(_message(data)).service
    except DecodeError as error:
        raise NotUnderstood(f"it isn't a health check: {error}") from error


def status(data: bytes) -> str:
    """The name of the status in an answer, such as NOT_SERVING. Raises NotUnderstood."""
    try:
        number = health.HealthCheckResponse.FromString(_message(data)).status
    except DecodeError as error:
        raise NotUnderstood(f"it isn't the answer to a health check: {error}") from error
    known = health.HealthCheckResponse.ServingStatus
    return known.Name(number) if number in known.values() else str(number)


def serving() -> bytes:
    """The answer of a healthy one, as it goes into DATA frames."""
    message = health.HealthCheckResponse(status=_SERVING).SerializeToString()
    return b"\0" + len(message).to_bytes(4, "big") + message


def _message(data: bytes) -> bytes:
    """A gRPC message without its prefix, which says whether it is compressed, and its length."""
    if len(data) < 5 or data[0] != 0 or int.from_bytes(data[1:5], "big") != len(data) - 5:
        raise NotUnderstood("a gRPC message is not whole, or compressed")
    return data[5:]
