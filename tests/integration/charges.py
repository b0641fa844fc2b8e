"""Which cgroup is charged for a file's pages in memory, as the kernel says (admin-guide/mm/pagemap.rst)."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections import Counter
from pathlib import Path

_PAGE = mmap.PAGESIZE
_NUMBER = (1 << 55) - 1  # of a page in memory, in an entry of pagemap

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def charged(path: Path) -> Counter[int]:
    """Bytes of the file that are in memory, by the inode of the memory controller's folder."""
    found: Counter[int] = Counter()
    size = path.stat().st_size
    if size == 0:
        return found
    # A private copy of nothing: ctypes takes the address only of what may be written.
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address = ctypes.addressof(first)
        present = ctypes.create_string_buffer(-(-size // _PAGE))
        assert _libc.mincore(address, size, present) == 0
        del first
        with open("/proc/self/pagemap", "rb", 0) as pages, open("/proc/kpagecgroup", "rb", 0) as cgroups:
            for index, there in enumerate(present.raw):
                if there & 1:
                    _ = mapped[index * _PAGE]
                    entry = _entry(pages.fileno(), address // _PAGE + index)
                    found[_entry(cgroups.fileno(), entry & _NUMBER)] += _PAGE
    return found


def forget(path: Path) -> None:
    """Drops those pages of the file that nobody has mapped, as the kernel does when it needs memory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _entry(table: int, index: int) -> int:
    return int(struct.unpack("=Q", os.pread(table, 8, 8 * index))[0])
