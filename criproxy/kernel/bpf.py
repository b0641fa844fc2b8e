"""libbpf, as much of it as the hook needs: loads an object file, pins it, reads and writes its maps.

libbpf.so.1 (200 KB, Debian's libbpf1) is called through ctypes: nothing of LLVM, no kernel headers and no compiler on
the node. Works with libbpf 1.1 (Debian 12) to 1.5 (Debian 13); what is called exists since 1.0 and never changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from criproxy.kernel.namespaces import MS_NODEV, MS_NOEXEC, MS_NOSUID, mount

_LIBRARY: Final = "libbpf.so.1"
_HINTS: Final = {
    errno.EPERM: "it needs CAP_BPF and CAP_NET_ADMIN (or root) in the first user namespace",
    errno.EACCES: "the kernel's verifier refused the program",
    errno.ENOENT: "is a bpf file system mounted there?",
    errno.ENOSYS: "this kernel has no eBPF",
    errno.EINVAL: "is the kernel older than 6.1, or the path not on a bpf file system?",
    errno.EEXIST: "something of that name is pinned there already",
    errno.ENOSPC: "no room is left",
    errno.E2BIG: "a map is full",
}


class BpfError(Exception):
    """What the kernel or libbpf refused: one sentence, and a hint in brackets."""


def load_object(
    path: Path,
    pins: Path,
    sizes: Mapping[str, int],
    maps: tuple[str, ...],
    programs: tuple[str, ...],
    shared: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Loads an eBPF object file, and pins the named maps and programs under `pins` (a new folder on a bpf file system).

    `sizes` sets the entries (bytes for a ring buffer) of maps. `shared` maps are those pinned at the given paths, which
    other objects use as well; where none is pinned yet it is made. Raises BpfError; nothing (but the shared maps) stays
    behind then.
    """
    lib = _libbpf()
    with _said() as said, contextlib.ExitStack() as stack:
        handle = lib.bpf_object__open_file(os.fsencode(path), None)
        if not handle:
            raise _error(f"Cannot read the eBPF object {path}", said)
        # What is pinned outlives it.
        stack.callback(lib.bpf_object__close, handle)
        try:
            pins.mkdir(mode=0o700)
        except OSError as error:
            raise BpfError(f"Cannot make the folder {pins} for pins: {error.strerror}") from error
        try:
            _load(handle, pins, sizes, {**{name: pins / name for name in maps}, **shared}, programs, said)
        except BaseException:
            unpin(pins)
            raise


def _load(
    handle: int,
    pins: Path,
    sizes: Mapping[str, int],
    maps: Mapping[str, Path],
    programs: tuple[str, ...],
    said: list[str],
) -> None:
    lib = _libbpf()
    for name, pin in maps.items():
        found = lib.bpf_object__find_map_by_name(handle, name.encode())
        if not found:
            raise BpfError(f"The eBPF object has no map {name} (it belongs to another version of criproxy)")
        if name in sizes and lib.bpf_map__set_max_entries(found, sizes[name]):
            raise _error(f"Cannot give the map {name} {sizes[name]} entries", said)
        if lib.bpf_map__set_pin_path(found, os.fsencode(pin)):
            raise _error(f"Cannot pin the map {name} at {pin}", said)
    if lib.bpf_object__load(handle):
        raise _error("Cannot load the eBPF programs", said)
    for name in programs:
        program = lib.bpf_object__find_program_by_name(handle, name.encode())
        if not program or lib.bpf_program__pin(program, os.fsencode(pins / name)):
            raise _error(f"Cannot pin the eBPF program {name} in {pins}", said)


class Pinned:
    """The descriptor of a pinned program or map."""

    def __init__(self, path: Path) -> None:
        """Raises BpfError if nothing is pinned there."""
        self._name = path.name
        self._fd: int = _libbpf().bpf_obj_get(os.fsencode(path))
        if self._fd < 0:
            raise _error(f"Cannot open the pinned eBPF object {path}", [])

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def id(self) -> int:
        """The kernel's number of the program or map."""
        text = Path(f"/proc/self/fdinfo/{self._fd}").read_text()
        found = re.search(r"^(?:prog|map)_id:\s*(\d+)", text, re.MULTILINE)
        if found is None:
            raise BpfError(f"The kernel doesn't tell the id of {self._name}")
        return int(found[1])


