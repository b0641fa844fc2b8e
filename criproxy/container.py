"""The state machine of one container: when it is scaled down, and how it comes back.

It alone owns the state. Everybody else sends it events (`packet`, `hooked`, `exited`) or asks for it to stay awake
(`awake`). What it does to the world goes through two collaborators, so that it can be tested without root: the
`Workload` (its processes) and the `Gate` (the container's share of its pod's network). Whether it is idle is told by
`idleness.py`. How it is scaled down is the matter of a `scaledown.Method`: there may be several, of which the first
that isn't refused does it.

    starting -> running -> parking -> checkpointing -> scaled_down -> restoring -> running
                   ^          |             |                             |
                   +----------+-------------+  in doubt, it runs          +-> started afresh

`disabled` containers have no state machine: they run as they would without criproxy, and say why.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from criproxy import idleness
from criproxy.criu.errors import CheckpointError
from criproxy.errands import Errand, Errands
from criproxy.idleness import Idleness
from criproxy.policy import Tier
from criproxy.record import AWAKE, Record, State
from criproxy.scaledown import Attempts, Lost, Method, Refused, Wanted

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 0.25
"""How long parking waits for handshakes to end and accept queues to empty, while new SYNs are parked."""

BACKOFF_SECONDS = (5.0, 3600.0)
"""After a scale-down that failed: the first pause, doubled at each further failure, and the longest."""

BUSY_POLL_SECONDS = (0.05, 1.0)
"""How soon a container that was idle but busy in another way is looked at again: its duration, within these."""


class Workload(idleness.Workload, Protocol):
    """The container's processes, whichever way they are scaled down."""

    async def find(self) -> None:
        """Waits until the application runs (its main process exists)."""

    def ended(self) -> bool:
        """Whether the container is gone, as far as its first process tells."""

    def memory(self) -> int: ...

    async def kill(self) -> None:
        """Ends the container."""

    async def snapshot(self, folder: Path, unless: asyncio.Event) -> None:
        """Puts a checkpoint of the application, which goes on running, into the new folder. Raises CheckpointError,
        also if `unless` was set in time."""


class Gate(idleness.Gate, Protocol):
    def park_new(self) -> None:
        """From now on new connections are parked; what is established goes on."""

    def park_all(self) -> None:
        """From now on every packet for the container is parked."""

    def wanted(self) -> bool:
        """Whether a parked packet asks for the container."""

    def open(self) -> None:
        """Delivers what is parked, in order, and lets everything pass."""


class Probes(idleness.Probes, Protocol):
    def save(self) -> None:
        """They are needed while the container sleeps, by the next daemon too."""


async def _nothing() -> None: ...


