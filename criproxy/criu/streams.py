"""The established TCP connections of a checkpoint, read from CRIU's images: what an answer in their place needs."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from criproxy.api import criu_pb2 as criu
from criproxy.criu import images as image_files
from criproxy.hook.pod_maps import Stream
from criproxy.kernel import sockets
from criproxy.kernel.sockets import Address, Flow

_ESTABLISHED: Final = 1
_TIMESTAMPS, _WINDOW_SCALE = 1, 4  # TCPI_OPT_* in linux/tcp.h


def streams(images: Path) -> dict[Flow, Stream]:
    """Raises OSError, or ValueError if an image isn't one that we know."""
    found = {}
    for file in image_files.read(images / "files.img", criu.File):
        one = file.isk
        if one.proto == socket.IPPROTO_TCP and one.state == _ESTABLISHED:
            # What is in its queues follows, which is no message.
            entries = image_files.read(images / f"tcp-stream-{one.ino:x}.img", criu.TcpStream)
            flow = Flow(
                "tcp",
                _address(one.family, one.src_addr, one.src_port),
                _address(one.family, one.dst_addr, one.dst_port),
            )
            found[flow] = _state(next(entries, criu.TcpStream()))
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


def _address(family: int, words: Iterable[int], port: int) -> Address:
    raw = b"".join(struct.pack("=I", word) for word in words)
    return (sockets.address(family, raw), port)
