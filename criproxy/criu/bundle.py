"""The bundle: the folder that is mounted read-only into containers, with our init and a CRIU that needs nothing else.

It holds `init`, `enter`, `preload.so`, `criu`, the libraries which that links, the dynamic loader they belong to, and
`kdt`, what this CRIU knows of the running kernel: so CRIU starts in any image, also in one without a libc, and at once.
Its path has the hash of its content: a folder that is there is complete and is never changed, whatever is upgraded,
while containers that were started with it have it mounted. As kernel data is that of one boot, so is the folder.

CRIU runs as root in the mount namespace of a hostile container, so nothing of the container's may steer it:
- the loader's `/etc/ld.so.preload` (it has no option to leave that out) is patched to a name inside of the bundle, and
  `/etc/ld.so.cache` isn't read;
- so is CRIU's `/run/criu.kdat` (no option either): the container could put a forged one there. It reads `kdt` instead,
  which it can't replace or delete either, as it does with one that it takes for another CRIU's;
- CRIU's configuration files (`/etc/criu/default.conf` and one in $HOME, which may name scripts to run) are off;
- its plugins (every `*.so` in `/usr/lib/criu`) are looked for in an empty folder of the bundle;
- so are the programs that it starts by name (iptables, ip, tar): with the options we use it needs none.
All of it is in `Bundle.criu_argv()` and `Bundle.environment`; CRIU must always be started with both.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import struct
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criproxy import run
from criproxy.criu import kdat
from criproxy.criu.debian import DownloadError, download
from criproxy.criu.kdat import KdatError

INSIDE: Final = "/.criproxy"
"""Where containers see the bundle."""

SUITE: Final = "trixie"
"""The Debian release whose CRIU is taken where the host has none that works: 4.1.1."""

# Libraries that CRIU is linked against and that we have no use for: ours takes the place of each.
_UNUSED: Final = ("libgnutls.so.30", "libnftables.so.1")
_PLUGINS: Final = "plugins"
_KDAT: Final = "kdt"

_PRELOAD_HOST: Final = b"/etc/ld.so.preload\0"
_PRELOAD_BUNDLE: Final = f"{INSIDE}/preload\0".encode()
assert len(_PRELOAD_HOST) == len(_PRELOAD_BUNDLE)

# With the zero before them: the linker lets a string be the end of another one.
_KDAT_HOST: Final = f"\0{kdat.PATH}\0".encode()
_KDAT_BUNDLE: Final = f"\0{INSIDE}/{_KDAT}\0".encode()
assert len(_KDAT_HOST) == len(_KDAT_BUNDLE)
# Up to CRIU 3.17, where a new one is written; later ones append ".tmp" to the other.
_KDAT_DRAFT_HOST: Final = b"\0/run/.criu.kdat\0"
_KDAT_DRAFT_BUNDLE: Final = f"\0{INSIDE}/.{_KDAT}\0".encode()
assert len(_KDAT_DRAFT_HOST) == len(_KDAT_DRAFT_BUNDLE)

_log: Final = logging.getLogger(__name__)


class BundleError(Exception):
    """There is no CRIU to work with. The text is a sentence for people, and a hint where there is something to do."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on the host. It is good until the next boot."""

    path: Path
    version: str
    """CRIU's own, such as `4.1.1`."""

    @property
    def environment(self) -> Mapping[str, str]:
        """The whole environment for CRIU."""
        return _environment(INSIDE)

    def criu_argv(self, inside: str = INSIDE) -> list[str]:
        """The beginning of every CRIU command line; the action and its options follow.

        `inside` is where the process that starts CRIU sees the bundle. `/proc/self/fd/N`, with a descriptor of the
        folder that was opened on the host, works as well, and doesn't depend on the container's mounts.
        """
        return _criu_argv(inside)

    @property
    def init(self) -> Path:
        """The container's first process, on the host."""
        return self.path / "init"

    @property
    def enter(self) -> Path:
        """The launcher that joins a container's namespaces and cgroups, on the host."""
        return self.path / "enter"


