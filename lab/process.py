"""The one place of the lab that spawns processes.

Daemons get a session of their own, so that Ctrl-C in a terminal reaches the lab alone, which then ends them in order.
"""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from lab import LabError

# What a person wants to see of a log when something failed; the whole stays in the file.
TAIL_LINES = 40
TAIL_COLUMNS = 400
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(argv: Sequence[str | os.PathLike[str]], *, timeout: float = 120.0, env: Mapping[str, str] | None = None) -> str:
    """Run a command to its end and return its stdout. Raises LabError with its output if it fails; seconds."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout, env=env
        )
    except FileNotFoundError as error:
        raise LabError(f"Cannot find {os.fspath(argv[0])}", "`make setup` installs what is missing") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{os.fspath(argv[0])} did not end within {timeout:g} s") from error
    if done.returncode:
        output = (done.stdout + done.stderr).strip()
        raise LabError(f"`{' '.join(os.fspath(word) for word in argv)}` ended with {done.returncode}: {output}")
    return done.stdout


class Service:
    """A daemon with its output in a log file."""

    def __init__(
        self, name: str, argv: Sequence[str | os.PathLike[str]], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        # Where this start's lines begin: a restarted daemon appends.
        self._log_start = log.stat().st_size if log.exists() else 0
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
                )
        except FileNotFoundError as error:
            raise LabError(f"Cannot find {os.fspath(argv[0])}", "`make setup` installs what is missing") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def wait_until(self, ready: Callable[[], bool], what: str, *, timeout: float = 30.0) -> None:
        """Wait until `ready()`. Raises LabError with the log's end if it ends first, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not ready():
            if self.returncode is not None:
                raise LabError(f"{self.name} ended with {self.returncode} before {what}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise LabError(f"{self.name}: not within {timeout:g} s: {what}:\n{self.tail()}")
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for its end; returns its exit code. Raises LabError after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{self.name} (pid {self.pid}) did not end within {timeout:g} s:\n{self.tail()}") from error

    def stop(self, *, grace: float = 10.0) -> int:
        """SIGTERM, and SIGKILL after `grace` seconds; returns its exit code."""
        if self.returncode is None:
            self._process.terminate()
            try:
                self._process.wait(grace)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()

    def kill(self) -> None:
        """SIGKILL, and its end awaited."""
        self._process.kill()
        self._process.wait()

    def output(self) -> str:
        """What it has written since this start."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def tail(self, only: str = "") -> str:
        """The end of its log for a person: the last lines (of those that match the regular expression `only`)."""
        lines = [line for line in self.output().splitlines() if re.search(only, line)][-TAIL_LINES:]
        shown = [line if len(line) <= TAIL_COLUMNS else f"{line[:TAIL_COLUMNS]}…" for line in lines]
        return "\n".join([*(f"  | {line}" for line in shown), f"  (all of it: {self.log})"])


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit here, as SIGINT raises KeyboardInterrupt, so that `with` blocks clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # Only where nobody else (pytest, the caller) has decided something.
    taken = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not stop the cleaning up in the middle: ending signals wait until the block is left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
