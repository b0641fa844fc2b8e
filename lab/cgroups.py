"""The lab's cgroups, under the same path in every hierarchy: one on cgroup v2, one per controller on v1, and the
unified tree beside those on hybrid machines."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

from lab import LabError

_MOUNT = Path("/sys/fs/cgroup")


def hierarchies() -> list[Path]:
    """The roots of all mounted hierarchies."""
    if (_MOUNT / "cgroup.controllers").exists():
        return [_MOUNT]
    return sorted(d for d in _MOUNT.iterdir() if not d.is_symlink() and (d / "cgroup.procs").exists())


def is_v2(root: Path) -> bool:
    return (root / "cgroup.controllers").exists()


def _checked(name: str) -> str:
    """Everything here is for the labs' own cgroups: an empty name would be the whole machine, and remove() kills."""
    if not re.fullmatch(r"/criproxy-lab-[0-9]+(/[^/.][^/]*)*", name):
        raise ValueError(f"{name!r} is no cgroup of a lab")
    return name


def directories(name: str) -> list[Path]:
    """Where the cgroup `name` ("/a/b") exists."""
    name = _checked(name)
    return [d for d in (root / name.lstrip("/") for root in hierarchies()) if d.is_dir()]


def create(name: str) -> None:
    """Make the cgroup in every hierarchy, usable for processes and, on v2, with the root's controllers passed on."""
    parts = Path(_checked(name).lstrip("/")).parts
    for root in hierarchies():
        directory = root
        for part in parts:
            if is_v2(directory):
                _pass_controllers_on(directory)
            directory /= part
            directory.mkdir(exist_ok=True)
            # A v1 cpuset starts empty, and takes no process until it has processors and memory nodes. (On v2 an empty
            # one has its parent's, and the root has no such file.)
            for file in ("cpuset.cpus", "cpuset.mems"):
                if not is_v2(root) and (directory / file).exists() and not (directory / file).read_text().strip():
                    (directory / file).write_text((directory.parent / file).read_text())


def _pass_controllers_on(directory: Path) -> None:
    for controller in (directory / "cgroup.controllers").read_text().split():
        # Refused one by one: a controller with real-time processes elsewhere, or a cgroup that has processes itself.
        with contextlib.suppress(OSError):
            (directory / "cgroup.subtree_control").write_text(f"+{controller}")


def join(name: str, pid: int) -> None:
    """Move a process into the cgroup, in every hierarchy."""
    for directory in directories(name):
        (directory / "cgroup.procs").write_text(str(pid))


def processes(name: str) -> set[int]:
    """All processes in the cgroup and below it, in any hierarchy."""
    found: set[int] = set()
    for top in directories(name):
        for directory, _, _ in os.walk(top):
            # Gone since the walk, or a threaded cgroup.
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in (Path(directory) / "cgroup.procs").read_text().split())
    return found - {0}


def of(pid: int) -> set[str]:
    """The folders of the cgroups that the process is in, one for each hierarchy. Raises OSError if it has ended."""
    found = set()
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for root in hierarchies():
            names = {root.name, f"name={root.name}"} if root != _MOUNT else {""}
            if names & set(controllers.split(",")) or (not controllers and is_v2(root)):
                found.add(f"{root}{path.rstrip('/')}")
    return found


def subtree(name: str) -> set[str]:
    """Every cgroup from `name` down, in any hierarchy, as full paths."""
    return {directory for top in directories(name) for directory, _, _ in os.walk(top)}


def remove(name: str, *, timeout: float = 20.0) -> None:
    """Kill every process in the cgroup and below, and remove it. Raises LabError if something is left after seconds."""
    deadline = time.monotonic() + timeout
    while True:
        pids = processes(name)
        for top in directories(name):
            _thaw(top)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for top in directories(name):
            for directory, _, _ in os.walk(top, topdown=False):
                # Busy while a process in it is still ending.
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        if not directories(name):
            return
        if time.monotonic() > deadline:
            raise LabError(f"The cgroup {name} can't be removed; processes: {sorted(pids)}")
        time.sleep(0.01)


def _thaw(top: Path) -> None:
    """SIGKILL does nothing to what the v1 freezer holds."""
    for directory, _, _ in os.walk(top):
        with contextlib.suppress(OSError):
            if (Path(directory) / "freezer.state").exists():
                (Path(directory) / "freezer.state").write_text("THAWED")
