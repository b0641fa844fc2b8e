"""Lets dumped threads go on with the waits that the dump has interrupted.

A stop interrupts system calls. Most begin again by themselves, and CRIU sees to it. poll(), nanosleep() and futex()
with a time limit go on with what is left of it, which the kernel keeps to itself ("restart block"), so CRIU lets them
fail with EINTR. Without a signal handler in the way no kernel does that, and not every application knows what to do:
MariaDB gives a connection up after ten of them. So, after a dump, each such wait is made to begin again:

- poll(): with its whole time limit. It may end later than it would have, but never too early.
- nanosleep(), clock_nanosleep(): with what is left, which the kernel has told the caller. Where the caller didn't want
  to know, it stays EINTR: of a thread that sleeps in a loop, each cycle would prolong the sleep, for ever.
- futex(): stays EINTR, for which its callers are prepared anyway.

Only x86-64 needs it: elsewhere the C library has ppoll() for poll(), which CRIU restarts. What a stop has interrupted
before (the system call is restart_syscall() then) stays EINTR, for nothing tells which call it was.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from criproxy.api import criu_pb2 as criu

_X86_64: Final = 1
_COMPAT: Final = 2
_POLL, _NANOSLEEP, _CLOCK_NANOSLEEP = 7, 35, 230
_SYSCALL_BYTES: Final = 2
"""Length of the instruction `syscall`."""
_EINTR: Final = (1 << 64) - errno.EINTR
_COMMON_MAGIC: Final = 0x54564319
_U32: Final = struct.Struct("<I")


def resume(images: Path) -> int:
    """Changes a complete dump as described above; returns how many threads go on. Raises OSError, ValueError."""
    resumed = 0
    for tree in (criu.Tree.FromString(entry) for entry in _entries((images / "pstree.img").read_bytes())):
        process_pending: set[int] | None = None
        # The first thread's number is the process'.
        for thread in sorted(tree.threads, key=lambda thread: thread != tree.pid):
            path = images / f"core-{thread}.img"
            data = path.read_bytes()
            core = criu.Core.FromString(next(_entries(data)))
            if process_pending is None:
                process_pending = set(_numbers(core.process.pending))
            if _resume(core, process_pending):
                payload = core.SerializeToString()
                # Renamed: whenever we are killed, one of both is there as a whole.
                draft = path.with_suffix(".new")
                draft.write_bytes(data[: _header(data)] + _U32.pack(len(payload)) + payload)
                draft.replace(path)
                resumed += 1
    return resumed


def _resume(core: criu.Core, process_pending: set[int]) -> bool:
    registers = core.x86.registers
    if core.machine != _X86_64 or registers.mode == _COMPAT or registers.ax != _EINTR:
        return False
    pending = process_pending | set(_numbers(core.thread.pending))
    if any(not core.thread.blocked >> (number - 1) & 1 for number in pending):
        return False  # its handler runs first, and then EINTR is what the caller waits for
    if registers.orig_ax == _NANOSLEEP and registers.si:
        registers.di = registers.si
    elif registers.orig_ax == _CLOCK_NANOSLEEP and registers.r10:
        registers.dx = registers.r10
    elif registers.orig_ax != _POLL:
        return False
    registers.ax = registers.orig_ax
    registers.ip -= _SYSCALL_BYTES
    return True


def _numbers(signals: criu.Signals) -> Iterator[int]:
    return (int.from_bytes(signal.siginfo[:4], "little") for signal in signals.signals)


def _entries(data: bytes) -> Iterator[bytes]:
    """The messages of an image file. Raises ValueError if it isn't one."""
    offset = _header(data)
    while offset < len(data):
        (size,) = _U32.unpack_from(data, offset)
        offset += _U32.size
        if offset + size > len(data):
            raise ValueError("an image of CRIU ends in the middle of an entry")
        yield data[offset : offset + size]
        offset += size


def _header(data: bytes) -> int:
    """Where the first entry begins: behind a common magic number and the file's own."""
    if len(data) < 2 * _U32.size or _U32.unpack_from(data)[0] != _COMMON_MAGIC:
        raise ValueError("not an image of CRIU")
    return 2 * _U32.size
