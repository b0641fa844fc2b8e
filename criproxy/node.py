"""All pods of this node that opted in, and what is kept of them on disk across a restart of the daemon."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from criproxy import checkpoint, policy, processes
from criproxy.checkpoint import Criu
from criproxy.config import Config
from criproxy.container import Record, State
from criproxy.sandbox import Member, Sandbox, SandboxRecord

log = logging.getLogger(__name__)


class Node:
    def __init__(self, config: Config, criu: Criu, pins: Path) -> None:
        """`pins`: folder on the daemon's bpf file system; each sandbox gets one below it."""
        self._config = config
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
        try:
            await sandbox.attach()
        except Exception as error:
            log.exception("%s/%s: no hook in the pod's network", record.namespace, record.name)
            record.problem = f"the hook in the pod's network failed: {error}"
        self._save(record)
        return sandbox

    async def stopped_sandbox(self, sandbox_id: str) -> None:
        """The runtime has stopped the sandbox: its containers are dead, its network namespace is gone."""
        if sandbox := self.sandboxes.get(sandbox_id):
            for member in sandbox.containers.values():
                await member.close()
            sandbox.detach()

    async def removed_sandbox(self, sandbox_id: str) -> None:
        await self.stopped_sandbox(sandbox_id)
        if sandbox := self.sandboxes.pop(sandbox_id, None):
            for container_id in list(sandbox.containers):
                self._forget(sandbox, container_id)
            self._path(sandbox_id).unlink(missing_ok=True)

    # --- containers come and go ----------------------------------------------------------------------------

    def add_container(self, sandbox: Sandbox, record: Record) -> Member:
        return sandbox.add(record, self._container_folder / record.id)

    async def removed_container(self, container_id: str) -> None:
        for sandbox in self.sandboxes.values():
            if member := sandbox.containers.get(container_id):
                await member.close()
                self._forget(sandbox, container_id)

    def _forget(self, sandbox: Sandbox, container_id: str) -> None:
        member = sandbox.containers.pop(container_id)
        shutil.rmtree(member.folder, ignore_errors=True)

    # --- the daemon comes and goes -------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Carries on from what an earlier daemon left on disk, in pins and in the kernel."""
        for path in sorted(self._sandbox_folder.glob("*.json")):
            record = SandboxRecord(**json.loads(path.read_text()))
            if not record.problem and not Path(record.netns).exists():
                record.problem = "its network namespace is gone"
            sandbox = await self.add_sandbox(record)
            for folder in self._container_folder.iterdir():
                state = folder / "state.json"
                if state.exists():
                    container = Record.from_json(json.loads(state.read_text()))
                    if container.sandbox_id == record.id:
                        self._adopt_container(sandbox, container, folder)
        known = {m.record.id for m in self.members()}
        for folder in self._container_folder.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder)

    def _adopt_container(self, sandbox: Sandbox, record: Record, folder: Path) -> None:
        member = sandbox.add(record, folder)
        if not record.pid or record.state in (State.DISABLED, State.EXITED):
            return
        if not processes.alive(record.pid, record.start_time):
            record.state = State.EXITED
            member.save()
            return
        # What the record says was about to happen may or may not have happened: the processes tell.
        tree = checkpoint.guard_pid(record.pid) is not None
        if record.state is State.CHECKPOINTING and tree:
            checkpoint.release(record.pid)
        record.state = State.RUNNING if tree else State.SCALED_DOWN
        sandbox.start(member)
        log.info("%s/%s/%s: adopted, %s", record.namespace, record.pod, record.name, record.state)

    async def close(self) -> None:
        for sandbox in self.sandboxes.values():
            await sandbox.close()

    # --- inside --------------------------------------------------------------------------------------------

    def _sandbox(self, record: SandboxRecord) -> Sandbox:
        parsed = policy.parse(record.annotations, record.runtime_handler)
        assert parsed is not None  # it opted in, or there were no record
        return Sandbox(record, parsed, self._config, self._criu, self._pins / record.id)

    def _path(self, sandbox_id: str) -> Path:
        return self._sandbox_folder / f"{sandbox_id}.json"

    def _save(self, record: SandboxRecord) -> None:
        draft = self._path(record.id).with_suffix(".new")
        draft.write_text(record.to_json())
        draft.replace(self._path(record.id))
