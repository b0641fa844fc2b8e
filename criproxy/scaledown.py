"""The ways in which a container is scaled down and brought back; the state machine knows them as `Method` alone.

    checkpoint   CRIU saves the processes and ends them; they are restored. The usual one.
    restart      the application is ended, and started afresh (zeropod's `disable-checkpointing`)
    freeze       the processes stay and stop, their memory is reclaimed; for whatever can't be checkpointed

When a method's `down()` is called, the container's gate parks all packets; after `up()` the state machine opens it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from criproxy.criu.errors import CheckpointError, GivenUp, OutOfMemory, RestoreError
from criproxy.criu.saved import AttributesChanged
from criproxy.freezer import FreezeError
from criproxy.hook.pod_maps import Stream
from criproxy.kernel.sockets import Flow
from criproxy.policy import Tier

log = logging.getLogger(__name__)

RESTORE_ATTEMPTS = 3
LISTEN_SECONDS = 60.0
"""How long packets stay parked for an application that was started afresh and doesn't listen yet."""

END_ATTEMPTS = 3
END_PAUSE = 1.0
"""Seconds between the attempts to end an application that mustn't go on."""


class Refused(Exception):
    """The container can't be scaled down in this way (now), and goes on as before. Why, for people."""


class Wanted(Refused):
    """Somebody wanted the container in the middle of its scale-down, which was given up: no failure."""


class Lost(Exception):
    """The application could only be started afresh, which is no use: its container is to be killed instead. Why, for
    people."""


class Method(Protocol):
    @property
    def tier(self) -> Tier: ...

    async def down(self, wanted: asyncio.Event) -> int:
        """Returns the bytes that are kept on disk. Raises Refused; then the application goes on. If `wanted` is set
        meanwhile it raises Wanted, if that brings the application back sooner."""

    def hand_out(self, folder: Path) -> bool:
        """While it is scaled down: puts the checkpoint into the new folder, for somebody else. False if it has to run
        for that. Raises Refused."""

    async def up(self, stops: Callable[[], bool]) -> str:
        """Brings the application back, whatever it takes. Returns what a person has to be told (state was lost).

        Raises Lost if a fresh start is no use: it is wanted only to be stopped, or was killed for want of memory.
        Raises ProcessLookupError if the container has ended."""

    async def ready(self) -> None:
        """Waits until the application that `up()` has brought back can be given its packets."""

    async def settle(self) -> str:
        """What is left to do when packets flow again, also of what an earlier daemon has begun. Returns what a person
        has to be told."""

    def unfinished(self) -> str:
        """What `settle()` will take long for, in words; empty if nothing."""

    async def rescue(self) -> None:
        """After an error of ours: the application runs, whatever happened before."""

    def discard(self) -> None:
        """The container runs or is gone: what was kept is deleted."""


class Workload(Protocol):
    """What the methods with our init as the container's PID 1 need of it. Paths, pids and CRIU are its business."""

    def ended(self) -> bool:
        """Whether the container is gone, or about to be."""

    async def dump(self, unless: asyncio.Event) -> int:
        """Checkpoints the processes and ends them. Returns the size in bytes. Raises CheckpointError (GivenUp if
        `unless` was set in time)."""

    def streams(self) -> Mapping[Flow, Stream]:
        """The established connections of the checkpoint."""

    async def restore(self, *, lazily: bool) -> None:
        """Raises RestoreError; what a failed attempt left is gone then. `lazily`: memory may be loaded afterwards."""

    def hand_out(self, folder: Path) -> None:
        """Puts the checkpoint into the new folder, too. Raises OSError."""

    def kept(self) -> bool:
        """Whether there is a checkpoint, be it that the processes are back or not."""

    def spoil(self) -> None:
        """The checkpoint is no way back any more, for the next daemon neither."""

    def running(self) -> bool:
        """Whether the application's main process is there."""

    def loading(self) -> bool:
        """Whether the restored processes run, but not all of their memory is there yet."""

    async def loaded(self) -> bool:
        """Waits until all of their memory is there. False: the rest won't come, and who touches it waits for ever."""

    async def verify(self) -> None:
        """Raises AttributesChanged if a restored thread's confinement isn't what it was."""

    async def end(self, *, at_once: bool = False) -> None:
        """Ends the application and its processes, but not the container. `at_once`: without asking them."""

    async def start_afresh(self) -> None:
        """Starts the container's command anew in the living container, after `end` or a failed restore."""

    async def rescue(self) -> None:
        """Whatever happened before: keeps the application if its processes are there, else starts it afresh."""

    async def kill(self) -> None:
        """Ends the container."""

    def discard(self) -> None:
        """Deletes the checkpoint."""


