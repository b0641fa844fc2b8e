"""CRIU's image files: a common magic number, the file's own, then entries, each a protobuf message behind its size.

What of the messages is known here is in api/criu.proto; protobuf keeps what isn't.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

_COMMON_MAGIC: Final = 0x54564319
_U32: Final = struct.Struct("<I")
_HEADER: Final = 2 * _U32.size


def entries(data: bytes) -> Iterator[bytes]:
    """The messages of an image file. Raises ValueError if it isn't one."""
    if len(data) < _HEADER or _U32.unpack_from(data)[0] != _COMMON_MAGIC:
        raise ValueError("not an image of CRIU")
    offset = _HEADER
    while offset < len(data):
        (size,) = _U32.unpack_from(data, offset)
        offset += _U32.size
        if offset + size > len(data):
            raise ValueError("an image of CRIU ends in the middle of an entry")
        yield data[offset : offset + size]
        offset += size


def replace(path: Path, new: Iterable[bytes]) -> None:
    """Gives an image file, which must be one, other messages. Killed meanwhile, it leaves one of both as a whole."""
    with open(path, "rb") as stream:
        header = stream.read(_HEADER)
    draft = path.with_suffix(".new")
    draft.write_bytes(header + b"".join(_U32.pack(len(entry)) + entry for entry in new))
    draft.replace(path)
