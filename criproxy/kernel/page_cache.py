"""What the kernel keeps of files in memory: the page cache.

A page is charged to the cgroup of whoever touches it first, and stays so until the kernel drops it. The kernel has two
lists of them: the active ones, which were used again and again, and the inactive ones, which it takes first when it
needs memory. A container's working set (`kubectl top`, kubelet's evictions) has the active ones in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

FILES: Final = 256
"""How many files of a container are looked at, at most: it may have mapped as many as it likes."""

MAPPINGS: Final = 10_000
"""How many of its mappings are read, at most; that takes 10 ms."""

BYTES: Final = 1 << 30
"""How big they may be altogether. What is bigger is data, of which little is in memory."""

_WINDOW: Final = 64 << 20
_PAGE: Final = mmap.PAGESIZE

# include/uapi/asm-generic/mman-common.h; MAP_POPULATE is <asm/mman.h>'s.
_MADV_COLD: Final = 20
_MADV_POPULATE_READ: Final = 22
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

# Not Python's own mmap: it holds the interpreter's lock while the kernel works.
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] + [ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def keep(paths: Iterable[Path]) -> None:
    """Reads files into memory and keeps them there for as long as this process lives, charged to its cgroup unless they
    were there before. Best effort: where the kernel refuses the lock (RLIMIT_MEMLOCK), they are only mapped."""
    for path in paths:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            _libc.mlock(_map(file.fileno(), 0, size, mmap.MAP_POPULATE), size)


def mapped(init_pid: int, pids: Iterable[int], stack: ExitStack) -> list[int]:
    """Descriptors, which `stack` closes, of what the processes have mapped of their container's own files: programs and
    libraries. Not of a volume, where any question might have to wait for somebody: for a server that sleeps, too.

    They see nothing of it: O_PATH opens no file, so no watch tells it, and no lease ends.
    """
    found: list[int] = []
    with contextlib.suppress(OSError):  # the container has ended
        root = _mount(_path(f"/proc/{init_pid}/root", stack))
        for link in _links(pids):
            with contextlib.suppress(OSError):
                descriptor = _path(link, stack)
                if _mount(descriptor) == root and stat.S_ISREG(os.fstat(descriptor).st_mode):
                    found.append(descriptor)
    return found


def cool(descriptors: Iterable[int], stop: Callable[[], bool], stack: ExitStack) -> None:
    """Makes those pages of `mapped()` files inactive that nobody has mapped any more: they stay in memory, so that who
    runs the program again finds them, but are the first that the kernel takes. Nothing is read. Stops between two files
    if `stop` says so, and closes `stack` in the end.

    For a thread: it takes 4 ms for redis (18 MB in memory), measured. What can't be done isn't.
    """
    left = BYTES
    with stack:
        for descriptor in descriptors:
            if stop():
                return
            with contextlib.suppress(OSError):
                if (size := os.fstat(descriptor).st_size) <= left:
                    left -= size
                    _cool(descriptor, size)


def _links(pids: Iterable[int]) -> Iterator[str]:
    """Of /proc/PID/map_files, for each file once."""
    seen: set[tuple[str, str]] = set()
    left = MAPPINGS
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", errors="replace") as maps:
            for line in itertools.islice(maps, left):
                left -= 1
                addresses, _access, _offset, device, inode = line.split(maxsplit=5)[:5]
                if inode != "0" and (device, inode) not in seen:
                    if len(seen) == FILES:
                        return
                    seen.add((device, inode))
                    # Without the leading zeros of /proc/PID/maps.
                    start, _dash, end = addresses.partition("-")
                    yield f"/proc/{pid}/map_files/{int(start, 16):x}-{int(end, 16):x}"


def _path(path: str, stack: ExitStack) -> int:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def _mount(descriptor: int) -> str:
    """Its mount, by the kernel's number, for which no file system is asked."""
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return next(line for line in lines if line.startswith("mnt_id:"))


def _cool(descriptor: int, size: int) -> None:
    """`descriptor` may be one of O_PATH."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC
    with open(f"/proc/self/fd/{descriptor}", "rb", 0, opener=lambda path, _: os.open(path, flags)) as file:
        for offset in range(0, size, _WINDOW):
            _cool_window(file.fileno(), offset, min(_WINDOW, size - offset))


def _cool_window(descriptor: int, offset: int, size: int) -> None:
    address = _map(descriptor, offset, size)
    try:
        present = ctypes.create_string_buffer(-(-size // _PAGE))
        if _libc.mincore(address, size, present) == 0:
            for run in re.finditer(rb"[^\0]+", present.raw[: len(present)]):
                start, length = address + run.start() * _PAGE, (run.end() - run.start()) * _PAGE
                # The other one is about pages that this process has mapped. Reading one would kill it (SIGBUS) where
                # the file has become shorter; this is an error then.
                _libc.madvise(start, length, _MADV_POPULATE_READ)
                _libc.madvise(start, length, _MADV_COLD)
    finally:
        _libc.munmap(address, size)


def _map(descriptor: int, offset: int, size: int, flags: int = 0) -> int:
    """Raises OSError."""
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED | flags, descriptor, offset)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    return int(address)


__all__ = ["cool", "keep", "mapped"]
