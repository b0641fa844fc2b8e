"""Whom a container serves other than by packets: while it is frozen they would hang, and nothing would wake it.

A checkpoint fails for most of this by itself, as CRIU can't save half of a connection. The freezer stops anything. Of a
socket that listens in a volume neither knows: others would get ECONNREFUSED while it is in a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criproxy.kernel import processes
from criproxy.kernel.sockets import UnixSocket


def entanglement(init_pid: int, pids: Iterable[int], sockets: Iterable[UnixSocket]) -> str | None:
    """What keeps a container from being frozen, in words, or None.

    `pids`: all its processes; `sockets`: all unix sockets of its pod.
    """
    pids = list(pids)
    for pid in pids:
        if _serves_fuse(pid):
            return f'"{processes.name(pid)}" serves a file system (FUSE), whose users would hang'
    own = processes.socket_inodes(pids)
    sockets = [one for one in sockets if one.inode in own]
    for one in sockets:
        if one.waiting or (one.peer and one.peer not in own):
            return f"it has a unix socket connected to a process outside of it{_named(one)}"
    return _listens(init_pid, sockets)


def listens_in_volume(init_pid: int, pids: Callable[[], Iterable[int]], sockets: Iterable[UnixSocket]) -> str | None:
    """What keeps a container from being checkpointed, in words, or None. As `entanglement`; most listen on none."""
    sockets = [one for one in sockets if one.listening and one.device is not None]
    if not sockets:
        return None
    own = processes.socket_inodes(pids())
    return _listens(init_pid, [one for one in sockets if one.inode in own])


def _listens(init_pid: int, sockets: Iterable[UnixSocket]) -> str | None:
    mounts: list[_Mount] | None = None
    for one in sockets:
        if one.listening and one.device is not None:
            mounts = _mounts(f"/proc/{init_pid}") if mounts is None else mounts
            if _shared(init_pid, mounts, one.device, one.name):
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


@dataclass(frozen=True)
class _Mount:
    device: tuple[int, int]
    root: str
    """Which folder of the file system it is."""
    path: str


# kubelet's name for emptyDir: made for one pod, on its disk or as a tmpfs.
_POD_ONLY: Final = "/volumes/kubernetes.io~empty-dir/"


def _mounts(process: str) -> list[_Mount]:
    found = []
    with contextlib.suppress(OSError):
        for line in Path(f"{process}/mountinfo").read_text().splitlines():
            fields = line.split()
            major, minor = fields[2].split(":")
            found.append(_Mount((int(major), int(minor)), fields[3], fields[4]))
    return found


def _shared(init_pid: int, mounts: Sequence[_Mount], device: tuple[int, int], name: str) -> bool:
    """Whether others than the container can reach a path on this device. In doubt they can."""
    host, own = _namespace("/proc/1"), _namespace(f"/proc/{init_pid}")
    here = [mount for mount in mounts if f"{name}/".startswith(f"{mount.path.rstrip('/')}/")]
    if own is None or own == host:
        return True
    if not here:  # given from a working folder
        return not {mount.path for mount in mounts if mount.device == device} <= {"/", "/dev"}
    mount = max(here, key=lambda mount: len(mount.path))
    if mount.device != device:
        return True  # the name isn't from its root
    if mount.path in ("/", "/dev"):
        return False
    if mount.root != "/" and _POD_ONLY not in mount.root:
        return True  # a folder of the node
    known = {own}
    for entry in os.scandir("/proc"):
        namespace = _namespace(entry.path) if entry.name.isdecimal() else None
        if namespace is not None and namespace not in known:
            known.add(namespace)
            for other in _mounts(entry.path):
                if other.device == device and _same_volume(mount, other, by_host=namespace == host):
                    return True
    return False


def _same_volume(mount: _Mount, other: _Mount, *, by_host: bool) -> bool:
    """Whether another mount of the same file system shows the same volume, rather than the node's whole disk, or where
    kubelet keeps a tmpfs for its pod."""
    if mount.root == "/":
        return not (by_host and _POD_ONLY in other.path)
    return _POD_ONLY in other.root and (
        f"{mount.root}/".startswith(f"{other.root}/") or f"{other.root}/".startswith(f"{mount.root}/")
    )


def _namespace(process: str) -> str | None:
    try:
        return os.readlink(f"{process}/ns/mnt")
    except OSError:
        return None


def _named(one: UnixSocket) -> str:
    return f" ({one.name})" if one.name else ""
