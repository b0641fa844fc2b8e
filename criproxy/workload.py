"""The processes of one container: where they are, what they use, how they are checkpointed or frozen."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from criproxy.criu import aftermath, init, store, streams
from criproxy.criu.checkpoint import Criu
from criproxy.criu.errors import CheckpointError, OutOfMemory, RestoreError
from criproxy.criu.pages import Loader
from criproxy.entanglement import entanglement, listens_in_volume
from criproxy.freezer import Freezer
from criproxy.hook.pod_maps import Stream
from criproxy.kernel import page_cache, processes
from criproxy.kernel.cgroup import Cgroup
from criproxy.kernel.sockets import Flow, UnixSocket
from criproxy.policy import Clock, Connections, Lazy

log = logging.getLogger(__name__)

FIND_SECONDS = 30.0
LAZY_BYTES = 16 << 20
"""From this much private memory on, whoever waits is served sooner if it is loaded after the restore (measured)."""

SHARED_FACTOR = 1.25
"""How much bigger than its memory a container's images may be before that means memory shared since a fork."""

# In the checkpoint's folder: how much anonymous memory the container's cgroup had when it was dumped.
_ANONYMOUS = "anonymous"

ROOM_BYTES = 4 << 20
"""What a limit of memory must leave for a restore: CRIU needs nearly 3 MiB in the container (measured)."""

LIMITS_SECONDS = 5.0
"""How long a restore waits for a change of limits that the runtime is at."""

END_SECONDS = 10.0
"""How long an application may take to end after its stop signal before it is killed (tier restart)."""