class Container:
    def __init__(
        self,
        record: Record,
        workload: Workload,
        gate: Gate,
        probes: Probes,
        *,
        duration: float,
        methods: Sequence[Method],
        cpu_activity: float = 0.05,
        check: Callable[[], Awaitable[None]] = _nothing,
        give_up: str = "",
        save: Callable[[Record], None],
    ) -> None:
        """`duration`: seconds without activity before a scale-down, 0 = never. `cpu_activity`: share of a core.

        `methods`: how it may be scaled down, the best first. `check` looks after the pod's network hook, and says what
        it finds by `hooked`. `give_up`: why it is brought back, if it sleeps, and no longer scaled down.
        """
        self.record = record
        self._workload = workload
        self._gate = gate
        self._probes = probes
        self._duration = duration
        self._attempts = [Attempts(method) for method in methods]
        if not record.tier:
            record.tier = self._attempts[0].method.tier.value
        self._check = check
        self._give_up = give_up
        self._is_up = False
        """While it is brought back: its processes run, but may not listen yet."""
        self._save = save
        self._changed = asyncio.Condition()
        self._wanted = asyncio.Event()
        self._idleness = Idleness(workload, gate, probes, cpu_activity)
        self._errands = Errands()
        self._stops = 0
        """How many hold it awake only to stop it."""
        self._task: asyncio.Task[None] | None = None

    # --- events --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins (or, for an adopted container, resumes) the life of the container."""
        self._task = asyncio.create_task(self._live(), name=f"container {self.record.id[:13]}")

    def packet(self) -> None:
        """A parked packet asks for the container."""
        self._wanted.set()

    def hooked(self, problem: str | None, *, missed: bool = False) -> None:
        """What a look at the pod's network hook has shown: why packets may pass it, or None. What sleeps then is woken,
        for nothing else would. `missed`: some may have passed before, and may have been for this container."""
        self._idleness.unhooked = problem
        if missed:
            self._idleness.used()
        if problem is not None:
            self._wanted.set()

    async def exited(self) -> None:
        """The container's init is gone: whatever was under way ends, and nothing is kept."""
        await self.close()
        for attempt in self._attempts:
            attempt.method.discard()
        await self._enter(State.EXITED)

    async def close(self) -> None:
        """Ends the state machine and leaves the container as it is (the daemon stops)."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    @contextlib.asynccontextmanager
    async def awake(self, why: str) -> AsyncIterator[None]:
        """The container runs, and stays up until the context is left. `why` is shown as the reason."""
        with self._idleness.held(why):
            self._wanted.set()
            try:
                async with self._changed:
                    await self._changed.wait_for(lambda: self.record.state in AWAKE or self._is_up)
                yield
            finally:
                self._idleness.used()

    def up(self) -> bool:
        """Whether nothing of ours is in the way of whoever wants the container."""
        return self.record.state in AWAKE

    async def until_up(self) -> None:
        """For whoever holds it awake: waits until packets reach it, too."""
        async with self._changed:
            await self._changed.wait_for(self.up)

    @contextlib.contextmanager
    def probed(self, why: str) -> Iterator[None]:
        """A command of kubelet's probe runs in the container, which must be awake, and stays so meanwhile. That isn't
        activity, or a probe that comes often enough would keep the container up for ever."""
        with self._idleness.held(why):
            self.probing(True)
            try:
                yield
            finally:
                self.probing(False)

    def probing(self, on: bool) -> None:
        """A probe is at work in the container, or no longer, as its network shows."""
        self._idleness.probing(on)

    @contextlib.asynccontextmanager
    async def stopping(self, why: str) -> AsyncIterator[None]:
        """As `awake`, for whoever stops it then. If it can't be brought back as it was, it is killed instead."""
        self._stops += 1
        try:
            async with self.awake(why):
                yield
        finally:
            self._stops -= 1

    @contextlib.asynccontextmanager
    async def ending(self, why: str) -> AsyncIterator[None]:
        """The container is about to be killed. A frozen one is thawed for it, as with cgroup v1 it couldn't die, and
        none is frozen meanwhile; one whose processes are in a checkpoint needn't come back for that."""
        with self._idleness.held(why):
            if self._method.tier is Tier.FREEZE and self.record.state not in AWAKE:
                self._wanted.set()
                async with self._changed:
                    await self._changed.wait_for(lambda: self.record.state in AWAKE)
            yield

    async def snapshot(self, folder: Path) -> None:
        """Puts a checkpoint of the application into the new folder. One that sleeps goes on sleeping, one that runs
        goes on running. Raises Refused; cancelled, it is given up, and nothing of it goes on. The folder is the
        caller's."""
        if self._task is None or self._task.done():
            raise Refused(self.record.reason or "it has ended")
        await self._errands.ask(folder)

    # --- what others may know ------------------------------------------------------------------------------

    def last_activity(self) -> float:
        """Monotonic seconds."""
        return self._idleness.last_activity()

    def memory(self) -> int:
        return self._workload.memory()

    def reason(self) -> str:
        """Why the container isn't scaled down (or isn't in a better way), for people; empty when all is well."""
        if self.record.state is State.EXITED:
            return ""
        if self.record.state is State.RUNNING:
            if self._duration == 0:
                return "scaledown-duration is 0: never"
            if (holder := self._idleness.holder()) is not None:
                return holder
            if not self.record.reason:
                idle = time.monotonic() - self.last_activity()
                return f"last activity {idle:.1f} s ago, scales down after {self._duration:g} s"
        return self.record.reason

    # --- the life ------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        try:
            if self.record.state is State.STARTING:
                await self._workload.find()
                await self._enter(State.RUNNING)
            elif self.record.state is State.RUNNING:
                # Adopted: a daemon that died while it parked has left the gate closed, and one that died after it had
                # brought the application back has left the rest to do.
                self._gate.open()
                await self._settle("" if self._give_up else self.record.reason)
            while True:
                # An adopted container may begin anywhere in here.
                if self._give_up and self.record.state is State.RUNNING:
                    self.record.tier = ""
                    await self._enter(State.DISABLED, "; ".join(filter(None, (self.record.reason, self._give_up))))
                    return
                if self.record.state is State.RUNNING:
                    idle_since = await self._until_idle()
                    if idle_since is None:
                        await self._snapshot(self._errands.waiting.pop(0))
                        continue
                    if not await self._park(idle_since):
                        continue
                    if not await self._scale_down():
                        continue
                await self._until_wanted()
                await self._bring_back()
        except asyncio.CancelledError:
            raise
        except Exception:
            if self._workload.ended():
                # Killed while we were at it: `exited` follows at once.
                return
            # A bug of ours must not take a container with it: it is left running and no longer touched.
            log.exception("%s: internal error, it is no longer scaled down", self)
            await self._leave_alone()
        finally:
            self._errands.refuse("it has ended, or is no longer criproxy's")

    async def _leave_alone(self) -> None:
        """Each step does what it can, whatever becomes of the others: nobody may wait for this container for ever."""
        if self.record.state in (State.CHECKPOINTING, State.SCALED_DOWN, State.RESTORING):
            try:
                await self._method.rescue()
            except Exception:
                log.exception("%s: it could not be rescued", self)
        try:
            self._gate.open()
        except Exception:
            log.exception("%s: its gate could not be opened", self)
        await self._enter(State.DISABLED, "internal error of criproxy, see its log")

    async def _enter(self, state: State, reason: str = "", *, soon: bool = False) -> None:
        """`soon`: the record is written when this task waits next, not before. Raises Refused if that fails where the
        next daemon would need it; elsewhere a full disk must not keep a container from coming back."""
        log.debug("%s: %s -> %s %s", self, self.record.state, state, reason)
        self.record.state = state
        self.record.since = time.time()
        self.record.reason = reason
        if soon:
            asyncio.get_running_loop().call_soon(self._save, self.record)
        else:
            try:
                self._save(self.record)
            except OSError as error:
                if state is State.CHECKPOINTING:
                    raise Refused(f"its state can't be written to the disk: {error.strerror}") from error
                log.error("%s: %s can't be written to the disk: %s", self, state, error)
        async with self._changed:
            self._changed.notify_all()

    async def _until_idle(self) -> float | None:
        """Running. Returns when the container has been idle for its duration and nothing else is in the way: since when
        (monotonic seconds). Or None, when there is an errand."""
        self._idleness.measure()
        while not self._errands.waiting:
            self._errands.asked.clear()
            if self._duration == 0:
                await self._errands.asked.wait()
                continue
            now = time.monotonic()
            idle_since = self.last_activity()
            due = max(idle_since + self._duration, min(a.retry_at for a in self._attempts))
            if due > now:
                self._idleness.measure()
                await _first(self._errands.asked, timeout=due - now)
                continue
            obstacle = self._idleness.obstacle()
            if obstacle is None:
                await self._check()
                # Last, for it is a moment's matter.
                obstacle = self._idleness.obstacle_now()
            if obstacle is None:
                self.record.reason = ""
                # Whoever wanted it until now has had it.
                self._wanted.clear()
                return idle_since
            self.record.reason = obstacle
            # Between two probes there may be little time, which must not be missed each time.
            self._idleness.probe_ended.clear()
            pause = min(max(self._duration, BUSY_POLL_SECONDS[0]), BUSY_POLL_SECONDS[1])
            await _first(self._idleness.probe_ended, timeout=pause)
        return None

    async def _snapshot(self, errand: Errand) -> None:
        """Running. Packets are parked meanwhile: CRIU wants sockets in which nothing changes."""
        refusal, reason = "it has ended, or is no longer criproxy's", self.record.reason
        try:
            await self._enter(State.PARKING, "a checkpoint of it is made for somebody else")
            self._gate.park_all()
            await self._workload.snapshot(errand.folder, errand.unless)
            refusal = ""
        except CheckpointError as error:
            if not self._workload.ended():
                refusal = str(error)
        finally:
            self._gate.open()
            await self._enter(State.RUNNING, reason)
            errand.end(refusal)

    async def _park(self, idle_since: float) -> bool:
        """Closes the gate in two steps, so that no connection falls between kernel and checkpoint.

        What came after `idle_since` counts, also while it was being looked whether the container is idle: a request
        that is in the application's hands already shows nowhere else, and its client would wait for ever.
        """
        await self._enter(State.PARKING)
        self._gate.park_new()
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        while (unsettled := self._gate.unsettled()) and time.monotonic() < deadline and not self._wanted.is_set():
            await asyncio.sleep(0.005)
        if not unsettled:
            self._gate.park_all()
            # Packets that came in before the gate was shut have left their traces by now.
            unsettled = self._gate.unsettled()
        if unsettled or self._wanted.is_set() or self.last_activity() > idle_since:
            self._gate.open()
            await self._enter(State.RUNNING, unsettled or "")
            return False
        return True

    async def _scale_down(self) -> bool:
        reasons = [self.record.untouched] if self.record.untouched else []
        for attempt in self._attempts:
            if attempt.retry_at > time.monotonic():
                reasons.append(attempt.refusal)
                continue
            if self._idleness.holder() or self._wanted.is_set():
                break  # somebody came meanwhile; one who waits for a failed checkpoint doesn't wait for a freeze too
            if await self._down(attempt, reasons):
                return True
        self._gate.open()
        await self._enter(State.RUNNING, "; ".join(reasons))
        return False

    async def _down(self, attempt: Attempts, reasons: list[str]) -> bool:
        """Scales down in one of the ways; `reasons` are those of the ways before, and gets this one's."""
        tier = attempt.method.tier
        self.record.tier = tier.value
        began = time.monotonic()
        try:
            self._probes.save()
            self.record.awake_bytes = self.memory()
            await self._enter(State.CHECKPOINTING, "; ".join(reasons))
            self.record.checkpoint_bytes = await attempt.method.down(self._wanted)
        except Wanted:
            log.info(
                "%s: wanted while it was scaled down, given up after %.0f ms", self, (time.monotonic() - began) * 1e3
            )
            self._idleness.used()
            return False
        except Refused as error:
            if self._workload.ended():
                raise
            attempt.failed(str(error), max(BACKOFF_SECONDS[0], self._duration), BACKOFF_SECONDS[1])
            log.warning("%s: %s", self, attempt.refusal)
            reasons.append(attempt.refusal)
            return False
        attempt.worked()
        self.record.checkpoints += 1
        self.record.last_checkpoint_seconds = time.monotonic() - began
        await self._enter(State.SCALED_DOWN, "; ".join(reasons))
        log.info(
            "%s: scaled down (%s) in %.0f ms, %.1f MiB",
            self, tier, self.record.last_checkpoint_seconds * 1e3, self.record.checkpoint_bytes / 2**20,
        )  # fmt: skip
        return True

    async def _until_wanted(self) -> None:
        if not (self._idleness.holder() or self._gate.wanted() or self._idleness.unhooked is not None or self._give_up):
            self._wanted.clear()
            # Not looked at the gate again: where the parking was full, the packet that wants the container isn't in it.
            while not self._wanted.is_set():
                await _first(self._wanted, self._errands.asked)
                if not self._hand_out():
                    return

    def _hand_out(self) -> bool:
        """Scaled down. Whether the errands, if there are any, are done without waking it."""
        self._errands.asked.clear()
        while self._errands.waiting:
            try:
                if not self._method.hand_out(self._errands.waiting[0].folder):
                    return False
                refusal = ""
            except Refused as error:
                refusal = str(error)
            self._errands.waiting.pop(0).end(refusal)
        return True

    async def _bring_back(self) -> None:
        """From the checkpoint, else afresh; either way the container runs in the end and the gate is open."""
        began = time.monotonic()
        # A client waits, and the file takes 1 ms: it is written while CRIU works. Should we not live to do it, then
        # processes beside `scaled_down` tell whoever adopts the container the same as `restoring` does.
        await self._enter(State.RESTORING, soon=True)
        try:
            reason = await self._method.up(lambda: self._stops > 0)
        except Lost as error:
            log.error("%s: killed, its unsaved state was lost: %s", self, error)
            await self._workload.kill()
            raise
        self._is_up = True
        async with self._changed:
            self._changed.notify_all()
        try:
            await self._method.ready()
        finally:
            self._is_up = False
        self._gate.open()
        self._idleness.used()
        self.record.restores += 1
        self.record.last_restore_seconds = time.monotonic() - began
        self.record.checkpoint_bytes = 0
        await self._enter(State.RUNNING, reason)
        log.info("%s: running again after %.1f ms", self, self.record.last_restore_seconds * 1e3)
        await self._settle(reason)

    async def _settle(self, reason: str) -> None:
        """What is left to do after the way back, the application running. `reason` is what a person has been told."""
        self.record.reason = reason or self._method.unfinished()
        reason = await self._method.settle() or reason
        if reason:
            log.error("%s: %s", self, reason)
        self.record.reason = reason
        self._method.discard()

    @property
    def _method(self) -> Method:
        """The one that the container is, or was last, scaled down with."""
        return next((a.method for a in self._attempts if a.method.tier == self.record.tier), self._attempts[0].method)

    def __str__(self) -> str:
        return f"{self.record.namespace}/{self.record.pod}/{self.record.name} ({self.record.id[:13]})"


async def _first(*events: asyncio.Event, timeout: float | None = None) -> None:
    """Waits until one of them is set, or the seconds are over."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