class Link(Pinned):
    """A program that is attached to something by a pinned link: it stays so until that something, or the pin, is
    removed."""

    @classmethod
    def _attach(cls, program: Pinned, what: str, where: Path, kind: int, path: Path) -> Self:
        lib = _libbpf()
        try:
            target = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BpfError(f"Cannot open {what} {where}: {error.strerror}") from error
        try:
            link = lib.bpf_link_create(program.fileno(), target, kind, None)
            if link < 0:
                raise _error(f"Cannot attach to {what} {where}", [])
        finally:
            os.close(target)
        try:
            if lib.bpf_obj_pin(link, os.fsencode(path)) < 0:
                raise _error(f"Cannot pin a link at {path}", [])
        finally:
            os.close(link)
        return cls(path)

    def _target(self, field: str, what: str) -> int:
        text = Path(f"/proc/self/fdinfo/{self._fd}").read_text()
        found = re.search(rf"^{field}:\s*(\d+)", text, re.MULTILINE)
        if found is None:
            raise BpfError(f"What is pinned as {self._name} is no link to {what}")
        return int(found[1])

    def update(self, program: Pinned) -> None:
        """Puts another program into the first one's place, with no moment in between. Raises BpfError."""
        if _libbpf().bpf_link_update(self._fd, program.fileno(), None) < 0:
            raise _error(f"Cannot replace the program of {self._name}", [])


class CgroupLink(Link):
    @classmethod
    def attach(cls, program: Pinned, cgroup: Path, path: Path) -> Self:
        """Attaches a program for `sock_ops` beside those of others, and pins the link at `path`. Raises BpfError."""
        return cls._attach(program, "the cgroup", cgroup, _CGROUP_SOCK_OPS, path)

    def cgroup(self) -> int:
        """The inode of the cgroup's folder; 0: it was removed. Raises BpfError."""
        return self._target("cgroup_id", "a cgroup")


class NetnsLink(Link):
    @classmethod
    def attach(cls, program: Pinned, netns: Path, path: Path) -> Self:
        """Attaches a program for `sk_lookup` behind those of others, and pins the link at `path`. Raises BpfError."""
        return cls._attach(program, "the network namespace", netns, _SK_LOOKUP, path)

    def netns(self) -> int:
        """The inode of the network namespace; 0: it is gone, or the program was detached. Raises BpfError."""
        return self._target("netns_ino", "a network namespace")


class Map(Pinned):
    """A pinned map; keys and values are bytes of the sizes which the eBPF program gives them."""

    def __init__(self, path: Path, key_size: int, value_size: int) -> None:
        """Raises BpfError if nothing is pinned there, or something with other sizes."""
        super().__init__(path)
        text = Path(f"/proc/self/fdinfo/{self._fd}").read_text()
        sizes = tuple(int(n) for n in re.findall(r"^(?:key_size|value_size):\s*(\d+)", text, re.MULTILINE))
        if sizes != (key_size, value_size):
            self.close()
            raise BpfError(f"The map pinned at {path} belongs to another version of criproxy")
        self._lib = _libbpf()
        self._value = ctypes.create_string_buffer(value_size)
        self._next = ctypes.create_string_buffer(key_size)

    def get(self, key: bytes) -> bytes | None:
        """The value, or None. Raises BpfError."""
        if self._lib.bpf_map_lookup_elem(self._fd, key, self._value) < 0:
            if ctypes.get_errno() == errno.ENOENT:
                return None
            raise _error(f"Cannot read the map {self._name}", [])
        return self._value.raw

    def set(self, key: bytes, value: bytes) -> None:
        """Raises BpfError, for one if the map is full."""
        if self._lib.bpf_map_update_elem(self._fd, key, value, 0) < 0:
            raise _error(f"Cannot write to the map {self._name}", [])

    def delete(self, key: bytes) -> None:
        """Does nothing if the key isn't there. Raises BpfError."""
        if self._lib.bpf_map_delete_elem(self._fd, key) < 0 and ctypes.get_errno() != errno.ENOENT:
            raise _error(f"Cannot delete from the map {self._name}", [])

    def items(self) -> list[tuple[bytes, bytes]]:
        """All entries. Raises BpfError."""
        found = []
        key: bytes | None = None
        while self._lib.bpf_map_get_next_key(self._fd, key, self._next) == 0:
            key = self._next.raw
            if (value := self.get(key)) is not None:
                found.append((key, value))
        if ctypes.get_errno() != errno.ENOENT:
            raise _error(f"Cannot list the map {self._name}", [])
        return found


class RingBuffer:
    """Reads a ring buffer map. What was read is gone from it; what wasn't stays there for the next reader."""

    def __init__(self, pinned: Pinned) -> None:
        """Raises BpfError."""
        self._records: list[bytes] = []
        self._callback = _RECORD(self._take)
        self._lib = _libbpf()
        self._handle = self._lib.ring_buffer__new(pinned.fileno(), self._callback, None, None)
        if not self._handle:
            raise _error("Cannot read the ring buffer", [])

    def fileno(self) -> int:
        """A descriptor that is readable while there are records."""
        return int(self._lib.ring_buffer__epoll_fd(self._handle))

    def read(self) -> list[bytes]:
        """All records that are there now, each as long as its reservation. Raises BpfError."""
        if not self._handle:
            return []
        if self._lib.ring_buffer__consume(self._handle) < 0:
            raise _error("Cannot read the ring buffer", [])
        records, self._records = self._records, []
        return records

    def _take(self, _context: int | None, data: int, size: int) -> int:
        self._records.append(ctypes.string_at(data, size))
        return 0

    def close(self) -> None:
        if self._handle:
            self._lib.ring_buffer__free(self._handle)
            self._handle = None


