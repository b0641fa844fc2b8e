"""Dumps a container's processes and restores them in place, with CRIU inside the container's own namespaces.

In the container, PID 1 is `native/init.c`. Below it stands the guard, below that the application. CRIU dumps and
restores the guard's tree; init, namespaces, mounts and log pipes stay. What steers init is a signal that only a process
outside of the container can send: see the head of `init.c`.

`Criu.dump()` holds init first and releases it if it fails; `Criu.restore()` releases it after success. In between the
container is *held*: no process of the application is there, and the container lives all the same.

A CRIU that has begun is never interrupted, for a killed one leaves sockets in repair mode and processes half made. When
the caller is cancelled, it waits for CRIU's end first. When the daemon is killed, CRIU goes on (it writes to files, not
to pipes), and the next daemon finds either the processes or complete images (see `complete()`).

A checkpoint is a folder of images (mode 0700: it has the application's memory) and, beside it, `<folder>.json`: what is
needed to restore it and to see whether it is what it was, also after a restart of the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from criproxy import run
from criproxy.criu import aftermath, criu_log, expired, sysv
from criproxy.criu.bundle import Bundle
from criproxy.criu.kept import Kept
from criproxy.criu.obstacles import obstacle
from criproxy.criu.pages import Loader
from criproxy.criu.saved import AttributesChanged, Saved
from criproxy.kernel import processes
from criproxy.kernel.cgroup import Cgroup
from criproxy.kernel.processes import ThreadAttributes

log = logging.getLogger(__name__)

DUMP_TIMEOUT: Final = 120.0
"""Seconds after which a dump is given up (and the application goes on). 10 GiB take 20 s on a slow disk."""

RESTORE_TIMEOUT: Final = 120.0

# The numbers of native/init.c.
_HOLD: Final = 61
_RELEASE: Final = 62
_START: Final = 63
_ORDERS: Final = sum(1 << (order - 1) for order in (_HOLD, _RELEASE, _START))

# How long init may take to see a signal. It is a matter of microseconds, unless its cgroup is frozen or starved.
_HEARING_SECONDS: Final = 0.5

_CAP_KILL: Final = 5
_CAP_SYS_PTRACE: Final = 19
_CAP_SYS_ADMIN: Final = 21

_STDIO: Final = (0, 1, 2)

# As many as `enter` knows. The kernel leaves out what isn't there, or isn't the container's.
_EVERY_PROCESSOR: Final = "0-1023"

# How long a CRIU whose loader has ended may take to say why.
_LAST_WORDS_SECONDS: Final = 0.5

SAID: Final = ("dump.log", "stats-dump")
"""What CRIU writes about a dump, beside the images."""

# The name is known to native/preload.c.
_GIVEN_UP: Final = "given-up"

_OPTIONS: Final = ("--file-locks", "--ext-unix-sk", "--manage-cgroups=ignore")
# The lock is the pod's eBPF program. CRIU notes it in the images, and says so if it is given again for a restore.
_DUMP_OPTIONS: Final = ("--network-lock", "skip", "--link-remap", "--ghost-limit", "64M")


class CheckpointError(Exception):
    """The processes couldn't be dumped and go on as before. `reason` is for people, `log` CRIU's own, if any."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.log = log


class GivenUp(CheckpointError):
    """A dump was given up because its caller wanted it so; the processes go on as before."""


class RestoreError(Exception):
    """The processes couldn't be restored; the checkpoint is still there and the container still held."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.log = log


class OutOfMemory(RestoreError):
    """It was killed for a limit of the container's memory, or its pod's."""


# --- The container's init ---------------------------------------------------------------------------------------------


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


def _until_heard(init_pid: int) -> Iterator[float]:
    """Seconds to sleep, again and again, until init has taken all orders that were sent to it."""
    # Init sees pending signals by their number: a HOLD would overtake a RELEASE or START that it hasn't seen yet.
    deadline = time.monotonic() + _HEARING_SECONDS
    while _pending(init_pid) & _ORDERS:
        if time.monotonic() > deadline:
            raise CheckpointError("the container's init doesn't run: the container is paused, or has no processor time")
        yield 0.001


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
    sender, target = _status(init_pid), _status(app_pid)
    if int(sender["CapEff"], 16) >> _CAP_KILL & 1:
        return True
    real, effective = sender["Uid"].split()[:2]
    target_real, _effective, target_saved = target["Uid"].split()[:3]
    return bool({real, effective} & {target_real, target_saved})


def _guard(init_pid: int) -> tuple[int, int] | None:
    """The guard's number on the host, and the application's in the container, which is a part of the guard's name."""
    try:
        init = os.stat(f"/proc/{init_pid}/exe")
        for child in processes.children(init_pid):
            word, _space, number = processes.name(child).partition(" ")
            if word == "guard" and number.isdigit():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if os.path.samestat(os.stat(f"/proc/{child}/exe"), init):
                        return child, int(number)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return None


