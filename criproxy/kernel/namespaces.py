"""Runs a function inside another network, IPC or mount namespace, in a thread of its own.

The kernel keeps the namespaces (of these kinds) per thread. The thread that changed its own is never used again:
it ends with the function, so that there is no way back to get wrong, and the rest of the program never leaves the
host's. What the function opens (netlink and packet sockets, pinned objects) stays bound to the namespace it was made in
and may be used from any thread afterwards.

Functions that run in here must not import modules: in a foreign mount namespace they would come from there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

CLONE_FS: Final = 0x200
CLONE_NEWNS: Final = 0x20000
CLONE_NEWIPC: Final = 0x8000000
CLONE_NEWNET: Final = 0x40000000

MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000

_libc: Final = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


def in_network_namespace(where: Path | int, function: Callable[[], T]) -> T:
    """Calls `function` inside a network namespace and returns its result, or raises what it raises.

    `where` is the path of a namespace file (CRI's `/var/run/netns/…`) or the host's number of a process that lives in
    it. Blocks until the function is done. Raises OSError if the namespace is gone or can't be entered.
    """
    path = Path(f"/proc/{where}/ns/net") if isinstance(where, int) else where
    namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _in_thread(lambda: _setns(namespace, CLONE_NEWNET, str(path)), function)
    finally:
        os.close(namespace)


def in_ipc_namespace(pid: int, function: Callable[[], T]) -> T:
    """Calls `function` inside the IPC namespace of a process; as `in_network_namespace`."""
    namespace = os.open(f"/proc/{pid}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _in_thread(lambda: _setns(namespace, CLONE_NEWIPC, f"/proc/{pid}/ns/ipc"), function)
    finally:
        os.close(namespace)


def in_private_mounts(function: Callable[[], T]) -> T:
    """Calls `function` in a private copy of the *host's* mount namespace: what it mounts is seen by it, and by the
    processes that it starts, alone, and is gone when it (and they) have ended.

    The host's is the one of the machine's first process. Where that one can't be entered (a nested sandbox without the
    right to look at it) our own is taken. Raises OSError.
    """
    host = _host_mounts()

    def enter() -> None:
        # A mount namespace can't be changed by a thread which shares its root and working directory with others.
        _unshare(CLONE_FS)
        if host is not None:
            _setns(host, CLONE_NEWNS, "/proc/1/ns/mnt")
        _unshare(CLONE_NEWNS)
        mount("none", Path("/"), None, MS_REC | MS_PRIVATE)

    try:
        return _in_thread(enter, function)
    finally:
        if host is not None:
            os.close(host)


def mount(source: str, target: Path, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2) in the calling thread's namespace. Raises OSError, which names the target."""
    arguments = [text.encode() if text is not None else None for text in (source, str(target), kind)]
    if _libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() if data is not None else None) != 0:
        raise _error(f"mount on {target}")


def _in_thread(enter: Callable[[], None], function: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            enter()
            results.append(function())
        except BaseException as error:  # it is the caller's, whatever it is
            errors.append(error)

    thread = threading.Thread(target=body, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _host_mounts() -> int | None:
    """A descriptor of the first process's mount namespace; None if it is ours already, or out of reach."""
    with contextlib.suppress(OSError):
        if os.readlink("/proc/1/ns/mnt") != os.readlink("/proc/self/ns/mnt"):
            return os.open("/proc/1/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    return None


def _setns(descriptor: int, kind: int, name: str) -> None:
    if _libc.setns(descriptor, kind) != 0:
        raise _error(f"enter the namespace {name}")


def _unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        raise _error("make a namespace")


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"Cannot {what}: {os.strerror(number)}")