def mount_bpffs(path: Path) -> None:
    """Mounts a bpf file system of our own at `path` (made if need be), unless one is there. Raises BpfError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if is_bpffs(path):
        return
    try:
        mount("bpf", path, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700")
    except OSError as error:
        raise _error(f"Cannot mount a bpf file system on {path}", [], error.errno) from error


def is_bpffs(path: Path) -> bool:
    """Whether `path` itself is the root of a mounted bpf file system."""
    wanted = str(path.resolve())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        where = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields.split(" ")[4])
        if where == wanted and rest.startswith("bpf "):
            return True
    return False


def unpin(pins: Path) -> None:
    """Removes a folder of pins, if it is there. What is attached goes on without them."""
    with contextlib.suppress(FileNotFoundError):
        for pin in pins.iterdir():
            pin.unlink()
        pins.rmdir()


# --- libbpf ----------------------------------------------------------------------------------------------------------

_RECORD: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
# The third argument is a va_list, which both x86-64 and arm64 hand over as a pointer.
_PRINT: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

_libc: Final = ctypes.CDLL(None, use_errno=True)
_lock: Final = threading.Lock()
_messages: list[str] = []
_loaded: Any = None

_CGROUP_SOCK_OPS: Final = 3
_SK_LOOKUP: Final = 36
"""BPF_CGROUP_SOCK_OPS and BPF_SK_LOOKUP of enum bpf_attach_type, linux/bpf.h."""

_P, _I, _S, _U = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32
_FUNCTIONS: Final[dict[str, tuple[Any, list[Any]]]] = {
    "bpf_object__open_file": (_P, [_S, _P]),
    "bpf_object__load": (_I, [_P]),
    "bpf_object__close": (None, [_P]),
    "bpf_object__find_map_by_name": (_P, [_P, _S]),
    "bpf_object__find_program_by_name": (_P, [_P, _S]),
    "bpf_map__set_max_entries": (_I, [_P, _U]),
    "bpf_map__set_pin_path": (_I, [_P, _S]),
    "bpf_program__pin": (_I, [_P, _S]),
    "bpf_obj_get": (_I, [_S]),
    "bpf_obj_pin": (_I, [_I, _S]),
    "bpf_link_create": (_I, [_I, _I, _I, _P]),
    "bpf_link_update": (_I, [_I, _I, _P]),
    "bpf_map_lookup_elem": (_I, [_I, _S, _P]),
    "bpf_map_update_elem": (_I, [_I, _S, _S, ctypes.c_uint64]),
    "bpf_map_delete_elem": (_I, [_I, _S]),
    "bpf_map_get_next_key": (_I, [_I, _S, _P]),
    "ring_buffer__new": (_P, [_I, _RECORD, _P, _P]),
    "ring_buffer__epoll_fd": (_I, [_P]),
    "ring_buffer__consume": (_I, [_P]),
    "ring_buffer__free": (None, [_P]),
    "libbpf_set_print": (_P, [_PRINT]),
}


def _print(level: int, template: bytes, arguments: int) -> int:
    if level == 0:  # warnings: libbpf's reason for a failure, and the verifier's log with it
        text = ctypes.create_string_buffer(65536)
        _libc.vsnprintf(text, ctypes.c_size_t(len(text)), ctypes.c_char_p(template), ctypes.c_void_p(arguments))
        _messages.append(text.value.decode(errors="replace"))
    return 0


_print_callback: Final = _PRINT(_print)


def _libbpf() -> Any:
    global _loaded
    if _loaded is None:
        try:
            lib = ctypes.CDLL(_LIBRARY, use_errno=True)
        except OSError as error:
            raise BpfError(f"Cannot load {_LIBRARY} (install the package libbpf1): {error}") from error
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        lib.libbpf_set_print(_print_callback)
        _loaded = lib
    return _loaded


@contextlib.contextmanager
def _said() -> Iterator[list[str]]:
    """One object is loaded at a time, so that what libbpf says meanwhile is about that one."""
    with _lock:
        _messages.clear()
        yield _messages


def _error(what: str, said: list[str], number: int | None = None) -> BpfError:
    number = number or ctypes.get_errno()
    # Of a verifier log the last lines tell what is wrong; the first are libbpf's.
    lines = [line.strip() for message in said for line in message.splitlines() if line.strip()]
    detail = "; ".join(lines if len(lines) <= 6 else [lines[0], "…", *lines[-5:]])
    hint = _HINTS.get(number)
    return BpfError(
        f"{what}: {os.strerror(number)}" + (f" ({hint})" if hint else "") + (f". libbpf: {detail}" if detail else "")
    )
