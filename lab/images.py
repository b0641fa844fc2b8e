"""Container images built on the spot from this machine's Debian packages: nothing is pulled.

An image is a `Recipe` in `RECIPES`, a function that lists what its layers hold. A program comes with the libraries
that the dynamic loader gives it here. The OCI archives are kept under .build/images by what they were made of, so that
a second run only looks the files up.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from lab import BUILD, LabError, image_name
from lab.process import run

CACHE = BUILD / "images"
SOURCES = Path(__file__).parent / "sources"
# Raised when the archives themselves are made differently: the files that go in don't show it.
_FORMAT = 1
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


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

    def file(self, source: Path, path: str = "", mode: int | None = None) -> None:
        """A file of this machine, at the same path or another. Raises LabError if it isn't there."""
        if not source.is_file():
            raise LabError(f"Cannot find {source}, which an image needs", "`make setup` installs what is missing")
        chosen = stat.S_IMODE(source.stat().st_mode) if mode is None else mode
        self._add(Entry((path or str(source)).strip("/"), tarfile.REGTYPE, chosen, source=source.resolve()))

    def symlink(self, path: str, target: str) -> None:
        self._add(Entry(path.strip("/"), tarfile.SYMTYPE, 0o777, target=target))

    def hard_link(self, path: str, target: str) -> None:
        self._add(Entry(path.strip("/"), tarfile.LNKTYPE, 0o755, target=target.strip("/")))

    def program(self, source: Path, path: str = "") -> None:
        """An executable with the libraries that it is linked to."""
        self.file(source, path, 0o755)
        for library in _libraries(source):
            self.file(library)

    def tree(self, source: Path) -> None:
        """A folder of this machine with all that is in it; links stay links."""
        for directory, names, files in os.walk(source):
            self.directory(directory)
            for name in sorted(names + files):
                path = Path(directory, name)
                if path.is_symlink():
                    self.symlink(str(path), os.readlink(path))
                elif path.is_file():
                    self.file(path)

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
        }


# --- What goes in ----------------------------------------------------------------------------------------------


def _compiled(source: Path, compiler: Sequence[str], environment: dict[str, str] | None = None) -> Path:
    """A program from a source of ours, compiled once: `compiler` gets the output's and the source's path added."""
    found = shutil.which(compiler[0])
    if found is None:
        raise LabError(f"Cannot find {compiler[0]} for {source.name}", "`make setup` installs what is missing")
    version = Path(found).resolve().stat()
    made_of = f"{compiler}{environment}{version.st_size}{version.st_mtime_ns}".encode() + source.read_bytes()
    target = CACHE / f"{source.stem}-{hashlib.sha256(made_of).hexdigest()[:16]}"
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        run([*compiler, "-o", unfinished, source], env={**os.environ, **(environment or {})}, timeout=600)
        unfinished.rename(target)
    return target


