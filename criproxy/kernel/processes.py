"""What the kernel says about processes, read from `/proc` of the host.

Numbers are the host's unless a name says otherwise (`ns_pid`, `ns_tid`: the number inside the process's own PID
namespace). A process may end at any moment: single questions about one that is gone raise ProcessLookupError, questions
about many leave it out.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")

# include/linux/sched.h
_PF_EXITING: Final = 0x4

# The fields of /proc/PID/status that are compared, in the order in which the kernel writes them.
_STATUS: Final = re.compile(
    rb"^State:\t(?P<state>.).*?^NSpid:(?P<pids>[\d\t]+)$.*?"
    rb"^CapInh:\t(?P<inh>\w+)\nCapPrm:\t(?P<prm>\w+)\nCapEff:\t(?P<eff>\w+)\n"
    rb"CapBnd:\t(?P<bnd>\w+)\nCapAmb:\t(?P<amb>\w+)\nNoNewPrivs:\t(?P<privs>\d)\n"
    rb"(?:Seccomp:\t(?P<seccomp>\d+)\n(?:Seccomp_filters:\t(?P<filters>\d+)\n)?)?"
    rb".*?^Cpus_allowed_list:\t(?P<cpus>[\d,-]+)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Process:
    """A process that can't be mistaken for a later one with the same number."""

    pid: int
    start_time: int
    """Clock ticks since boot, as in /proc/PID/stat."""

    @classmethod
    def of(cls, pid: int, proc: Path = PROC) -> Process:
        """Raises ProcessLookupError if there is none."""
        return cls(pid, start_time(pid, proc))

    def alive(self, proc: Path = PROC) -> bool:
        """Whether it still runs. A zombie doesn't."""
        return alive(self.pid, self.start_time, proc)

    def ending(self, proc: Path = PROC) -> bool:
        """Whether it is gone, or on its way out: the first process of a PID namespace stays for as long as it takes the
        kernel to end all others there."""
        try:
            fields = _stat(self.pid, proc)
        except ProcessLookupError:
            return True
        return int(fields[19]) != self.start_time or bool(int(fields[6]) & _PF_EXITING)


@dataclass(frozen=True)
class ThreadAttributes:
    """What a thread must have after a restore exactly as it had it before."""

    label: str
    """Of the security module (AppArmor's profile, SELinux's context); empty where there is none."""
    cap_inh: int
    cap_prm: int
    cap_eff: int
    cap_bnd: int
    cap_amb: int
    no_new_privs: bool
    seccomp: int
    """0: none, 1: strict, 2: filter."""
    seccomp_filters: int
    oom_score_adj: int
    affinity: frozenset[int]
    """The processors that it may run on."""


def start_time(pid: int, proc: Path = PROC) -> int:
    """Clock ticks from boot to the start of a process."""
    return int(_stat(pid, proc)[19])


def alive(pid: int, start: int, proc: Path = PROC) -> bool:
    """Whether the process with this number and start time (see `start_time`) still runs. A zombie doesn't."""
    try:
        fields = _stat(pid, proc)
    except ProcessLookupError:
        return False
    return int(fields[19]) == start and fields[0] not in ("Z", "X")


def parent(pid: int, proc: Path = PROC) -> int:
    """The host's number of the parent; 0 if that is outside of our own PID namespace."""
    return int(_stat(pid, proc)[1])


def ns_pid(pid: int, proc: Path = PROC) -> int:
    """The number of a process (or thread) in the innermost PID namespace that it is a member of."""
    return int(status(pid, proc)["NSpid"].split()[-1])


def status(pid: int, proc: Path = PROC) -> dict[str, str]:
    """The lines of /proc/PID/status, by what stands before their colon."""
    lines = _alive_text(proc / str(pid) / "status").splitlines()
    return {name: value.strip() for name, _colon, value in (line.partition(":") for line in lines)}


def children(pid: int, proc: Path = PROC) -> list[int]:
    """The direct children of a process, whichever of its threads made them, zombies too."""
    found: set[int] = set()
    threads_ = threads(pid, proc)
    for tid in threads_:
        try:
            found.update(int(child) for child in (proc / str(pid) / "task" / str(tid) / "children").read_text().split())
        except FileNotFoundError:
            if (proc / str(pid) / "task" / str(tid)).is_dir():
                return _children_by_scan(pid, proc)  # a kernel without CONFIG_PROC_CHILDREN
        except ProcessLookupError:
            continue
    return sorted(found)


def tree(pid: int, proc: Path = PROC) -> list[int]:
    """A process and all its descendants, parents before children. Empty if it is gone."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        current = waiting.pop(0)
        try:
            waiting += children(current, proc)
        except ProcessLookupError:
            continue
        found.append(current)
    return found


def in_namespace(init_pid: int, among: Iterable[int] | None = None, proc: Path = PROC) -> list[int]:
    """All processes in the PID namespace of `init_pid`, itself included, and not those in namespaces below it.

    `among` bounds the search, best to what the container's cgroup lists; otherwise all processes of the host are looked
    at (12 µs each).
    """
    namespace = _namespace(init_pid, proc)
    if namespace is None:
        raise ProcessLookupError(f"There is no process {init_pid}")
    candidates = _pids(proc) if among is None else {init_pid, *among}
    return sorted(pid for pid in candidates if _namespace(pid, proc) == namespace)


def threads(pid: int, proc: Path = PROC) -> list[int]:
    """The host's thread numbers of a process, the main one first."""
    try:
        return sorted((int(name) for name in os.listdir(proc / str(pid) / "task")), key=lambda tid: (tid != pid, tid))
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"There is no process {pid}") from None


