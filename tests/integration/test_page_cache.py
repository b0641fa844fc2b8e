"""What is kept of files in memory, and what that is taken for."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from charges import charged, forget

from criproxy.kernel import page_cache
from criproxy.kernel.cgroup import UNIFIED, Cgroup
from lab import BUILD, cgroups, volumes

SIZE = 4 << 20
ALL_EVENTS = 0xFFF  # inotify(7)
LIBC = ctypes.CDLL(None, use_errno=True)
# No lab has such a number.
NAME = f"/criproxy-lab-{1000 + os.getpid()}"

USER = """
import mmap, sys
input()
for turn in range(3):
    with open(sys.argv[1], "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    for offset in range(0, len(mapped), mmap.PAGESIZE):
        mapped[offset]
    if sys.argv[2] != "keep" or turn < 2:
        mapped.close()
print(flush=True)
input()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not in /tmp, which may be a tmpfs.
    with tempfile.TemporaryDirectory(dir=BUILD) as made:
        yield Path(made)


@pytest.fixture
def blob(folder: Path) -> Path:
    """A file on a disk of which nothing is in memory."""
    path = folder / "blob"
    path.write_bytes(os.urandom(SIZE))
    forget(path)
    return path


@pytest.fixture
def user(blob: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    """A process that has used the file again and again, in a cgroup of its own."""
    cgroups.create(NAME)
    try:
        argv = [sys.executable, "-Sc", USER, blob, request.param]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                cgroups.join(NAME, process.pid)
                process.stdin.write(b"\n")
                process.stdin.flush()
                assert process.stdout.readline() == b"\n"
                yield process.pid
            finally:
                process.kill()
    finally:
        cgroups.remove(NAME)


def memory(pid: int) -> tuple[int, int, int]:
    """Bytes of active and inactive file pages, and the number by which the kernel knows the cgroup."""
    group = Cgroup.of(pid)
    folder = group.own("memory") or group.folders[UNIFIED]
    values = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(values["active_file"]), int(values["inactive_file"]), folder.stat().st_ino


def cool(*paths: Path, stop: bool = False) -> None:
    with ExitStack() as stack:
        files = [os.open(path, os.O_PATH) for path in paths]
        for descriptor in files:
            stack.callback(os.close, descriptor)
        page_cache.cool(files, lambda: stop, stack.pop_all())
    for descriptor in files:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.parametrize("user", ["close"], indirect=True)
def test_what_nobody_uses_any_more_becomes_inactive_and_stays(user: int, blob: Path) -> None:
    active, _inactive, number = memory(user)
    assert active > SIZE * 3 / 4
    assert charged(blob)[number] == SIZE
    cool(blob, stop=True)
    assert memory(user)[0] > SIZE * 3 / 4
    cool(blob)
    active, inactive, _ = memory(user)
    # The kernel may be some pages late with both.
    assert active < SIZE / 4
    assert inactive > SIZE * 3 / 4
    assert charged(blob)[number] == SIZE


@pytest.mark.parametrize("user", ["keep"], indirect=True)
def test_what_somebody_has_mapped_is_left_alone(user: int, blob: Path) -> None:
    cool(blob)
    assert memory(user)[0] > SIZE * 3 / 4


def test_nothing_is_read_for_it(blob: Path) -> None:
    cool(blob)
    assert not charged(blob)


def test_what_can_not_be_done_harms_nobody(folder: Path) -> None:
    empty, huge = folder / "empty", folder / "huge"
    empty.touch()
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    cool(empty, huge, folder, Path("/dev/zero"))


def test_a_watch_does_not_tell_that_files_are_looked_for(blob: Path) -> None:
    watch = LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert watch >= 0
    try:
        with ExitStack() as stack, blob.open("rb") as file:
            stack.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            assert LIBC.inotify_add_watch(watch, bytes(blob), ALL_EVENTS) >= 0
            found = page_cache.mapped(os.getpid(), [os.getpid()], stack)
            assert any(os.path.sameopenfile(file.fileno(), descriptor) for descriptor in found)
            with pytest.raises(BlockingIOError):
                os.read(watch, 4096)
    finally:
        os.close(watch)


def test_the_files_of_a_process_are_found_without_those_of_volumes(blob: Path, folder: Path) -> None:
    volume, other = folder / "volume", folder / "other"
    other.mkdir()
    (other / "data").write_bytes(b"on the same disk")
    volume.mkdir()
    with volumes.mounted(volume, "--bind", other), ExitStack() as stack:
        for path in (blob, volume / "data"):
            with path.open("rb") as file:
                stack.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        files = page_cache.mapped(os.getpid(), [os.getpid(), os.getpid()], stack)
        paths = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in files]
    assert str(blob) in paths
    assert any("python" in path for path in paths)
    assert str(volume / "data") not in paths
    assert len(set(paths)) == len(paths)


def test_only_so_many_files_are_looked_at(blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "FILES", 2)
    with ExitStack() as stack:
        assert len(page_cache.mapped(os.getpid(), [os.getpid()], stack)) <= 2


def test_a_container_that_has_ended_has_no_files() -> None:
    with ExitStack() as stack:
        assert page_cache.mapped(2**22 + 1, [2**22 + 1], stack) == []


def test_what_is_kept_stays_in_memory(blob: Path) -> None:
    # In a process of its own, for it is kept for as long as one lives.
    program = f"""
from pathlib import Path
from criproxy.kernel import page_cache
page_cache.keep([Path({str(blob)!r}), Path({str(blob)!r} + "-that-is-not-there"), Path("/dev/null")])
print(flush=True)
input()
"""
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        forget(blob)
        assert sum(charged(blob).values()) == SIZE
        process.kill()
    forget(blob)
    assert not charged(blob)
