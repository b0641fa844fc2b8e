"""Which of the waits that a dump has interrupted go on, and how."""

import errno
import struct
from pathlib import Path

import pytest

from criproxy import interrupted
from criproxy.api import criu_pb2 as criu

EINTR = (1 << 64) - errno.EINTR
AT = 0x401002
POLL, EPOLL_WAIT, NANOSLEEP, FUTEX, CLOCK_NANOSLEEP, RESTART = 7, 232, 35, 202, 230, 219
SIGTERM = 15


def write(path: Path, *messages: criu.Core | criu.Tree) -> None:
    entries = [message.SerializeToString() for message in messages]
    data = b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)
    path.write_bytes(struct.pack("<II", 0x54564319, 0x55053847) + data)


def read(path: Path) -> criu.Core:
    return criu.Core.FromString(path.read_bytes()[12:])


def thread(call: int, *, ax: int = EINTR, pending: int = 0, blocked: int = 0, **registers: int) -> criu.Core:
    core = criu.Core(machine=1, thread=criu.Thread(blocked=blocked))
    known = {"di": 0, "si": 0, "dx": 0, "r10": 0, "mode": 1, **registers}
    core.x86.registers.CopyFrom(criu.RegistersX86(ax=ax, orig_ax=call, ip=AT, **known))
    if pending:
        core.thread.pending.signals.add(siginfo=struct.pack("<i", pending).ljust(128, b"\0"))
    return core


def resumed(tmp_path: Path, core: criu.Core) -> criu.RegistersX86 | None:
    """The registers with which the thread goes on; None if nothing was changed."""
    write(tmp_path / "pstree.img", criu.Tree(pid=8, threads=[8]))
    write(tmp_path / "core-8.img", core)
    before = (tmp_path / "core-8.img").read_bytes()
    if interrupted.resume(tmp_path):
        return read(tmp_path / "core-8.img").x86.registers
    assert (tmp_path / "core-8.img").read_bytes() == before
    return None


@pytest.mark.parametrize("call", [POLL, EPOLL_WAIT])
def test_poll_begins_again_with_its_arguments(tmp_path: Path, call: int) -> None:
    registers = resumed(tmp_path, thread(call, di=0x7000, si=1, dx=28_800_000))
    assert registers is not None
    assert (registers.ax, registers.ip) == (call, AT - 2)
    assert (registers.di, registers.si, registers.dx) == (0x7000, 1, 28_800_000)


@pytest.mark.parametrize(("call", "asked", "rest"), [(NANOSLEEP, "di", "si"), (CLOCK_NANOSLEEP, "dx", "r10")])
def test_a_sleep_goes_on_with_what_is_left_of_it(tmp_path: Path, call: int, asked: str, rest: str) -> None:
    registers = resumed(tmp_path, thread(call, **{asked: 0x7000, rest: 0x7010}))
    assert registers is not None
    assert (registers.ax, registers.ip) == (call, AT - 2)
    assert getattr(registers, asked) == 0x7010


@pytest.mark.parametrize(
    "core",
    [
        pytest.param(thread(NANOSLEEP, di=0x7000), id="nobody wants to know what is left"),
        pytest.param(thread(CLOCK_NANOSLEEP, dx=0x7000), id="nor here"),
        pytest.param(thread(FUTEX), id="futex"),
        pytest.param(thread(RESTART), id="interrupted before"),
        pytest.param(thread(POLL, ax=1), id="it has an answer"),
        pytest.param(thread(POLL, mode=2), id="a 32-bit program"),
        pytest.param(thread(POLL, pending=SIGTERM), id="a signal waits"),
        pytest.param(criu.Core(machine=3), id="another machine"),
    ],
)
def test_others_stay_as_they_are(tmp_path: Path, core: criu.Core) -> None:
    assert resumed(tmp_path, core) is None


def test_a_blocked_signal_doesnt_matter(tmp_path: Path) -> None:
    assert resumed(tmp_path, thread(POLL, pending=SIGTERM, blocked=1 << (SIGTERM - 1)))


def test_a_signal_of_the_process_concerns_each_thread(tmp_path: Path) -> None:
    first = thread(FUTEX)
    first.process.pending.signals.add(siginfo=struct.pack("<i", SIGTERM))
    write(tmp_path / "pstree.img", criu.Tree(pid=8, threads=[9, 8]), criu.Tree(pid=10, threads=[10]))
    for number, core in ((8, first), (9, thread(POLL)), (10, thread(POLL))):
        write(tmp_path / f"core-{number}.img", core)
    assert interrupted.resume(tmp_path) == 1
    assert read(tmp_path / "core-9.img").x86.registers.ax == EINTR
    assert read(tmp_path / "core-10.img").x86.registers.ax == POLL


def test_a_zombies_threads_have_no_numbers(tmp_path: Path) -> None:
    write(tmp_path / "pstree.img", criu.Tree(pid=7, threads=[1781214912]), criu.Tree(pid=8, threads=[8]))
    write(tmp_path / "core-8.img", thread(POLL))
    assert interrupted.resume(tmp_path) == 1


def test_what_isnt_known_stays(tmp_path: Path) -> None:
    extra = b"\xa2\x06\x03abc"  # field 100
    core = criu.Core.FromString(thread(POLL).SerializeToString() + extra)
    assert resumed(tmp_path, core)
    assert extra in (tmp_path / "core-8.img").read_bytes()


@pytest.mark.parametrize("data", [b"", b"nonsense", struct.pack("<III", 0x54564319, 1, 100) + b"short"])
def test_what_is_no_image_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "pstree.img").write_bytes(data)
    with pytest.raises(ValueError, match="image of CRIU"):
        interrupted.resume(tmp_path)
