"""What an image consists of: layers of this machine's files and our own, and how its containers are started."""

import contextlib
import hashlib
import io
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from lab import LabError
from lab.process import run

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Entry:
    """One path of a layer; `kind` is one of tarfile's types. Contents come from `source` or are `data`."""

    path: str
    kind: bytes
    mode: int
    source: Path | None = None
    data: bytes = b""
    target: str = ""
    owner: int = 0

    def fingerprint(self) -> str:
        """Changes when the contents may have; a source counts by size and time, for reading all would take seconds."""
        content = hashlib.sha256(self.data).hexdigest()
        if self.source:
            seen = self.source.stat()
            content = f"{self.source}:{seen.st_size}:{seen.st_mtime_ns}"
        return f"{self.path}:{self.kind!r}:{self.mode:o}:{self.owner}:{self.target}:{content}"


class Layer:
    """The files of one layer, each path once: the first one that is added wins."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def _add(self, entry: Entry) -> None:
        if entry.path in self._entries:
            return
        parent = os.path.dirname(entry.path)
        if parent:
            self.directory(parent)
        self._entries[entry.path] = entry

    def directory(self, path: str, mode: int = 0o755, owner: int = 0) -> None:
        self._add(Entry(path.strip("/"), tarfile.DIRTYPE, mode, owner=owner))

    def text(self, path: str, content: str, mode: int = 0o644, owner: int = 0) -> None:
        self._add(Entry(path.strip("/"), tarfile.REGTYPE, mode, data=content.encode(), owner=owner))

    def file(self, source: Path, path: str = "", mode: int | None = None, owner: int = 0) -> None:
        """A file of this machine, at the same path or another. Raises LabError if it isn't there."""
        if not source.is_file():
            raise LabError(f"Cannot find {source}, which an image needs", "`make setup` installs what is missing")
        chosen = stat.S_IMODE(source.stat().st_mode) if mode is None else mode
        target = (path or str(source)).strip("/")
        self._add(Entry(target, tarfile.REGTYPE, chosen, source=source.resolve(), owner=owner))

    def symlink(self, path: str, target: str) -> None:
        self._add(Entry(path.strip("/"), tarfile.SYMTYPE, 0o777, target=target))

    def hard_link(self, path: str, target: str) -> None:
        self._add(Entry(path.strip("/"), tarfile.LNKTYPE, 0o755, target=target.strip("/")))

    def program(self, source: Path, path: str = "") -> None:
        """An executable with the libraries that it is linked to."""
        self.file(source, path, 0o755)
        for library in _libraries(source):
            self.file(library)

    def tree(self, source: Path, path: str = "", *, owner: int = 0) -> None:
        """A folder of this machine with all that is in it, at the same path or another; links stay links."""
        for directory, names, files in os.walk(source):
            place = Path(path or source, os.path.relpath(directory, source))
            self.directory(os.path.normpath(place), stat.S_IMODE(os.stat(directory).st_mode), owner)
            for name in sorted(names + files):
                found, target = Path(directory, name), os.path.normpath(place / name)
                if found.is_symlink():
                    self.symlink(target, os.readlink(found))
                elif found.is_file():
                    self.file(found, target, owner=owner)

    def fingerprints(self) -> Iterator[str]:
        return (entry.fingerprint() for entry in self._entries.values())

    def write(self, out: BinaryIO) -> None:
        """As a tar archive that depends on nothing but the contents."""
        with tarfile.open(fileobj=out, mode="w|") as archive:
            for entry in self._entries.values():
                info = tarfile.TarInfo(entry.path)
                info.type, info.mode, info.linkname = entry.kind, entry.mode, entry.target
                info.uid = info.gid = entry.owner
                if entry.source:
                    info.size = entry.source.stat().st_size
                    with entry.source.open("rb") as content:
                        archive.addfile(info, content)
                else:
                    info.size = len(entry.data)
                    archive.addfile(info, io.BytesIO(entry.data))


def _libraries(program: Path) -> list[Path]:
    # ldd fails for a static program, which is just what needs no libraries.
    with contextlib.suppress(LabError):
        return [Path(found) for found in re.findall(r"(/\S+) \(0x", run(["ldd", program]))]
    return []


@dataclass(frozen=True)
class Recipe:
    """How an image is made and started, with the words of a Dockerfile."""

    layers: Callable[[], Sequence[Layer]]
    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()
    environment: Sequence[str] = (_PATH,)
    directory: str = "/"
    user: str = ""
    stop_signal: str = ""
    ports: Sequence[str] = field(default=())  # "6379/tcp"
    volumes: Sequence[str] = ()
    """Folders that each container gets a copy of, on the node's disk and not in the image's layers: databases."""

    def config(self) -> dict[str, object]:
        """The image configuration's `config`."""
        return {
            "Entrypoint": list(self.entrypoint) or None,
            "Cmd": list(self.command) or None,
            "Env": list(self.environment),
            "WorkingDir": self.directory,
            "User": self.user,
            **({"StopSignal": self.stop_signal} if self.stop_signal else {}),
            **({"ExposedPorts": {port: {} for port in self.ports}} if self.ports else {}),
            **({"Volumes": {volume: {} for volume in self.volumes}} if self.volumes else {}),
        }
