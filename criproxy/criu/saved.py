"""What every thread of a container was and might do before its dump, kept on disk, and compared after the restore.

CRIU restores security labels, capabilities, NoNewPrivs, seccomp filters and mostly oom_score_adj, not the CPU affinity,
and what it doesn't restore is that of whoever restores. So it is seen here whether a restored thread is what it was.

A thread that uses all of its container's processors follows them: kubelet may change them while it sleeps, or later.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from criproxy.files import write_whole
from criproxy.kernel import processes
from criproxy.kernel.processes import ThreadAttributes


class AttributesChanged(Exception):
    """A restored thread may do more than before. The text says which thread and what."""


@dataclass(frozen=True)
class Saved:
    """What is kept beside the images."""

    guard: int
    """The number of the tree's root in the container's PID namespace. So are those of the threads."""
    attributes: Mapping[int, ThreadAttributes]
    """No affinity: that of the container."""
    sysv: Mapping[int, bool] = field(default_factory=dict)
    """The System V segments that it maps, by number: whether they are deleted."""

    @classmethod
    def of(cls, init_pid: int, guard: int, pids: Sequence[int], sysv: Mapping[int, bool]) -> Saved:
        """`init_pid`: the container's first process, which never chooses its processors. Numbers are the host's.

        Raises ProcessLookupError if one of the first two is gone.
        """
        whole = os.sched_getaffinity(init_pid)
        attributes = {
            tid: replace(thread, affinity=frozenset()) if thread.affinity == whole else thread
            for tid, thread in processes.attributes(pids).items()
        }
        return cls(processes.ns_pid(guard), attributes, sysv)

    def write(self, path: Path) -> None:
        threads = {
            tid: asdict(thread) | {"affinity": sorted(thread.affinity)} for tid, thread in self.attributes.items()
        }
        write_whole(path, json.dumps({"guard": self.guard, "threads": threads, "sysv": self.sysv}))

    @classmethod
    def read(cls, path: Path) -> Saved:
        """Raises OSError or ValueError."""
        data: dict[str, Any] = json.loads(path.read_text())
        try:
            threads = {
                int(tid): ThreadAttributes(**fields | {"affinity": frozenset(fields["affinity"])})
                for tid, fields in data["threads"].items()
            }
            sysv = {int(number): bool(deleted) for number, deleted in data.get("sysv", {}).items()}
            return cls(int(data["guard"]), threads, sysv)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} isn't what criproxy has written: {error}") from error

    def compare(self, pids: Sequence[int]) -> list[str]:
        """Compares the threads of restored processes (the host's numbers) with what they were; puts back affinity and
        oom_score_adj.

        Returns sentences about what is still different; raises AttributesChanged if a thread may do more than before.
        Threads that have ended or begun since don't count.
        """
        now = processes.attributes(pids)
        hosts = _host_numbers(pids)
        remarks: list[str] = []
        for tid, was in self.attributes.items():
            if (new := now.get(tid)) is None or new == was:
                continue
            if (gained := _gained(was, new)) is not None:
                raise AttributesChanged(f"thread {tid} of the restored application has {gained}")
            remarks += _put_back(hosts.get(tid, 0), tid, was, new)
        return remarks


def _host_numbers(pids: Sequence[int]) -> dict[int, int]:
    """The host's thread numbers by those in the container."""
    numbers: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            for tid in processes.threads(pid):
                with contextlib.suppress(ProcessLookupError):
                    numbers[processes.ns_pid(tid)] = tid
    return numbers


def _gained(was: ThreadAttributes, new: ThreadAttributes) -> str | None:
    """What a thread may do now that it mightn't before, in words."""
    if new.label != was.label:
        return f'the security label "{new.label}" instead of "{was.label}"'
    for name in ("inh", "prm", "eff", "bnd", "amb"):
        if more := getattr(new, f"cap_{name}") & ~getattr(was, f"cap_{name}"):
            return f"capabilities that it didn't have before (Cap{name.capitalize()} {more:016x} more)"
    if was.no_new_privs and not new.no_new_privs:
        return "lost NoNewPrivs"
    if (was.seccomp and not new.seccomp) or new.seccomp_filters < was.seccomp_filters:
        return "lost seccomp filters"
    return None


def _put_back(host: int, tid: int, was: ThreadAttributes, new: ThreadAttributes) -> list[str]:
    remarks = []
    if was.affinity and new.affinity != was.affinity:
        try:
            os.sched_setaffinity(host, was.affinity)
        except OSError as error:
            remarks.append(f"thread {tid} can't have the processors that it had: {error.strerror}")
    if new.oom_score_adj != was.oom_score_adj:
        try:
            Path(f"/proc/{host}/oom_score_adj").write_text(str(was.oom_score_adj))
        except OSError as error:
            remarks.append(
                f"thread {tid} has oom_score_adj {new.oom_score_adj}, not {was.oom_score_adj}: {error.strerror}"
            )
    for name in ("inh", "prm", "eff", "bnd", "amb"):
        if less := getattr(was, f"cap_{name}") & ~getattr(new, f"cap_{name}"):
            remarks.append(f"thread {tid} lacks capabilities that it had before (Cap{name.capitalize()} {less:016x})")
    return remarks
