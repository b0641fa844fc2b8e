"""System V shared memory (PostgreSQL's): segments belong to an IPC namespace, which a pod's containers share.

CRIU dumps them with a whole namespace only, so where the dumped processes use some, it stays outside of it
(checkpoint.py), and its images have all segments, semaphores and queues of the pod. What the dumped processes don't
map stays where it is, and is taken out of the images. What they map is removed after the dump, as its memory would
stay allocated otherwise and CRIU couldn't make it again, with the same number, for a restore.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criproxy.api import criu_pb2 as criu
from criproxy.criu import images as image_files
from criproxy.kernel.namespaces import in_ipc_namespace

_IPC_RMID: Final = 0
_DELETED: Final = 0o1000

# "7f01-7f02 rw-s 00000000 00:01 98305     /SYSV0052e2c1 (deleted)": the inode is the segment's number.
_MAPPED: Final = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ \S+ [0-9a-f]+ (\S+) (\d+) +/SYSV[0-9a-f]{8} \(deleted\)$", re.M)

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Segment:
    attached: int
    """How many mappings it has, whosever they are."""
    deleted: bool
    """It goes with its last mapping."""


class Shared(Exception):
    """A segment is used from outside of the processes in question. The text says so, for people."""


def used(init_pid: int, pids: Iterable[int]) -> dict[int, bool]:
    """The segments that the processes of a container map, by number: whether they are deleted.

    Raises Shared if another process maps one of them, too.
    """
    present = in_ipc_namespace(init_pid, _segments)
    if not present:
        return {}
    mapped = _mapped(pids)
    for number, count in mapped.items():
        if number in present and present[number].attached > count:
            raise Shared("it shares System V memory with a process outside of it")
    return {number: present[number].deleted for number in mapped if number in present}


def remove(init_pid: int, segments: Mapping[int, bool]) -> None:
    """Deletes segments that nobody maps any more, as far as they are there. Raises OSError."""

    def delete() -> None:
        for number, segment in _segments().items():
            if number in segments and not segment.attached:
                _delete(number)

    if segments:
        in_ipc_namespace(init_pid, delete)


def delete_again(init_pid: int, segments: Mapping[int, bool]) -> None:
    """After a restore: what was deleted, but still mapped, is so again. Raises OSError."""
    deleted = [number for number, deleted in segments.items() if deleted]

    def delete() -> None:
        for number in deleted:
            _delete(number)

    if deleted:
        in_ipc_namespace(init_pid, delete)


def keep_only(images: Path, segments: Mapping[int, bool]) -> None:
    """Takes everything out of a dump that stays in the namespace. Raises OSError, ValueError."""
    for path in images.glob("ipcns-shm-*.img"):
        found = list(image_files.read(path, criu.SharedMemory))
        image_files.replace(path, (one for one in found if one.desc.id in segments))
    for kind in ("msg", "sem"):
        for path in images.glob(f"ipcns-{kind}-*.img"):
            image_files.replace(path, [])


def _segments() -> dict[int, Segment]:
    """Of the calling thread's namespace; proc(5), /proc/sysvipc/shm."""
    found = {}
    with open("/proc/sysvipc/shm") as table:
        next(table)
        for line in table:
            fields = line.split()
            found[int(fields[1])] = Segment(int(fields[6]), bool(int(fields[2], 8) & _DELETED))
    return found


def _mapped(pids: Iterable[int]) -> Counter[int]:
    """The segments' numbers, and how often each is mapped."""
    device = _device()
    found: Counter[int] = Counter()
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # A file can have such a name, too, but not on the kernel's own file system.
        found.update(int(number) for where, number in _MAPPED.findall(maps) if where == device)
    return found


def _device() -> bytes:
    """That of the kernel's own file system for shared memory, as /proc/PID/maps writes it."""
    with mmap.mmap(-1, mmap.PAGESIZE):
        for line in Path("/proc/self/maps").read_bytes().splitlines():
            if line.endswith(b"/dev/zero (deleted)"):
                return line.split()[3]
    raise OSError(errno.ENOSYS, "the kernel doesn't show shared memory in /proc/self/maps")


def _delete(number: int) -> None:
    if _libc.shmctl(number, _IPC_RMID, None) != 0 and ctypes.get_errno() not in (errno.EINVAL, errno.EIDRM):
        raise OSError(ctypes.get_errno(), f"System V segment {number}: {os.strerror(ctypes.get_errno())}")
