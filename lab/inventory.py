"""What there is of a lab on this machine, before and after: for tests that nothing is left behind.

    before = take(lab)
    ...
    assert not difference(before, take(lab))

Only what belongs to this lab counts, for others may run beside it. Programs in the kernel belong to nobody by name;
they are those of the kinds that criproxy loads (`BPF_KINDS`), machine-wide, and compared only on request.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from lab import LabError, cgroups
from lab.containerd import Containerd, mounts_below
from lab.process import run

# linux/bpf.h: BPF_PROG_TYPE_SCHED_CLS (tc), BPF_PROG_TYPE_SOCK_OPS and BPF_PROG_TYPE_SK_LOOKUP.
BPF_KINDS = {3: "tc", 13: "sock_ops", 30: "sk_lookup"}
_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_BPF_PROG_GET_NEXT_ID, _BPF_PROG_GET_FD_BY_ID, _BPF_OBJ_GET_INFO_BY_FD = 11, 13, 15


@dataclass(frozen=True)
class Inventory:
    """Sets of lines that a person can read."""

    processes: frozenset[str]
    mounts: frozenset[str]
    links: frozenset[str]
    filters: frozenset[str]
    pins: frozenset[str]
    programs: frozenset[str]
    cgroups: frozenset[str]
    iptables: frozenset[str]
    files: frozenset[str]


def take(lab: Containerd) -> Inventory:
    """An inventory of a running lab. Raises LabError."""
    links = _links(lab)
    return Inventory(
        processes=frozenset(_processes(lab)),
        mounts=frozenset(mounts_below(lab.state, lab.root)),
        links=frozenset(links),
        filters=frozenset(_filters(links)),
        pins=frozenset(_below(lab.state / "criproxy" / "bpf")),
        programs=frozenset(_programs()),
        cgroups=frozenset(cgroups.subtree(lab.cgroup)),
        iptables=frozenset(_iptables(lab)),
        files=frozenset(_files(lab)),
    )


def difference(before: Inventory, after: Inventory, *, programs: bool = False) -> list[str]:
    """What came (+) and went (-), a line each, empty if nothing. `programs` for the only lab on a machine."""
    lines = []
    for field in fields(Inventory):
        if field.name == "programs" and not programs:
            continue
        old: frozenset[str] = getattr(before, field.name)
        new: frozenset[str] = getattr(after, field.name)
        lines += [f"+ {field.name}: {entry}" for entry in sorted(new - old)]
        lines += [f"- {field.name}: {entry}" for entry in sorted(old - new)]
    return lines


def _processes(lab: Containerd) -> list[str]:
    found = []
    for pid in cgroups.processes(lab.cgroup):
        # Ended in between.
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text()
            comm = state[state.index("(") + 1 : state.rindex(")")]
            found.append(f"{pid} {comm} (since {state[state.rindex(')') + 2 :].split()[19]})")
    return found


def _links(lab: Containerd) -> list[str]:
    """Links of this lab's bridge on the host: those in pods end with their namespaces, which are among the mounts."""
    links: list[Mapping[str, str]] = json.loads(run(["ip", "-json", "link", "show"]))
    return [link["ifname"] for link in links if lab.bridge in (link["ifname"], link.get("master"))]


def _filters(links: list[str]) -> list[str]:
    found = []
    for link in links:
        try:
            for side in ("ingress", "egress"):
                lines = run(["tc", "filter", "show", "dev", link, side]).splitlines()
                found += [f"{link} {side}: {line}" for line in lines]
            queues = run(["tc", "qdisc", "show", "dev", link]).splitlines()
            found += [f"{link}: {line}" for line in queues if "noqueue" not in line]
        except LabError:
            # Gone meanwhile, and its filters with it.
            if Path("/sys/class/net", link).exists():
                raise
    return found


def _iptables(lab: Containerd) -> list[str]:
    wanted = (lab.bridge, f"10.231.{lab.number}.", f"fd10:231:{lab.number}:", "CNI-")
    rules = [f"{tool}: {line}" for tool in ("iptables", "ip6tables") for line in run([f"{tool}-save"]).splitlines()]
    return [rule for rule in rules if any(word in rule for word in wanted) and ": # " not in rule]


def _below(directory: Path) -> list[str]:
    return [str(Path(top, name)) for top, folders, files in os.walk(directory) for name in folders + files]


def _files(lab: Containerd) -> list[str]:
    """criproxy's state without what is kept for the next container, CNI's addresses, and shims' sockets."""
    state = lab.root / "criproxy"
    # Named by their content, and used by one container after another.
    shared = [state / name for name in ("bundles", "seccomp")]
    owned = [path for path in _below(state) if not any(Path(path).is_relative_to(place) for place in shared)]
    addresses = [path for path in _below(lab.state / "cni-addresses") if "/last_" not in path and "/lock" not in path]
    bundles = [str(path) for path in lab.state.glob("containerd/io.containerd.runtime.v2.task/*/*")]
    return owned + addresses + bundles


def loadable_programs() -> bool:
    """Whether this process may ask the kernel about eBPF programs at all."""
    return _call(_BPF_PROG_GET_NEXT_ID, bytearray(16)) == 0 or ctypes.get_errno() == errno.ENOENT


def _programs() -> list[str]:
    """`id kind name` of the kernel's eBPF programs of the kinds that criproxy loads."""
    found = []
    identity = 0
    while (identity := _bpf(_BPF_PROG_GET_NEXT_ID, identity, 0, field=1)) > 0:
        descriptor = _bpf(_BPF_PROG_GET_FD_BY_ID, identity)
        if descriptor < 0:
            continue
        try:
            # struct bpf_prog_info: type, id, tag[8], … name[16] at offset 64.
            info = ctypes.create_string_buffer(256)
            attributes = descriptor.to_bytes(4, "little") + len(info).to_bytes(4, "little")
            attributes += ctypes.addressof(info).to_bytes(8, "little")
            if _call(_BPF_OBJ_GET_INFO_BY_FD, bytearray(attributes)) == 0:
                kind = int.from_bytes(info.raw[:4], "little")
                name = info.raw[64:80].rstrip(b"\0").decode(errors="replace")
                if kind in BPF_KINDS:
                    found.append(f"{identity} {BPF_KINDS[kind]} {name}")
        finally:
            os.close(descriptor)
    return found


def _bpf(command: int, *values: int, field: int | None = None) -> int:
    """A bpf(2) call with 32-bit attributes; its result, or the attribute number `field` after it; -1 for an error."""
    attributes = bytearray(b"".join(value.to_bytes(4, "little") for value in values)).ljust(16, b"\0")
    result = _call(command, attributes)
    if result < 0 or field is None:
        return result
    return int.from_bytes(attributes[4 * field : 4 * field + 4], "little")


def _call(command: int, attributes: bytearray) -> int:
    buffer = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    number = _SYS_BPF[platform.machine()]
    return int(ctypes.CDLL(None, use_errno=True).syscall(number, command, ctypes.byref(buffer), len(attributes)))
