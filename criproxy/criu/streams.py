"""The established TCP connections of a checkpoint, read from CRIU's images: what an answer in their place needs.

An image is two magic numbers of 32 bits, then entries: a length of 32 bits and a protobuf message
(`api/criu_sockets.proto`).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from criproxy.api import criu_sockets_pb2 as criu
from criproxy.hook.pod_maps import Stream
from criproxy.kernel import sockets
from criproxy.kernel.sockets import Address, Flow

_COMMON_MAGIC: Final = 0x54564319
_FILES_MAGIC: Final = 0x56303138
_TCP_STREAM_MAGIC: Final = 0x51465506
_ESTABLISHED: Final = 1
_Message = TypeVar("_Message", bound=Message)
_TIMESTAMPS, _WINDOW_SCALE = 1, 4  # TCPI_OPT_* in linux/tcp.h


def streams(images: Path) -> dict[Flow, Stream]:
    """Raises OSError, or ValueError if an image isn't one that we know."""
    found = {}
    for message in _entries(images / "files.img", _FILES_MAGIC):
        one = _parsed(criu.FileEntry, message).isk
        if one.proto == socket.IPPROTO_TCP and one.state == _ESTABLISHED:
            path = images / f"tcp-stream-{one.ino:x}.img"
            stream = _parsed(criu.TcpStream, next(_entries(path, _TCP_STREAM_MAGIC), b""))
            flow = Flow(
                "tcp",
                _address(one.family, one.src_addr, one.src_port),
                _address(one.family, one.dst_addr, one.dst_port),
            )
            found[flow] = _state(stream)
    return found


def _state(stream: criu.TcpStream) -> Stream:
    scale = stream.rcv_wscale if stream.opt_mask & _WINDOW_SCALE else 0
    window = (stream.rcv_wup + stream.rcv_wnd - stream.inq_seq) & 0xFFFFFFFF
    if window > 1 << 31:  # more came in than was offered
        window = 0
    return Stream(
        rcv_nxt=stream.inq_seq,
        snd_nxt=(stream.outq_seq - stream.unsq_len) & 0xFFFFFFFF,
        window=min(window >> scale, 0xFFFF),
        tsval=stream.timestamp if stream.opt_mask & _TIMESTAMPS else None,
    )


def _entries(path: Path, magic: int) -> Iterator[bytes]:
    data = path.read_bytes()
    if data[:8] != struct.pack("<II", _COMMON_MAGIC, magic):
        raise ValueError(f"{path.name} isn't an image of CRIU's as it should be")
    offset = 8
    while offset + 4 <= len(data):
        length = struct.unpack_from("<I", data, offset)[0]
        yield data[offset + 4 : offset + 4 + length]
        offset += 4 + length


def _parsed(kind: type[_Message], data: bytes) -> _Message:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ValueError(f"an image of CRIU's can't be read: {error}") from error


def _address(family: int, words: Iterable[int], port: int) -> Address:
    raw = b"".join(struct.pack("=I", word) for word in words)
    return (sockets.address(family, raw), port)
