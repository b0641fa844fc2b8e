"""What a sleeping container has open in places where others may change it meanwhile: its volumes.

CRIU restores an open file by its path, and fails if something else is there then, or nothing: a log file that was
rotated, a volume of Kubernetes' own (secrets, tokens, config maps) that kubelet has replaced as a whole. A process that
runs keeps the file itself, whatever becomes of its name. So does a small process on the host (`native/keep.c`) for one
that sleeps, from before the dump until the checkpoint isn't needed any more; the restored processes get it from there:

- An open, mapped or current file or folder is the same as before: appended to, truncated, renamed or deleted, with what
  is in it now. Its size and mode may be others than at the dump.
- An inotify watch is on the same file or folder as before. If that was deleted, its end is told to the application as
  soon as the checkpoint is deleted (IN_DELETE_SELF, IN_IGNORED). What else happened meanwhile isn't.

If the keeper is gone (somebody has killed it), everything is looked up by its path.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criproxy import LIBEXEC, run
from criproxy.api import criu_pb2 as criu
from criproxy.criu import images as image_files
from criproxy.criu.bundle import INSIDE
from criproxy.files import write_whole
from criproxy.kernel.processes import Process

PROGRAM: Final = LIBEXEC / "keep"

_WHAT: Final = "kept.json"
_START_SECONDS: Final = 10.0
_DELETED: Final = " (deleted)"

# Only the container's own processes change what is there, and those of the kernel.
_PRIVATE: Final = ("/", "/dev", "/dev/pts", "/proc", "/sys", INSIDE)
_KERNELS: Final = {"proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue"}

_COPY: Final = 1
"""A remap_type of criu.proto."""

_WATCH: Final = re.compile(
    r"^inotify wd:(?P<wd>\w+) ino:(?P<ino>\w+) sdev:(?P<dev>\w+) .*"
    r"fhandle-bytes:(?P<size>\w+) fhandle-type:(?P<kind>\w+) f_handle:(?P<handle>\w+)",
    re.MULTILINE,
)

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class _Volume:
    path: str
    """Where it is mounted in the container."""
    device: int
    """As the kernel writes it in hexadecimal: major << 20 | minor."""


@dataclass(frozen=True)
class Inheritance:
    descriptors: tuple[int, ...]
    options: tuple[str, ...]
    environment: Mapping[str, str]
    """For preload.c: CRIU has no option for what is watched."""


class Kept:
    """The keeper's descriptors by what they stand for: the path in the container, with " (deleted)" if it was so at the
    time of the dump."""

    def __init__(self, keeper: Process, files: dict[str, int], watches: dict[tuple[int, int], int]) -> None:
        """`watches`: by inode and number."""
        self._keeper = keeper
        self._files = files
        self._watches = watches

    @classmethod
    def hold(cls, init_pid: int, pids: Iterable[int], images: Path) -> None:
        """Starts the keeper for processes that are about to be dumped to `images`, if they have anything to be kept.

        Raises OSError or CommandError.
        """
        volumes = list(_volumes(init_pid))
        if not volumes:
            return
        with ExitStack() as stack:
            files, watches = _Open(init_pid, volumes, stack).of(pids)
            if not files and not watches:
                return
            pidfd = os.pidfd_open(init_pid)
            stack.callback(os.close, pidfd)
            descriptors = [*files.values(), *watches.values(), pidfd]
            started = run.run([PROGRAM, str(pidfd)], pass_fds=descriptors, env={}, timeout=_START_SECONDS).check()
            keeper = Process.of(int(started.stdout))
            what = {
                "pid": keeper.pid,
                "start_time": keeper.start_time,
                "files": files,
                "watches": [[*watch, number] for watch, number in watches.items()],
            }
            write_whole(images / _WHAT, json.dumps(what))

    @classmethod
    def of(cls, images: Path) -> Kept | None:
        """What is kept for a checkpoint; None if nothing has to be. Raises ValueError."""
        try:
            data = json.loads((images / _WHAT).read_text())
        except FileNotFoundError:
            return None
        try:
            keeper = Process(int(data["pid"]), int(data["start_time"]))
            return cls(keeper, dict(data["files"]), {(ino, wd): number for ino, wd, number in data["watches"]})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{images / _WHAT} isn't what criproxy has written: {error}") from error

    def close(self) -> None:
        """Ends the keeper."""
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self._keeper.pid)
            try:
                if self._keeper.alive():
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    # --- images --------------------------------------------------------------------------------------------

    def rewrite(self, images: Path) -> None:
        """Makes a complete dump refer to what is kept. Raises OSError, ValueError."""
        path = images / "files.img"
        files = list(image_files.read(path, criu.File))
        remaps = []
        with contextlib.suppress(FileNotFoundError):  # where no file was deleted
            remaps = list(image_files.read(images / "remap-fpath.img", criu.Remap))
        # Which of them CRIU has copied, to make them anew in the same folder, and which it has linked there.
        deleted = {remap.orig_id for remap in remaps if remap.remap_type == _COPY}
        linked = {remap.orig_id for remap in remaps} - deleted
        kept = set()
        for file in files:
            if file.HasField("reg"):
                name = file.reg.name + (_DELETED if file.id in deleted else "")
                if name in self._files and file.id not in linked:
                    file.reg.ext, file.reg.name = True, _key(self._files[name])
                    # It is opened through a link of /proc.
                    file.reg.flags &= ~os.O_NOFOLLOW
                    kept.add(file.id)
                if file.id in kept | linked:
                    file.reg.ClearField("size")
                    file.reg.ClearField("mode")
            for watch in file.ify.wd:
                if (number := self._watches.get((watch.i_ino, watch.wd))) is not None:
                    watch.f_handle.path = f"/.criproxy-kept/{number}"
                    watch.f_handle.ClearField("mnt_id")
        shutil.copyfile(path, images / "files.plain")
        image_files.replace(path, files)
        if kept & deleted:
            shutil.copyfile(images / "remap-fpath.img", images / "remap-fpath.plain")
            left = [remap for remap in remaps if remap.orig_id not in kept]
            image_files.replace(images / "remap-fpath.img", left)

    def inherit(self, images: Path, stack: ExitStack) -> Inheritance:
        """What a CRIU needs that restores. `stack` closes the descriptors. Raises OSError, ValueError."""
        if not self._keeper.alive():
            self._do_without(images)
            return Inheritance((), (), {})
        files, watches = list(self._files.values()), list(self._watches.values())
        descriptors = {}
        for number in {*files, *watches}:
            descriptors[number] = os.open(f"/proc/{self._keeper.pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, descriptors[number])
        options = [word for number in files for word in ("--inherit-fd", f"fd[{descriptors[number]}]:{_key(number)}")]
        environment = {"CRIPROXY_KEPT": ",".join(f"{number}={descriptors[number]}" for number in watches)}
        return Inheritance(tuple(descriptors.values()), tuple(options), environment)

    def _do_without(self, images: Path) -> None:
        """By their paths, then; but a file may have grown."""
        for name in ("remap-fpath", "files"):
            with contextlib.suppress(FileNotFoundError):
                (images / f"{name}.plain").replace(images / f"{name}.img")
        path = images / "files.img"
        files = list(image_files.read(path, criu.File))
        for file in files:
            if file.HasField("reg") and file.reg.name in self._files:
                file.reg.ClearField("size")
                file.reg.ClearField("mode")
        image_files.replace(path, files)


# --- Inside -----------------------------------------------------------------------------------------------------------


def _key(number: int) -> str:
    """As a path, since CRIU takes the rest of one, without the slash, for the name of a descriptor as it is."""
    return f"/kept-{number}"


def _volumes(init_pid: int) -> Iterator[_Volume]:
    """The mounts of a container that may be others', too."""
    lines = Path(f"/proc/{init_pid}/mountinfo").read_text().splitlines()
    for line in lines:
        fields, _dash, rest = line.partition(" - ")
        words = fields.split()
        major, minor = words[2].split(":")
        path = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), words[4])
        if path not in _PRIVATE and rest.split()[0] not in _KERNELS:
            yield _Volume(path, int(major) << 20 | int(minor))


