"""CRIU's image files, read and replaced."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest

from criproxy.api import criu_pb2 as criu
from criproxy.criu import images

HEADER = struct.pack("<II", 0x54564319, 0x56303138)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "files.img").write_bytes(HEADER)
    return tmp_path / "files.img"


def test_what_is_not_known_of_a_message_stays(path: Path) -> None:
    whole = criu.File(id=7, tfd=criu.TimerFd(ticks=1)).SerializeToString() + b"\x82\x7d\x03new"
    path.write_bytes(HEADER + struct.pack("<I", len(whole)) + whole)
    (file,) = images.read(path, criu.File)
    file.id = 8
    images.replace(path, [file])
    (entry,) = images.entries(path.read_bytes())
    assert b"\x82\x7d\x03new" in entry
    assert criu.File.FromString(entry).id == 8
    assert [file.name for file in path.parent.iterdir()] == ["files.img"]


def test_the_file_s_own_header_stays(path: Path) -> None:
    images.replace(path, [])
    assert path.read_bytes() == HEADER
    assert list(images.read(path, criu.File)) == []


def test_a_file_that_is_cut_off_is_refused_wherever_it_is(path: Path) -> None:
    images.replace(path, [criu.File(id=7), criu.File(id=300)])
    whole = path.read_bytes()
    ends = []
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with contextlib.suppress(ValueError):
            ends.append((cut, len(list(images.read(path, criu.File)))))
    # Between two entries, nobody can tell.
    assert ends == [(len(HEADER), 0), (len(HEADER) + 6, 1)]


def test_other_messages_are_refused(path: Path) -> None:
    path.write_bytes(HEADER + struct.pack("<I", 2) + b"\xff\xff")
    with pytest.raises(ValueError, match=r"files\.img can't be read"):
        list(images.read(path, criu.File))