class Freezable(Protocol):
    """What freezing needs of a container; any has it, also one that runs untouched."""

    def entangled(self) -> str | None:
        """Who outside of the container would hang while it is frozen, other than by packets, in words, or None."""

    async def freeze(self) -> None:
        """Raises FreezeError; then it isn't frozen."""

    def thaw(self) -> None: ...


class Gate(Protocol):
    """What the methods need of the container's share of its pod's network."""

    def silent(self) -> str | None:
        """Why no packet could wake the container: it doesn't listen (yet), or None."""

    def park_all(self) -> None:
        """From now on every packet for the container is parked."""

    def hanging(self) -> str | None:
        """After `park_all`: a connection whose packets reach its socket all the same, where nothing would answer them
        while the processes are frozen, in words, or None."""

    def stand_in(self, streams: Mapping[Flow, Stream]) -> None:
        """After `park_all`: these sockets are gone, and their peers' keep-alives are answered in their place."""

    def sockets_stay(self) -> None:
        """After `park_all`: what carries no news (acknowledgements, keep-alives) passes, for the kernel answers it."""

    def open(self) -> None:
        """Delivers what is parked, in order, and lets everything pass."""


class Restart:
    tier = Tier.RESTART

    def __init__(self, workload: Workload, gate: Gate) -> None:
        self._workload = workload
        self._gate = gate
        self._afresh = False

    async def down(self, wanted: asyncio.Event) -> int:
        try:
            await self._workload.end()
        except CheckpointError as error:
            raise Refused(str(error)) from error
        return 0

    def hand_out(self, folder: Path) -> bool:
        raise Refused("it was ended while it is idle, and is started afresh when it is wanted: there is no checkpoint")

    async def up(self, stops: Callable[[], bool]) -> str:
        await self._start_afresh()
        return ""

    async def ready(self) -> None:
        if not self._afresh:
            return
        deadline = time.monotonic() + LISTEN_SECONDS
        while (silent := self._gate.silent()) and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        if silent:
            log.warning("%s after %.0f s; parked packets are delivered all the same", silent, LISTEN_SECONDS)

    async def settle(self) -> str:
        return ""

    def unfinished(self) -> str:
        return ""

    async def rescue(self) -> None:
        await self._workload.rescue()

    def discard(self) -> None:
        self._workload.discard()

    async def _start_afresh(self) -> None:
        await self._workload.start_afresh()
        self._afresh = True


