"""A container's init (`native/init.c`) as the host sees it: what stands below it, and the orders that it takes.

In the container, PID 1 is init. Below it stands the guard, below that the application. What steers init is a signal
that only a process outside of the container can send: see the head of `init.c`.

A container is *held* while its application may end, or not be there at all, without the container's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Final

from criproxy.criu.errors import CheckpointError
from criproxy.kernel import processes

# The numbers of native/init.c.
_HOLD: Final = 61
_RELEASE: Final = 62
_START: Final = 63
_ORDERS: Final = sum(1 << (order - 1) for order in (_HOLD, _RELEASE, _START))

# How long init may take to see a signal. It is a matter of microseconds, unless its cgroup is frozen or starved.
_HEARING_SECONDS: Final = 0.5

_CAP_KILL: Final = 5


# --- What stands below it ---------------------------------------------------------------------------------------------


def guard_pid(init_pid: int) -> int | None:
    """The host's number of the root of the application's tree; None if there is none."""
    guard = _guard(init_pid)
    return guard[0] if guard else None


def application_pid(init_pid: int) -> int | None:
    """The host's number of the application's main process (the container's command); None if there is none."""
    guard = _guard(init_pid)
    if guard is None:
        return None
    pid, wanted = guard
    for child in processes.children(pid):
        with contextlib.suppress(ProcessLookupError):
            if processes.ns_pid(child) == wanted and processes.Process.of(child).alive():
                return child
    return None


def may_signal(init_pid: int, app_pid: int) -> bool:
    """Whether kill(2) lets the container's init send the application any signal; where not, criproxy has to do it.

    Raises ProcessLookupError if one of them is gone.
    """
    sender, target = processes.status(init_pid), processes.status(app_pid)
    if int(sender["CapEff"], 16) >> _CAP_KILL & 1:
        return True
    real, effective = sender["Uid"].split()[:2]
    target_real, _effective, target_saved = target["Uid"].split()[:3]
    return bool({real, effective} & {target_real, target_saved})


def _guard(init_pid: int) -> tuple[int, int] | None:
    """The guard's number on the host, and the application's in the container, which is a part of the guard's name."""
    try:
        program = os.stat(f"/proc/{init_pid}/exe")
        for child in processes.children(init_pid):
            word, _space, number = processes.name(child).partition(" ")
            if word == "guard" and number.isdigit():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if os.path.samestat(os.stat(f"/proc/{child}/exe"), program):
                        return child, int(number)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return None


# --- Orders -----------------------------------------------------------------------------------------------------------


def hold(init_pid: int) -> None:
    """From now on the application's end isn't the container's. May sleep: for where nothing else waits.

    Raises ProcessLookupError if the container has ended, and CheckpointError if its init doesn't run (a frozen cgroup).
    """
    for pause in _until_heard(init_pid):
        time.sleep(pause)
    _order(init_pid, _HOLD)


async def take_hold(init_pid: int) -> None:
    """As `hold`, for the event loop."""
    for pause in _until_heard(init_pid):
        await asyncio.sleep(pause)
    _order(init_pid, _HOLD)


def release(init_pid: int) -> None:
    """The application's end is the container's again. If it has ended meanwhile, the container ends, with its status.

    Raises ProcessLookupError if the container has ended.
    """
    _order(init_pid, _RELEASE)


def start(init_pid: int) -> None:
    """A held container's command is started afresh. What is left of the old tree has to be killed before.

    Raises ProcessLookupError if the container has ended.
    """
    _order(init_pid, _START)


def open_pidfd(init_pid: int) -> int:
    """A pidfd of the container's init. Raises ProcessLookupError if the number isn't that of a namespace's PID 1."""
    pidfd = os.pidfd_open(init_pid)
    try:
        # After the descriptor, so that what is looked at and what the descriptor stands for are the same.
        numbers = processes.status(init_pid)["NSpid"].split()
        if len(numbers) < 2 or numbers[-1] != "1":
            raise ProcessLookupError(f"Process {init_pid} isn't the first one of a container")
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


def _until_heard(init_pid: int) -> Iterator[float]:
    """Seconds to sleep, again and again, until init has taken all orders that were sent to it."""
    # Init sees pending signals by their number: a HOLD would overtake a RELEASE or START that it hasn't seen yet.
    deadline = time.monotonic() + _HEARING_SECONDS
    while _pending(init_pid) & _ORDERS:
        if time.monotonic() > deadline:
            raise CheckpointError("the container's init doesn't run: the container is paused, or has no processor time")
        yield 0.001


def _pending(pid: int) -> int:
    """The signals that a process has been sent and has not taken yet, as a set of bits."""
    return int(processes.status(pid)["ShdPnd"], 16)


def _order(init_pid: int, signum: int) -> None:
    """Sends a signal to a container's init and to nothing else, whatever has become of the number."""
    pidfd = open_pidfd(init_pid)
    try:
        signal.pidfd_send_signal(pidfd, signum)
    finally:
        os.close(pidfd)