def _base() -> Layer:
    """A shell with its tools, the users that Debian's packages want, and the folders that programs expect."""
    layer = Layer()
    busybox = Path("/usr/bin/busybox")  # Debian's two packages of it have it there, or by the merged /bin
    layer.program(busybox, "/bin/busybox")
    for applet in run([busybox, "--list"]).split():
        layer.hard_link(f"/bin/{applet}", "/bin/busybox")
    for directory in ("proc", "sys", "dev", "root", "run", "home", "etc", "var/log", "var/lib", "usr/bin", "usr/sbin"):
        layer.directory(directory)
    layer.symlink("/var/run", "/run")
    layer.directory("/tmp", 0o1777)
    layer.text(
        "/etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\n"
        "mysql:x:101:101:mysql:/var/lib/mysql:/bin/sh\nredis:x:102:102:redis:/data:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/:/bin/sh\n",
    )
    layer.text("/etc/group", "root:x:0:\nwww-data:x:33:\nmysql:x:101:\nredis:x:102:\nnogroup:x:65534:\n")
    layer.text("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
    return layer


def _pause() -> list[Layer]:
    layer = Layer()
    layer.file(_compiled(SOURCES / "pause.c", ["gcc", "-static", "-O2", "-Wall"]), "/pause", 0o755)
    return [layer]


def _hello() -> list[Layer]:
    # Debian's compiler, also where another Go comes first in PATH; and no toolchain is fetched from anywhere.
    go = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-trimpath", "GO111MODULE": "off", "HOME": str(BUILD)}
    go |= {"GOCACHE": str(BUILD / "go-cache"), "GOPATH": str(BUILD / "go")}
    layer = Layer()
    layer.file(_compiled(SOURCES / "hello.go", ["/usr/bin/go", "build"], go), "/hello", 0o755)
    return [layer]


def _redis() -> list[Layer]:
    layer = Layer()
    # Debian's redis-tools has the server too, under the name of its checker; argv[0] decides what it is.
    layer.program(Path("/usr/bin/redis-check-rdb"), "/usr/bin/redis-server")
    layer.program(Path("/usr/bin/redis-cli"))
    layer.directory("/data", owner=102)
    return [_base(), layer]


_NGINX_CONF = """\
user www-data;
worker_processes 3;
pid /run/nginx.pid;
error_log /dev/stderr notice;
events { worker_connections 512; }
http {
    include mime.types;
    access_log /dev/stdout;
    server {
        listen 80;
        listen [::]:80;
        root /var/www;
    }
}
"""


def _nginx() -> list[Layer]:
    layer = Layer()
    layer.program(Path("/usr/sbin/nginx"))
    layer.file(Path("/etc/nginx/mime.types"))
    layer.text("/etc/nginx/nginx.conf", _NGINX_CONF)
    for directory in ("/var/lib/nginx", "/var/log/nginx"):
        layer.directory(directory, owner=33)
    layer.text("/var/www/index.html", "nginx in the lab\n")
    return [_base(), layer]


RECIPES: dict[str, Recipe] = {
    "pause": Recipe(_pause, entrypoint=["/pause"]),
    "busybox": Recipe(lambda: [_base()], command=["sh"]),
    "redis": Recipe(
        _redis,
        entrypoint=["redis-server"],
        command=["--save", "", "--protected-mode", "no"],
        directory="/data",
        ports=["6379/tcp"],
    ),
    "nginx": Recipe(
        _nginx, entrypoint=["nginx"], command=["-g", "daemon off;"], stop_signal="SIGQUIT", ports=["80/tcp"]
    ),
    "hello": Recipe(_hello, entrypoint=["/hello"], ports=["8080/tcp"]),
}
# What every lab has from its start; others are imported when they are asked for.
USUAL = ("pause", "busybox", "redis", "nginx", "hello")


# --- The archive -----------------------------------------------------------------------------------------------


def build(name: str) -> Path:
    """The OCI archive of the image, built if what it is made of has changed. Raises LabError."""
    recipe = RECIPES.get(name)
    if recipe is None:
        raise LabError(f"There is no recipe for the image {name}", f"there are {', '.join(RECIPES)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    # Several labs may start at once from the same checkout.
    with (CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        layers = recipe.layers()
        made_of = "\n".join([str(_FORMAT), json.dumps(recipe.config()), *(f for x in layers for f in x.fingerprints())])
        archive = CACHE / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.tar"
        if not archive.exists():
            unfinished = archive.with_suffix(".unfinished")
            with unfinished.open("wb") as out:
                _write_archive(out, image_name(name), recipe, layers)
            for old in CACHE.glob(f"{name}-{'?' * 16}.tar"):
                old.unlink()
            unfinished.rename(archive)
        return archive


def _write_archive(out: BinaryIO, reference: str, recipe: Recipe, layers: Sequence[Layer]) -> None:
    with tarfile.open(fileobj=out, mode="w") as archive:

        def blob(content: BinaryIO, media_type: str) -> dict[str, object]:
            digest = hashlib.sha256()
            while piece := content.read(1 << 20):
                digest.update(piece)
            info = tarfile.TarInfo(f"blobs/sha256/{digest.hexdigest()}")
            info.size = content.tell()
            content.seek(0)
            archive.addfile(info, content)
            return {"mediaType": media_type, "digest": f"sha256:{digest.hexdigest()}", "size": info.size}

        def document(content: object, kind: str) -> dict[str, object]:
            return blob(io.BytesIO(json.dumps(content).encode()), f"application/vnd.oci.image.{kind}.v1+json")

        descriptors = []
        for layer in layers:
            with tempfile.TemporaryFile(dir=CACHE) as content:
                layer.write(content)
                content.seek(0)
                descriptors.append(blob(content, "application/vnd.oci.image.layer.v1.tar"))
        config = document(
            {
                "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
                "os": "linux",
                "config": recipe.config(),
                "rootfs": {"type": "layers", "diff_ids": [d["digest"] for d in descriptors]},
            },
            "config",
        )
        manifest = document({"schemaVersion": 2, "config": config, "layers": descriptors}, "manifest")
        # containerd names the imported image by this annotation.
        manifest["annotations"] = {"io.containerd.image.name": reference}
        index: dict[str, object] = {"schemaVersion": 2, "manifests": [manifest]}
        for path, document_ in (("oci-layout", {"imageLayoutVersion": "1.0.0"}), ("index.json", index)):
            data = json.dumps(document_).encode()
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
