"""One run of CRIU inside a container: its command line, what it may open, and how it ends.

CRIU is started by `native/enter`, which joins the container's namespaces, and for a restore its cgroups.

A CRIU that has begun is never interrupted, for a killed one leaves sockets in repair mode and processes half made. When
the caller is cancelled, it waits for CRIU's end first. When the daemon is killed, CRIU goes on: it writes to files, not
to pipes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal

from criproxy import run
from criproxy.criu import aftermath, criu_log, init
from criproxy.criu.bundle import Bundle
from criproxy.criu.kept import Inheritance
from criproxy.criu.pages import Loader
from criproxy.kernel import processes
from criproxy.kernel.cgroup import Cgroup
from criproxy.kernel.processes import Process, ThreadAttributes

_STDIO: Final = (0, 1, 2)

# As many as `enter` knows. The kernel leaves out what isn't there, or isn't the container's.
_EVERY_PROCESSOR: Final = "0-1023"

# How long a CRIU whose loader has ended may take to say why.
_LAST_WORDS_SECONDS: Final = 0.5

_OPTIONS: Final = ("-v2", "--file-locks", "--ext-unix-sk", "--manage-cgroups=ignore")


class Failed(Exception):
    """CRIU has failed, or was ended."""

    def __init__(
        self, reason: str, log: str = "", cancelled: asyncio.CancelledError | None = None, *, killed: bool = False
    ) -> None:
        """`reason` is for people, `log` CRIU's own words. `cancelled`: what came while CRIU ran. `killed`: by us, after
        we had stopped the processes."""
        super().__init__(reason)
        self.log = log
        self.cancelled = cancelled
        self.killed = killed


class Command:
    """Put together step by step, then run once. `stack` closes what CRIU is lent."""

    def __init__(
        self, bundle: Bundle, action: Literal["dump", "restore"], init_pid: int, images: Path, stack: ExitStack
    ) -> None:
        """Raises OSError, for a container that has ended ProcessLookupError."""
        self._stack = stack
        self._init_pid = init_pid
        self._log = images / f"{action}.log"
        self._lent: list[int] = []
        self._environment = dict(bundle.environment)
        self._enter = [str(bundle.enter), "--pidfd", str(self.lend(init.open_pidfd(init_pid)))]
        # By descriptor: the container has no path to it, and must not have one.
        folder = f"/proc/self/fd/{self.lend(os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))}"
        self._criu = [*bundle.criu_argv(), action, "-D", folder, "-W", folder, "-o", self._log.name, *_OPTIONS]

    def add(self, *options: str) -> None:
        """Options of CRIU."""
        self._criu += options

    def lend(self, descriptor: int) -> int:
        """Lets CRIU have a descriptor, under the same number, and closes it when all is over."""
        self._stack.callback(os.close, descriptor)
        self._lent.append(descriptor)
        return descriptor

    def lend_kept(self, inheritance: Inheritance) -> None:
        """What a keeper has for a restore."""
        self.add(*inheritance.options)
        self._lent += inheritance.descriptors
        self._environment |= inheritance.environment

    def lend_pipes(self) -> None:
        """Init's standard streams, as far as they are pipes: the application's own are the same.

        They are opened for reading *and* writing, and kept open while CRIU runs, as CRIU opens them once more in the
        application's own mode: that would block for ever where the other end is gone (a closed stdin).
        """
        found: set[str] = set()
        for number in _STDIO:
            path = f"/proc/{self._init_pid}/fd/{number}"
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(path)
                if target.startswith("pipe:[") and target not in found:
                    found.add(target)
                    self.add("--inherit-fd", f"fd[{self.lend(os.open(path, os.O_RDWR | os.O_CLOEXEC))}]:{target}")

    def join(self, cgroup: Cgroup) -> None:
        """CRIU runs in a cgroup, and what it restores stays there."""
        for descriptor in cgroup.join_fds():
            self._enter += ["--cgroup-fd", str(self.lend(descriptor))]

    def resemble(self, thread: ThreadAttributes) -> None:
        """Gives CRIU, and so what it restores, a thread's processors and oom_score_adj."""
        # An affinity that is set outlives changes of the container's, unless it names every processor there may be.
        self._enter += ["--cpu-affinity", ",".join(map(str, sorted(thread.affinity))) or _EVERY_PROCESSOR]
        self._enter += ["--oom-score-adj", str(thread.oom_score_adj)]

    def stay_out_of_ipc(self) -> None:
        """CRIU isn't to enter the container's IPC namespace (`sysv.py` says when)."""
        self._enter += ["--without", "ipc"]

    async def run(self, timeout: float, tree: Sequence[Process] = (), loader: Loader | None = None) -> None:
        """Raises Failed. `tree` is what is stopped before CRIU is killed after `timeout` seconds, or without its
        loader. What CRIU says is in its log, beside the images."""
        output = self._log.with_suffix(".out")
        try:
            with open(output, "wb") as stream, ExitStack() as stack:
                running = stack.enter_context(
                    run.start(
                        [*self._enter, "--", *self._criu],
                        pass_fds=self._lent,
                        stdout=stream.fileno(),
                        stderr=stream.fileno(),
                        env=self._environment,
                    )
                )
                code, cancelled = await _to_the_end(running, timeout, loader)
                if code is None:
                    # What is traced stops when CRIU's death lets go of it, before it can use what CRIU has changed.
                    aftermath.send(tree, signal.SIGSTOP)
                    await _kill_criu(running)
        except run.CommandError as error:
            raise Failed(str(error)) from error
        if code != 0:
            text = _read(output) + _read(self._log)
            if code is not None:
                raise Failed(criu_log.reason(text, f"ended with code {code}"), criu_log.tail(text), cancelled)
            reason = f"CRIU took longer than {timeout:g} s and was ended"
            if loader is not None and not loader.loaded():
                reason = f"what loads its memory has ended: {loader.last_words()}"
            raise Failed(reason, criu_log.tail(text), cancelled, killed=True)
        if cancelled is not None:
            raise cancelled


async def _to_the_end(
    running: run.Running, timeout: float, loader: Loader | None = None
) -> tuple[int | None, asyncio.CancelledError | None]:
    """The exit code, None after the time-out or when `loader` is lost; and the cancellation that came meanwhile."""
    waiting = asyncio.ensure_future(running.wait())
    lost = asyncio.ensure_future(loader.lost()) if loader is not None else None
    deadline = time.monotonic() + timeout
    cancelled = None
    while not waiting.done() and (left := deadline - time.monotonic()) > 0:
        if lost is not None and lost.done():
            # It ends by itself when CRIU fails, and CRIU's own words are better.
            deadline, lost = min(deadline, time.monotonic() + _LAST_WORDS_SECONDS), None
            continue
        try:
            await asyncio.wait({waiting, lost} if lost else {waiting}, timeout=left, return_when=FIRST_COMPLETED)
        except asyncio.CancelledError as error:
            cancelled = error
    if lost is not None:
        lost.cancel()
    if waiting.done():
        return waiting.result(), cancelled
    waiting.cancel()
    return None, cancelled


async def _kill_criu(running: run.Running) -> None:
    """Kills CRIU and not its launcher: that one reaps it. The launcher's end would kill CRIU too, but when?"""
    deadline = time.monotonic() + run.KILL_GRACE
    while running.poll() is None and time.monotonic() < deadline:
        aftermath.send(aftermath.identify(processes.children(running.pid)), signal.SIGKILL)
        await _to_the_end(running, 0.02)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