def build(criu_root: Path, libexec: Path, state_dir: Path) -> Bundle:
    """Makes the bundle from the CRIU under `criu_root` (`/` is the host's) and our own programs in `libexec`.

    One that was made of the same since the machine has booted is taken as it is. Raises BundleError if there is no
    CRIU, if a part is missing, or if `criu check` says that it doesn't work with this kernel.
    """
    criu_root, state_dir = criu_root.absolute(), state_dir.absolute()
    plain = _ours(libexec) | _criu(criu_root, libexec)
    content = plain | {"criu": _with_our_kernel_data(plain["criu"], criu_root)}

    def find_out(draft: Path) -> bytes:
        version = _version(draft, criu_root)
        folder = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # By descriptor: the state folder may be out of sight in the host's mount namespace, or below /run.
            inside = f"/proc/self/fd/{folder}"
            return kdat.make(_criu_argv(inside), _environment(inside), folder)
        except KdatError as error:
            raise BundleError(f"CRIU {version} of {criu_root} doesn't work here: {error}") from error
        finally:
            os.close(folder)

    with _locked(state_dir):
        path = _store(state_dir / "bundles", content, plain["criu"], find_out)
    return Bundle(path=path, version=_version(path, criu_root))


def prepare(
    libexec: Path,
    state_dir: Path,
    *,
    criu_root: Path | None = None,
) -> Bundle:
    """The bundle to use on this machine: from `criu_root` if one is given, else of the host's CRIU if it works here,
    else of Debian's packages (`SUITE`), which are kept in the state folder.

    Raises BundleError if none of these works.
    """
    if criu_root is not None:
        return build(criu_root, libexec, state_dir)
    try:
        return build(Path("/"), libexec, state_dir)
    except BundleError as error:
        _log.info("%s", error)
        reason = error
    root = state_dir / f"criu-{SUITE}"
    try:
        download(SUITE, root, say=_log.info)
    except DownloadError as error:
        raise BundleError(f"{reason} And no other CRIU could be had: {error}") from error
    return build(root, libexec, state_dir)


def collect_garbage(state_dir: Path, in_use: set[Path]) -> list[Path]:
    """Removes the bundles that are none of `in_use` (`Bundle.path` of the current one and of every container), and what
    an interrupted `build()` has left. Returns what was removed.
    """
    kept = {path.absolute() for path in in_use}
    removed = []
    with _locked(state_dir):
        for folder in sorted((state_dir / "bundles").glob("*")):
            if folder.is_dir() and folder.absolute() not in kept:
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


# --- What goes into it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    data: bytes
    mode: int = 0o444


def _ours(libexec: Path) -> dict[str, _File]:
    files = {}
    parts = (("init", 0o555, True), ("enter", 0o555, False), ("preload.so", 0o444, True))
    for name, mode, needed in parts:
        try:
            files[name] = _File((libexec / name).read_bytes(), mode)
        except FileNotFoundError:
            if needed:
                raise BundleError(f"{libexec / name} is missing. Install the package again, or run `make`.") from None
    return files


