"""Which connections are kubelet's: a program on its cgroup notes each one before its first packet leaves.

`bpf/kubelet.c` does the work in the kernel. Its map and its link to the cgroup are pinned in the folder `kubelet`
beside the pods' hooks, which look into the map, so that all goes on without us and the next daemon carries on.

The cgroup is the one that the configuration names, else that of a service (`UNITS`), else that of a process by its
name. What a container could bring about itself is no evidence: cgroups of pods and sessions aren't searched, and a
process counts only if it has the namespaces that we have. The root cgroup is never taken, for it has every process of
the node. Connections aren't recognised where the node rewrites kubelet's address on its way to the pod.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from criproxy import LIBEXEC
from criproxy.config import Config
from criproxy.hook import pod_maps
from criproxy.kernel.bpf import BpfError, CgroupLink, Map, Pinned, load_object, unpin

log = logging.getLogger(__name__)

OBJECT: Final = LIBEXEC / "kubelet.bpf.o"

FOLDER: Final = "kubelet"
"""Below the folder of all pins, where each pod has its own."""
MAPS: Final = {"connections": (pod_maps.FOUR_BYTES, 8), "addresses": (pod_maps.ADDRESS_BYTES, 4)}
_LINK, _PROGRAM, _OPENING = "link", "program", "opening"

UNITS: Final = (
    "kubelet.service",
    "k3s.service",
    "k3s-agent.service",
    "rke2-server.service",
    "rke2-agent.service",
)
"""The services that kubelet runs in, the likeliest first."""

_DEPTH: Final = 3
_NOT_SEARCHED: Final = ("kubepods", "user.slice")
_SEARCH_SECONDS: Final = 1.0
"""How long what wasn't found isn't searched for again."""


def shared_maps(pins: Path) -> dict[str, Path]:
    """Where the maps are pinned which the pods' hooks look into; `pins` is the folder of all pins."""
    return {name: pins / FOLDER / name for name in MAPS}


class Kubelet:
    """Kubelet, as far as it makes connections. One per daemon; closing it leaves everything at work."""

    def __init__(self, config: Config, pins: Path, proc: Path = Path("/proc")) -> None:
        """Makes or finds the maps in `pins`, a folder on a bpf file system. Doesn't fail: `problem` tells."""
        self.cgroup: Path | None = None
        """The folder of kubelet's cgroup, once the program is attached to it."""
        self.problem = ""
        """Why kubelet's connections aren't known, for people; empty if they are."""
        self._config = config
        self._pins = pins / FOLDER
        self._proc = proc
        self._program: Pinned | None = None
        self._process = 0
        self._inode = 0
        self._failed = -_SEARCH_SECONDS
        try:
            self._load()
        except (BpfError, OSError) as error:
            self._tell(f"kubelet's connections can't be watched: {error}")

    def look(self, *, called: bool = True) -> None:
        """Finds kubelet's cgroup and attaches to it; again, if it is another one by now. Cheap if nothing changed.

        `called`: kubelet must be there, as it has called us; when the daemon starts it may not be, yet.
        """
        if self._program is None or self._unchanged():
            return
        if time.monotonic() - self._failed < _SEARCH_SECONDS:
            return
        try:
            cgroup, process = find(self._config, self._proc)
            self._attach(self._program, cgroup)
        except (LookupError, BpfError, OSError) as error:
            self.cgroup, self._failed = None, time.monotonic()
            if called:
                self._tell(str(error.args[0]) if isinstance(error, LookupError) else str(error))
        else:
            self.cgroup, self._inode, self._process = cgroup, cgroup.stat().st_ino, process
            self._tell("")

    def close(self) -> None:
        if self._program is not None:
            self._program.close()
            self._program = None

    def _tell(self, problem: str) -> None:
        if self._config.kubelet_addresses and problem:
            problem += f". Connections from {', '.join(self._config.kubelet_addresses)} are taken for kubelet's"
        if problem and problem != self.problem:
            log.warning("probes aren't told from other connections, and wake: %s", problem)
        elif not problem and self.cgroup is not None:
            log.info("kubelet's cgroup is %s", self.cgroup)
        self.problem = problem

    # --- the kernel ----------------------------------------------------------------------------------------

    def _load(self) -> None:
        """The program is always our own version's; the maps stay, as the hooks in the pods look into them."""
        self._pins.mkdir(mode=0o700, exist_ok=True)
        folder = self._pins / _PROGRAM
        unpin(folder)
        load_object(OBJECT, folder, {}, (), (_OPENING,), shared_maps(self._pins.parent))
        addresses = Map(self._pins / "addresses", *MAPS["addresses"])
        try:
            wanted = {pod_maps.address(text) for text in self._config.kubelet_addresses}
            for key, _ in addresses.items():
                if key not in wanted:
                    addresses.delete(key)
            for key in wanted:
                addresses.set(key, bytes(4))
        finally:
            addresses.close()
        self._program = Pinned(folder / _OPENING)

    def _attach(self, program: Pinned, cgroup: Path) -> None:
        pin = self._pins / _LINK
        with contextlib.suppress(FileNotFoundError):
            pin.stat()
            link = CgroupLink(pin)
            try:
                if link.cgroup() == cgroup.stat().st_ino:
                    link.update(program)
                    return
            finally:
                link.close()
        fresh = pin.with_name(_LINK + "-new")
        fresh.unlink(missing_ok=True)
        CgroupLink.attach(program, cgroup, fresh).close()
        fresh.rename(pin)

    def _unchanged(self) -> bool:
        if self.cgroup is None:
            return False
        try:
            if self.cgroup.stat().st_ino != self._inode:
                return False
        except OSError:
            return False
        if self._config.kubelet_cgroup is None and not _populated(self.cgroup):
            return False
        return not self._process or _cgroup_of(self._process, self._proc) == self.cgroup


