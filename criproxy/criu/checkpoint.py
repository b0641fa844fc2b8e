"""Dumps a container's processes and restores them in place, with CRIU inside the container's own namespaces.

CRIU dumps and restores the tree below the guard (see `init.py`); init, namespaces, mounts and log pipes stay.

`Criu.dump()` holds init first and releases it if it fails; `Criu.restore()` releases it after success. In between the
container is *held*: no process of the application is there, and the container lives all the same.

When the daemon is killed meanwhile, the next one finds either the processes or complete images (`store.complete()`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from criproxy import run
from criproxy.criu import aftermath, expired, init, store, sysv
from criproxy.criu.bundle import Bundle
from criproxy.criu.command import Command, Failed
from criproxy.criu.errors import CheckpointError, GivenUp, RestoreError
from criproxy.criu.kept import Kept
from criproxy.criu.obstacles import obstacle
from criproxy.criu.pages import Loader
from criproxy.criu.saved import Saved
from criproxy.kernel import processes
from criproxy.kernel.cgroup import Cgroup
from criproxy.kernel.processes import Process

log = logging.getLogger(__name__)

DUMP_TIMEOUT: Final = 120.0
"""Seconds after which a dump is given up (and the application goes on). 10 GiB take 20 s on a slow disk."""

RESTORE_TIMEOUT: Final = 120.0

_CAP_SYS_PTRACE: Final = 19
_CAP_SYS_ADMIN: Final = 21

# The name is known to native/preload.c.
_GIVEN_UP: Final = "given-up"

# The lock is the pod's eBPF program. CRIU notes it in the images, and says so if it is given again for a restore.
_DUMP_OPTIONS: Final = ("--network-lock", "skip", "--link-remap", "--ghost-limit", "64M")


class Criu:
    """CRIU from a bundle, run inside containers that have this bundle mounted. Durations are in seconds."""

    def __init__(
        self, bundle: Bundle, *, dump_timeout: float = DUMP_TIMEOUT, restore_timeout: float = RESTORE_TIMEOUT
    ) -> None:
        self._bundle = bundle
        self._dump_timeout = dump_timeout
        self._restore_timeout = restore_timeout

    async def dump(
        self,
        init_pid: int,
        images: Path,
        unless: asyncio.Event | None = None,
        *,
        close: bool = False,
        keep: bool = True,
        stop_clock: bool = True,
    ) -> None:
        """Dumps the application of a container into the new folder `images` and ends its processes.

        The container is held afterwards. Raises CheckpointError; then it isn't, and the application goes on. What was
        in `images` is older than the running application, and deleted. Cancelled, it takes as long and has the same
        effect. If `unless` is set before all memory is written, the dump is given up at once (GivenUp).
        `close`: established TCP connections aren't dumped but end with the processes; neither that nor `keep`: a dump
        with such connections fails. `stop_clock`: the application's monotonic clock stands still until the restore.
        """
        store.discard(images)
        try:
            saved, tree = self._survey(init_pid)
            images.mkdir(mode=0o700)
            saved.write(store.beside(images))
            Kept.hold(init_pid, [process.pid for process in tree], images)
            await init.take_hold(init_pid)
        except BaseException as error:
            store.discard(images)
            if isinstance(error, OSError | run.CommandError):
                raise CheckpointError(_sentence(error)) from error
            raise
        try:
            await self._dump(init_pid, images, saved, tree, unless, *([_tcp(close)] if close or keep else []))
            await aftermath.gone(tree)
        except (Failed, OSError) as error:
            if store.complete(images) and not all(process.alive() for process in tree):
                # It was killed when all was written and some processes were ended: the others can't go on without them.
                aftermath.send(tree, signal.SIGKILL)
                await aftermath.gone(tree)
                _take_over(init_pid, images, saved, stop_clock)
                _pass_on(error)
                return
            refusal = _refusal(error, tree, images)
            with contextlib.suppress(ProcessLookupError):
                init.release(init_pid)
            store.discard(images)
            _pass_on(error)
            raise refusal from error
        _take_over(init_pid, images, saved, stop_clock)

    async def snapshot(self, init_pid: int, images: Path, unless: asyncio.Event) -> None:
        """Dumps the application of a container into the new folder `images`, and lets it go on: for people to look at,
        not for `restore()`. Connections that it hasn't accepted yet aren't in there.

        Raises CheckpointError; the folder is the caller's also then. Cancelled, it takes as long. If `unless` is set
        before all memory is written, the dump is given up at once (GivenUp).
        """
        try:
            saved, tree = self._survey(init_pid)
            images.mkdir(mode=0o700)
        except OSError as error:
            raise CheckpointError(_sentence(error)) from error
        try:
            await self._dump(init_pid, images, saved, tree, unless, _tcp(False), "--leave-running", "--skip-in-flight")
        except (Failed, OSError) as error:
            refusal = _refusal(error, tree, images)
            _pass_on(error)
            raise refusal from error

    async def _dump(
        self,
        init_pid: int,
        images: Path,
        saved: Saved,
        tree: Sequence[Process],
        unless: asyncio.Event | None,
        *options: str,
    ) -> None:
        """Raises Failed and OSError."""
        with ExitStack() as stack:
            # Not in the container's cgroups: it would be counted there, limited, and killed with the container.
            command = Command(self._bundle, "dump", init_pid, images, stack)
            command.add("-t", str(saved.guard), *_DUMP_OPTIONS, *options)
            if saved.sysv:
                command.stay_out_of_ipc()
            if unless is not None:
                stack.callback(asyncio.ensure_future(_give_up(images, unless)).cancel)
            await command.run(self._dump_timeout, tree)

    def loader(self, images: Path) -> Loader:
        """Starts what loads the memory of an application that is restored from `images` next. Raises RestoreError."""
        try:
            return Loader.start(images)
        except (OSError, run.CommandError) as error:
            raise RestoreError(f"what loads its memory can't be started: {error}") from error

    async def restore(
        self,
        init_pid: int,
        images: Path,
        cgroup: Cgroup | None = None,
        loader: Loader | None = None,
        *,
        close: bool = False,
    ) -> None:
        """Restores what `dump()` has dumped, in a container that is held, and lets go of it.

        `cgroup`: the container's; without it, init's is looked up. The images stay. Raises RestoreError; then what was
        restored half is gone, and another try is possible. With a `loader` (which `loader()` has started) private
        memory isn't restored, but loaded by it. `close` as it was for the dump: the application finds them closed.
        """
        since = aftermath.ticks()
        try:
            with ExitStack() as stack:
                saved = Saved.read(store.beside(images))
                command = Command(self._bundle, "restore", init_pid, images, stack)
                command.add("--restore-detached", _tcp(close))
                # A client waits: whoever knows the container's cgroup spares us to look it up among all mounts.
                command.join(cgroup or Cgroup.of(init_pid))
                if (guard := saved.attributes.get(saved.guard)) is not None:
                    command.resemble(guard)
                command.lend_pipes()
                if loader is not None:
                    command.add("--lazy-pages")
                if (kept := Kept.of(images)) is not None:
                    command.lend_kept(kept.inherit(images, stack))
                if saved.sysv:
                    # What an attempt before has left, or a daemon that was killed.
                    sysv.remove(init_pid, saved.sysv)
                    command.stay_out_of_ipc()
                    namespace = command.lend(os.open(f"/proc/{init_pid}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC))
                    command.add("--join-ns", f"ipc:/proc/self/fd/{namespace}")
                try:
                    await command.run(self._restore_timeout, loader=loader)
                except Failed:
                    await aftermath.clear(init_pid, since)
                    raise
                finally:
                    # Also when cancelled after CRIU's success. If there is nothing, it isn't let go of.
                    if init.guard_pid(init_pid) is not None:
                        with contextlib.suppress(OSError):
                            sysv.delete_again(init_pid, saved.sysv)
                        init.release(init_pid)
        except (Failed, OSError, LookupError, ValueError) as error:
            _pass_on(error)
            raise RestoreError(_sentence(error), getattr(error, "log", "")) from error

    async def verify(self, init_pid: int, images: Path) -> list[str]:
        """Compares every thread with what was saved before the dump; for right after a restore, off its hot path.

        Where they differ, CPU affinity (which CRIU doesn't restore) and oom_score_adj (which it restores unless it was
        0) are set. Raises AttributesChanged if a thread may do more than before: another LSM label, more capabilities,
        no NoNewPrivs, a weaker seccomp mode. Returns sentences about what else differs. What the application itself
        has given up since is seen as well; threads that it has ended or made since aren't.
        """
        guard = init.guard_pid(init_pid)
        return Saved.read(store.beside(images)).compare(processes.tree(guard) if guard is not None else [])

    def _survey(self, init_pid: int) -> tuple[Saved, list[Process]]:
        guard = init.guard_pid(init_pid)
        if guard is None:
            raise CheckpointError("there is no application below the container's init")
        bounding = int(processes.status(init_pid)["CapBnd"], 16)
        if bounding >> _CAP_SYS_PTRACE & 1 and not bounding >> _CAP_SYS_ADMIN & 1:
            # CRIU has the host's full rights and is visible in the container: who may trace it has them too.
            raise CheckpointError("the container has CAP_SYS_PTRACE, and could take over CRIU with it")
        pids = processes.tree(guard)
        if (why := obstacle(pids)) is not None:
            raise CheckpointError(why)
        try:
            segments = sysv.used(init_pid, pids)
        except sysv.Shared as error:
            raise CheckpointError(str(error)) from error
        return Saved.of(init_pid, guard, pids, segments), aftermath.identify(pids)


async def _give_up(images: Path, unless: asyncio.Event) -> None:
    """The library that is preloaded into CRIU looks for this file while memory is written: CRIU then fails, and cleans
    up after itself as in any other failure."""
    await unless.wait()
    (images / _GIVEN_UP).touch()


def _take_over(init_pid: int, images: Path, saved: Saved, stop_clock: bool) -> None:
    """What of a complete dump isn't to be restored as CRIU would."""
    with _or_warn(images, "timers that had expired aren't armed again"):
        expired.rearm(images)
    if not stop_clock:
        # Without it, CRIU leaves the processes in our time namespace.
        (images / "timens-0.img").unlink(missing_ok=True)
    if saved.sysv:
        with _or_warn(images, "System V segments can't be removed"):
            sysv.keep_only(images, saved.sysv)
            sysv.remove(init_pid, saved.sysv)
    with _or_warn(images, "open files have to be found by their paths"):
        if (kept := Kept.of(images)) is not None:
            kept.rewrite(images)
    # If it came too late, the restore mustn't find it.
    (images / _GIVEN_UP).unlink(missing_ok=True)