def _order(init_pid: int, signum: int) -> None:
    """Sends a signal to a container's init and to nothing else, whatever has become of the number."""
    pidfd = _open_init(init_pid)
    try:
        signal.pidfd_send_signal(pidfd, signum)
    finally:
        os.close(pidfd)


def _open_init(init_pid: int) -> int:
    """A pidfd of the container's init. Raises ProcessLookupError if the number isn't that of a namespace's PID 1."""
    pidfd = os.pidfd_open(init_pid)
    try:
        # After the descriptor, so that what is looked at and what the descriptor stands for are the same.
        numbers = _status(init_pid)["NSpid"].split()
        if len(numbers) < 2 or numbers[-1] != "1":
            raise ProcessLookupError(f"Process {init_pid} isn't the first one of a container")
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


def _pending(pid: int) -> int:
    """The signals that a process has been sent and has not taken yet, as a set of bits."""
    return int(_status(pid)["ShdPnd"], 16)


def _status(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"There is no process {pid}") from None
    return {name: value.strip() for name, _colon, value in (line.partition(":") for line in text.splitlines())}


# --- CRIU -------------------------------------------------------------------------------------------------------------


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
        stop_clock: bool = True,
    ) -> float:
        """Dumps the application of a container into the new folder `images` and ends its processes; returns how long.

        The container is held afterwards. Raises CheckpointError; then it isn't, and the application goes on. What was
        in `images` is older than the running application, and deleted. Cancelled, it takes as long and has the same
        effect. If `unless` is set before all memory is written, the dump is given up at once (GivenUp).
        `close`: established TCP connections aren't dumped but end with the processes. `stop_clock`: the application's
        monotonic clock stands still until the restore.
        """
        began = time.monotonic()
        discard(images)
        try:
            saved, tree = self._survey(init_pid)
            images.mkdir(mode=0o700)
            saved.write(_beside(images))
            Kept.hold(init_pid, [process.pid for process in tree], images)
            await take_hold(init_pid)
        except asyncio.CancelledError:
            discard(images)
            raise
        except (OSError, run.CommandError) as error:
            discard(images)
            raise CheckpointError(_sentence(error)) from error
        except CheckpointError:
            discard(images)
            raise
        try:
            await self._dump(init_pid, images, saved, tree, unless, _tcp(close))
            await aftermath.gone(tree)
        except (_Failed, OSError) as error:
            if complete(images) and not all(process.alive() for process in tree):
                # It was killed when all was written and some processes were ended: the others can't go on without them.
                aftermath.send(tree, signal.SIGKILL)
                await aftermath.gone(tree)
                _rearm(images)
                _take_over(init_pid, images, saved, stop_clock)
                (images / _GIVEN_UP).unlink(missing_ok=True)
                _pass_on(error)
                return time.monotonic() - began
            refusal = _refusal(error, tree, images)
            with contextlib.suppress(ProcessLookupError):
                release(init_pid)
            discard(images)
            _pass_on(error)
            raise refusal from error
        _rearm(images)
        _take_over(init_pid, images, saved, stop_clock)
        # If it came too late, the restore mustn't find it.
        (images / _GIVEN_UP).unlink(missing_ok=True)
        return time.monotonic() - began

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
        except (_Failed, OSError) as error:
            refusal = _refusal(error, tree, images)
            _pass_on(error)
            raise refusal from error

    async def _dump(
        self,
        init_pid: int,
        images: Path,
        saved: Saved,
        tree: Sequence[processes.Process],
        unless: asyncio.Event | None,
        *options: str,
    ) -> None:
        """Raises _Failed and OSError."""
        with ExitStack() as stack:
            folder = _folder(images, stack)
            # Not in the container's cgroups: it would be counted there, limited, and killed with the container.
            enter = self._enter(init_pid, stack, cgroups=(), in_ipc=not saved.sysv)
            action = ["dump", "-t", str(saved.guard), *_images(folder, "dump.log"), *_OPTIONS, *_DUMP_OPTIONS, *options]
            if unless is not None:
                stack.callback(asyncio.ensure_future(_give_up(images, unless)).cancel)
            await self._run([*enter.argv, *action], (*enter.fds, folder), self._dump_timeout, images / "dump.log", tree)

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
    ) -> float:
        """Restores what `dump()` has dumped, in a container that is held, and lets go of it; returns how long.

        `cgroup`: the container's; without it, init's is looked up. The images stay. Raises RestoreError; then what was
        restored half is gone, and another try is possible. With a `loader` (which `loader()` has started) private
        memory isn't restored, but loaded by it. `close` as it was for the dump: the application finds them closed.
        """
        began = time.monotonic()
        since = aftermath.ticks()
        try:
            with ExitStack() as stack:
                saved = Saved.read(_beside(images))
                # A client waits: whoever knows the container's cgroup spares us to look it up among all mounts.
                cgroup_fds = (cgroup or Cgroup.of(init_pid)).join_fds()
                for descriptor in cgroup_fds:
                    stack.callback(os.close, descriptor)
                folder = _folder(images, stack)
                pipes = _pipes(init_pid, stack)
                enter = self._enter(
                    init_pid,
                    stack,
                    cgroups=cgroup_fds,
                    like=saved.attributes.get(saved.guard),
                    in_ipc=not saved.sysv,
                )
                action = ["restore", "--restore-detached", *_images(folder, "restore.log"), *_OPTIONS, _tcp(close)]
                if loader is not None:
                    action.append("--lazy-pages")
                for inode, descriptor in pipes.items():
                    action += ["--inherit-fd", f"fd[{descriptor}]:pipe:[{inode}]"]
                fds = [*enter.fds, *cgroup_fds, folder, *pipes.values()]
                environment: Mapping[str, str] = {}
                if (kept := Kept.of(images)) is not None:
                    inheritance = kept.inherit(images, stack)
                    action += inheritance.options
                    fds += inheritance.descriptors
                    environment = inheritance.environment
                if saved.sysv:
                    # What an attempt before has left, or a daemon that was killed.
                    sysv.remove(init_pid, saved.sysv)
                    namespace = os.open(f"/proc/{init_pid}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
                    stack.callback(os.close, namespace)
                    action += ["--join-ns", f"ipc:/proc/self/fd/{namespace}"]
                    fds.append(namespace)
                try:
                    await self._run(
                        [*enter.argv, *action],
                        fds,
                        self._restore_timeout,
                        images / "restore.log",
                        loader=loader,
                        environment=environment,
                    )
                except _Failed:
                    await aftermath.clear(init_pid, since)
                    raise
                finally:
                    # Also when cancelled after CRIU's success. If there is nothing, it isn't let go of.
                    if guard_pid(init_pid) is not None:
                        with contextlib.suppress(OSError):
                            sysv.delete_again(init_pid, saved.sysv)
                        release(init_pid)
        except (_Failed, OSError, LookupError, ValueError) as error:
            _pass_on(error)
            raise RestoreError(_sentence(error), getattr(error, "log", "")) from error
        return time.monotonic() - began

    async def verify(self, init_pid: int, images: Path) -> list[str]:
        """Compares every thread with what was saved before the dump; for right after a restore, off its hot path.

        Where they differ, CPU affinity (which CRIU doesn't restore) and oom_score_adj (which it restores unless it was
        0) are set. Raises AttributesChanged if a thread may do more than before: another LSM label, more capabilities,
        no NoNewPrivs, a weaker seccomp mode. Returns sentences about what else differs. What the application itself
        has given up since is seen as well; threads that it has ended or made since aren't.
        """
        guard = guard_pid(init_pid)
        return Saved.read(_beside(images)).compare(processes.tree(guard) if guard is not None else [])

    def _survey(self, init_pid: int) -> tuple[Saved, list[processes.Process]]:
        guard = guard_pid(init_pid)
        if guard is None:
            raise CheckpointError("there is no application below the container's init")
        bounding = int(_status(init_pid)["CapBnd"], 16)
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

    def _enter(
        self,
        init_pid: int,
        stack: ExitStack,
        *,
        cgroups: Sequence[int],
        like: ThreadAttributes | None = None,
        in_ipc: bool = True,
    ) -> _Enter:
        """`in_ipc`: in the container's IPC namespace, too."""
        pidfd = _open_init(init_pid)
        stack.callback(os.close, pidfd)
        argv = [str(self._bundle.enter), "--pidfd", str(pidfd)]
        for descriptor in cgroups:
            argv += ["--cgroup-fd", str(descriptor)]
        if like is not None:
            # An affinity that is set outlives changes of the container's, unless it names every processor there may be.
            argv += ["--cpu-affinity", ",".join(map(str, sorted(like.affinity))) or _EVERY_PROCESSOR]
            argv += ["--oom-score-adj", str(like.oom_score_adj)]
        if not in_ipc:
            argv += ["--without", "ipc"]
        return _Enter([*argv, "--", *self._bundle.criu_argv()], (pidfd,))

    async def _run(
        self,
        argv: list[str],
        fds: Sequence[int],
        timeout: float,
        log: Path,
        tree: Sequence[processes.Process] = (),
        loader: Loader | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Raises _Failed. `tree` is what is stopped before CRIU is killed after the time-out, or without its loader."""
        output = log.with_suffix(".out")
        try:
            with open(output, "wb") as stream, ExitStack() as stack:
                running = stack.enter_context(
                    run.start(
                        argv,
                        pass_fds=fds,
                        stdout=stream.fileno(),
                        stderr=stream.fileno(),
                        env={**self._bundle.environment, **(environment or {})},
                    )
                )
                code, cancelled = await _to_the_end(running, timeout, loader)
                if code is None:
                    # What is traced stops when CRIU's death lets go of it, before it can use what CRIU has changed.
                    aftermath.send(tree, signal.SIGSTOP)
                    await _kill_criu(running)
        except run.CommandError as error:
            raise _Failed(str(error)) from error
        if code != 0:
            text = _read(output) + _read(log)
            ended = f"ended with code {code}"
            if code is None and loader is not None and not loader.loaded():
                raise _Failed(
                    f"what loads its memory has ended: {loader.last_words()}",
                    criu_log.tail(text),
                    cancelled,
                    killed=True,
                )
            if code is None:
                raise _Failed(
                    f"CRIU took longer than {timeout:g} s and was ended", criu_log.tail(text), cancelled, killed=True
                )
            raise _Failed(criu_log.reason(text, ended), criu_log.tail(text), cancelled)
        if cancelled is not None:
            raise cancelled


def _rearm(images: Path) -> None:
    try:
        expired.rearm(images)
    except (OSError, ValueError, DecodeError) as error:
        log.warning("%s: timers that had expired aren't armed again: %s", images, error)


def _take_over(init_pid: int, images: Path, saved: Saved, stop_clock: bool) -> None:
    """What of a complete dump isn't to be restored as CRIU would."""
    if not stop_clock:
        # Without it, CRIU leaves the processes in our time namespace.
        (images / "timens-0.img").unlink(missing_ok=True)
    if saved.sysv:
        try:
            sysv.keep_only(images, saved.sysv)
            sysv.remove(init_pid, saved.sysv)
        except (OSError, ValueError, DecodeError) as error:
            log.warning("%s: System V segments can't be removed: %s", images, error)
    try:
        if (kept := Kept.of(images)) is not None:
            kept.rewrite(images)
    except (OSError, ValueError, DecodeError) as error:
        log.warning("%s: open files have to be found by their paths: %s", images, error)


def _refusal(error: Exception, tree: Sequence[processes.Process], images: Path) -> CheckpointError:
    """A dump has failed: the processes are brought to go on, and it is said why."""
    aftermath.rescue(tree, stopped=isinstance(error, _Failed) and error.killed)
    if (images / _GIVEN_UP).exists():
        return GivenUp("somebody wants the container")
    return CheckpointError(obstacle(process.pid for process in tree) or _sentence(error), getattr(error, "log", ""))


def complete(images: Path) -> bool:
    """Whether a folder has all images of a dump, also of one that a daemon which was killed has begun.

    CRIU writes the inventory last, before it ends the processes.
    """
    return (images / "inventory.img").exists() and _beside(images).exists()


def link(images: Path, folder: Path) -> None:
    """The images, and what CRIU says of them, in the new folder, too: there they stay as they are, whatever becomes of
    the checkpoint. Raises OSError."""
    folder.mkdir(mode=0o700)
    for path in images.iterdir():
        if path.suffix == ".img" or path.name in SAID:
            os.link(path, folder / path.name)


def spoil(images: Path) -> None:
    """What is there is no complete checkpoint any more, to nobody. Idempotent."""
    (images / "inventory.img").unlink(missing_ok=True)


def discard(images: Path) -> None:
    """Deletes a checkpoint, if there is one. Idempotent."""
    # The inventory first: what is deleted half must not look complete.
    spoil(images)
    with contextlib.suppress(OSError, ValueError):
        if (kept := Kept.of(images)) is not None:
            kept.close()
    shutil.rmtree(images, ignore_errors=True)
    _beside(images).unlink(missing_ok=True)


# --- Inside -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Enter:
    argv: list[str]
    fds: tuple[int, ...]


class _Failed(Exception):
    def __init__(
        self,
        reason: str,
        log: str = "",
        cancelled: asyncio.CancelledError | None = None,
        *,
        killed: bool = False,
    ) -> None:
        """`cancelled`: what came while CRIU ran. `killed`: by us, after we had stopped the processes."""
        super().__init__(reason)
        self.log = log
        self.cancelled = cancelled
        self.killed = killed


def _pass_on(error: Exception) -> None:
    """A cancellation isn't lost when CRIU fails meanwhile, as it does when the container is killed: who cancelled waits
    for the end of the task."""
    if isinstance(error, _Failed) and error.cancelled is not None:
        raise error.cancelled


def _tcp(close: bool) -> str:
    return "--tcp-close" if close else "--tcp-established"


def _beside(images: Path) -> Path:
    return images.with_name(f"{images.name}.json")


def _folder(images: Path, stack: ExitStack) -> int:
    descriptor = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def _images(folder: int, log: str) -> list[str]:
    """By descriptor: the container has no path to it, and must not have one."""
    return ["-D", f"/proc/self/fd/{folder}", "-W", f"/proc/self/fd/{folder}", "-o", log, "-v2"]


def _pipes(init_pid: int, stack: ExitStack) -> dict[int, int]:
    """Init's standard streams as far as they are pipes: a descriptor of ours by their inode.

    Opened for reading *and* writing, and kept open while CRIU runs, as CRIU opens them once more in the application's
    own mode: that would block for ever where the other end is gone (a closed stdin).
    """
    pipes: dict[int, int] = {}
    for number in _STDIO:
        path = f"/proc/{init_pid}/fd/{number}"
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(path)
            if target.startswith("pipe:[") and (inode := int(target[6:-1])) not in pipes:
                pipes[inode] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                stack.callback(os.close, pipes[inode])
    return pipes


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


async def _give_up(images: Path, unless: asyncio.Event) -> None:
    """The library that is preloaded into CRIU looks for this file while memory is written: CRIU then fails, and cleans
    up after itself as in any other failure."""
    await unless.wait()
    (images / _GIVEN_UP).touch()


async def _kill_criu(running: run.Running) -> None:
    """Kills CRIU and not its launcher: that one reaps it. The launcher's end would kill CRIU too, but when?"""
    deadline = time.monotonic() + run.KILL_GRACE
    while running.poll() is None and time.monotonic() < deadline:
        aftermath.send(aftermath.identify(processes.children(running.pid)), signal.SIGKILL)
        await _to_the_end(running, 0.02)


def _sentence(error: BaseException) -> str:
    if isinstance(error, ProcessLookupError):
        return f"the container has ended ({error})" if str(error) else "the container has ended"
    return str(error)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


__all__ = [
    "SAID",
    "AttributesChanged",
    "CheckpointError",
    "Criu",
    "GivenUp",
    "OutOfMemory",
    "RestoreError",
    "application_pid",
    "complete",
    "discard",
    "guard_pid",
    "hold",
    "link",
    "may_signal",
    "release",
    "spoil",
    "start",
    "take_hold",
]