class Processes:
    """The processes of any container, also of one that runs untouched: all in its cgroup. They can be frozen."""

    def __init__(self, container_id: str, init_pid: int, unix_sockets: Callable[[], list[UnixSocket]]) -> None:
        """`init_pid`: the container's first process, on the host. `unix_sockets` tells those of its pod."""
        self.init_pid = init_pid
        self._init = processes.Process.of(init_pid)
        self._cgroup = Cgroup.of(init_pid).whole(container_id)
        self._freezer = Freezer(self._cgroup)
        self._unix_sockets = unix_sockets

    async def find(self) -> None:
        """They are there as soon as the container is."""

    def ended(self) -> bool:
        return self._init.ending()

    # --- what they are doing -------------------------------------------------------------------------------

    def visitors(self) -> str | None:
        own = set(self._own())
        for pid in self._cgroup.procs():
            if pid not in own and (name := processes.name(pid)):
                return f'"{name}" (pid {pid}) was started in the container from outside (exec)'
        return self._neighbour()

    def _neighbour(self) -> str | None:
        """A process of another container in this one's own PID namespace: it wants to see the application, and could
        take a number that the application needs when it is restored."""
        if processes.ns_pid(self.init_pid) != 1:
            return None  # the pod's, where everybody is
        inside = set(self._cgroup.procs())
        for pid in processes.in_namespace(self.init_pid, self._cgroup.around().procs()):
            if pid not in inside and (name := processes.name(pid)):
                return f'"{name}" (pid {pid}) of an ephemeral container is in its PID namespace (kubectl debug)'
        return None

    def working(self) -> str | None:
        if (pid := processes.running(self._own())) is None:
            return None
        return f"a thread of {processes.name(pid) or 'a process'} is running"

    def socket_inodes(self) -> set[int]:
        return processes.socket_inodes(self._own())

    def cpu_usage(self) -> float:
        return self._cgroup.cpu_usage()

    def memory(self) -> int:
        return self._cgroup.memory()

    @contextlib.asynccontextmanager
    async def limits_change(self) -> AsyncIterator[None]:
        """Somebody else changes the container's limits meanwhile."""
        yield

    def out_of_reach(self) -> int | None:
        """The application's pid if the one who gets the stop signal may not pass it on; None if all is well."""
        return None

    @staticmethod
    def signal(pid: int, name: str) -> None:
        """Sends a signal, as images name it, to a process that may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_number(name))

    def _own(self) -> list[int]:
        """Init, what it has started, and what was left to its PID namespace's init (the pod's, where it is shared)."""
        everyone = set(self._cgroup.procs())
        below: dict[int, list[int]] = {}
        found: list[int] = []
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):
                parent = processes.parent(pid)
                if pid != self.init_pid and parent in everyone:
                    below.setdefault(parent, []).append(pid)
                elif pid == self.init_pid or (parent > 0 and processes.ns_pid(parent) == 1):
                    found.append(pid)
        for pid in found:
            found += below.get(pid, [])
        return found

    # --- what is done to them ------------------------------------------------------------------------------

    async def snapshot(self, folder: Path, unless: asyncio.Event) -> None:
        raise CheckpointError("it runs without criproxy's init, and so can only be frozen")

    def entangled(self) -> str | None:
        return entanglement(self.init_pid, self._cgroup.procs(), self._unix_sockets())

    async def freeze(self) -> None:
        await self._freezer.freeze()

    def thaw(self) -> None:
        self._freezer.thaw()

    async def kill(self) -> None:
        aftermath.send([self._init], signal.SIGKILL)
        await aftermath.gone([self._init])


class Workload(Processes):
    """The processes of a container whose PID 1 is our init. They can be checkpointed, too."""

    def __init__(
        self,
        container_id: str,
        init_pid: int,
        unix_sockets: Callable[[], list[UnixSocket]],
        folder: Path,
        criu: Criu,
        *,
        stop_signal: str = "SIGTERM",
        lazy: Lazy = Lazy.AUTO,
        connections: Connections = Connections.PRESERVE,
        parked: bool = True,
        clock: Clock = Clock.STOP,
    ) -> None:
        """`folder`: the container's own in the state directory. `parked`: so are the packets of its connections; where
        they aren't, none can be preserved.
        """
        super().__init__(container_id, init_pid, unix_sockets)
        self._criu = criu
        self._images = folder / "checkpoint"
        self._limits = folder / "limits.json"
        self._limits_lock = asyncio.Lock()
        self._stop_signal = stop_signal
        self._lazy = lazy
        self._eagerly = False
        """Loading memory after the restore has failed once."""
        self._close = connections is Connections.CLOSE
        self._parked = parked
        self._stop_clock = clock is Clock.STOP
        self._loader: Loader | None = None

    async def find(self) -> None:
        deadline = time.monotonic() + FIND_SECONDS
        while init.application_pid(self.init_pid) is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def out_of_reach(self) -> int | None:
        """The application's pid if its init may not signal it (another user, no CAP_KILL), else None."""
        application = init.application_pid(self.init_pid)
        if application is None or init.may_signal(self.init_pid, application):
            return None
        return application

    def _own(self) -> list[int]:
        guard = init.guard_pid(self.init_pid)
        return [self.init_pid, *([] if guard is None else processes.tree(guard))]

    # --- what is done to it --------------------------------------------------------------------------------

    async def dump(self, unless: asyncio.Event) -> int:
        try:
            why = listens_in_volume(self.init_pid, self._cgroup.procs, self._unix_sockets())
        except OSError as error:
            why = f"its unix sockets can't be listed: {error}"
        if why is not None:
            raise CheckpointError(why)
        if (room := self._cgroup.room()) is not None and room < ROOM_BYTES:
            raise CheckpointError(
                f"its limit of memory leaves {max(room, 0) / 2**20:.1f} MiB, and a restore takes {ROOM_BYTES >> 20}"
            )
        self._forget_loader()
        anonymous = self._cgroup.anonymous()
        with contextlib.ExitStack() as stack:
            files = page_cache.mapped(self.init_pid, self._own(), stack)
            await self._criu.dump(
                self.init_pid,
                self._images,
                unless,
                close=self._close,
                keep=self._parked,
                stop_clock=self._stop_clock,
            )
            # The processes are in the images now: a disk that is full must not make it look as if that had failed.
            with contextlib.suppress(OSError):
                (self._images / _ANONYMOUS).write_text(str(anonymous))
            if not unless.is_set():
                self._cgroup.reclaim()
                # Not waited for; who wants the container meanwhile ends it. The files are the thread's to close.
                asyncio.get_running_loop().run_in_executor(None, page_cache.cool, files, unless.is_set, stack.pop_all())
        return sum(f.stat().st_size for f in self._images.iterdir())

    async def snapshot(self, folder: Path, unless: asyncio.Event) -> None:
        await self._criu.snapshot(self.init_pid, folder, unless)

    def hand_out(self, folder: Path) -> None:
        store.link(self._images, folder)

    def streams(self) -> dict[Flow, Stream]:
        if self._close:
            return {}
        try:
            return streams.streams(self._images)
        except (OSError, ValueError) as error:
            log.warning("pid %d: keep-alives of its connections aren't answered: %s", self.init_pid, error)
            return {}

    @contextlib.asynccontextmanager
    async def limits_change(self) -> AsyncIterator[None]:
        """None is lifted meanwhile, or the old one would be put back over one that reads as no limit does."""
        async with self._limits_lock:
            yield

    async def restore(self, *, lazily: bool) -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(LIMITS_SECONDS):
                    await stack.enter_async_context(self._limits_lock)
            except TimeoutError:
                log.warning("pid %d: the runtime hangs at a change of its limits: they aren't lifted", self.init_pid)
            else:
                stack.enter_context(self._cgroup.lifted(self._limits))
            killed = self._cgroup.oom_kills()
            self._loader = self._criu.loader(self._images) if lazily and self._pays() else None
            try:
                await self._criu.restore(self.init_pid, self._images, self._cgroup, self._loader, close=self._close)
            except RestoreError as error:
                # Such as address space reserved beyond the machine's memory (MariaDB), which CRIU can't map twice: it
                # would fail at each wake.
                self._eagerly |= self._loader is not None
                self._forget_loader()
                if self._cgroup.oom_kills() > killed:
                    raise OutOfMemory(
                        "its container's or its pod's limit of memory is too low for it", error.log
                    ) from error
                raise

    def _pays(self) -> bool:
        if self._eagerly:
            return False
        if self._lazy is not Lazy.AUTO:
            return self._lazy is Lazy.ALWAYS
        size = sum(path.stat().st_size for path in self._images.glob("pages-*.img"))
        if size < LAZY_BYTES:
            return False
        # Pages that processes share since a fork are in the images once for each, and would be loaded so.
        try:
            anonymous = int((self._images / _ANONYMOUS).read_text())
        except (FileNotFoundError, ValueError):
            return False
        return size < anonymous * SHARED_FACTOR

    def kept(self) -> bool:
        return store.complete(self._images)

    def spoil(self) -> None:
        store.spoil(self._images)

    def running(self) -> bool:
        return init.application_pid(self.init_pid) is not None

    def loading(self) -> bool:
        loader = self._known_loader()
        return loader is not None and not loader.loaded()

    async def loaded(self) -> bool:
        loader = self._known_loader()
        if loader is None or await loader.ended():
            return True
        log.error("pid %d: what loads its memory has ended: %s", self.init_pid, loader.last_words())
        return False

    def _known_loader(self) -> Loader | None:
        """Also one that an earlier daemon has started."""
        if self._loader is None:
            self._loader = Loader.adopt(self._images)
        return self._loader

    def _forget_loader(self) -> None:
        if (loader := self._known_loader()) is not None:
            loader.close()
            self._loader = None

    async def verify(self) -> None:
        for remark in await self._criu.verify(self.init_pid, self._images):
            log.info("pid %d was restored differently: %s", self.init_pid, remark)

    async def end(self, *, at_once: bool = False) -> None:
        await init.take_hold(self.init_pid)
        application = init.application_pid(self.init_pid)
        if at_once:
            await self._kill_remains()
        elif application is not None:
            self.signal(application, self._stop_signal)
        deadline = time.monotonic() + END_SECONDS
        while init.guard_pid(self.init_pid) is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await self._kill_remains()

    async def start_afresh(self) -> None:
        await self._kill_remains()
        init.start(self.init_pid)

    async def rescue(self) -> None:
        if self.running():
            init.release(self.init_pid)
        else:
            await self.start_afresh()

    def discard(self) -> None:
        self._forget_loader()
        store.discard(self._images)

    async def _kill_remains(self) -> None:
        """Ends every process of the container but its init, and waits until they are gone: what listens on the port of
        the one to come, for instance, does so until its memory has been freed."""
        remains = aftermath.identify([pid for pid in self._cgroup.procs() if pid != self.init_pid])
        aftermath.send(remains, signal.SIGKILL)
        await aftermath.gone(remains)


def signal_number(name: str) -> int:
    """An image's STOPSIGNAL, read as containerd does: `SIGQUIT`, `quit`, `3`, `SIGRTMIN+3`. SIGTERM if it is none."""
    number = 0
    if name.isdecimal():
        number = int(name)
    elif match := re.fullmatch(r"(?:SIG)?([A-Z0-9]+)([+-]\d+)?", name.upper()):
        with contextlib.suppress(KeyError):
            number = signal.Signals[f"SIG{match[1]}"] + int(match[2] or 0)
    return number if 0 < number < signal.NSIG else signal.SIGTERM