@contextlib.contextmanager
def _or_warn(images: Path, consequence: str) -> Iterator[None]:
    """The processes are in the images only: what fails now mustn't keep them there."""
    try:
        yield
    except (OSError, ValueError) as error:
        log.warning("%s: %s: %s", images, consequence, error)


def _refusal(error: Exception, tree: Sequence[Process], images: Path) -> CheckpointError:
    """A dump has failed: the processes are brought to go on, and it is said why."""
    aftermath.rescue(tree, stopped=isinstance(error, Failed) and error.killed)
    if (images / _GIVEN_UP).exists():
        return GivenUp("somebody wants the container")
    return CheckpointError(obstacle(process.pid for process in tree) or _sentence(error), getattr(error, "log", ""))


def _pass_on(error: Exception) -> None:
    """A cancellation isn't lost when CRIU fails meanwhile, as it does when the container is killed: who cancelled waits
    for the end of the task."""
    if isinstance(error, Failed) and error.cancelled is not None:
        raise error.cancelled


def _tcp(close: bool) -> str:
    return "--tcp-close" if close else "--tcp-established"


def _sentence(error: BaseException) -> str:
    if isinstance(error, ProcessLookupError):
        return f"the container has ended ({error})" if str(error) else "the container has ended"
    return str(error)
