"""CRIU's log, in plain words: why it gave up.

CRIU logs where it noticed something: what comes last is "Dumping FAILED", what comes first is nearest to the cause.
The translations are for what users can meet with ordinary applications. CRIU's own words always follow, so that they
can be looked up.
"""

from __future__ import annotations

import re
from typing import Final

LINES: Final = 60
"""How much of a log is kept with an error."""

# "(00.001234) Error (criu/files.c:1234): tcp: what" and, of restored tasks, "(00.001234)    12: Error (...): what".
_ERROR: Final = re.compile(r"^\s*(?:\(\d+\.\d+\)\s*)?(?:pie: )?(?:\d+:\s*)?Error \([^)]*\):\s*(?P<what>.*)$")

# Said on the way out or about other things, and never the cause. The limit is CRIU's own, which without
# CAP_SYS_RESOURCE it can't raise.
_NOISE: Final = re.compile(
    r"^(Dumping FAILED|Restoring FAILED|\d+ exited, status=|rlimit: Can't setup RLIMIT_NOFILE|cg: cgroupd: recv)"
)

# What CRIU says (anywhere in its errors): what it means. The first that fits is taken.
_MEANINGS: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(pattern, re.IGNORECASE), meaning)
    for pattern, meaning in (
        (r"io_uring", "it uses io_uring, which CRIU can't dump"),
        (r"send_fds failed|Can't retrieve FDs", "it has a descriptor open that the kernel doesn't let CRIU have"),
        (
            r"Unsupported proto 262",
            "it listens with MPTCP, which CRIU can't dump (net.mptcp.enabled=0 in its network helps)",
        ),
        (r"Unsupported proto|Unknown socket collected", "it has a socket of a protocol that CRIU can't dump"),
        (r"secretmem", "it has secret memory (memfd_secret), which CRIU can't read"),
        (r"nested \w+ namespace|nested namespace", "it has made namespaces of its own, which CRIU can't dump"),
        (r"SysVIPC|SysV IPC|\bshm set\b", "it uses System V shared memory, which can't be dumped with it"),
        (
            r"Can't get rlimit|set rlimit|setrlimit",
            "CRIU lacks CAP_SYS_RESOURCE, without which it can't handle its limits",
        ),
        (
            r"Dangling connection|external socket is used|unix socket .* with(out)? peer",
            "a unix socket of it is connected to a process outside",
        ),
        (r"Connected TCP socket", "it has an open connection, which can't be kept in the host's network"),
        (r"in-?flight|pending connection|not accepted", "it has connections that it hasn't accepted yet"),
        (r"Can't dump (in|half-?open)", "it has connections that it hasn't accepted yet"),
        (r"Found (dead|unknown) (master|pty)|tty|Can't .* (pts|ptmx)", "it has a terminal open"),
        (r"anon_inode:?\[?(perf|bpf|fanotify|uffd|userfaultfd|kvm)", "it uses a kernel object that CRIU can't dump"),
        (r"Can't dump file .* of that type .*(/dev/|chr |blk )", "it has a device open"),
        (
            r"Can't lookup mount|mount .* not (found|supported)",
            "it has a file open that isn't in its mounts (any more), such as a message queue",
        ),
        (r"ghost file .* size|Can't dump ghost file", "it has a big deleted file open"),
        (r"link.?remap|Can't (create|link) .*remap", "it has a deleted file open that can't be kept"),
        (r"inotify|fsnotify|irmap|handle", "it watches a file (inotify) that isn't there any more"),
        (r"bad (size|mode|inode)|File .* has (bad|wrong|different)", "a file that it has open was changed meanwhile"),
        (
            r"Can't open file|Can't restore file|No such file or directory.*(open|file)",
            "a file that it has open is gone",
        ),
        (r"File exists|Can't fork for", "one of its process numbers is taken"),
        (r"Address already in use|Can't bind", "an address that it listens on is taken"),
        (r"Out of memory|Cannot allocate memory", "there isn't enough memory"),
        (r"No space left", "there is no space left on the disk"),
        (
            r"ptrace|seize|Unseiz|Unable to (attach|interrupt)",
            "its processes can't be stopped: something else traces them",
        ),
        (r"Timeout reached|frozen|freeze", "its processes can't be stopped in time"),
        (r"seccomp", "its seccomp filter can't be handled"),
        (r"No such process|is gone|Zombie|Can't .*dead", "one of its processes ended meanwhile"),
        (r"vDSO|vdso|kernel.*(too old|doesn't support)", "this CRIU doesn't fit this kernel"),
    )
)


def errors(log: str) -> list[str]:
    """What CRIU complained about, in its order and words, without its file names and line numbers."""
    found = (match["what"].strip() for line in log.splitlines() if (match := _ERROR.match(line)))
    return [what for what in found if what]


def reason(log: str, ended: str) -> str:
    """Why, without a full stop, and then CRIU's words. `ended` says how it ended, in case it has said nothing."""
    said = errors(log)
    own = next((what for what in said if not _NOISE.match(what)), "")
    if not own:
        last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")
        return f"CRIU {ended}" + (f' (its last words: "{last}")' if last else "")
    for pattern, meaning in _MEANINGS:
        if pattern.search(own):
            return f'{meaning} (CRIU: "{own}")'
    for pattern, meaning in _MEANINGS:
        for what in said:
            if not _NOISE.match(what) and pattern.search(what):
                return f'{meaning} (CRIU: "{what}")'
    return f'CRIU says "{own}"'


def tail(log: str) -> str:
    """The end of a log, as much as is worth keeping."""
    return "\n".join(log.splitlines()[-LINES:])