class _Open:
    """Descriptors for what processes have open in a container's volumes."""

    def __init__(self, init_pid: int, volumes: list[_Volume], stack: ExitStack) -> None:
        self._init_pid = init_pid
        self._folders = tuple(f"{volume.path}/" for volume in volumes)
        self._paths = {volume.path for volume in volumes}
        self._devices = {volume.device: volume.path for volume in volumes}
        self._stack = stack
        self._files: dict[str, tuple[int, tuple[int, int]]] = {}
        self._ambiguous: set[str] = set()
        self._watches: dict[tuple[int, int], int] = {}

    def of(self, pids: Iterable[int]) -> tuple[dict[str, int], dict[tuple[int, int], int]]:
        for pid in pids:
            # What a process opens or closes meanwhile is CRIU's.
            with contextlib.suppress(OSError):
                self._descriptors(pid)
                for link in ("exe", "cwd", "root"):
                    self._keep(f"/proc/{pid}/{link}")
                self._mapped(pid)
        files = {name: number for name, (number, _) in self._files.items() if name not in self._ambiguous}
        return files, self._watches

    def _descriptors(self, pid: int) -> None:
        for name in os.listdir(f"/proc/{pid}/fd"):
            target = self._keep(f"/proc/{pid}/fd/{name}")
            if target == "anon_inode:inotify":
                self._watched(Path(f"/proc/{pid}/fdinfo/{name}"))

    def _mapped(self, pid: int) -> None:
        for line in Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines():
            words = line.split(maxsplit=5)
            if len(words) == 6 and self._concerns(words[5]):
                # Without the leading zeros of /proc/PID/maps.
                start, _dash, end = words[0].partition("-")
                self._keep(f"/proc/{pid}/map_files/{int(start, 16):x}-{int(end, 16):x}")

    def _concerns(self, path: str) -> bool:
        return path.startswith(self._folders) or path.removesuffix(_DELETED) in self._paths

    def _keep(self, link: str) -> str:
        """Returns what the link says; empty if it is gone."""
        try:
            name = os.readlink(link)
            if not self._concerns(name):
                return name
            descriptor = os.open(link, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return ""
        found = os.fstat(descriptor)
        which = found.st_dev, found.st_ino
        known = self._files.get(name)
        if known is None and (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            self._stack.callback(os.close, descriptor)
            self._files[name] = descriptor, which
        else:
            os.close(descriptor)
            if known is not None and known[1] != which:
                self._ambiguous.add(name)
        return name

    def _watched(self, fdinfo: Path) -> None:
        for match in _WATCH.finditer(fdinfo.read_text()):
            ino, wd, device = (int(match[name], 16) for name in ("ino", "wd", "dev"))
            path = self._devices.get(device)
            if path is None:
                continue
            with contextlib.suppress(OSError):
                mount = os.open(f"/proc/{self._init_pid}/root{path}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    descriptor = _by_handle(mount, int(match["kind"], 16), bytes.fromhex(match["handle"]))
                finally:
                    os.close(mount)
                self._stack.callback(os.close, descriptor)
                if os.fstat(descriptor).st_ino == ino:
                    self._watches[ino, wd] = descriptor


def _by_handle(mount: int, kind: int, handle: bytes) -> int:
    """open_by_handle_at(2). Raises OSError."""
    size = len(handle).to_bytes(4, "little") + kind.to_bytes(4, "little", signed=True)
    descriptor = _libc.open_by_handle_at(mount, size + handle, os.O_PATH | os.O_CLOEXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "open_by_handle_at")
    return int(descriptor)


__all__ = ["PROGRAM", "Kept"]
