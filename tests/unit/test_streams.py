"""CRIU's images of sockets, as the test writes them."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from criproxy.api import criu_pb2 as criu
from criproxy.criu.streams import streams
from criproxy.hook.pod_maps import Stream
from criproxy.kernel.sockets import Flow


def write(path: Path, magic: int, *messages: bytes, rest: bytes = b"") -> None:
    entries = b"".join(struct.pack("<I", len(message)) + message for message in messages)
    path.write_bytes(struct.pack("<II", 0x54564319, magic) + entries + rest)


def words(family: socket.AddressFamily, text: str) -> list[int]:
    raw = socket.inet_pton(family, text)
    return list(struct.unpack(f"={len(raw) // 4}I", raw))


def inet(ino: int, family: socket.AddressFamily, local: str, remote: str, state: int = 1) -> bytes:
    entry = criu.InetSocket(
        ino=ino, family=family, proto=6, state=state, src_port=80, dst_port=4711,
        src_addr=words(family, local), dst_addr=words(family, remote),
    )  # fmt: skip
    return criu.File(isk=entry).SerializeToString()


def test_established_connections_are_found(tmp_path: Path) -> None:
    v4, v6 = socket.AF_INET, socket.AF_INET6
    files = [
        criu.File().SerializeToString(),
        inet(0x1A, v4, "10.0.0.2", "10.0.0.5"),
        inet(0x1B, v6, "::ffff:10.0.0.2", "::ffff:10.0.0.6"),
        inet(0x1C, v6, "fd00::2", "fd00::5"),
        inet(0x1D, v4, "0.0.0.0", "0.0.0.0", state=10),
    ]
    write(tmp_path / "files.img", 0x56303138, *files)
    first = criu.TcpStream(inq_seq=1000, outq_seq=50, opt_mask=5, rcv_wscale=7, timestamp=7, unsq_len=60,
                           rcv_wnd=64000, rcv_wup=900)  # fmt: skip
    write(tmp_path / "tcp-stream-1a.img", 0x51465506, first.SerializeToString(), rest=b"\xff" * 9)
    bare = criu.TcpStream(inq_seq=1, outq_seq=2, rcv_wnd=1 << 20, rcv_wup=1)
    overdrawn = criu.TcpStream(inq_seq=1, outq_seq=2, rcv_wnd=3, rcv_wup=0xFFFFFFF0)
    write(tmp_path / "tcp-stream-1b.img", 0x51465506, bare.SerializeToString())
    write(tmp_path / "tcp-stream-1c.img", 0x51465506, overdrawn.SerializeToString())
    assert streams(tmp_path) == {
        Flow("tcp", ("10.0.0.2", 80), ("10.0.0.5", 4711)): Stream(1000, (50 - 60) & 0xFFFFFFFF, 63900 >> 7, 7),
        Flow("tcp", ("10.0.0.2", 80), ("10.0.0.6", 4711)): Stream(1, 2, 0xFFFF, None),
        Flow("tcp", ("fd00::2", 80), ("fd00::5", 4711)): Stream(1, 2, 0, None),
    }


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "files.img").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"files\.img"):
        streams(tmp_path)
    write(tmp_path / "files.img", 0x56303138, b"\xff\xff")
    with pytest.raises(ValueError, match="read"):
        streams(tmp_path)