class Checkpoint(Restart):
    """Where a restore fails for good, or gives the application more rights than it had, it is a restart after all."""

    tier = Tier.CHECKPOINT

    async def down(self, wanted: asyncio.Event) -> int:
        try:
            size = await self._workload.dump(wanted)
        except GivenUp as error:
            raise Wanted(str(error)) from error
        except CheckpointError as error:
            raise Refused(str(error)) from error
        self._gate.stand_in(self._workload.streams())
        return size

    def hand_out(self, folder: Path) -> bool:
        if not self._workload.kept():
            raise Refused("its checkpoint isn't complete")
        try:
            self._workload.hand_out(folder)
        except OSError as error:
            raise Refused(f"its checkpoint can't be read: {error}") from error
        return True

    async def up(self, stops: Callable[[], bool]) -> str:
        self._afresh = False
        if not self._workload.kept():
            return await self._do_without("there is no complete checkpoint", stops)
        for attempt in range(1, RESTORE_ATTEMPTS + 1):
            try:
                # What may be wrong with loading memory later isn't tried twice.
                await self._workload.restore(lazily=attempt == 1)
                return ""
            except RestoreError as error:
                if self._workload.ended():
                    raise ProcessLookupError("the container has ended") from error
                log.error("restore failed (attempt %d of %d): %s", attempt, RESTORE_ATTEMPTS, error)
                failure = error
        if isinstance(failure, OutOfMemory):
            # There was room for it when it was checkpointed. kubelet is to see what it sees of whoever has too little.
            raise Lost(f"restore failed: {failure}")
        return await self._do_without(f"restore failed: {failure}", stops)

    async def _do_without(self, why: str, stops: Callable[[], bool]) -> str:
        if stops():
            raise Lost(f"it is to stop, but {why}")
        await self._start_afresh()
        return f"started afresh, its state was lost: {why}"

    async def settle(self) -> str:
        """Off the way of the first packet: a restored process that may do more than before doesn't stay."""
        if self._afresh or not self._workload.kept():
            return ""
        try:
            await self._workload.verify()
        except AttributesChanged as error:
            return await self._replace(str(error))
        if not await self._workload.loaded():
            # The images are no way back: the application has run since, and its files, and what its clients were told,
            # may be newer than they. As after a crash, it begins with its files alone.
            return await self._replace("what loads its memory after the restore has ended too soon", at_once=True)
        return ""

    def unfinished(self) -> str:
        return "its memory is still being loaded" if self._workload.loading() else ""

    async def rescue(self) -> None:
        if self._workload.kept() and not self._workload.running():
            try:
                self._afresh = False
                await self._workload.restore(lazily=False)
                await self.settle()
                self._workload.discard()
                return
            except Exception:
                log.exception("what is in its checkpoint could not be rescued")
        await self._workload.rescue()

    async def _replace(self, why: str, *, at_once: bool = False) -> str:
        self._gate.park_all()
        # If we don't come to the end of this, the next daemon mustn't go back to it.
        self._workload.spoil()
        try:
            if not await self._end(at_once):
                await self._workload.kill()
                return f"its container was killed, as its processes could not be ended: {why}"
            await self._start_afresh()
        except asyncio.CancelledError:
            # Nobody could tell later that what runs is about to end, and isn't to end its container.
            with contextlib.suppress(CheckpointError, OSError):
                await self._workload.end(at_once=True)
                await self._start_afresh()
            raise
        except ProcessLookupError:
            raise  # the container has ended
        except Exception:
            # To the state machine it runs, so nobody else would.
            await self._workload.rescue()
            raise
        await self.ready()
        self._gate.open()
        return f"started afresh, its state was lost: {why}"

    async def _end(self, at_once: bool) -> bool:
        for attempt in range(1, END_ATTEMPTS + 1):
            try:
                await self._workload.end(at_once=at_once)
                return True
            except (CheckpointError, OSError) as error:
                if isinstance(error, ProcessLookupError):
                    raise
                log.error("it could not be ended (attempt %d of %d): %s", attempt, END_ATTEMPTS, error)
                if attempt < END_ATTEMPTS:
                    await asyncio.sleep(END_PAUSE)
        return False


class Freeze:
    tier = Tier.FREEZE

    def __init__(self, workload: Freezable, gate: Gate) -> None:
        self._workload = workload
        self._gate = gate

    async def down(self, wanted: asyncio.Event) -> int:
        if (why := self._workload.entangled() or self._gate.hanging()) is not None:
            raise Refused(why)
        try:
            await self._workload.freeze()
        except FreezeError as error:
            raise Refused(str(error)) from error
        # Since then it may have made one.
        if (why := self._gate.hanging()) is not None:
            self._workload.thaw()
            raise Refused(why)
        # The application's own keep-alives would end a connection whose peer's answers they don't see.
        self._gate.sockets_stay()
        return 0

    def hand_out(self, folder: Path) -> bool:
        return False

    async def up(self, stops: Callable[[], bool]) -> str:
        self._workload.thaw()
        return ""

    async def ready(self) -> None: ...

    async def settle(self) -> str:
        return ""

    def unfinished(self) -> str:
        return ""

    async def rescue(self) -> None:
        self._workload.thaw()

    def discard(self) -> None:
        pass


class Attempts:
    """A method, and how often it was refused lately: each time it is left alone for longer."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.refusal = ""
        """What people are told of the last try; empty when it worked."""
        self.retry_at = 0.0
        """time.monotonic() from which it may be tried again."""
        self._failures = 0

    def failed(self, reason: str, first: float, longest: float) -> None:
        """It is left alone for `first` seconds, and for twice as long at each further refusal."""
        pause = min(first * 2.0**self._failures, longest)
        self._failures += 1
        self.refusal = f"{self.method.tier} failed, next try in {pause:.0f} s: {reason}"
        self.retry_at = time.monotonic() + pause

    def worked(self) -> None:
        self.refusal, self.retry_at, self._failures = "", 0.0, 0
