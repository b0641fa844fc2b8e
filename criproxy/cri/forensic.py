"""The archive of kubelet's forensic checkpoints (CheckpointContainer): a container's memory and files, to be looked at.

It has the layout that containerd 2 and CRI-O write and that `checkpointctl` and `crit` read:

    checkpoint/*.img             CRIU's images
    stats-dump, dump.log         how CRIU made them
    config.dump, spec.dump       what the container is: id, image and runtime; its OCI specification
    status.dump                  CRI's ContainerStatus of that time
    rootfs-diff.tar              what it has changed in its image's files, as a layer of an image (overlayfs only)
    container.log                its log

The processes in it are the application's, below criproxy's init, which isn't in there. So neither containerd nor CRI-O
can restore it. The files are read after the memory: of a container that runs, they may be newer.

The layout's names are those of checkpoint-restore/checkpointctl, lib/metadata.go.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import stat
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final, Protocol

from google.protobuf import json_format

from criproxy.api import cri_pb2 as cri
from criproxy.cri.runtime import ContainerInfo, Mount
from criproxy.criu.store import SAID

_BELOW: Final = "checkpoint"
_SCRATCH: Final = "archives"
_TIMES: Final = ("created_at", "started_at", "finished_at")
_SAFELY: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS: Final = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


class LocationError(Exception):
    """The archive can't be written where it is to be. The text says what is wrong with the place."""


class Source(Protocol):
    """A container, as its state machine shows it."""

    async def snapshot(self, folder: Path) -> None: ...


def clean(state_dir: Path) -> None:
    """Removes what a daemon that was killed has left of archives that it was writing."""
    shutil.rmtree(state_dir / _SCRATCH, ignore_errors=True)


async def archive(
    container: Source, info: ContainerInfo, mounts: Sequence[Mount], location: Path, state_dir: Path
) -> None:
    """Checkpoints a container and writes its archive (mode 0600), which is there as a whole or not at all.

    `mounts`: of the container's root. What is in the works is in `state_dir`. Raises Refused, LocationError, OSError.
    Cancelled, it is given up, and nothing of it goes on.
    """
    _check(location)
    (state_dir / _SCRATCH).mkdir(mode=0o700, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=state_dir / _SCRATCH))
    try:
        await container.snapshot(folder / _BELOW)
        given_up = threading.Event()
        writing = asyncio.ensure_future(asyncio.to_thread(_write, location, folder, info, mounts, given_up))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            given_up.set()
            await asyncio.wait([writing])
            raise
    finally:
        await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder))


def _check(location: Path) -> None:
    if not location.is_absolute():
        raise LocationError(f'"{location}" is not an absolute path')
    if not location.parent.is_dir():
        raise LocationError(f"{location.parent} is not a folder")
    if location.is_dir():
        raise LocationError(f"{location} is a folder")


def _write(
    location: Path, folder: Path, info: ContainerInfo, mounts: Sequence[Mount], given_up: threading.Event
) -> None:
    with _new_file(location) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        texts = {
            # CRIU writes the inventory last. What sleeps may have been checkpointed long ago.
            "config.dump": _config(info, (folder / _BELOW / "inventory.img").stat().st_mtime),
            "spec.dump": json.dumps(info.spec),
            "status.dump": _status(info.status),
        }
        for name, text in texts.items():
            data = text.encode()
            _add(archive, _entry(name, len(data)), io.BytesIO(data), given_up)
        archive.addfile(_entry(_BELOW, kind=tarfile.DIRTYPE))
        for path in sorted((folder / _BELOW).iterdir()):
            if path.suffix == ".img" or path.name in SAID:
                _add_file(archive, path.name if path.name in SAID else f"{_BELOW}/{path.name}", path, given_up)
        if (upper := _upper(mounts)) is not None:
            with open(folder / "diff", "wb") as layer:
                _write_layer(layer, upper, given_up)
            _add_file(archive, "rootfs-diff.tar", folder / "diff", given_up)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            _add_file(archive, "container.log", Path(info.status.log_path), given_up)


