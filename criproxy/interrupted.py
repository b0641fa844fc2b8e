"""Lets dumped threads go on with the waits that the dump has interrupted.

A stop interrupts system calls. Most begin again by themselves, and CRIU sees to it. poll(), nanosleep() and futex()
with a time limit go on with what is left of it, which the kernel keeps to itself ("restart block"), so CRIU lets them
fail with EINTR. Without a signal handler in the way no kernel does that, and not every application knows what to do:
MariaDB gives a connection up after ten of them. So, after a dump, each such wait is made to begin again:

- poll(): with its whole time limit. It may end later than it would have, but never too early. So do epoll_wait() and
  the like, which any stop interrupts (signal(7)), but which few applications have ever seen interrupted.
- nanosleep(), clock_nanosleep(): with what is left, which the kernel has told the caller. Where the caller didn't want
  to know, it stays EINTR: of a thread that sleeps in a loop, each cycle would prolong the sleep, for ever.
- futex(): stays EINTR, for which its callers are prepared anyway.

Only x86-64 needs it: elsewhere the C library has ppoll() for poll(), which CRIU restarts. What a stop has interrupted
before (the system call is restart_syscall() then) stays EINTR, for nothing tells which call it was.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from criproxy import images as image_files
from criproxy.api import criu_pb2 as criu

_X86_64: Final = 1
_COMPAT: Final = 2
_NANOSLEEP, _CLOCK_NANOSLEEP = 35, 230
_BEGUN_AGAIN: Final = {7, 65, 128, 208, 220, 232, 281, 441}
"""poll, semop, rt_sigtimedwait, io_getevents, semtimedop, epoll_wait, epoll_pwait, epoll_pwait2."""
_SYSCALL_BYTES: Final = 2
"""Length of the instruction `syscall`."""
_EINTR: Final = (1 << 64) - errno.EINTR


def resume(images: Path) -> int:
    """Changes a complete dump as described above; returns how many threads go on. Raises OSError, ValueError."""
    resumed = 0
    for tree in (criu.Tree.FromString(entry) for entry in image_files.entries((images / "pstree.img").read_bytes())):
        process_pending: set[int] | None = None
        # The first thread's number is the process'.
        for thread in sorted(tree.threads, key=lambda thread: thread != tree.pid):
            path = images / f"core-{thread}.img"
            if not path.exists():
                continue  # a zombie's: CRIU leaves the numbers of its threads unset
            data = path.read_bytes()
            core = criu.Core.FromString(next(image_files.entries(data)))
            if process_pending is None:
                process_pending = set(_numbers(core.process.pending))
            if _resume(core, process_pending):
                image_files.replace(path, [core.SerializeToString()])
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
    elif registers.orig_ax not in _BEGUN_AGAIN:
        return False
    registers.ax = registers.orig_ax
    registers.ip -= _SYSCALL_BYTES
    return True


def _numbers(signals: criu.Signals) -> Iterator[int]:
    return (int.from_bytes(signal.siginfo[:4], "little") for signal in signals.signals)
