"""Unix sockets that gRPC servers listen on: private (mode 0600) from their first instant, never somebody else's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grpc import aio

# sun_path holds 108 bytes with the terminating zero.
_LONGEST_PATH: Final = 107


class ListenError(Exception):
    """The socket can't be served. The text is one sentence for people."""


@dataclass(frozen=True)
class Listening:
    """A socket that a server of ours listens on."""

    path: Path
    _inode: int

    def remove(self) -> None:
        """Takes the socket's file away, unless it is another's by now."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()


async def listen(server: aio.Server, path: Path) -> Listening:
    """Starts `server` at `path`. A stale socket is replaced, a live one refused. Raises ListenError."""
    with _claimed(path) as fresh:
        # grpc binds and listens here. The mask decides the mode at that instant, before anyone can connect.
        mask = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix://{fresh}")
        except RuntimeError as error:
            raise ListenError(f"Cannot listen on {path}: {error}") from None
        finally:
            os.umask(mask)
        await server.start()
        return Listening(path, fresh.stat().st_ino)


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[Path]:
    """Yields a path to listen on, and puts it in the place of `path` when the block ends well.

    By the rename a stale socket is replaced without a moment in which there is none. Raises ListenError when `path`
    is somebody's.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f".{secrets.token_hex(3)}")
    if (longest := max(len(os.fsencode(path)), len(os.fsencode(fresh)))) > _LONGEST_PATH:
        raise ListenError(f"{path} is too long for a socket ({longest} bytes of {_LONGEST_PATH}); use a shorter folder")
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            # Two that start at once would both find the socket stale.
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ListenError(f"Another criproxy is starting in {path.parent}") from None
        _refuse_live(path)
        try:
            yield fresh
            fresh.rename(path)
        finally:
            fresh.unlink(missing_ok=True)
    finally:
        os.close(folder)


def _refuse_live(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ListenError(f"{path} exists and isn't a socket; remove it or listen somewhere else")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        if (problem := probe.connect_ex(os.fspath(path))) != errno.ECONNREFUSED:
            how = "" if problem in (0, errno.EAGAIN) else f" ({os.strerror(problem)})"
            raise ListenError(f"{path} is in use{how}; stop the process that serves it or listen somewhere else")