@contextlib.contextmanager
def _new_file(location: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when all is in it, and is gone with whoever writes it if it doesn't come to that."""
    with ExitStack() as stack:
        folder = os.open(location.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, folder)
        descriptor = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
        stream = stack.enter_context(open(descriptor, "wb"))
        yield stream
        stream.flush()
        os.fsync(descriptor)
        # A link doesn't replace what is there.
        draft = f".criproxy-{os.getpid()}-{time.monotonic_ns()}"
        os.link(f"/proc/self/fd/{descriptor}", draft, dst_dir_fd=folder, follow_symlinks=True)
        try:
            os.replace(draft, location.name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.unlink(draft, dir_fd=folder)
            raise


def _config(info: ContainerInfo, checkpointed: float) -> str:
    status = info.status
    labels = [status.labels.get(f"io.kubernetes.pod.{name}", "") for name in ("name", "namespace", "uid")]
    return json.dumps(
        {
            "id": status.id,
            "name": "_".join((status.metadata.name, *labels, str(status.metadata.attempt))),
            "rootfsImage": status.image.image,
            "rootfsImageRef": status.image_ref,
            "rootfsImageName": status.image.image,
            "runtime": info.runtime,
            "createdTime": _rfc3339(status.created_at / 1e9),
            "checkpointedTime": _rfc3339(checkpointed),
            "restoredTime": "0001-01-01T00:00:00Z",
            "restored": False,
        }
    )


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _status(status: cri.ContainerStatus) -> str:
    """As Go writes it: 64-bit numbers are numbers."""
    found = json_format.MessageToDict(status, preserving_proto_field_name=True, use_integers_for_enums=True)
    return json.dumps(found | {name: getattr(status, name) for name in _TIMES})


# --- Tar -------------------------------------------------------------------------------------------------------------


class _GivenUp(Exception):
    pass


class _Copied:
    """A file that is read into an archive, unless that is given up. What it has shrunk by meanwhile is zeros."""

    def __init__(self, stream: IO[bytes], given_up: threading.Event) -> None:
        self._stream = stream
        self._given_up = given_up

    def read(self, size: int) -> bytes:
        if self._given_up.is_set():
            raise _GivenUp
        return self._stream.read(size).ljust(size, b"\0")


def _entry(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.mtime = size, kind, int(time.time())
    entry.mode = 0o700 if kind == tarfile.DIRTYPE else 0o600
    return entry


def _add(archive: tarfile.TarFile, entry: tarfile.TarInfo, stream: IO[bytes], given_up: threading.Event) -> None:
    archive.addfile(entry, _Copied(stream, given_up))  # type: ignore[arg-type]


def _add_file(archive: tarfile.TarFile, name: str, path: Path, given_up: threading.Event) -> None:
    with open(path, "rb") as stream:
        _add(archive, _entry(name, os.fstat(stream.fileno()).st_size), stream, given_up)


# --- What the container has changed of its image ---------------------------------------------------------------------


def _upper(mounts: Sequence[Mount]) -> Path | None:
    """The folder in which overlayfs keeps it; None with another snapshotter."""
    for mount in mounts:
        for option in mount.options if mount.type == "overlay" else ():
            name, _equals, value = option.partition("=")
            if name == "upperdir":
                return Path(value)
    return None


def _write_layer(layer: IO[bytes], upper: Path, given_up: threading.Event) -> None:
    """As a layer of an OCI image (opencontainers/image-spec, layer.md): what was deleted is a file `.wh.NAME`, a folder
    that hides the image's has `.wh..wh..opq`.

    The container may change what is there at any time, so no link is followed, and nothing is opened but plain files.
    """
    with ExitStack() as stack, tarfile.open(fileobj=layer, mode="w") as archive:
        top = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, top)
        for folder, folders, files, descriptor in os.fwalk(dir_fd=top):
            for name in sorted((*folders, *files)):
                _add_changed(archive, os.path.normpath(f"{folder}/{name}"), name, descriptor, given_up)


def _add_changed(archive: tarfile.TarFile, path: str, name: str, folder: int, given_up: threading.Event) -> None:
    with ExitStack() as stack:
        descriptor = -1
        entry = _entry(path)
        try:
            seen = os.lstat(name, dir_fd=folder)
            kind = stat.S_IFMT(seen.st_mode)
            if kind == stat.S_IFLNK:
                entry.linkname = os.readlink(name, dir_fd=folder)
            elif kind in (stat.S_IFREG, stat.S_IFDIR):
                descriptor = os.open(name, _SAFELY, dir_fd=folder)
                stack.callback(os.close, descriptor)
                seen = os.fstat(descriptor)
        except OSError:
            return  # gone, or another kind of thing than a moment ago
        if kind == stat.S_IFCHR and seen.st_rdev == 0:
            archive.addfile(_entry(os.path.join(os.path.dirname(path), f".wh.{name}")))
        elif kind in _KINDS and kind == stat.S_IFMT(seen.st_mode):
            entry.type, entry.mode, entry.mtime = _KINDS[kind], stat.S_IMODE(seen.st_mode), seen.st_mtime
            entry.uid, entry.gid = seen.st_uid, seen.st_gid
            entry.devmajor, entry.devminor = os.major(seen.st_rdev), os.minor(seen.st_rdev)
            if kind == stat.S_IFREG:
                entry.size = seen.st_size
                _add(archive, entry, stack.enter_context(open(descriptor, "rb", closefd=False)), given_up)
            else:
                archive.addfile(entry)
            if kind == stat.S_IFDIR and _opaque(descriptor):
                archive.addfile(_entry(f"{path}/.wh..wh..opq"))


def _opaque(folder: int) -> bool:
    try:
        return os.getxattr(folder, "trusted.overlay.opaque") == b"y"
    except OSError:
        return False
