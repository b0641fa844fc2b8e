"""What an image's STOPSIGNAL means, and what doesn't undo a checkpoint. The rest needs real processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from criproxy import checkpoint
from criproxy.checkpoint import CheckpointError, RestoreError
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
    workload.init_pid, workload._images, workload._loader, workload._close = 1, tmp_path, None, False
    workload._unix_sockets, workload._stop_clock = list, True
    workload._criu = SimpleNamespace(dump=dump)
    workload._cgroup = SimpleNamespace(anonymous=lambda: 4, reclaim=lambda: None, procs=list)
    assert await workload.dump(asyncio.Event()) == 4


@pytest.mark.parametrize("hears", [True, False])
async def test_an_init_that_does_not_hear_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch, hears: bool) -> None:
    monkeypatch.setattr(checkpoint, "_HEARING_SECONDS", 0.05)
    release_is_pending, sent = True, []
    monkeypatch.setattr(checkpoint, "_pending", lambda pid: 1 << 61 if release_is_pending else 0)
    monkeypatch.setattr(checkpoint, "_order", lambda pid, order: sent.append(order))
    task = asyncio.create_task(checkpoint.take_hold(7))
    await asyncio.sleep(0.01)
    assert not task.done()
    release_is_pending = not hears
    if hears:
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

    workload: Any = Workload.__new__(Workload)
    workload.init_pid, workload._images, workload._close, workload._limits = 1, tmp_path, False, tmp_path / "limits"
    workload._loader, workload._eagerly, workload._lazy = None, False, Lazy.ALWAYS
    loader = SimpleNamespace(close=lambda: None)
    workload._criu = SimpleNamespace(restore=restore, loader=lambda _: loader)
    workload._cgroup = SimpleNamespace(lifted=lambda _: contextlib.nullcontext())
    with pytest.raises(RestoreError):
        await workload.restore(lazily=True)
    await workload.restore(lazily=False)
    await workload.restore(lazily=True)
    assert given == [loader, None, None]
