"""Pods and containers as they come, go, and are found by the next daemon; no network, no processes of theirs."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from criproxy import node as node_module
from criproxy.config import Config
from criproxy.cri.runtime import Runtime, Unreachable
from criproxy.criu import init
from criproxy.criu.checkpoint import Criu
from criproxy.hook import kinds
from criproxy.hook.gate import Gate
from criproxy.hook.pod_maps import Park
from criproxy.hook.slots import NetworkError
from criproxy.kernel import processes
from criproxy.kernel.cgroup import Cgroup
from criproxy.node import Node
from criproxy.record import Record, State
from criproxy.sandbox import Member, Sandbox, SandboxRecord

GONE = 2**22 + 1
"""No process has this number."""


class Network:
    """Notes what is asked of a pod's hook."""

    made: ClassVar[list[Network]] = []
    broken = False
    stripped: ClassVar[list[Path]] = []
    discarded: ClassVar[list[str]] = []

    def __init__(self, netns: Path) -> None:
        self.netns = netns
        self.log: list[object] = []

    @classmethod
    def attach(cls, netns: Path, pins: Path) -> Network:
        if cls.broken:
            raise NetworkError("no hook")
        cls.made.append(cls(netns))
        return cls.made[-1]

    def on_parked(self, callback: object) -> None: ...

    def off_parked(self) -> None: ...

    def detach(self) -> None:
        self.log.append("detached")

    def on_watched(self, callback: object) -> None: ...

    def listen(self) -> None:
        raise OSError("no network to listen in")

    def close(self) -> None: ...

    def park(self, slot: int, mode: Park, flows: object = ()) -> None:
        self.log.append(("park", slot, mode))

    def assign(self, slot: int, ports: object) -> None:
        self.log.append(("assign", slot, ports))

    @classmethod
    def discard(cls, pins: Path) -> None:
        cls.discarded.append(pins.name)

    @classmethod
    def strip(cls, netns: Path) -> None:
        cls.stripped.append(netns)


class FakeRuntime:
    """A containerd that is there or not."""

    def __init__(self) -> None:
        self.away = False
        self.there = ["pod"]
        self.pid = os.getpid()

    async def list_pod_sandboxes(self) -> list[Any]:
        if self.away:
            raise Unreachable("away")
        return [SimpleNamespace(id=name) for name in self.there]

    async def sandbox_status(self, _: str) -> Any:
        if self.away:
            raise Unreachable("away")
        return SimpleNamespace(netns=Path("/netns"))

    async def container_status(self, _: str) -> Any:
        return SimpleNamespace(pid=self.pid, running=True)


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def make(tmp_path: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Network, "made", [])
    monkeypatch.setattr(Network, "stripped", [])
    monkeypatch.setattr(Network, "discarded", [])
    monkeypatch.setattr(Network, "broken", False)
    monkeypatch.setattr(kinds, "_POD", kinds.Kind(cast(Any, Network), Gate, True))
    config = Config(state_dir=tmp_path / "state")
    return lambda: Node(config, cast(Runtime, runtime), cast(Criu, None), tmp_path / "pins")


def pod() -> SandboxRecord:
    return SandboxRecord("pod", "default", "web", {"criproxy.io/scaledown-duration": "1s"}, "")


def container(**fields: Any) -> Record:
    return Record(**{"id": "c1", "sandbox_id": "pod", "namespace": "default", "pod": "web", "name": "app", **fields})