def _criu(root: Path, libexec: Path) -> dict[str, _File]:
    """CRIU of a root as it is, its loader (patched) and its libraries, all in one flat folder.

    What is linked and unused is taken from `libexec`, as far as this CRIU starts with it, and needs no libraries.
    """
    binary = _find(root, [f"{folder}/criu" for folder in ("usr/sbin", "usr/local/sbin", "usr/bin", "sbin")])
    if binary is None:
        raise BundleError(f"There is no criu in {root}. Install the package criu, or let one be downloaded.")
    interpreter = _interpreter(binary)
    loader = _find(root, [interpreter.lstrip("/"), f"usr{interpreter}"])
    if loader is None or "/ld-linux" not in interpreter:
        raise BundleError(f"{binary} wants the loader {interpreter}, which isn't glibc's or isn't in {root}.")
    start: list[str | Path] = [loader]
    if root != Path("/"):
        start += ["--inhibit-cache", "--library-path", ":".join(_library_folders(root))]
    try:
        ours = [library for name in _UNUSED if (library := libexec / name).exists() and _starts(start, library, binary)]
        # Without LD_PRELOAD and the like, which would be listed as well.
        argv = [*start, "--preload", ":".join(map(str, ours)), "--list", binary]
        listing = run.run(argv, env={}, timeout=30).check().stdout.decode()
    except run.CommandError as error:
        raise BundleError(f"The libraries of {binary} can't be listed: {error}") from error

    files = {"criu": _File(binary.read_bytes(), 0o555), "ld.so": _File(_without_preload(loader), 0o555)}
    files |= {library.name: _File(library.read_bytes()) for library in ours}
    for line in listing.splitlines():
        name, arrow, where = line.strip().partition(" => ")
        if not arrow or "/" in name:  # the kernel's own (vdso), or the loader
            continue
        path = Path(where.rsplit(" (", 1)[0])
        # The loader looks in the host's own folders as well.
        if not path.is_absolute() or not path.is_relative_to(root):
            raise BundleError(
                f"{binary} needs {name}, which isn't in {root}. Install what the package criu depends on."
            )
        files[name] = _File(_inside(root, path).read_bytes())
    return files


def _starts(loader: list[str | Path], library: Path, binary: Path) -> bool:
    """Whether a program does with our library: the loader takes what is preloaded for what has the same soname."""
    return run.run([*loader, "--preload", library, binary, "--version"], env={}, timeout=30).returncode == 0


def _with_our_kernel_data(criu: _File, root: Path) -> _File:
    """CRIU that reads the bundle's kernel data, wherever it is started (outside of containers, it finds none)."""
    path = str(kdat.PATH).encode()
    if criu.data.count(path) != 1 or criu.data.count(_KDAT_HOST) != 1:
        raise BundleError(
            f"The criu of {root} can't be kept from reading the container's {kdat.PATH}. "
            "Let a known CRIU be downloaded."
        )
    data = criu.data.replace(_KDAT_HOST, _KDAT_BUNDLE).replace(_KDAT_DRAFT_HOST, _KDAT_DRAFT_BUNDLE)
    return _File(data, criu.mode)


def _without_preload(loader: Path) -> bytes:
    data = loader.read_bytes()
    if data.count(_PRELOAD_HOST) != 1:
        raise BundleError(
            f"{loader} can't be kept from reading the container's /etc/ld.so.preload. Let a known CRIU be downloaded."
        )
    return data.replace(_PRELOAD_HOST, _PRELOAD_BUNDLE)


def _interpreter(binary: Path) -> str:
    """The loader that a dynamically linked 64-bit ELF file names (PT_INTERP; elf(5))."""
    data = binary.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        raise BundleError(f"{binary} isn't a 64-bit ELF file.")
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for index in range(count):
        kind, _flags, offset, _virtual, _physical, length = struct.unpack_from("<IIQQQQ", data, table + index * size)
        if kind == 3:
            return data[offset : offset + length].rstrip(b"\0").decode()
    raise BundleError(f"{binary} isn't linked dynamically.")


def _library_folders(root: Path) -> list[str]:
    triplet = sysconfig.get_config_var("MULTIARCH") or f"{os.uname().machine}-linux-gnu"
    names = (f"usr/lib/{triplet}", f"lib/{triplet}", "usr/lib64", "lib64", "usr/lib", "lib")
    return [str(root / name) for name in names if (root / name).is_dir()]


def _find(root: Path, names: list[str]) -> Path | None:
    for name in names:
        path = _inside(root, root / name)
        if path.is_file():
            return path
    return None


def _inside(root: Path, path: Path) -> Path:
    """Follows the links at a path of an unpacked root; absolute ones begin at that root, not at the host's."""
    for _ in range(40):
        if not path.is_symlink():
            break
        target = os.readlink(path)
        path = root / target.lstrip("/") if target.startswith("/") else path.parent / target
    return path


# --- Where it is kept -------------------------------------------------------------------------------------------------


