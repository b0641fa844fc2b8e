"""Whether a container's command exists, told before the container is started.

With runc a missing executable is an error of StartContainer, which kubelet shows. Under an init of ours it would be a
container that starts and ends, so such a container must be left as it is. The search is that of runc's init: Go's
`exec.LookPath` inside the container's root, with the container's PATH and working directory. Nothing of the container's
is trusted: every path is walked one component at a time, and no symbolic link is ever followed by the kernel.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

from criproxy.api import cri_pb2
from criproxy.kernel import namespaces

_MS_RDONLY = 0x1
# The kernel's own limit on the links of one path (ELOOP).
_LINKS = 40


class Answer(Enum):
    FOUND = auto()
    # Not there, or not executable: runc would say so.
    MISSING = auto()
    # It can't be told from here.
    UNKNOWN = auto()


@dataclass(frozen=True)
class Bind:
    """A mount of the container. `host_path` is None where its content can't be seen from here."""

    container_path: str
    host_path: str | None


# What containerd mounts into every container and what runc fills.
_KERNELS = (Bind("/proc", None), Bind("/sys", None), Bind("/dev", None))


def binds(config: cri_pb2.ContainerConfig) -> list[Bind]:
    """The mounts of a CreateContainer request.

    Devices of the Container Device Interface bring mounts that no request shows, so with one of them everything is in
    doubt.
    """
    if config.cdi_devices:
        return [Bind("/", None)]
    return [Bind(mount.container_path, None if mount.HasField("image") else mount.host_path) for mount in config.mounts]


def find(argv0: str, path_env: str, mounts: Iterable[Bind], rootfs: int, cwd: str = "/") -> Answer:
    """Looks a command up as runc would.

    `rootfs` is a descriptor of the container's root (see `rootfs` below), `mounts` what is mounted there in the order
    of the request, `path_env` the container's PATH, `cwd` its working directory (for a relative command with a slash).
    """
    with _Tree(rootfs, mounts) as tree:
        if "/" in argv0:
            return tree.executable(posixpath.join("/", cwd, argv0))
        answer = Answer.MISSING
        for folder in path_env.split(":") if path_env else []:
            # Go refuses what it finds by a relative folder of PATH (ErrDot, since 1.19).
            found = tree.executable(f"{folder}/{argv0}") if folder.startswith("/") else Answer.UNKNOWN
            if found is Answer.FOUND:
                return found
            if found is Answer.UNKNOWN:
                answer = found
        return answer


class _Doubt(Exception):
    """The path leads to where the content can't be known."""


class _Missing(Exception):
    pass


class _Tree:
    """The container's files: its root and its mounts, put where runc would put them."""

    def __init__(self, rootfs: int, mounts: Iterable[Bind]) -> None:
        self._open = contextlib.ExitStack()
        self._root = rootfs
        self._mounts: dict[tuple[str, ...], str | None] = {}
        # containerd mounts the shallow ones first and otherwise keeps the order (`orderedMounts`).
        rest = sorted(mounts, key=lambda bind: len(_parts(bind.container_path)))
        for bind in (*_KERNELS, *rest):
            with contextlib.suppress(_Doubt):
                self._mounts[self._walk(bind.container_path, placing=True)[0]] = bind.host_path

    def __enter__(self) -> _Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def executable(self, path: str) -> Answer:
        """Go's `findExecutable`: no folder, and executable for someone."""
        try:
            names, descriptor = self._walk(path)
            if descriptor is None:
                return Answer.MISSING  # a folder that exists only because something is mounted below it
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISDIR(mode) or path.endswith("/") or not mode & 0o111:
                return Answer.MISSING
            # access(2) denies what lies on a volume that forbids execution.
            if self._in_mount(names) and os.fstatvfs(descriptor).f_flag & os.ST_NOEXEC:
                return Answer.UNKNOWN
            return Answer.FOUND
        except _Missing:
            return Answer.MISSING
        except (_Doubt, OSError):
            return Answer.UNKNOWN

    def _in_mount(self, names: tuple[str, ...]) -> bool:
        return any(names[: len(mount)] == mount for mount in self._mounts)

    def _walk(self, path: str, *, placing: bool = False) -> tuple[tuple[str, ...], int | None]:
        """The names that a path comes to when all its links are resolved, and a descriptor of what is there.

        The descriptor is None for a folder that is made only as a mount point's parent. With `placing` it is that of
        a mount point to be, whose missing parts are taken literally, as runc does. Raises `_Missing` and `_Doubt`.
        """
        todo = deque(_parts(path))
        names: list[str] = []
        if () in self._mounts:
            raise _Doubt  # something unknown lies over all of it
        descriptors: list[int | None] = [self._root]
        links = 0
        while todo:
            name = todo.popleft()
            if name == "..":
                if descriptors[-1] is not None and not stat.S_ISDIR(os.fstat(descriptors[-1]).st_mode):
                    raise _Missing
                if names:
                    names.pop()
                    descriptors.pop()
                continue
            here = (*names, name)
            if placing and not todo and here in self._mounts:
                return here, None  # it goes on top of another one
            try:
                child = self._mounted(here) if here in self._mounts else self._child(descriptors[-1], name)
            except _Missing:
                if not placing and not any(mount[: len(here)] == here for mount in self._mounts):
                    raise
                child = None
            except _Doubt:
                if not placing:
                    raise
                child = None
            if child is not None and stat.S_ISLNK(os.fstat(child).st_mode):
                links += 1
                if links > _LINKS:
                    raise _Missing
                target = os.readlink("", dir_fd=child)
                todo.extendleft(reversed(_parts(target)))
                if target.startswith("/"):
                    names.clear()
                    del descriptors[1:]
                continue
            names.append(name)
            descriptors.append(child)
        return tuple(names), descriptors[-1]

    def _mounted(self, names: tuple[str, ...]) -> int | None:
        host_path = self._mounts[names]
        if host_path is None:
            raise _Doubt
        try:
            return self._keep(os.open(host_path, os.O_PATH | os.O_CLOEXEC))
        except OSError:  # containerd may make it yet, or say what is wrong
            raise _Doubt from None

    def _child(self, parent: int | None, name: str) -> int | None:
        if parent is None:
            raise _Missing
        try:
            return self._keep(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent))
        except (FileNotFoundError, NotADirectoryError):
            raise _Missing from None
        except OSError:
            raise _Doubt from None

    def _keep(self, descriptor: int) -> int:
        self._open.callback(os.close, descriptor)
        return descriptor


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


