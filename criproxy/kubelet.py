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

from criproxy import pod_maps
from criproxy.bpf import BpfError, CgroupLink, Map, Object, Pinned, unpin
from criproxy.config import Config

log = logging.getLogger(__name__)

OBJECT: Final = Path(__file__).parent / "libexec" / "kubelet.bpf.o"

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
"""kubelet.service is below a slice at most: kind has one of its own."""
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
        self._searched = -_SEARCH_SECONDS
        try:
            self._load()
        except (BpfError, OSError) as error:
            self._tell(f"kubelet's connections can't be watched: {error}")

    def look(self) -> None:
        """Finds kubelet's cgroup and attaches to it; again, if it is another one by now. Cheap if nothing changed."""
        if self._program is None or self._unchanged():
            return
        now = time.monotonic()
        if now - self._searched < _SEARCH_SECONDS:
            return
        self._searched = now
        try:
            cgroup = self._search()
            self._attach(self._program, cgroup)
        except (LookupError, BpfError, OSError) as error:
            self.cgroup = None
            self._tell(str(error.args[0]) if isinstance(error, LookupError) else str(error))
        else:
            self.cgroup, self._inode = cgroup, cgroup.stat().st_ino
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
        Object(OBJECT, folder, {}, (), (_OPENING,), shared_maps(self._pins.parent)).close()
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

    # --- the cgroup ----------------------------------------------------------------------------------------

    def _unchanged(self) -> bool:
        if self.cgroup is None:
            return False
        try:
            if self.cgroup.stat().st_ino != self._inode or not _populated(self.cgroup):
                return False
        except OSError:
            return False
        return not self._process or self._cgroup_of(self._process) == self.cgroup

    def _search(self) -> Path:
        """The folder of kubelet's cgroup. Raises LookupError, which says why there is none."""
        self._process = 0
        root = self._root()
        if self._config.kubelet_cgroup is not None:
            cgroup = root / self._config.kubelet_cgroup.lstrip("/")
            if not cgroup.is_dir():
                raise LookupError(f"there is no cgroup {cgroup} (kubelet-cgroup)")
            return cgroup
        found: dict[str, Path] = {}
        for folder in _services(root, _DEPTH):
            if folder.name not in found and _populated(folder):
                found[folder.name] = folder
        for name in UNITS:
            if name in found:
                return found[name]
        return self._search_process(root)

    def _search_process(self, root: Path) -> Path:
        name, alone = self._config.kubelet_process, False
        for pid in sorted(int(folder.name) for folder in self._proc.iterdir() if folder.name.isdigit()):
            if not self._named(pid) or not self._beside_us(pid) or (cgroup := self._cgroup_of(pid)) is None:
                continue
            if cgroup == root:
                alone = True
            elif "kubepods" not in str(cgroup.relative_to(root)):
                self._process = pid
                return cgroup
        if alone:
            raise LookupError(f"the process {name} is in the root cgroup, with all others; give it a cgroup of its own")
        raise LookupError(f"there is no cgroup {', '.join(UNITS)}, and no process {name} (kubelet-cgroup names it)")

    def _named(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return (self._proc / str(pid) / "comm").read_text().rstrip("\n") == self._config.kubelet_process
        return False

    def _beside_us(self, pid: int) -> bool:
        """Whether it lives in our namespaces, as kubelet does, and as what calls itself so in a container doesn't."""
        with contextlib.suppress(OSError):
            return all(
                os.readlink(self._proc / str(pid) / "ns" / kind) == os.readlink(self._proc / "self/ns" / kind)
                for kind in ("pid", "net")
            )
        return False

    def _cgroup_of(self, pid: int) -> Path | None:
        with contextlib.suppress(OSError, LookupError):
            for line in (self._proc / str(pid) / "cgroup").read_text().splitlines():
                if line.startswith("0::/"):
                    return self._root() / line.removeprefix("0::/")
        return None

    def _root(self) -> Path:
        """Where cgroup v2 is mounted: for itself, or beside v1's trees. Raises LookupError."""
        for line in (self._proc / "self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            top, where = fields.split(" ")[3:5]
            if rest.startswith("cgroup2 ") and top == "/":
                return Path(where)
        raise LookupError("cgroup v2 isn't mounted, not even beside v1 (mount -t cgroup2)")


def _services(folder: Path, depth: int) -> Iterator[Path]:
    """Cgroups with the name of one of UNITS, the shallowest first. Not those below containers, pods and sessions."""
    level = [folder]
    for _ in range(depth):
        below = [child for parent in level for child in _children(parent)]
        yield from (child for child in below if child.name in UNITS)
        level = [child for child in below if child.name.endswith(".slice") and child.name != "user.slice"]


def _children(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(
            Path(entry.path)
            for entry in os.scandir(folder)
            if entry.is_dir(follow_symlinks=False) and "kubepods" not in entry.name
        )
    return []


def _populated(cgroup: Path) -> bool:
    """Whether there is a process in it or below it (cgroup.events)."""
    return "populated 1" in (cgroup / "cgroup.events").read_text()
