"""The process that gives a restored application its memory while it runs already (`native/pages.c`).

It runs on the host, outlives the daemon, and leaves word in the checkpoint's folder: `loader.json` says who it is, and
`loader.out` has the line "loaded" when all pages are in. If it ends without that line, processes that touch a missing
page wait for ever (they never read anything else), and have to be killed: the kernel has told what they did to their
memory meanwhile, and told nobody but it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import Final

from criproxy import LIBEXEC, run
from criproxy.files import write_whole
from criproxy.kernel.processes import Process

PROGRAM: Final = LIBEXEC / "pages"

# Where `criu restore --lazy-pages` connects to, in its working folder (uffd.c).
_SOCKET: Final = "lazy-pages.socket"

_WHO: Final = "loader.json"
_OUTPUT: Final = "loader.out"
_LOG: Final = "loader.log"
_LOADED: Final = "loaded\n"


class Loader:
    """The process, whether we have started it or an earlier daemon has."""

    def __init__(self, images: Path, process: Process, running: run.Running | None = None) -> None:
        self._images = images
        self._process = process
        self._running = running

    @classmethod
    def start(cls, images: Path) -> Loader:
        """Starts it for a restore from `images` that follows at once. Raises OSError or CommandError."""
        if (earlier := cls.adopt(images)) is not None:
            earlier.close()
        folder = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            (images / _SOCKET).unlink(missing_ok=True)
            with (
                socket.socket(socket.AF_UNIX) as listener,
                open(images / _OUTPUT, "wb") as output,
                open(images / _LOG, "wb") as log,
            ):
                # By descriptor: a socket's address has room for 107 bytes.
                listener.bind(f"/proc/self/fd/{folder}/{_SOCKET}")
                listener.listen(1)
                running = run.start(
                    [PROGRAM, str(folder), str(listener.fileno())],
                    pass_fds=(folder, listener.fileno()),
                    stdout=output.fileno(),
                    stderr=log.fileno(),
                    env={},
                    new_session=True,
                )
        finally:
            os.close(folder)
        try:
            process = Process.of(running.pid)
            write_whole(images / _WHO, json.dumps({"pid": process.pid, "start_time": process.start_time}))
        except BaseException:
            running.close()
            raise
        return cls(images, process, running)

    @classmethod
    def adopt(cls, images: Path) -> Loader | None:
        """The one that an earlier daemon has started for a restore from `images`, be it at work, done or dead; None if
        there was none."""
        try:
            data = json.loads((images / _WHO).read_text())
            return cls(images, Process(int(data["pid"]), int(data["start_time"])))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (KeyError, TypeError, ValueError):
            # Cut off by a crash of the machine, after which none of its processes is there.
            return cls(images, Process(0, 0))

    async def ended(self) -> bool:
        """Waits for its end. Returns whether all pages are in (or nobody is left who needs them)."""
        if self._running is not None:
            await self._running.wait()
        else:
            await self._watch()
        return self.loaded()

    def loaded(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return (self._images / _OUTPUT).read_text() == _LOADED
        return False

    async def lost(self) -> None:
        """Returns when it has ended before all pages were in; else never."""
        if await self.ended():
            await asyncio.Event().wait()

    def last_words(self) -> str:
        """Why it has ended, if it has said so; for the log."""
        with contextlib.suppress(OSError):
            return (self._images / _LOG).read_text(errors="replace").strip()
        return ""

    def close(self) -> None:
        """Ends it if it still runs, and forgets it: nobody needs it, or those who do are about to be killed."""
        if self._running is not None:
            self._running.close()
        else:
            with contextlib.suppress(ProcessLookupError):
                if self._process.alive():
                    os.kill(self._process.pid, signal.SIGKILL)
        (self._images / _WHO).unlink(missing_ok=True)

    async def _watch(self) -> None:
        try:
            pidfd = os.pidfd_open(self._process.pid)
        except (ProcessLookupError, OSError):
            return
        try:
            # After the descriptor: the number may be another process's by now.
            if not self._process.alive():
                return
            loop = asyncio.get_running_loop()
            over = asyncio.Event()
            loop.add_reader(pidfd, over.set)
            try:
                await over.wait()
            finally:
                loop.remove_reader(pidfd)
        finally:
            os.close(pidfd)


__all__ = ["Loader"]
