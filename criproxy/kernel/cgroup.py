"""The control groups of one container, in whichever of the three layouts the machine has.

v1 has a tree per controller, v2 has one tree for all, and a hybrid machine has v1's trees for the controllers and a v2
tree without any beside them. A container has a folder in each. They are found through `/proc/PID/cgroup` and our own
mounts, so criproxy has to see the host's cgroup namespace (a DaemonSet: `/sys/fs/cgroup` of the host).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criproxy.files import write_whole

UNIFIED: Final = ""
"""The key of the v2 tree among the controllers of v1, as in /proc/PID/cgroup."""

KEPT: Final = 64 << 20
"""Bytes of file pages that a container may keep while it sleeps."""

_UNLIMITED: Final = 1 << 60
"""Bytes. v1 writes no limit as one near 2^63."""

# v2 first, as there all is in one; then those of v1 which every runtime gives a container a folder in.
_FOR_PROCESSES: Final = (UNIFIED, "pids", "memory", "freezer", "devices", "cpu", "name=systemd")

# What is in the way of a restore, by controller, with what stands for no limit. CRIU needs two tasks and MiBs on top
# of the application's. Where the limits don't leave that, it is killed half-way, and the application's state is lost.
# Above memory.high it would be slow. v1's limit of memory stays: the kernel may refuse to put it back.
_IN_THE_WAY: Final = (
    ("cpu", "cpu.cfs_quota_us", "-1"),
    ("pids", "pids.max", "max"),
    (UNIFIED, "cpu.max", "max"),
    (UNIFIED, "pids.max", "max"),
    (UNIFIED, "memory.high", "max"),
    (UNIFIED, "memory.max", "max"),
    (UNIFIED, "memory.oom.group", "0"),
)

# How often what is being lifted is lifted: two containers of a pod may be restored at once, and share the pod's folder.
_lifted: dict[str, tuple[str, int]] = {}


@dataclass(frozen=True)
class Cgroup:
    """Where a container's processes are accounted for and limited."""

    folders: Mapping[str, Path]
    """The container's folder by controller (`memory`, `name=systemd`; UNIFIED for v2's tree), where it is mounted."""
    roots: frozenset[Path]
    """The topmost folders that we see of these trees. A container that is in one of them isn't limited there."""

    @classmethod
    def of(cls, pid: int, proc: Path = Path("/proc")) -> Cgroup:
        """The cgroup that a process is in.

        Raises ProcessLookupError if it is gone, and LookupError if it is in no group of its own or out of our sight.
        """
        try:
            lines = (proc / str(pid) / "cgroup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessLookupError(f"There is no process {pid}") from None
        mounts = _mounts((proc / "self/mountinfo").read_text())
        folders: dict[str, Path] = {}
        roots: set[Path] = set()
        for line in lines:
            _number, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                for top, mountpoint in mounts.get(controller, []):
                    if (below := _below(top, path)) is not None:
                        folders[controller] = mountpoint / below
                        roots.add(mountpoint)
                        break
        group = cls(folders, frozenset(roots))
        if group._processes() is None:
            raise LookupError(
                f"Process {pid} has no cgroup of its own in sight. criproxy needs the host's cgroup namespace and the "
                "host's /sys/fs/cgroup."
            )
        return group

    def whole(self, name: str) -> Cgroup:
        """The group whose name contains `name` (a container's id) and which this one is in, or is.

        A container may divide its group, and move its first process (systemd does); runtimes name the whole after it.
        """
        return Cgroup({controller: _whole(folder, name) for controller, folder in self.folders.items()}, self.roots)

    def around(self) -> Cgroup:
        """The group around it: its pod's, with the pod's other containers."""
        return Cgroup({controller: folder.parent for controller, folder in self.folders.items()}, self.roots)

    def procs(self) -> list[int]:
        """The host's numbers of all processes in it and in groups below it. Empty once it is removed."""
        top = self._processes()
        found: set[int] = set()
        for folder, _folders, _files in os.walk(top) if top is not None else ():
            # 0 stands for a process of another PID namespace. A threaded group (v2) has no list: its parent has it.
            found.update(int(word) for word in _read(Path(folder) / "cgroup.procs").split() if word != "0")
        return sorted(found)

    def cpu_usage(self) -> float:
        """Processor time that was ever used in it, in seconds. It goes on counting over checkpoints."""
        if folder := self.own("cpuacct"):
            return _number(folder / "cpuacct.usage") / 1e9
        if folder := self.own(UNIFIED):
            return _number(folder / "cpu.stat", "usage_usec") / 1e6
        return 0.0

    def memory(self) -> int:
        """Bytes in use, but for file pages that are as good as free: the working set, as `kubectl top` shows it."""
        if folder := self.own("memory"):
            used = _number(folder / "memory.usage_in_bytes")
            free = _number(folder / "memory.stat", "total_inactive_file")
        elif folder := self.own(UNIFIED):
            used = _number(folder / "memory.current")
            free = _number(folder / "memory.stat", "inactive_file")
        else:
            used, free = 0, 0
        return max(0, used - free)

    def anonymous(self) -> int:
        """Bytes of memory that no file backs: what a checkpoint has to save."""
        if folder := self.own("memory"):
            return _number(folder / "memory.stat", "total_rss")
        if folder := self.own(UNIFIED):
            return _number(folder / "memory.stat", "anon")
        return 0

    def room(self) -> int | None:
        """Bytes that its processes may use on top of what they have, by the limits of v1 for the container and its pod.
        File pages count as free. None where there is no limit, and with v2, whose limits are lifted for a restore."""
        if (own := self.own("memory")) is None:
            return None
        rooms = []
        for folder in (own.parent, own):
            limit = _number(folder / "memory.limit_in_bytes")
            if folder not in self.roots and 0 < limit < _UNLIMITED:
                files = sum(_number(folder / "memory.stat", f"total_{kind}_file") for kind in ("active", "inactive"))
                rooms.append(limit - _number(folder / "memory.usage_in_bytes") + files)
        return min(rooms, default=None)

    def oom_kills(self) -> int:
        """How many of its processes were killed because a limit left no memory; it only grows."""
        if folder := self.own("memory"):
            return _number(folder / "memory.oom_control", "oom_kill")
        if folder := self.own(UNIFIED):
            return _number(folder / "memory.events", "oom_kill")
        return 0

    def join_fds(self) -> list[int]:
        """Descriptors for `enter --cgroup-fd`, one a tree: v2's folder, v1's file `tasks`. The caller closes them.

        clone3(CLONE_INTO_CGROUP) starts a process in the folder, and a thread that writes `0` to `tasks` goes there.
        Both take microseconds, where a write to `cgroup.procs` waits for an RCU grace period of 10 to 20 ms.

        Raises OSError if the cgroup is gone.
        """
        descriptors: list[int] = []
        try:
            # Controllers that are mounted together (cpu,cpuacct) share a folder. A root folder counts too: the writer
            # may be elsewhere in that tree, the container's processes aren't.
            for folder, controller in {folder: controller for controller, folder in self.folders.items()}.items():
                if controller == UNIFIED:
                    descriptors.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                else:
                    descriptors.append(os.open(folder / "tasks", os.O_WRONLY | os.O_CLOEXEC))
        except OSError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return descriptors

    @contextlib.contextmanager
    def lifted(self, record: Path) -> Iterator[None]:
        """Without limits of processor time, tasks and (on v2) memory, and without v2's rule that one OOM kill ends the
        whole container (init included): for a restore, in which CRIU needs its own on top of the application's.

        That holds for the container's group and for the one around it, the pod's; further up are other pods. What was
        there is kept in the file `record`, so that `restore_limits(record)` can put it back if we don't live to do it.
        """
        entries = self._limits()
        if not entries:
            yield
            return
        _write_record(record, entries)
        try:
            for entry in entries:
                _lifted[entry.file] = (entry.value, _lifted.get(entry.file, (entry.value, 0))[1] + 1)
                entry.lift()
            yield
        finally:
            for entry in reversed(entries):
                value, count = _lifted.pop(entry.file)
                if count > 1:
                    _lifted[entry.file] = (value, count - 1)
                else:
                    entry.put_back()
            record.unlink(missing_ok=True)

    def reclaim(self, keep: int = KEPT) -> None:
        """Gives back what the processes leave behind, file pages above all, but for about `keep` bytes.

        Those are the application's own code, and a restore that has to read it from the disk again takes longer: 4 ms
        more for redis (2 MB), 55 ms more for node (33 MB), measured with all of it given back. The kernel takes such
        pages by itself when it needs them. v1 can only give back all: that happens where there is more than `keep`.

        Best effort, never an error. Blocks for 1 to 3 ms.
        """
        if (folder := self.own("memory")) and _number(folder / "memory.usage_in_bytes") > keep:
            _write(folder / "memory.force_empty", "0")
        elif (folder := self.own(UNIFIED)) and (excess := _number(folder / "memory.current") - keep) > 0:
            # The kernel takes what it can; EAGAIN says that this was less.
            _write(folder / "memory.reclaim", str(excess))

    def reclaim_all(self) -> list[tuple[Path, str]]:
        """What to write where so that the kernel gives back all it can of the container's memory: file pages, and where
        the node has swap, the rest as well. The writing takes seconds then, and answers EAGAIN or EBUSY in the end."""
        if folder := self.own("memory"):
            return [(folder / "memory.force_empty", "0")]
        if (folder := self.own(UNIFIED)) and (used := _number(folder / "memory.current")):
            return [(folder / "memory.reclaim", str(used))]
        return []

    def own(self, controller: str) -> Path | None:
        """The container's folder, if it has one of its own in that tree."""
        folder = self.folders.get(controller)
        return folder if folder not in self.roots else None

    def _processes(self) -> Path | None:
        """A folder that lists the container's processes and no others."""
        return next((folder for controller in _FOR_PROCESSES if (folder := self.own(controller))), None)

    def _limits(self) -> list[_Limit]:
        """The limits to lift, the outer ones first."""
        found = []
        for controller, file, free in _IN_THE_WAY:
            if (folder := self.own(controller)) is None:
                continue
            for level in (folder.parent, folder):
                path = str(level / file)
                value = _lifted[path][0] if path in _lifted else _read(level / file)
                if value and value.split()[0] != free and level not in self.roots:
                    found.append(_Limit(path, value, free))
        return found


def restore_limits(record: Path) -> None:
    """Puts back what a `lifted()` that was interrupted has left in its record. Does nothing if there is none."""
    try:
        entries = [_Limit(**entry) for entry in json.loads(record.read_text())]
    except FileNotFoundError:
        return
    for entry in reversed(entries):
        entry.put_back()
    record.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Limit:
    file: str
    value: str
    """What it was."""
    free: str
    """What stands for no limit. The kernel may add to it (`max` reads as `max 100000`)."""

    def lift(self) -> None:
        _write(Path(self.file), self.free)

    def put_back(self) -> None:
        """Unless someone (kubelet: UpdateContainerResources) has set another one meanwhile, or the cgroup is gone."""
        if _read(Path(self.file)).split()[:1] == [self.free]:
            _write(Path(self.file), self.value)


def _write_record(record: Path, entries: list[_Limit]) -> None:
    """It has to outlive us, not the kernel, whose cgroups are gone after a power failure."""
    write_whole(record, json.dumps([vars(entry) for entry in entries]))


def _mounts(mountinfo: str) -> dict[str, list[tuple[str, Path]]]:
    """Where each controller's tree is mounted, and which part of it: see proc(5)."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for line in mountinfo.splitlines():
        before, _dash, after = line.partition(" - ")
        top, mountpoint = (_unescaped(field) for field in before.split()[3:5])
        kind, _source, options = after.split(" ", 2)
        if kind == "cgroup2":
            found.setdefault(UNIFIED, []).append((top, Path(mountpoint)))
        elif kind == "cgroup":
            for option in options.split(","):
                found.setdefault(option, []).append((top, Path(mountpoint)))
    return found


def _below(top: str, path: str) -> str | None:
    """The part of a cgroup's path under the part of the tree that is mounted; None if it is outside of that."""
    if path.startswith("/.."):  # outside of our own cgroup namespace
        return None
    if top == "/":
        return path.lstrip("/")
    if path == top or path.startswith(top + "/"):
        return path[len(top) :].lstrip("/")
    return None


def _whole(folder: Path, name: str) -> Path:
    return next((level for level in reversed((folder, *folder.parents)) if name in level.name), folder)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _read(path: Path) -> str:
    """Empty if there is no such file: another version, a controller that isn't on, or a cgroup that is gone."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path, key: str | None = None) -> int:
    """The number in a file, or the one after `key` in a file of `key number` lines; 0 if there is none."""
    found = re.search(r"^(\d+)" if key is None else rf"^{key} (\d+)$", _read(path), re.MULTILINE)
    return int(found[1]) if found else 0


def _write(path: Path, value: str) -> None:
    """As far as it goes: a limit that can't be lifted makes a restore slow, and no more."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)


__all__ = ["UNIFIED", "Cgroup", "restore_limits"]