# --- Root file systems ------------------------------------------------------------------------------------------


class SnapshotMount(Protocol):
    """A mount as containerd's snapshotters describe it."""

    @property
    def type(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def options(self) -> Iterable[str]: ...


class RootfsError(Exception):
    """The snapshot can't be looked into; the message says why."""


@contextlib.contextmanager
def rootfs(mounts: Sequence[SnapshotMount]) -> Iterator[int]:
    """A descriptor (O_PATH) of the root that a snapshot's mounts would make, read-only.

    Nothing is mounted where another process could see it or where it could be left behind: an overlay is mounted in
    a private mount namespace that is gone at once, and lives on by the descriptor alone. Its upper folder takes part as
    the topmost lower one, so that the container's own overlay of the same folders isn't disturbed.

    Blocks for about a millisecond, needs CAP_SYS_ADMIN. Raises `RootfsError`, also for snapshotters other than overlay
    and plain folders.
    """
    layers, options = _layers(mounts)
    try:
        descriptor = namespaces.in_private_mounts(lambda: _open(layers, options))
    except OSError as error:
        raise RootfsError(f"the container's root file system can't be opened: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _layers(mounts: Sequence[SnapshotMount]) -> tuple[list[str], list[str]]:
    """The folders that lie upon each other, topmost first, and the options that say how to read them."""
    if len(mounts) != 1:
        raise RootfsError(f"the container's root file system is made of {len(mounts)} mounts, where one was expected")
    [mount] = mounts
    if mount.type == "bind":
        return [mount.source], []
    if mount.type != "overlay":
        raise RootfsError(f"the container's root file system is of the type {mount.type}, not overlay or bind")
    upper: list[str] = []
    lower: list[str] = []
    options = []
    for option in mount.options:
        name, _, value = option.partition("=")
        if name == "upperdir":
            upper = [value]
        elif name == "lowerdir":
            # "::" stands before layers that give nothing but data (overlayfs 6.5), a backslash before a colon.
            if "::" in value or "\\" in value:
                raise RootfsError("the container's overlay has lower folders in a form that isn't understood")
            lower = value.split(":")
        elif name in ("index", "userxattr", "xino", "metacopy", "redirect_dir"):
            options.append(option)
    if not lower:
        raise RootfsError("the container's overlay has no lower folder")
    return upper + lower, options


def _open(layers: Sequence[str], options: Sequence[str]) -> int:
    """Runs in the private mount namespace."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:
        descriptors = []
        for layer in layers:
            descriptors.append(os.open(layer, flags))
            stack.callback(os.close, descriptors[-1])
        if len(layers) == 1:
            # overlayfs wants two folders at least, and one alone needs no overlay.
            return os.dup(descriptors[0])
        # mount(2) takes one page of options: too little for the full paths of many layers.
        lower = ":".join(f"/proc/self/fd/{descriptor}" for descriptor in descriptors)
        namespaces.mount(
            "overlay",
            Path(layers[0]),
            "overlay",
            _MS_RDONLY | namespaces.MS_NOSUID | namespaces.MS_NODEV,
            ",".join([f"lowerdir={lower}", *options]),
        )
        return os.open(layers[0], flags)
