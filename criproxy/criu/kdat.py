"""What CRIU finds out about the kernel, found out once per boot instead of at every start (which takes it 20 ms).

CRIU reads it from `/run/criu.kdat`, wherever that comes from, but writes it to a tmpfs only. So it is made in a private
copy of the host's mount namespace, with a tmpfs over `/run`, by an unchanged CRIU. A bundle's CRIU reads it from the
bundle (see `bundle.py`).

The security module needs care: CRIU finds it by paths in `/sys`. Made where these are hidden, kernel data says that
there is none, and restored containers would be unconfined without a word. Such data is refused here.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from criproxy import run
from criproxy.kernel import namespaces

PATH: Final = Path("/run/criu.kdat")
"""Where a CRIU keeps it by itself (KERNDAT_CACHE_FILE in kerndat.c, as distributions build it)."""

NONE: Final = "none"
APPARMOR: Final = "apparmor"
SELINUX: Final = "selinux"

# The first number in every kernel data file (KDAT_MAGIC in CRIU's kerndat.c).
_MAGIC: Final = 0x57023458


class KdatError(Exception):
    """CRIU doesn't work with this kernel, or can't be told the truth about it. The text is for people."""


def make(criu: Sequence[str], environment: Mapping[str, str], descriptor: int) -> bytes:
    """The kernel data of this boot, as `criu check` finds it out.

    `criu` is the beginning of the command line of an unchanged CRIU, valid where `descriptor` is inherited. Raises
    KdatError with CRIU's own words if it can't work here.
    """

    def check() -> tuple[bytes, str]:
        _show_security()
        lsm = kernel_lsm()
        namespaces.mount("tmpfs", PATH.parent, "tmpfs", namespaces.MS_NOSUID | namespaces.MS_NODEV, "size=4m")
        completed = run.run([*criu, "check"], env=environment, pass_fds=[descriptor], timeout=60)
        if completed.returncode != 0:
            raise KdatError(f"`criu check` says: {_reason(completed.stderr + completed.stdout)}")
        try:
            return PATH.read_bytes(), lsm
        except FileNotFoundError:
            raise KdatError(f"`criu check` passes, but leaves no kernel data in {PATH.parent}.") from None

    try:
        data, kernel = namespaces.in_private_mounts(check)
    except (OSError, run.CommandError) as error:
        raise KdatError(f"{error}. It has to run as root, with CAP_SYS_ADMIN.") from error
    _agree(found_lsm(data), kernel)
    return data


def key(criu: str, proc: Path = Path("/proc")) -> str:
    """A name for kernel data: it holds for one CRIU (`criu` says which) and one boot of one kernel."""
    kernel = proc / "sys/kernel"
    parts = [criu, (kernel / "osrelease").read_text(), (kernel / "random/boot_id").read_text()]
    return hashlib.sha256("\0".join(part.strip() for part in parts).encode()).hexdigest()[:20]


def kernel_lsm(root: Path = Path("/")) -> str:
    """The kernel's security module that labels processes, whether CRIU can see it or not: none, apparmor or selinux.

    Several sources, as each may be hidden: securityfs's list, AppArmor's parameter, the kernel's list of file systems.
    """
    listed = _read(root / "sys/kernel/security/lsm").split(",")
    if _read(root / "sys/module/apparmor/parameters/enabled") == "Y" or "apparmor" in listed:
        return APPARMOR
    if "selinux" in listed or "selinuxfs" in _read(root / "proc/filesystems").split():
        return SELINUX
    return NONE


def found_lsm(data: bytes, proc: Path = Path("/proc")) -> str | None:
    """The security module in CRIU's kernel data; None if its layout isn't the known one.

    `struct kerndat_s` has no version, but its beginning is the same from CRIU 3.17 to 4.2 (checked in its sources), and
    values in it that are known from elsewhere show whether it still is.
    """
    if len(data) < 88:
        return None
    (magic,) = struct.unpack_from("=I", data, 0)
    (last_cap,) = struct.unpack_from("=i", data, 16)
    (lowest,) = struct.unpack_from("=Q", data, 72)
    (lsm,) = struct.unpack_from("=i", data, 84)
    known = magic == _MAGIC and str(last_cap) == _read(proc / "sys/kernel/cap_last_cap")
    # The lowest address for mappings: at least the setting's, as CRIU rounds it up to 64 KiB.
    known = known and int(_read(proc / "sys/vm/mmap_min_addr") or 0) <= lowest <= 1 << 20 and lowest % 4096 == 0
    return {0: NONE, 1: SELINUX, 2: APPARMOR}.get(lsm) if known else None


def _agree(found: str | None, kernel: str) -> None:
    if found == kernel or (found is None and kernel == NONE):
        return
    if found is None:
        raise KdatError(f"it can't be seen whether this CRIU knows the kernel's security module ({kernel}).")
    if kernel == SELINUX:
        raise KdatError(
            "the kernel runs SELinux, which this CRIU was built without or doesn't see: restored containers would lose "
            "their labels. Install the distribution's own criu."
        )
    raise KdatError(
        f"the kernel's security module is {kernel}, but CRIU sees {found}: restored containers would be unconfined. "
        "Let criproxy see /sys of the host."
    )


def _show_security() -> None:
    """Mounts what CRIU needs to see the security module, if the host (or our container) has it hidden."""
    for kind, target, sample in (
        ("securityfs", Path("/sys/kernel/security"), "lsm"),
        ("selinuxfs", Path("/sys/fs/selinux"), "enforce"),
    ):
        if target.is_dir() and not (target / sample).exists():
            with contextlib.suppress(OSError):
                flags = namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC
                namespaces.mount(kind, target, kind, flags)


def _reason(output: bytes) -> str:
    """CRIU's first error, without where in its sources it comes from; what follows is a consequence of it."""
    lines = output.decode(errors="replace").splitlines()
    # Those of util.c are about iptables, which it tries to run and needn't have.
    errors = [line.split("): ", 1)[-1] for line in lines if line.startswith("Error") and "(criu/util.c" not in line]
    return (errors or [line for line in lines if line.strip()] or ["nothing."])[0].strip()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


__all__ = ["PATH", "KdatError", "found_lsm", "kernel_lsm", "key", "make"]
