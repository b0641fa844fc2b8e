"""All pods of this node that opted in, and what is kept of them on disk across a restart of the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TypeVar

from criproxy.annotations import policy_of
from criproxy.config import Config
from criproxy.cri import rewrite
from criproxy.cri.runtime import CriError, Runtime
from criproxy.criu import init, store
from criproxy.criu.checkpoint import Criu
from criproxy.files import write_whole
from criproxy.freezer import Freezer
from criproxy.hook import host_network, kinds
from criproxy.hook.slots import NetworkError
from criproxy.kernel import cgroup, processes
from criproxy.kernel.bpf import BpfError
from criproxy.kernel.cgroup import Cgroup
from criproxy.kubelet import connections as kubelet
from criproxy.policy import Tier
from criproxy.record import Record, State
from criproxy.sandbox import Member, Sandbox, SandboxRecord

log = logging.getLogger(__name__)

_Record = TypeVar("_Record")


class Node:
    def __init__(self, config: Config, runtime: Runtime, criu: Criu, pins: Path) -> None:
        """`pins`: folder on the daemon's bpf file system; each sandbox gets one below it."""
        self._config = config
        self._runtime = runtime
        self._criu = criu
        self._pins = pins
        self._sandbox_folder = config.state_dir / "sandboxes"
        self._container_folder = config.state_dir / "containers"
        for folder in (self._sandbox_folder, self._container_folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.sandboxes: dict[str, Sandbox] = {}

    def members(self) -> Iterator[Member]:
        for sandbox in self.sandboxes.values():
            yield from sandbox.containers.values()

    def member(self, container_id: str) -> Member | None:
        """By its full id, as CRI calls name it."""
        return next((m for m in self.members() if m.record.id == container_id), None)

    # --- pods come and go ----------------------------------------------------------------------------------

    async def add_sandbox(self, record: SandboxRecord) -> Sandbox:
        """A pod that opted in has its sandbox. What fails here disables its scale-down, never the pod."""
        sandbox = self._sandbox(record)
        self.sandboxes[record.id] = sandbox
        if not record.problem:
            try:
                # containerd may be away when a pod is adopted; where its network is doesn't change.
                record.netns = record.netns or str(await self._netns(record.id))
                if host_network.is_hosts(Path(record.netns)) and not sandbox.policy.ports:
                    raise NetworkError(f"it is the host's (hostNetwork), {rewrite.HOSTS_PORTS}")
                # Before the act: a hook must not be left behind that no record tells of.
                self._save(record)
                await sandbox.attach()
            except Exception as error:
                expected = isinstance(error, (NetworkError, BpfError, CriError, OSError))
                record.problem = f"there is no hook in the pod's network: {error}"
                log.warning("%s/%s: %s", record.namespace, record.name, record.problem, exc_info=not expected)
                with contextlib.suppress(OSError):
                    self._save(record)
        return sandbox

    async def _netns(self, sandbox_id: str) -> Path:
        info = await self._runtime.sandbox_status(sandbox_id)
        return info.netns or host_network.of_pod(info.pid)

    async def stopped_sandbox(self, sandbox_id: str) -> None:
        """The runtime has stopped the sandbox: its containers are dead, its network namespace is gone."""
        if sandbox := self.sandboxes.get(sandbox_id):
            for member in list(sandbox.containers.values()):
                await member.close()
            await sandbox.detach()
            # kubelet may remove it much later: the next daemon needn't look for a network that is gone.
            sandbox.record.problem = "the pod has been stopped"
            with contextlib.suppress(OSError):
                self._save(sandbox.record)

    async def removed_sandbox(self, sandbox_id: str) -> None:
        await self.stopped_sandbox(sandbox_id)
        if sandbox := self.sandboxes.pop(sandbox_id, None):
            for container_id in list(sandbox.containers):
                self._forget(sandbox, container_id)
            try:
                self._path(sandbox_id).unlink(missing_ok=True)
            except OSError as error:
                # The pod is gone all the same; `adopt` passes its record over.
                log.error("sandbox %s: its record can't be deleted: %s", sandbox_id, error)

    # --- containers come and go ----------------------------------------------------------------------------

    def add_container(self, sandbox: Sandbox, record: Record) -> Member:
        """The runtime has made a container. What fails here must not tell kubelet otherwise."""
        member = sandbox.add(record, self._container_folder / record.id)
        try:
            member.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            member.save()
        except OSError as error:
            member.disable(f"its state can't be written to the disk: {error.strerror}")
        return member

    async def started_container(self, member: Member) -> None:
        """The runtime has started a container of a pod that opted in."""
        record = member.record
        if record.state not in (State.STARTING, State.DISABLED) or record.pid:
            return
        try:
            record.pid = (await self._runtime.container_status(record.id)).pid
            record.start_time = processes.start_time(record.pid)
            if record.state is State.DISABLED:
                member.disable(record.reason)
            else:
                self.sandboxes[record.sandbox_id].start(member)
        except ProcessLookupError:
            record.state = State.EXITED
            member.save()
        except CriError as error:
            member.disable(record.reason or f"its process is not known: {error}")
        except Exception as error:
            # It runs, and kubelet must not be told otherwise: it would start another one beside it.
            expected = isinstance(error, (NetworkError, BpfError, LookupError, OSError))
            log.warning("container %s is left alone: %s", record.id, error, exc_info=not expected)
            member.disable(str(error))

    async def removed_container(self, container_id: str) -> None:
        if member := self.member(container_id):
            await member.close()
            self._forget(self.sandboxes[member.record.sandbox_id], container_id)

    def _forget(self, sandbox: Sandbox, container_id: str) -> None:
        # kubelet asks again while its first call is still at work.
        if member := sandbox.containers.pop(container_id, None):
            shutil.rmtree(member.folder, ignore_errors=True)

    # --- the daemon comes and goes -------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Carries on from what an earlier daemon left on disk, in pins and in the kernel.

        Without this daemon the node has no runtime: what can't be taken over is left as it is, and said so.
        """
        records = _read(self._sandbox_folder.glob("*.json"), SandboxRecord)
        containers = _read(self._container_folder.glob("*/state.json"), Record)
        try:
            there = {sandbox.id for sandbox in await self._runtime.list_pod_sandboxes()}
        except CriError as error:
            log.warning("which pods are still there is not known, all are taken over: %s", error)
            there = {record.id for record in records.values()}
        for path, record in sorted(records.items()):
            if record.id not in there:
                path.unlink()
                kinds.discard(self._pins / record.id)
                continue
            try:
                await self._adopt_sandbox(record, containers)
            except Exception:
                log.exception("%s/%s can't be taken over", record.namespace, record.name)
        await self._collect_pins(there)
        for folder in self._container_folder.iterdir():
            state = folder / "state.json"
            if (state in containers and containers[state].sandbox_id not in there) or not state.exists():
                shutil.rmtree(folder, ignore_errors=True)

    async def _collect_pins(self, there: Collection[str]) -> None:
        """Removes hooks that no record tells of: they cost memory, and what they park nobody would deliver."""
        # Those of records that can't be read stay: another version may.
        known = {path.stem for path in self._sandbox_folder.glob("*.json")}
        found = list(self._pins.iterdir()) if self._pins.exists() else []
        for pins in found:
            # The kernel has files of its own there.
            if pins.name in known or pins.name == kubelet.FOLDER or not pins.is_dir():
                continue
            log.warning("pod sandbox %s: nothing is known of its hook, which is removed", pins.name)
            if pins.name in there:
                with contextlib.suppress(NetworkError, CriError, OSError):
                    netns = await self._netns(pins.name)
                    await asyncio.to_thread(kinds.kind(netns).network.strip, netns)
            with contextlib.suppress(OSError):
                kinds.discard(pins)

    async def _adopt_sandbox(self, record: SandboxRecord, containers: Mapping[Path, Record]) -> None:
        sandbox = await self.add_sandbox(record)
        for state, container in containers.items():
            if container.sandbox_id != record.id:
                continue
            member = sandbox.add(container, state.parent)
            try:
                await self._adopt_container(sandbox, member)
            except Exception as error:
                log.warning("container %s can't be taken over", container.id, exc_info=True)
                # Not on disk: what is there is what the next daemon has to know, and it may do better.
                container.state, container.reason = State.DISABLED, f"it could not be taken over: {error}"

    async def _adopt_container(self, sandbox: Sandbox, member: Member) -> None:
        record, folder = member.record, member.folder
        if record.state is State.STARTING and not record.pid:
            if (await self._runtime.container_status(record.id)).running:
                await self.started_container(member)
        elif record.state is State.EXITED or (record.state is State.DISABLED and not record.pid):
            sandbox.release(member)
        elif not processes.alive(record.pid, record.start_time):
            store.discard(folder / "checkpoint")
            record.state = State.EXITED
            sandbox.release(member)
        elif record.state is State.DISABLED:
            sandbox.release(member)
            member.disable(record.reason)
        else:
            while _criu_at_work(record.pid):
                # It goes on without the daemon that started it, and what becomes of them is open until its end.
                await asyncio.sleep(0.02)
            cgroup.restore_limits(folder / "limits.json")
            record.state = _found(record)
            sandbox.start(member)
            log.info("%s/%s/%s: adopted, %s", record.namespace, record.pod, record.name, record.state)

    async def close(self) -> None:
        for sandbox in self.sandboxes.values():
            await sandbox.close()

    # --- inside --------------------------------------------------------------------------------------------

    def _sandbox(self, record: SandboxRecord) -> Sandbox:
        parsed = policy_of(record.annotations, record.runtime_handler, default_duration=self._config.scaledown_duration)
        assert parsed is not None  # it opted in, or there were no record
        return Sandbox(record, parsed, self._config, self._criu, self._pins / record.id)

    def _path(self, sandbox_id: str) -> Path:
        return self._sandbox_folder / f"{sandbox_id}.json"

    def _save(self, record: SandboxRecord) -> None:
        write_whole(self._path(record.id), record.to_json())


def _read(paths: Iterable[Path], kind: Callable[..., _Record]) -> dict[Path, _Record]:
    """The records that can be read. Fields that a newer version has put there are passed over; what another version
    means otherwise is left as it is."""
    known = inspect.signature(kind).parameters
    records = {}
    for path in paths:
        try:
            fields = json.loads(path.read_text()).items()
            records[path] = kind(**{name: value for name, value in fields if name in known})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.error("%s can't be read: %s", path, error)
    return records


def _criu_at_work(init_pid: int) -> bool:
    """Whether a CRIU that an earlier daemon has started dumps or restores this container now.

    It is in the container's PID namespace, and its parent, which no process of the container can have, isn't.
    """
    for pid in processes.in_namespace(init_pid):
        with contextlib.suppress(ProcessLookupError):
            if PurePath(processes.executable(processes.parent(pid))).name == "enter":
                return True
    return False


def _found(record: Record) -> State:
    """The state of a container that an earlier daemon had. What its record says was about to happen may or may not
    have happened: the freezer and the processes tell."""
    freezer = Freezer(Cgroup.of(record.pid).whole(record.id))
    if record.tier == Tier.FREEZE and freezer.asked():
        if freezer.frozen():
            return State.SCALED_DOWN
        freezer.thaw()
    if not record.bundle:
        return State.RUNNING
    tree = init.guard_pid(record.pid) is not None
    if tree and record.tier == Tier.RESTART and record.state is State.CHECKPOINTING:
        # It has been asked to end, and its end isn't to be the container's.
        init.hold(record.pid)
        return State.SCALED_DOWN
    if tree and record.state in (State.CHECKPOINTING, State.SCALED_DOWN, State.RESTORING):
        # A dump that failed, or a restore of which nobody has written down the end, or even the beginning: either way
        # the container is still held, and wouldn't end with its application.
        init.release(record.pid)
    return State.RUNNING if tree else State.SCALED_DOWN
