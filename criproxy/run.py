"""The one place of the program that starts other processes.

`spawn()` is for the daemon: it runs on the event loop, without a thread and without one of asyncio's child watchers
(which would own SIGCHLD or a thread per child): the kernel's pidfd says when the child has ended. `start()` is for
processes that live longer than one call, `run()` for the command line and for set-up, where nothing else has to go on
meanwhile.

Three rules hold for all of them:
- A child has ended when *it* has ended, not when its pipes are closed: whatever it leaves behind (a restored container)
  may hold on to them for ever.
- Time-outs and cancellation kill the child and reap it before the caller goes on. Whoever needs a child to survive the
  daemon gives it files instead of pipes: a pipe whose reader is gone kills the writer.
- Descriptors are inherited only when `pass_fds` names them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

PIPE: Final = subprocess.PIPE
DEVNULL: Final = subprocess.DEVNULL

# More than this of a child's output is read, so that the child goes on, but not kept.
CAPTURE_LIMIT: Final = 1 << 20

# A child that SIGKILL doesn't end within this many seconds hangs in the kernel; its reaping is then left to the loop.
KILL_GRACE: Final = 10.0


class CommandError(Exception):
    """A command couldn't be started, failed or took too long. The text is one sentence for people."""

    def __init__(self, message: str, completed: Completed | None = None) -> None:
        super().__init__(message)
        self.completed = completed


class Expired(CommandError):
    """The command ran into its time-out and was killed; `completed` has what it had said by then."""


@dataclass(frozen=True)
class Completed:
    """How a command ended. `returncode` is negative (-SIGKILL) after a signal; outputs are empty unless captured."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes
    seconds: float

    def check(self) -> Completed:
        """Returns itself, or raises CommandError with the last line that the command said on stderr (or stdout)."""
        if self.returncode == 0:
            return self
        lines = (self.stderr.strip() or self.stdout.strip()).decode(errors="replace").splitlines()
        how = f"exit code {self.returncode}" if self.returncode > 0 else _signal_name(-self.returncode)
        raise CommandError(f"{_short(self.argv)} failed ({how})" + (f": {lines[-1]}" if lines else ""), self)


class Running:
    """A child process; a context manager, also without one closed by `close()`, which kills it if it still runs.

    The descriptors that `start()` made for captured outputs belong to this object.
    """

    def __init__(self, argv: tuple[str, ...], process: subprocess.Popen[bytes]) -> None:
        self.argv = argv
        self.pid = process.pid
        self._process = process
        self._began = time.monotonic()
        try:
            self._pidfd = os.pidfd_open(process.pid)
        except OSError:  # no descriptor left: without a way to wait for it there must be no child
            process.kill()
            process.wait()
            _close_pipes(process)
            raise

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Sends a signal (SIGKILL). Does nothing once the child has been reaped."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)

    def poll(self) -> int | None:
        """Reaps the child if it has ended and returns its code (negative after a signal), else None."""
        return self._process.poll()

    async def wait(self) -> int:
        """Waits for the end, reaps and returns the code (negative: a signal). If cancelled, the child goes on."""
        if (code := self._process.poll()) is not None:
            return code
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        # A descriptor of its own: two waiters would replace each other's reader.
        watched = os.dup(self._pidfd)
        loop.add_reader(watched, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(watched)
            os.close(watched)
        return self._process.wait()

    async def complete(self, timeout: float | None = None) -> Completed:
        """Waits for the end while it reads captured outputs; kills on cancellation or after `timeout` seconds.

        Raises Expired after the time-out.
        """
        streams = (self._process.stdout, self._process.stderr)
        outputs = [_Capture(stream.fileno()) if stream is not None else None for stream in streams]
        expired = False
        try:
            async with asyncio.timeout(timeout) as limit:
                await self.wait()
        except TimeoutError:
            if not limit.expired():
                raise
            expired = True
        finally:
            try:
                if self._process.poll() is None:
                    self.kill()
                    await self._reap()
            finally:
                stdout, stderr = (output.finish() if output else b"" for output in outputs)
        completed = Completed(self.argv, self._process.returncode, stdout, stderr, time.monotonic() - self._began)
        if expired:
            raise Expired(f"{_short(self.argv)} took longer than {timeout:g} s and was killed", completed)
        return completed

    async def _reap(self) -> None:
        """Waits for a killed child, cancelled or not: nothing of it may go on behind the caller's back."""
        reaping = asyncio.ensure_future(self.wait())
        deadline = time.monotonic() + KILL_GRACE
        cancelled: asyncio.CancelledError | None = None
        while not reaping.done() and (left := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait({reaping}, timeout=left)
            except asyncio.CancelledError as error:
                cancelled = error
        if not reaping.done():
            reaping.cancel()
            raise CommandError(f"{_short(self.argv)} doesn't end, although it was killed (it hangs in the kernel)")
        if cancelled is not None:
            raise cancelled

    def close(self) -> None:
        """Kills and reaps the child if it still runs (blocking; SIGKILL takes effect within milliseconds)."""
        if self._process.poll() is None:
            self.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_GRACE)
        _close_pipes(self._process)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start(
    argv: Sequence[str | Path],
    *,
    pass_fds: Sequence[int] = (),
    stdin: int = DEVNULL,
    stdout: int | None = DEVNULL,
    stderr: int | None = DEVNULL,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    new_session: bool = False,
) -> Running:
    """Starts a process and returns at once. For the streams: DEVNULL, PIPE, a descriptor, or None for our own.

    Raises CommandError if the executable can't be run.
    """
    words = tuple(str(word) for word in argv)
    try:
        # Nothing (such as preexec_fn) that keeps Popen from using vfork: fork would copy the daemon's page tables.
        process = subprocess.Popen(
            words,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            env=env,
            cwd=cwd,
            start_new_session=new_session,
            bufsize=0,
        )
    except OSError as error:
        raise CommandError(f"Cannot run {_short(words)}: {error.strerror or error}") from error
    return Running(words, process)


