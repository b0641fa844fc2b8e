"""What keeps processes from being checkpointed where CRIU doesn't tell: it can't name it, or loses it silently."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from criproxy.kernel import processes


def obstacle(pids: Iterable[int]) -> str | None:
    """What one of the processes has open, in words, or None.

    - io_uring: the kernel doesn't let its descriptors be copied to CRIU, which then says "Can't retrieve FDs".
    - eventfd with EFD_SEMAPHORE: CRIU restores it without (the kernel shows it from Linux 6.5 on).
    """
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    kind = os.readlink(f"/proc/{pid}/fd/{name}")
                    if kind == "anon_inode:[io_uring]":
                        return f'"{processes.name(pid)}" uses io_uring, which CRIU can\'t dump'
                    if kind == "anon_inode:[eventfd]" and _semaphore(f"/proc/{pid}/fdinfo/{name}"):
                        return (
                            f'"{processes.name(pid)}" has an eventfd with EFD_SEMAPHORE, '
                            "which CRIU would restore without it"
                        )
    return None


def _semaphore(fdinfo: str) -> bool:
    return "eventfd-semaphore: 1" in Path(fdinfo).read_text()
