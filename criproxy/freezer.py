"""Stops a container's processes where they are, by the kernel's cgroup freezer, and takes their memory back.

Nothing is saved: processes, sockets and pipes stay, they only get no processor. So it works with whatever a container
does, and costs the memory that the kernel can't take back: without swap, all that isn't a file's.

Which freezer: v2's (`cgroup.freeze`) where the container has a group of its own in that tree, also on a hybrid machine,
else v1's (`freezer.state`). In v2 a frozen process can be killed. In v1 SIGKILL waits for the thaw, so whoever ends a
container has to thaw it before (runc 1.1 and later do so themselves when they send SIGKILL).

The kernel's files are the truth about what is frozen, also for a daemon that comes later.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criproxy import run
from criproxy.kernel.cgroup import UNIFIED, Cgroup

log = logging.getLogger(__name__)

FREEZE_SECONDS: Final = 2.0
"""How long processes may take to stop. It is a matter of microseconds, but for those in a system call that waits for a
disk or a network file system and can't be interrupted."""


class FreezeError(Exception):
    """The container couldn't be frozen and goes on. A sentence for people."""


@dataclass(frozen=True)
class _Files:
    """One version's files, and the words in them."""

    switch: Path
    freeze: str
    thaw: str
    state: Path
    frozen: str


class Freezer:
    """The freezer of one container."""

    def __init__(self, cgroup: Cgroup) -> None:
        self._cgroup = cgroup
        self._files = _files(cgroup)
        self._reclaiming: asyncio.Task[None] | None = None

    async def freeze(self) -> None:
        """Stops every process of the container. Raises FreezeError; then all of them run.

        When it is done, memory is taken back in the background.
        """
        files = self._files
        if files is None:
            raise FreezeError("the container has no cgroup of its own with a freezer")
        if self.asked():
            raise FreezeError("the container is paused already, by somebody else")
        try:
            files.switch.write_text(files.freeze)
            pause, deadline = 0.0005, time.monotonic() + FREEZE_SECONDS
            while not self.frozen():
                if time.monotonic() > deadline:
                    raise FreezeError(f"its processes did not stop within {FREEZE_SECONDS:g} s")
                # v1 looks anew whether all have stopped only when it is asked.
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.02)
        except OSError as error:
            self.thaw()
            raise FreezeError(f"the kernel doesn't freeze the container: {error.strerror}") from error
        except BaseException:
            self.thaw()
            raise
        self._reclaiming = asyncio.create_task(self._reclaim(), name="reclaim")

    def thaw(self) -> None:
        """The processes go on. Does nothing if they do, or if the container is gone."""
        if self._files is not None:
            try:
                self._files.switch.write_text(self._files.thaw)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    raise
        self.close()

    def frozen(self) -> bool:
        """Whether every process has stopped."""
        return self._files is not None and self._files.frozen in _lines(self._files.state)

    def asked(self) -> bool:
        """Whether it is frozen or about to be. (v1: FREEZING in the place of FROZEN; v2's switch keeps what it got.)"""
        return self._files is not None and _lines(self._files.switch) not in ([self._files.thaw], [])

    def close(self) -> None:
        """Ends what goes on in the background; a frozen container stays frozen."""
        if self._reclaiming is not None:
            self._reclaiming.cancel()
            self._reclaiming = None

    async def _reclaim(self) -> None:
        """In a process of its own, for the kernel works for seconds where there is swap, and a wake must end it."""
        before = self._cgroup.memory()
        for file, value in self._cgroup.reclaim_all():
            # The kernel takes what it can, and says EAGAIN or EBUSY when that was less than all.
            with contextlib.suppress(run.CommandError):
                await run.spawn(["/bin/sh", "-c", 'echo "$1" >"$0"', str(file), value], timeout=None)
        log.debug("%s: frozen, %d of %d bytes are left", self, self._cgroup.memory(), before)

    def __str__(self) -> str:
        return str(self._files.switch.parent) if self._files else "no freezer"


def _files(cgroup: Cgroup) -> _Files | None:
    if (folder := cgroup.own(UNIFIED)) and os.access(folder / "cgroup.freeze", os.W_OK):
        return _Files(folder / "cgroup.freeze", "1", "0", folder / "cgroup.events", "frozen 1")
    if folder := cgroup.own("freezer"):
        return _Files(folder / "freezer.state", "FROZEN", "THAWED", folder / "freezer.state", "FROZEN")
    return None


def _lines(path: Path) -> list[str]:
    """Empty if the cgroup is gone."""
    try:
        return path.read_text().split("\n")[:-1]
    except OSError:
        return []
