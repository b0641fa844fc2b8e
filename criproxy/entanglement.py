"""Whom a container serves other than by packets: while it is frozen they would hang, and nothing would wake it.

A checkpoint fails for most of this by itself, as CRIU can't save half of a connection. The freezer stops anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from criproxy import processes
from criproxy.sockets import UnixSocket


def entanglement(init_pid: int, pids: Iterable[int], sockets: Iterable[UnixSocket]) -> str | None:
    """What keeps a container from being frozen, in words, or None.

    `pids`: all its processes; `sockets`: all unix sockets of its pod.
    """
    pids = list(pids)
    for pid in pids:
        if _serves_fuse(pid):
            return f'"{processes.name(pid)}" serves a file system (FUSE), whose users would hang'
    own = processes.socket_inodes(pids)
    private = _private_devices(init_pid)
    for one in sockets:
        if one.inode not in own:
            continue
        if one.waiting or (one.peer and one.peer not in own):
            return f"it has a unix socket connected to a process outside of it{_named(one)}"
        if one.listening and one.device is not None and one.device not in private:
            return f"it listens on a unix socket in a volume{_named(one)}, and a connection there couldn't wake it"
    return None


def _serves_fuse(pid: int) -> bool:
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.readlink(f"{folder}/{name}") in ("/dev/fuse", "/dev/cuse"):
                    return True
    return False


def _private_devices(init_pid: int) -> set[tuple[int, int]]:
    """The file systems that only this container has: its root and its /dev. A volume may be somebody else's, too."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{init_pid}/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[4] in ("/", "/dev"):
                major, minor = fields[2].split(":")
                found.add((int(major), int(minor)))
    return found


def _named(one: UnixSocket) -> str:
    return f" ({one.name})" if one.name else ""
