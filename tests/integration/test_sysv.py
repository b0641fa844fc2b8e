"""System V shared memory in an IPC namespace that a pod's containers share: each keeps its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from box import Box

from criproxy.criu import sysv
from criproxy.criu.checkpoint import Criu
from criproxy.criu.errors import CheckpointError
from criproxy.kernel.namespaces import in_ipc_namespace

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="containers need root")

# Makes the segments with these keys, maps them, and says what is in them when asked.
PROGRAM = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
name, *keys = sys.argv[1:]
segments = []
for key in keys:
    number = libc.shmget(int(key), 4096, 0o1600)
    segments.append((ctypes.c_char * 4096).from_address(libc.shmat(number, None, 0)))
    segments[-1].value = f"{name} {key}".encode()
print("ready")
for line in sys.stdin:
    print(", ".join(segment.value.decode() for segment in segments))
"""


def uses(name: str, *keys: int) -> list[str]:
    return ["/usr/bin/python3", "-u", "-c", PROGRAM, name, *map(str, keys)]


def joins(pid: int) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        namespace = next(one for one in config["linux"]["namespaces"] if one["type"] == "ipc")
        namespace["path"] = f"/proc/{pid}/ns/ipc"

    return change


def count(container: Box) -> int:
    return len(in_ipc_namespace(container.pid, sysv._segments))


async def test_others_keep_theirs(box: Callable[..., Box], criu: Criu, images: Path, tmp_path: Path) -> None:
    first = box(*uses("first", 1, 2))
    first.hear("ready")
    second = box(*uses("second", 3), change=joins(first.pid))
    second.hear("ready")
    third = box("sleep", "1000", change=joins(first.pid))
    assert count(first) == count(third) == 3
    for _ in range(2):
        await criu.dump(first.pid, images)
        # Its memory is free.
        assert count(first) == 1
        # While it sleeps: one sleeps too, one runs and changes what is there.
        await criu.dump(second.pid, tmp_path / "second")
        assert count(first) == 0
        await criu.dump(third.pid, tmp_path / "third")
        await criu.restore(third.pid, tmp_path / "third")
        await criu.restore(first.pid, images)
        await criu.restore(second.pid, tmp_path / "second")
        for container, says in ((first, "first 1, first 2"), (second, "second 3")):
            os.write(container.stdin, b"\n")
            container.hear(says)
        assert count(first) == 3


async def test_what_two_share_stays(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    first = box(*uses("first", 1))
    first.hear("ready")
    second = box(*uses("second", 1), change=joins(first.pid))
    second.hear("ready")
    with pytest.raises(CheckpointError, match="shares System V memory"):
        await criu.dump(first.pid, images)
    os.write(first.stdin, b"\n")
    first.hear("second 1")


async def test_a_restore_can_be_tried_again(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    """What an attempt before has made, or a daemon that was killed right after the dump hasn't removed, is there."""
    container = box(*uses("one", 1))
    container.hear("ready")
    (number,) = in_ipc_namespace(container.pid, sysv._segments)
    await criu.dump(container.pid, images)
    in_ipc_namespace(container.pid, lambda: _make(1, number))
    await criu.restore(container.pid, images)
    os.write(container.stdin, b"\n")
    container.hear("one 1")


def _make(key: int, number: int) -> None:
    """A segment with this number; the kernel takes it from shm_next_id (proc(5))."""
    Path("/proc/sys/kernel/shm_next_id").write_text(str(number))
    assert sysv._libc.shmget(key, 4096, 0o1600) == number