def _store(bundles: Path, content: Mapping[str, _File], plain_criu: _File, find_out: Callable[[Path], bytes]) -> Path:
    """The folder of this content and of the kernel's data. That is found out once per boot: it has bytes that differ
    each time, so that every start of the daemon would make another bundle.

    `find_out` is called with the folder while its CRIU is `plain_criu`, which leaves the data where one can get at it.
    """
    name = kdat.key(_digest(content))
    for path in bundles.glob(f"{name}-*"):
        _verify(path, content)
        return path
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=bundles))
    try:
        _write(new, {**content, "criu": plain_criu})
        (new / _PLUGINS).mkdir(mode=0o755)
        kernel = {_KDAT: _File(find_out(new), 0o400)}
        _write(new, {"criu": content["criu"], **kernel})
        new.chmod(0o755)
        _sync(new)
        path = bundles / f"{name}-{_digest(kernel)[:8]}"
        new.rename(path)
        _sync(bundles)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return path


def _digest(content: Mapping[str, _File]) -> str:
    digest = hashlib.sha256()
    for name, file in sorted(content.items()):
        digest.update(f"{name}\0{file.mode:o}\0{len(file.data)}\0".encode() + file.data)
    return digest.hexdigest()


def _write(folder: Path, content: Mapping[str, _File]) -> None:
    for name, file in content.items():
        path = folder / name
        path.unlink(missing_ok=True)  # what runs can't be written to
        with open(path, "wb") as stream:
            stream.write(file.data)
            os.fchmod(stream.fileno(), file.mode)
            stream.flush()
            os.fsync(stream.fileno())


def _verify(path: Path, content: Mapping[str, _File]) -> None:
    """Containers may have it mounted, so a damaged one can't be put right in place."""
    for name in (*content, _KDAT):
        try:
            data = (path / name).read_bytes()
        except OSError:
            same = False
        else:
            kernel = {_KDAT: _File(data, 0o400)}
            same = path.name.endswith(f"-{_digest(kernel)[:8]}") if name == _KDAT else data == content[name].data
        if not same:
            raise BundleError(f"{path / name} was changed. End the containers that use it, and remove {path}.")


@contextlib.contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """One maker or remover of bundles at a time, whatever the process."""
    bundles = state_dir / "bundles"
    bundles.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(bundles / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- How it is run ----------------------------------------------------------------------------------------------------


def _criu_argv(inside: str) -> list[str]:
    loader = [f"{inside}/ld.so", "--inhibit-cache", "--library-path", inside, "--preload", f"{inside}/preload.so"]
    return [*loader, f"{inside}/criu", "--no-default-config", "--libdir", f"{inside}/{_PLUGINS}"]


def _environment(inside: str) -> dict[str, str]:
    return {
        # Unset, it would be /bin:/usr/bin, and these are the container's.
        "PATH": f"{inside}/{_PLUGINS}",
        # Should it be the real one (see native/gnutls.c): its set-up at load time reads the container's /etc/gnutls.
        "GNUTLS_NO_IMPLICIT_INIT": "1",
        # No error is simulated: CRIU traces system calls instead of setting breakpoints. The first breakpoint on a
        # machine that has had none for a second waits for an RCU grace period, 10 to 15 ms (docs/architecture.md). The
        # number has been the same since CRIU 3.0.
        "CRIU_FAULT": "130",
    }


def _version(path: Path, root: Path) -> str:
    """`root` is where it is from."""
    try:
        argv = [*_criu_argv(str(path)), "--version"]
        said = run.run(argv, env=_environment(str(path)), timeout=30).check().stdout.decode()
    except run.CommandError as error:
        raise BundleError(f"The CRIU of {root} can't be started: {error}") from error
    for line in said.splitlines():
        if line.startswith("Version:"):
            return line.removeprefix("Version:").strip()
    raise BundleError(f"The CRIU of {root} doesn't say its version.")


__all__ = [
    "INSIDE",
    "SUITE",
    "Bundle",
    "BundleError",
    "DownloadError",
    "build",
    "collect_garbage",
    "download",
    "prepare",
]