async def spawn(
    argv: Sequence[str | Path],
    *,
    timeout: float | None,
    pass_fds: Sequence[int] = (),
    stdin: int = DEVNULL,
    stdout: int | None = PIPE,
    stderr: int | None = PIPE,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Completed:
    """Runs a command on the event loop. `timeout` in seconds (None: as long as it takes).

    A code other than 0 isn't an error here (see `Completed.check`). Raises CommandError if the executable can't be run
    and Expired after the time-out. The child is killed and reaped when this coroutine is cancelled.
    """
    with start(argv, pass_fds=pass_fds, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd) as running:
        return await running.complete(timeout)


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float | None = None,
    pass_fds: Sequence[int] = (),
    stdin: int = DEVNULL,
    stdout: int | None = PIPE,
    stderr: int | None = PIPE,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Completed:
    """Runs a command and blocks until it has ended; otherwise as `spawn()`."""
    began = time.monotonic()
    with start(argv, pass_fds=pass_fds, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd) as running:
        process = running._process
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            running.kill()
            code = process.wait()
            out, err = error.stdout or b"", error.stderr or b""
            completed = Completed(running.argv, code, out, err, time.monotonic() - began)
            raise Expired(f"{_short(running.argv)} took longer than {timeout:g} s and was killed", completed) from error
        return Completed(running.argv, process.returncode, out or b"", err or b"", time.monotonic() - began)


class _Capture:
    """Reads a pipe on the event loop, so that the child never blocks on it, and keeps the first CAPTURE_LIMIT bytes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._chunks: list[bytes] = []
        self._size = 0
        os.set_blocking(fd, False)
        self._loop = asyncio.get_running_loop()
        self._reading = True
        self._loop.add_reader(fd, self._read)

    def _read(self) -> bool:
        """Reads once; False when there is nothing (more) to read now."""
        try:
            chunk = os.read(self._fd, 65536)
        except BlockingIOError:
            return False
        if not chunk:
            self._stop()
            return False
        if self._size < CAPTURE_LIMIT:
            self._chunks.append(chunk[: CAPTURE_LIMIT - self._size])
        self._size += len(chunk)
        return True

    def _stop(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._fd)
            self._reading = False

    def finish(self) -> bytes:
        """What the child has written. A writer that it left behind is read no further than one pipe's content."""
        rest = 64
        while self._reading and rest and self._read():
            rest -= 1
        self._stop()
        return b"".join(self._chunks)


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _short(argv: Sequence[str]) -> str:
    text = shlex.join(argv)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


__all__ = ["DEVNULL", "PIPE", "CommandError", "Completed", "Expired", "Running", "run", "spawn", "start"]