def running(pids: Iterable[int], proc: Path = PROC) -> int | None:
    """The first of these processes of which a thread runs, or wants to, or waits for a disk (states R and D)."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            for tid in threads(pid, proc):
                with contextlib.suppress(ProcessLookupError):
                    # The state follows the name, which may contain anything.
                    if _fast(f"{proc}/{pid}/task/{tid}/stat").rpartition(b")")[2][1:2] in (b"R", b"D"):
                        return pid
    return None


def attributes(pids: Iterable[int], proc: Path = PROC) -> dict[int, ThreadAttributes]:
    """The attributes of every thread of the processes, by its number in their (one) PID namespace.

    A host's numbers change with a restore, these don't. Threads that end meanwhile are left out, and so are zombies.
    """
    found: dict[int, ThreadAttributes] = {}
    for pid in pids:
        try:
            tids = threads(pid, proc)
        except ProcessLookupError:
            continue
        for tid in tids:
            try:
                ns_tid, found_attributes = _attributes(f"{proc}/{pid}/task/{tid}")
            except ProcessLookupError:
                continue
            found[ns_tid] = found_attributes
    return found


def socket_inodes(pids: Iterable[int], proc: Path = PROC) -> set[int]:
    """The inodes of all sockets that the processes have open, as sock_diag and /proc/net name them."""
    inodes = set()
    for pid in pids:
        folder = f"{proc}/{pid}/fd"
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, ProcessLookupError):
            continue
        for name in names:
            try:
                target = os.readlink(f"{folder}/{name}")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if target.startswith("socket:["):
                inodes.add(int(target[8:-1]))
    return inodes


def name(pid: int, proc: Path = PROC) -> str:
    """The short name of a process (its comm), for messages; empty if it is gone."""
    return _text(proc / str(pid) / "comm").strip()


def cmdline(pid: int, proc: Path = PROC) -> list[str]:
    """Its command line; empty for kernel threads, zombies and processes that are gone."""
    text = _text(proc / str(pid) / "cmdline")
    return text.rstrip("\0").split("\0") if text else []


def executable(pid: int, proc: Path = PROC) -> str:
    """The path of its program as the process itself sees it; empty if it is gone. May end in ` (deleted)`."""
    try:
        return os.readlink(proc / str(pid) / "exe")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def _attributes(task: str) -> tuple[int, ThreadAttributes]:
    match = _STATUS.search(_fast(f"{task}/status"))
    if match is None:
        raise ValueError(f"{task}/status isn't as Linux 4.10 and later write it")
    if match["state"] in b"ZX":
        raise ProcessLookupError(f"Thread {task} has ended")
    return int(match["pids"].split()[-1]), ThreadAttributes(
        label=_label(task),
        cap_inh=int(match["inh"], 16),
        cap_prm=int(match["prm"], 16),
        cap_eff=int(match["eff"], 16),
        cap_bnd=int(match["bnd"], 16),
        cap_amb=int(match["amb"], 16),
        no_new_privs=match["privs"] == b"1",
        seccomp=int(match["seccomp"] or 0),
        seccomp_filters=int(match["filters"] or 0),
        oom_score_adj=int(_fast(f"{task}/oom_score_adj")),
        affinity=_cpus(match["cpus"].decode()),
    )


def _label(task: str) -> str:
    try:
        return _fast(f"{task}/attr/current").rstrip(b"\0\n").decode(errors="replace")
    except ProcessLookupError:
        if os.path.isdir(task):
            return ""  # a kernel without any security module
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # none of the kernel's modules labels processes
            raise
        return ""


def _fast(path: str) -> bytes:
    """A file of /proc, without the layers of Python's own: a JVM has a hundred threads, and a client may be waiting."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(descriptor, 16384)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"The process of {path} is gone") from None


@functools.lru_cache(64)
def _cpus(text: str) -> frozenset[int]:
    """`0-3,8` → 0, 1, 2, 3, 8."""
    found: set[int] = set()
    for part in text.split(","):
        first, _dash, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _stat(pid: int, proc: Path) -> list[str]:
    """The fields of /proc/PID/stat from the third (the state) on; the second, the name, may contain anything."""
    return _alive_text(proc / str(pid) / "stat").rpartition(")")[2].split()


def _alive_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"The process of {path} is gone") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _namespace(pid: int, proc: Path) -> str | None:
    try:
        return os.readlink(f"{proc}/{pid}/ns/pid")
    except OSError:  # gone, a zombie, or another's that we may not look at
        return None


def _pids(proc: Path) -> Iterator[int]:
    return (int(name) for name in os.listdir(proc) if name.isdigit())


def _children_by_scan(pid: int, proc: Path) -> list[int]:
    found = []
    for candidate in _pids(proc):
        try:
            if parent(candidate, proc) == pid:
                found.append(candidate)
        except ProcessLookupError:
            continue
    return sorted(found)
