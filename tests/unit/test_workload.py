"""What an image's STOPSIGNAL means, and what doesn't undo a checkpoint. The rest needs real processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from criproxy import workload as workload_module
from criproxy.criu import init
from criproxy.criu.errors import CheckpointError, OutOfMemory, RestoreError
from criproxy.policy import Lazy
from criproxy.workload import Processes, Workload, signal_number


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("SIGTERM", signal.SIGTERM),
        ("SIGQUIT", signal.SIGQUIT),
        ("QUIT", signal.SIGQUIT),
        ("sigwinch", signal.SIGWINCH),
        ("USR1", signal.SIGUSR1),
        ("3", signal.SIGQUIT),
        ("37", 37),
        # systemd's
        ("SIGRTMIN+3", signal.SIGRTMIN + 3),
        ("RTMAX-14", signal.SIGRTMAX - 14),
        ("SIGNOTHING", signal.SIGTERM),
        ("99", signal.SIGTERM),
        ("SIGRTMAX+1", signal.SIGTERM),
        ("", signal.SIGTERM),
    ],
)
def test_stop_signals_are_read_as_containerd_reads_them(name: str, number: int) -> None:
    assert signal_number(name) == number


def test_a_process_that_has_ended_needs_no_signal() -> None:
    Processes.signal(2**22 + 1, "SIGTERM")


async def test_a_disk_that_is_full_after_the_dump_does_not_undo_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dump(*_: object, **__: object) -> None:
        (tmp_path / "pages-1.img").write_bytes(b"1234")
        monkeypatch.setattr(Path, "write_text", full)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    workload: Any = Workload.__new__(Workload)
    workload.init_pid, workload._images, workload._loader, workload._close = os.getpid(), tmp_path, None, False
    workload._unix_sockets, workload._stop_clock, workload._parked = list, True, True
    workload._criu = SimpleNamespace(dump=dump)
    workload._cgroup = SimpleNamespace(anonymous=lambda: 4, reclaim=lambda: None, procs=list, room=lambda: None)
    assert await workload.dump(asyncio.Event()) == 4


@pytest.mark.parametrize("hears", [True, False])
async def test_an_init_that_does_not_hear_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch, hears: bool) -> None:
    monkeypatch.setattr(init, "_HEARING_SECONDS", 60.0 if hears else 0.05)
    release_is_pending, sent = True, []
    monkeypatch.setattr(init, "_pending", lambda pid: 1 << 61 if release_is_pending else 0)
    monkeypatch.setattr(init, "_order", lambda pid, order: sent.append(order))
    task = asyncio.create_task(init.take_hold(7))
    await asyncio.sleep(0.01)
    if hears:
        assert not task.done()
        release_is_pending = False
        await task
        assert sent == [61]
    else:
        with pytest.raises(CheckpointError, match="doesn't run"):
            await task
        assert not sent


async def test_what_could_not_be_loaded_lazily_once_is_not_tried_so_again(tmp_path: Path) -> None:
    given: list[object] = []

    async def restore(_pid: int, _images: Path, _cgroup: object, loader: object, *, close: bool) -> None:
        given.append(loader)
        if loader is not None:
            raise RestoreError("there isn't enough memory")

    workload, loader = restoring(tmp_path, restore)
    workload._lazy = Lazy.ALWAYS
    with pytest.raises(RestoreError):
        await workload.restore(lazily=True)
    await workload.restore(lazily=False)
    await workload.restore(lazily=True)
    assert given == [loader, None, None]


def restoring(folder: Path, restore: object, **cgroup: Any) -> tuple[Any, object]:
    """A workload, and the loader that it would start."""
    workload: Any = Workload.__new__(Workload)
    workload.init_pid, workload._images, workload._close, workload._limits = 1, folder, False, folder / "limits"
    workload._loader, workload._eagerly, workload._lazy = None, False, Lazy.NEVER
    workload._limits_lock = asyncio.Lock()
    loader = SimpleNamespace(close=lambda: None)
    workload._criu = SimpleNamespace(restore=restore, loader=lambda _: loader)
    fakes = {"lifted": lambda _: contextlib.nullcontext(), "oom_kills": lambda: 0}
    workload._cgroup = SimpleNamespace(**{**fakes, **cgroup})
    return workload, loader


async def test_limits_are_not_lifted_while_the_runtime_changes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def lifted(_: Path) -> Iterator[None]:
        log.append("lifted")
        yield
        log.append("put back")

    async def restore(*_: object, **__: object) -> None:
        log.append("restored")

    workload, _ = restoring(tmp_path, restore, lifted=lifted)
    async with workload.limits_change():
        task = asyncio.create_task(workload.restore(lazily=False))
        await asyncio.sleep(0.01)
        log.append("changed")
    await task
    assert log == ["changed", "lifted", "restored", "put back"]
    # A runtime that hangs is waited for only for a while.
    log.clear()
    monkeypatch.setattr(workload_module, "LIMITS_SECONDS", 0.01)
    async with workload.limits_change():
        await workload.restore(lazily=False)
    assert log == ["restored"]


async def test_a_restore_that_was_killed_for_want_of_memory_says_so(tmp_path: Path) -> None:
    kills = iter((3, 4, 4, 4))

    async def restore(*_: object, **__: object) -> None:
        raise RestoreError("CRIU ended with code 1")

    workload, _ = restoring(tmp_path, restore, oom_kills=lambda: next(kills))
    with pytest.raises(OutOfMemory, match="limit of memory is too low"):
        await workload.restore(lazily=False)
    with pytest.raises(RestoreError, match="code 1") as caught:
        await workload.restore(lazily=False)
    assert not isinstance(caught.value, OutOfMemory)


async def test_what_could_not_be_restored_below_its_limit_is_not_checkpointed(tmp_path: Path) -> None:
    workload: Any = Workload.__new__(Workload)
    workload.init_pid, workload._unix_sockets = 1, list
    workload._cgroup = SimpleNamespace(procs=list, room=lambda: 3 << 20)
    with pytest.raises(CheckpointError, match=r"its limit of memory leaves 3\.0 MiB, and a restore takes 4"):
        await workload.dump(asyncio.Event())
