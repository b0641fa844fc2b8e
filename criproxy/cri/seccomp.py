"""Seccomp profiles that refuse io_uring, which CRIU can't dump.

`io_uring_setup` answers ENOSYS, as on a kernel without it, and applications fall back to what they did before there
was an io_uring (MariaDB, for one). A profile is a file that containerd reads while it handles CreateContainer and
never again: `contrib/seccomp.WithProfile` in 1.6 to 2.x takes any absolute path.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_CALL = "io_uring_setup"
# Actions after which the call may still take place.
_PERMISSIVE = frozenset({"SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_NOTIFY"})
# libseccomp kills a process that uses an architecture which its filter doesn't list (32-bit programs on a 64-bit
# kernel), so a profile that allows all must list what the kernel can run.
_ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
    "ppc64le": ("SCMP_ARCH_PPC64LE",),
    "s390x": ("SCMP_ARCH_S390X", "SCMP_ARCH_S390"),
    "riscv64": ("SCMP_ARCH_RISCV64",),
}


def allow_all(machine: str) -> dict[str, Any] | None:
    """A profile that allows everything but io_uring; None for a machine whose architectures aren't known here."""
    architectures = _ARCHITECTURES.get(machine)
    if architectures is None:
        return None
    return {"defaultAction": "SCMP_ACT_ALLOW", "architectures": list(architectures), "syscalls": [_refusal()]}


def merged(profile: Any) -> dict[str, Any] | None:
    """A copy of a profile that refuses io_uring.

    None if that wouldn't change anything (the profile refuses it already) or if this isn't a profile that can be
    understood without doubt: containerd's own error, or the container as its author meant it, is better then.
    """
    if not isinstance(profile, dict) or not _spelled_right(profile, "defaultAction", "syscalls"):
        return None
    syscalls = profile.get("syscalls") or []
    if not isinstance(syscalls, list) or not all(isinstance(rule, dict) for rule in syscalls):
        return None
    if not all(_spelled_right(rule, "names", "action", "args") for rule in syscalls):
        return None
    naming = [rule for rule in syscalls if _CALL in (rule.get("names") or [])]
    refused_always = any(rule.get("action") not in _PERMISSIVE and not rule.get("args") for rule in naming)
    allowed = any(rule.get("action") in _PERMISSIVE for rule in naming)
    if not allowed and (refused_always or profile.get("defaultAction") not in _PERMISSIVE):
        return None
    # Two rules for one call contradict each other, so ours must be the only one.
    rest = []
    for rule in syscalls:
        if _CALL in (rule.get("names") or []):
            rule = {**rule, "names": [name for name in rule["names"] if name != _CALL]}
            if not rule["names"]:
                continue
        rest.append(rule)
    return {**profile, "syscalls": [*rest, _refusal()]}


def forbidden(profile: Any, calls: Iterable[str]) -> str | None:
    """The first of these system calls that a profile refuses whatever its arguments are, or None.

    Where a rule depends on arguments, capabilities or the kernel, it is given the benefit of the doubt.
    """
    if not isinstance(profile, dict) or not isinstance(profile.get("syscalls") or [], list):
        return None
    rules = [rule for rule in profile.get("syscalls") or [] if isinstance(rule, dict)]
    for call in calls:
        naming = [rule for rule in rules if call in (rule.get("names") or []) or call == rule.get("name")]
        allowed = any(rule.get("action") in _PERMISSIVE for rule in naming)
        refused = any(rule.get("action") not in _PERMISSIVE and not rule.get("args") for rule in naming)
        if not allowed and (refused or profile.get("defaultAction") not in _PERMISSIVE):
            return call
    return None


def _refusal() -> dict[str, Any]:
    return {"names": [_CALL], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS}


def _spelled_right(mapping: dict[str, Any], *keys: str) -> bool:
    """Whether none of the keys is there in another spelling: Go reads JSON without regard to case, so that a second
    list of ours under the right name would replace the first."""
    folded = {key.lower(): key for key in keys}
    return all(folded.get(key.lower(), key) == key for key in mapping)


class Profiles:
    """Files with profiles, named by their content, in a folder of ours."""

    def __init__(self, folder: Path, machine: str | None = None) -> None:
        """`machine` as in uname(2); None is this one."""
        self._folder = folder
        self._machine = platform.machine() if machine is None else machine

    def allow_all(self) -> Path | None:
        """The file of a profile that refuses io_uring alone."""
        profile = allow_all(self._machine)
        return None if profile is None else self._store(profile)

    def merged(self, path: Path) -> Path | None:
        """The file of a copy of the profile at `path` that refuses io_uring; None where it's better left as it is."""
        try:
            profile = merged(json.loads(path.read_bytes()))
        except (OSError, ValueError):
            return None
        return None if profile is None else self._store(profile)

    @staticmethod
    def forbidden(path: Path, calls: Iterable[str]) -> str | None:
        """As `forbidden`, of the profile at `path`; None if that can't be read."""
        try:
            return forbidden(json.loads(path.read_bytes()), calls)
        except (OSError, ValueError):
            return None

    def _store(self, profile: dict[str, Any]) -> Path:
        data = json.dumps(profile, indent=1).encode()
        path = self._folder / f"{hashlib.sha256(data).hexdigest()}.json"
        if path.exists():
            return path
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._folder)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                # A name that is there after a power cut with no content would be trusted for ever.
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        return path
