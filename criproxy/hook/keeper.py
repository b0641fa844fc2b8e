"""Sockets that outlive the daemon: a process on the host (`native/keep.c`) has them open, too, and the next daemon
takes them back from there, with the connections that wait in them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Sequence
from typing import Final

from criproxy import LIBEXEC, run
from criproxy.kernel.processes import Process

PROGRAM: Final = LIBEXEC / "keep"
_START_SECONDS: Final = 10.0
_PIDFD_GETFD: Final = 438
"""The same number on every architecture. Python has no name for it."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def keep(sockets: Sequence[socket.socket], pid: int) -> Process:
    """Starts a keeper, in which the sockets' descriptors have the same numbers as here. It ends with the process `pid`
    at the latest. Raises OSError or CommandError.
    """
    pidfd = os.pidfd_open(pid)
    try:
        descriptors = [pidfd, *(one.fileno() for one in sockets)]
        started = run.run([PROGRAM, str(pidfd)], pass_fds=descriptors, env={}, timeout=_START_SECONDS).check()
    finally:
        os.close(pidfd)
    return Process.of(int(started.stdout))


def take_back(keeper: Process, descriptors: Sequence[int]) -> list[socket.socket]:
    """What a keeper keeps. Raises OSError, ProcessLookupError among them if it is gone."""
    with contextlib.ExitStack() as stack:
        pidfd = _open(keeper)
        stack.callback(os.close, pidfd)
        found: list[socket.socket] = []
        try:
            for number in descriptors:
                if (own := _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)) < 0:
                    code = ctypes.get_errno()
                    raise OSError(code, f"Cannot take a socket back from {keeper.pid}: {os.strerror(code)}")
                found.append(socket.socket(fileno=own))
                found[-1].setblocking(False)
        except BaseException:
            for one in found:
                one.close()
            raise
        return found


def end(keeper: Process) -> None:
    """Ends a keeper, if it is there. The sockets are closed unless somebody else has them open."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = _open(keeper)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def _open(keeper: Process) -> int:
    if keeper.pid:  # 0: none has been started
        pidfd = os.pidfd_open(keeper.pid)
        if keeper.alive():  # after the descriptor: the number may be another process's by now
            return pidfd
        os.close(pidfd)
    raise ProcessLookupError(f"There is no keeper {keeper.pid}")


__all__ = ["PROGRAM", "end", "keep", "take_back"]
