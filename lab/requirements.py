"""What the tests, the demo and the benchmark need of a machine, checked before anything starts.

A test that is skipped for a missing capability looks like a test that passes; so everything here fails instead.
"""

import os
import shutil
from pathlib import Path

from lab import LabError
from lab.containerd import has_capability
from lab.daemon import COMMAND, CRIU_ROOT
from lab.inventory import loadable_programs

_COMMANDS = ("containerd", "ctr", "runc", "ip", "tc", "iptables")
_CAPABILITIES = {"CAP_SYS_ADMIN": 21, "CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_NET_RAW": 13}


def check() -> None:
    """Raises LabError that names everything that is missing."""
    missing = []
    if os.geteuid() != 0:
        missing.append("root")
    missing += [name for name, number in _CAPABILITIES.items() if not has_capability(number)]
    missing += [f"the command {name}" for name in _COMMANDS if not shutil.which(name)]
    if not any((root / "usr/sbin/criu").exists() for root in (CRIU_ROOT, Path("/"))):
        missing.append("CRIU")
    if not COMMAND.exists():
        missing.append(str(COMMAND))
    if "bpf" not in Path("/proc/filesystems").read_text() or not loadable_programs():
        missing.append("eBPF")
    if missing:
        raise LabError(f"This machine lacks {', '.join(missing)}", "run `make setup` as root; see README.md for limits")