def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The containers whose state machine was started; none is."""
    names: list[str] = []
    monkeypatch.setattr(Sandbox, "start", lambda self, member: names.append(member.record.id))
    return names


async def test_a_pod_is_taken_over_while_containerd_is_away(make: Any, runtime: FakeRuntime) -> None:
    await make().add_sandbox(pod())
    runtime.away = True
    node = make()
    await node.adopt()
    assert node.sandboxes["pod"].record.problem == ""
    assert [network.netns for network in Network.made] == [Path("/netns")] * 2


async def test_a_pod_that_was_stopped_is_not_hooked_again(make: Any) -> None:
    node = make()
    await node.add_sandbox(pod())
    await node.stopped_sandbox("pod")
    assert Network.made[0].log == ["detached"]
    later = make()
    await later.adopt()
    assert list(later.sandboxes) == ["pod"]
    assert len(Network.made) == 1


async def test_what_a_newer_version_has_put_into_the_records_is_passed_over(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = started(monkeypatch)
    node = make()
    sandbox = await node.add_sandbox(pod())
    record = container(state=State.SCALED_DOWN, pid=os.getpid(), start_time=processes.start_time(os.getpid()))
    node.add_container(sandbox, record)
    for path in (tmp_path / "state").glob("*s/**/*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "novelty": 1}))
    await make().adopt()
    assert names == ["c1"]


async def test_the_record_of_a_pod_is_there_before_its_hook(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def killed(_: Sandbox) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(Sandbox, "attach", killed)
    with pytest.raises(asyncio.CancelledError):
        await make().add_sandbox(pod())
    monkeypatch.undo()
    node = make()
    assert len(list(node._sandbox_folder.iterdir())) == 1


async def test_what_can_not_be_read_keeps_neither_the_daemon_nor_the_rest_from_starting(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = started(monkeypatch)
    monkeypatch.setattr(node_module, "_found", lambda record: State.SCALED_DOWN)
    node = make()
    sandbox = await node.add_sandbox(pod())
    mine = {"pid": os.getpid(), "start_time": processes.start_time(os.getpid()), "state": State.SCALED_DOWN}
    for name in ("c1", "c2", "c3"):
        node.add_container(sandbox, container(id=name, **mine))
    (node._container_folder / "c1" / "state.json").write_text("")
    later = node._container_folder / "c2" / "state.json"
    later.write_text(json.dumps(json.loads(later.read_text()) | {"state": "of_a_later_version"}))
    (node._sandbox_folder / "other.json").write_text("{")
    node = make()
    await node.adopt()
    assert names == ["c3"]
    # They may be asleep: what brings them back stays.
    assert (node._container_folder / "c1").is_dir()
    assert later.exists()


async def test_a_container_that_can_not_be_taken_over_is_left_to_the_next_daemon(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LookupError("it has no cgroup in sight")

    monkeypatch.setattr(node_module, "_found", broken)
    node = make()
    mine = {"pid": os.getpid(), "start_time": processes.start_time(os.getpid()), "state": State.SCALED_DOWN}
    node.add_container(await node.add_sandbox(pod()), container(**mine))
    node = make()
    await node.adopt()
    member = node.member("c1")
    assert member.record.state is State.DISABLED
    assert "no cgroup" in member.record.reason
    assert json.loads((member.folder / "state.json").read_text())["state"] == "scaled_down"


@pytest.mark.parametrize("state", [State.SCALED_DOWN, State.EXITED])
async def test_a_container_that_ended_without_a_daemon_leaves_nothing(make: Any, state: State) -> None:
    node = make()
    node.add_container(await node.add_sandbox(pod()), container(pid=GONE, slot=3, state=state))
    images = node._container_folder / "c1" / "checkpoint"
    if state is State.SCALED_DOWN:
        images.mkdir()
    node = make()
    await node.adopt()
    member = node.member("c1")
    assert member.record.state is State.EXITED
    assert member.record.slot is None
    assert ("park", 3, Park.PASS) in Network.made[-1].log
    assert ("assign", 3, ()) in Network.made[-1].log
    assert not images.exists()


async def test_what_belongs_to_no_pod_is_deleted(make: Any, runtime: FakeRuntime) -> None:
    node = make()
    node.add_container(await node.add_sandbox(pod()), container())
    runtime.there = []
    node = make()
    await node.adopt()
    assert list(node._container_folder.iterdir()) == list(node._sandbox_folder.iterdir()) == []


async def test_a_container_runs_although_its_state_machine_can_not(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise LookupError("it has no cgroup in sight")

    monkeypatch.setattr(Sandbox, "start", broken)
    node = make()
    member = node.add_container(await node.add_sandbox(pod()), container())
    await node.started_container(member)
    assert (member.record.state, member.record.reason) == (State.DISABLED, "it has no cgroup in sight")


@pytest.mark.parametrize("adopted", [False, True])
async def test_the_end_of_a_container_that_is_left_alone_is_noticed(
    make: Any, runtime: FakeRuntime, adopted: bool
) -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        runtime.pid = process.pid
        node = make()
        left_alone = container(state=State.DISABLED, reason="it has a terminal")
        member = node.add_container(await node.add_sandbox(pod()), left_alone)
        await node.started_container(member)
        assert (member.record.state, member.record.reason) == (State.DISABLED, "it has a terminal")
        if adopted:
            await node.close()
            node = make()
            await node.adopt()
            member = node.member("c1")
            assert (member.record.state, member.record.reason) == (State.DISABLED, "it has a terminal")
        process.kill()
        async with asyncio.timeout(5):
            while member.record.state is not State.EXITED:
                await asyncio.sleep(0.005)
    await member.ended()
    assert json.loads((member.folder / "state.json").read_text())["state"] == "exited"
    await node.close()


async def test_on_a_full_disk_pods_and_containers_come_and_go(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = make()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    sandbox = await node.add_sandbox(pod())
    assert "No space left" in sandbox.record.problem
    member = node.add_container(sandbox, container())
    assert "No space left" in member.record.reason
    await node.removed_container("c1")
    # kubelet asks again.
    await node.removed_container("c1")
    assert node.member("c1") is None


async def test_what_fails_after_a_container_s_end_does_not_keep_it_from_being_removed(tmp_path: Path) -> None:
    class Broken:
        async def exited(self) -> None:
            raise OSError("bug")

    member = Member(container(slot=1), tmp_path)
    member.container = member.gate = cast(Any, Broken())
    member._init_ended()
    await member.ended()
    assert member.container is member.record.slot is None


async def test_what_criu_is_at_work_on_is_not_touched_before_its_end(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    works = iter([True, True, False])

    def criu_at_work(_: int) -> bool:
        steps.append("criu")
        return next(works)

    def found(_: Record) -> State:
        steps.append("found")
        return State.SCALED_DOWN

    started(monkeypatch)
    monkeypatch.setattr(node_module, "_criu_at_work", criu_at_work)
    monkeypatch.setattr(node_module, "_found", found)
    node = make()
    mine = {"pid": os.getpid(), "start_time": processes.start_time(os.getpid()), "state": State.CHECKPOINTING}
    node.add_container(await node.add_sandbox(pod()), container(**mine))
    await make().adopt()
    assert steps == ["criu", "criu", "criu", "found"]


async def test_what_was_asked_to_end_by_the_last_daemon_does_not_end_its_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    orders: list[str] = []
    group: Any = SimpleNamespace(whole=lambda name: None)
    monkeypatch.setattr(Cgroup, "of", lambda pid: group)
    monkeypatch.setattr(node_module, "Freezer", lambda group: None)
    monkeypatch.setattr(init, "guard_pid", lambda pid: 7)
    monkeypatch.setattr(init, "hold", lambda pid: orders.append("hold"))
    monkeypatch.setattr(init, "release", lambda pid: orders.append("release"))
    ending = container(pid=6, bundle="/bundle", tier="restart", state=State.CHECKPOINTING)
    assert node_module._found(ending) is State.SCALED_DOWN
    ending.tier = "checkpoint"
    assert node_module._found(ending) is State.RUNNING
    assert orders == ["hold", "release"]


async def test_where_no_hook_can_be_made_none_that_was_there_goes_on_parking(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "broken", True)
    sandbox = await make().add_sandbox(pod())
    assert "no hook" in sandbox.record.problem
    assert Network.stripped == [Path("/netns")]


async def test_hooks_that_no_record_tells_of_are_removed(make: Any, runtime: FakeRuntime, tmp_path: Path) -> None:
    node = make()
    (node._sandbox_folder / "unreadable.json").write_text("{")
    for name in ("unreadable", "lost", "gone"):
        (tmp_path / "pins" / name).mkdir(parents=True)
    (tmp_path / "pins" / "maps.debug").touch()
    runtime.there = ["unreadable", "lost"]
    await node.adopt()
    assert sorted(Network.discarded) == ["gone", "lost"]
    assert Network.stripped == [Path("/netns")]
