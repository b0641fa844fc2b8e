"""Control groups of this machine, whichever layout it has."""

import contextlib
import ctypes
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from box import until

from criproxy.kernel.cgroup import UNIFIED, Cgroup, restore_limits
from lab import BUILD, CHECKOUT, cgroups

ENTER = CHECKOUT / "criproxy" / "libexec" / "enter"
# No lab has such a number.
NAME = f"/criproxy-lab-{1000 + os.getpid()}"
BUSY = "import sys,time\nprint(flush=True)\nwhile True:\n pass"


@pytest.fixture
def folder() -> Iterator[str]:
    """A container's cgroup within a pod's, in every tree."""
    cgroups.create(f"{NAME}/pod/container")
    try:
        yield f"{NAME}/pod/container"
    finally:
        cgroups.remove(NAME)


@contextlib.contextmanager
def running(folder: str, program: str) -> Iterator[int]:
    """A process in that cgroup that has said a word: it is past its start."""
    with subprocess.Popen([sys.executable, "-Sc", "input()\n" + program], stdin=-1, stdout=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            cgroups.join(folder, process.pid)
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"\n"
            yield process.pid
        finally:
            process.kill()


def quota_file(group: Cgroup) -> tuple[Path, str, str]:
    """The file of the CPU quota, what sets 5 ms per 100 ms, and how it reads without one."""
    if "cpu" in group.folders:
        return group.folders["cpu"] / "cpu.cfs_quota_us", "5000", "-1"
    return group.folders[UNIFIED] / "cpu.max", "5000 100000", "max 100000"


def throttled(file: Path) -> int:
    """In how many of its periods a quota, or that of the group around it, has held up what it is for."""
    lines = [line for folder in file.parents[:2] for line in (folder / "cpu.stat").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("nr_throttled "))


def processor_time(pid: int) -> float:
    """Seconds that a process has used: its clock, as clock_getcpuclockid(3) has it."""
    return time.clock_gettime(~pid << 3 | 2)


def test_numbers(folder: str) -> None:
    with running(folder, "block = b'x' * (32 << 20)\nprint(flush=True)\nwhile True: pass") as pid:
        group = Cgroup.of(pid)
        assert group.procs() == [pid]
        assert 32 << 20 < group.memory() < 64 << 20
        # The kernel accounts for a group at each tick.
        tick = 0.05
        earliest, before, begin = processor_time(pid), group.cpu_usage(), processor_time(pid)
        until(lambda: processor_time(pid) > begin + 0.3)
        end, after, latest = processor_time(pid), group.cpu_usage(), processor_time(pid)
        assert end - begin - tick < after - before < latest - earliest + tick
    assert group.procs() == []
    assert group.cpu_usage() > before


def entered(pid: int, *command: str) -> str:
    """What a command writes that `enter` starts in the cgroups of a process."""
    target, *joined = descriptors = [os.pidfd_open(pid), *Cgroup.of(pid).join_fds()]
    options = ["--pidfd", str(target), *(word for fd in joined for word in ("--cgroup-fd", str(fd)))]
    try:
        return subprocess.run(
            [ENTER, *options, "--", *command], pass_fds=descriptors, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_joining(folder: str) -> None:
    with running(folder, "print(flush=True)\ninput()") as pid:
        assert entered(pid, "/bin/cat", "/proc/self/cgroup") == Path(f"/proc/{pid}/cgroup").read_text()


@contextlib.contextmanager
def written(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Which of the files somebody has written to meanwhile (inotify); to be looked at afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    found: list[Path] = []
    try:
        numbers = {libc.inotify_add_watch(watch, os.fsencode(file), 0x2): file for file in files}  # IN_MODIFY
        yield found
        with contextlib.suppress(BlockingIOError):
            found += [numbers[number] for number, *_ in struct.iter_unpack("iIII", os.read(watch, 65536))]
    finally:
        os.close(watch)


def test_joining_takes_no_lock_over_all_processes(folder: str) -> None:
    """A write to cgroup.procs takes it, waits 10 to 20 ms for it, and a client waits for the container meanwhile."""
    with running(folder, "print(flush=True)\ninput()") as pid:
        files = [place / "cgroup.procs" for place in Cgroup.of(pid).folders.values()]
        with written(files) as locked:
            entered(pid, "/bin/true")
        assert locked == []
        with written(files) as locked:
            cgroups.join(folder, pid)
        assert set(locked) == set(files)


def test_a_lifted_quota_gives_a_whole_processor(folder: str, tmp_path: Path) -> None:
    with running(folder, BUSY) as pid:
        group = Cgroup.of(pid)
        file, value, free = quota_file(group)
        for level in (file.parent.parent / file.name, file):
            level.write_text(value)
        until(lambda: throttled(file) > 0)
        with group.lifted(tmp_path / "limits.json"):
            assert file.read_text().strip() == free
            before, used = throttled(file), group.cpu_usage()
            until(lambda: group.cpu_usage() > used + 0.12)
            assert throttled(file) == before
        assert file.read_text().strip() == value
        assert (file.parent.parent / file.name).read_text().strip() == value
        until(lambda: throttled(file) > before)


def test_limits_after_a_crash(folder: str, tmp_path: Path) -> None:
    record = tmp_path / "limits.json"
    with running(folder, BUSY) as pid:
        file, value, free = quota_file(Cgroup.of(pid))
        file.write_text(value)
        program = f"""
import os, pathlib
from criproxy.kernel.cgroup import Cgroup
with Cgroup.of({pid}).lifted(pathlib.Path({str(record)!r})):
    os.kill(os.getpid(), 9)
"""
        subprocess.run([sys.executable, "-c", program], check=False)
        assert file.read_text().strip() == free
        restore_limits(record)
        assert file.read_text().strip() == value
        assert not record.exists()


def charged(group: Cgroup) -> int:
    """Bytes, with those that count as inactive: kernels differ in what they take a file's pages for."""
    if "memory" in group.folders:
        return int((group.folders["memory"] / "memory.usage_in_bytes").read_text())
    return int((group.folders[UNIFIED] / "memory.current").read_text())


def test_reclaiming_file_pages_of_a_living_process(folder: str) -> None:
    # Not in /tmp: what a tmpfs holds is on no disk to be read again from.
    with tempfile.NamedTemporaryFile(dir=BUILD) as blob:
        blob.write(os.urandom(1 << 20) * 64)
        blob.flush()
        os.fsync(blob.fileno())
        os.posix_fadvise(blob.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        program = f"for i in range(2): len(open({blob.name!r}, 'rb').read())\nprint(flush=True)\ninput()"
        with running(folder, program) as pid:
            group = Cgroup.of(pid)
            assert charged(group) > 60 << 20
            group.reclaim(keep=1 << 20)
            assert charged(group) < 20 << 20
            assert group.procs() == [pid]
