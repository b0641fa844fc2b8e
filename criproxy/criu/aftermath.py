"""What CRIU leaves behind: processes that it has killed, half restored, or was at work on when it was killed itself."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from typing import Final

from criproxy.kernel import processes
from criproxy.kernel.processes import Process

# How long what was killed may take to be gone: init reaps it, and big memory takes time to be freed.
_REAPING_SECONDS: Final = 10.0

# The same number on every architecture, as those of all system calls since Linux 5.1.
_SYS_PIDFD_GETFD: Final = 438
_TCP_REPAIR: Final = 19

_libc: Final = ctypes.CDLL(None, use_errno=True)
_log: Final = logging.getLogger(__name__)


def identify(pids: Sequence[int]) -> list[Process]:
    """The processes with these numbers, as far as they are there, so that later ones aren't taken for them."""
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            found.append(Process.of(pid))
    return found


def send(tree: Sequence[Process], signum: int) -> None:
    """Sends a signal to those that still run."""
    for process in tree:
        with contextlib.suppress(ProcessLookupError):
            if process.alive():
                os.kill(process.pid, signum)


async def gone(tree: Sequence[Process]) -> bool:
    """Waits until what was killed is reaped; before, a restore couldn't have the numbers. False: it takes too long."""
    pause = 0.0005
    deadline = time.monotonic() + _REAPING_SECONDS
    for process in tree:
        while _same(process):
            if time.monotonic() > deadline:
                _log.warning("process %d was killed, but init hasn't reaped it", process.pid)
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.02)
    return True


async def clear(init_pid: int, since: int) -> None:
    """Ends the processes below init that were made since, and waits until they are gone."""
    # Once more for those that one had made before it was killed; then once more to see that there are none.
    while remains := [new for new in identify(processes.tree(init_pid)[1:]) if new.start_time >= since]:
        send(remains, signal.SIGKILL)
        if not await gone(remains):
            return


def ticks() -> int:
    """Now, as the kernel notes when a process starts."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def rescue(tree: Sequence[Process], *, stopped: bool) -> None:
    """Repairs, as far as possible, what a CRIU that was killed, or crashed, in the middle of a dump has left.

    A traced process runs on when its tracer is gone, and CRIU's code in it withdraws when it notices. But TCP sockets
    stay in repair mode, in which reading fails with EPERM, and what we have stopped is stopped. Beyond repair is a
    process in which CRIU was just placing its code, for a millisecond each: it ends with SIGTRAP, as in a crash.
    """
    for process in tree:
        if process.alive():
            with contextlib.suppress(OSError):
                _end_repair(process.pid)
    # Without a look at their state: whoever hasn't stopped yet will.
    if stopped:
        send(tree, signal.SIGCONT)


def _end_repair(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    continue
                copy = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, int(name), 0)
                if copy < 0:
                    continue
                with socket.socket(fileno=copy) as one:
                    if one.getsockopt(socket.SOL_TCP, _TCP_REPAIR) == 1:
                        one.setsockopt(socket.SOL_TCP, _TCP_REPAIR, 0)
    finally:
        os.close(pidfd)


def _same(process: Process) -> bool:
    """Whether the process is there, if only as a zombie."""
    try:
        return processes.start_time(process.pid) == process.start_time
    except ProcessLookupError:
        return False
