"""CRIU's image files: a common magic number, the file's own, then entries, each a protobuf message behind its size.

What of the messages is known here is in api/criu.proto; protobuf keeps what isn't.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from criproxy.files import write_whole

_COMMON_MAGIC: Final = 0x54564319
_U32: Final = struct.Struct("<I")
_HEADER: Final = 2 * _U32.size

_Kind = TypeVar("_Kind", bound=Message)


def read(path: Path, kind: type[_Kind]) -> Iterator[_Kind]:
    """The messages of an image file. Raises OSError, and ValueError if there are others in it."""
    try:
        yield from map(kind.FromString, entries(path.read_bytes()))
    except (ValueError, DecodeError) as error:
        raise ValueError(f"{path.name} can't be read: {error}") from error


def replace(path: Path, messages: Iterable[Message]) -> None:
    """Gives an image file, which must be one, other messages. Killed meanwhile, it leaves one of both as a whole.

    Raises OSError.
    """
    with open(path, "rb") as stream:
        content = bytearray(stream.read(_HEADER))
    for message in messages:
        entry = message.SerializeToString()
        content += _U32.pack(len(entry)) + entry
    write_whole(path, bytes(content))


def entries(data: bytes) -> Iterator[bytes]:
    """The messages in the bytes of an image file, as bytes. Raises ValueError if it isn't one."""
    if len(data) < _HEADER or _U32.unpack_from(data)[0] != _COMMON_MAGIC:
        raise ValueError("not an image of CRIU")
    offset = _HEADER
    while offset < len(data):
        begin = offset + _U32.size
        if begin > len(data) or (end := begin + _U32.unpack_from(data, offset)[0]) > len(data):
            raise ValueError("an image of CRIU ends in the middle of an entry")
        yield data[begin:end]
        offset = end