# --- The cgroup ------------------------------------------------------------------------------------------------------


def find(config: Config, proc: Path = Path("/proc")) -> tuple[Path, int]:
    """The folder of kubelet's cgroup, and the process that it was found by, or 0.

    Raises LookupError, which says why there is none.
    """
    root = _root(proc)
    if config.kubelet_cgroup is not None:
        cgroup = root / config.kubelet_cgroup
        if not cgroup.is_dir():
            raise LookupError(f"there is no cgroup {cgroup} (kubelet-cgroup)")
        return cgroup, 0
    services = [folder for folder in _services(root) if _populated(folder)]
    for name in UNITS:
        for folder in services:
            if folder.name == name:
                return folder, 0
    return _find_process(config.kubelet_process, root, proc)


def _services(root: Path) -> Iterator[Path]:
    """Cgroups with the name of one of UNITS, the shallowest first; in slices alone, not in containers and sessions."""
    level = [root]
    for _ in range(_DEPTH):
        below = [child for parent in level for child in _children(parent)]
        yield from (child for child in below if child.name in UNITS)
        level = [
            child
            for child in below
            if child.suffix == ".slice" and not any(word in child.name for word in _NOT_SEARCHED)
        ]


def _children(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    return []


def _populated(cgroup: Path) -> bool:
    """Whether there is a process in it or below it (cgroup.events)."""
    with contextlib.suppress(OSError):
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    return False


def _find_process(name: str, root: Path, proc: Path) -> tuple[Path, int]:
    alone = True
    for pid in sorted(int(folder.name) for folder in proc.iterdir() if folder.name.isdigit()):
        if not _named(name, pid, proc) or not _beside_us(pid, proc) or (cgroup := _cgroup_of(pid, proc)) is None:
            continue
        if cgroup == root:
            alone = False
        elif "kubepods" not in str(cgroup.relative_to(root)):
            return cgroup, pid
    if not alone:
        raise LookupError(f"the process {name} is in the root cgroup, with all others; give it a cgroup of its own")
    raise LookupError(f"there is neither a cgroup {', '.join(UNITS)} nor a process {name} (kubelet-cgroup names it)")


def _named(name: str, pid: int, proc: Path) -> bool:
    with contextlib.suppress(OSError):
        return (proc / str(pid) / "comm").read_text().rstrip("\n") == name
    return False


def _beside_us(pid: int, proc: Path) -> bool:
    """Whether it lives in our namespaces, as kubelet does, and as what calls itself so in a container doesn't."""
    with contextlib.suppress(OSError):
        theirs, ours = proc / str(pid) / "ns", proc / "self/ns"
        return all(os.readlink(theirs / kind) == os.readlink(ours / kind) for kind in ("pid", "net"))
    return False


def _cgroup_of(pid: int, proc: Path) -> Path | None:
    with contextlib.suppress(OSError, LookupError):
        for line in (proc / str(pid) / "cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                return _root(proc) / line.removeprefix("0::/")
    return None


def _root(proc: Path) -> Path:
    """Where cgroup v2 is mounted: for itself, or beside v1's trees. Raises LookupError."""
    for line in (proc / "self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        top, where = fields.split(" ")[3:5]
        if rest.startswith("cgroup2 ") and top == "/":
            return Path(where)
    raise LookupError("cgroup v2 isn't mounted, not even beside v1 (mount -t cgroup2)")
