"""The freezer's files, faked: which are used, and what happens when processes don't stop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from criproxy import freezer as freezer_module
from criproxy import node
from criproxy.freezer import FreezeError, Freezer
from criproxy.kernel.cgroup import UNIFIED, Cgroup
from criproxy.record import Record, State


def group(root: Path, *controllers: str) -> Cgroup:
    """A container's folders with a freezer that does as it is told, but never reports that all have stopped."""
    folders = {}
    for controller in controllers:
        folder = root / (controller or "unified") / "container"
        folder.mkdir(parents=True)
        folders[controller] = folder
        if controller == UNIFIED:
            (folder / "cgroup.freeze").write_text("0\n")
            (folder / "cgroup.events").write_text("populated 1\nfrozen 0\n")
        elif controller == "freezer":
            (folder / "freezer.state").write_text("THAWED\n")
    return Cgroup(folders, frozenset())


def test_v2_is_preferred_on_a_hybrid_machine(tmp_path: Path) -> None:
    both = group(tmp_path, UNIFIED, "freezer", "memory")
    assert str(Freezer(both)).endswith("unified/container")
    # Before Linux 5.2, v2 had none.
    (both.folders[UNIFIED] / "cgroup.freeze").unlink()
    assert str(Freezer(both)).endswith("freezer/container")


@pytest.mark.parametrize("controller", [UNIFIED, "freezer"])
async def test_what_does_not_stop_is_thawed(tmp_path: Path, controller: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezer_module, "FREEZE_SECONDS", 0.1)
    of = group(tmp_path, controller)
    freezer = Freezer(of)
    task = asyncio.create_task(freezer.freeze())
    if controller == "freezer":
        await asyncio.sleep(0)
        (of.folders["freezer"] / "freezer.state").write_text("FREEZING\n")
        assert freezer.asked()
    with pytest.raises(FreezeError, match="did not stop"):
        await task
    file = of.folders[controller] / ("freezer.state" if controller == "freezer" else "cgroup.freeze")
    assert file.read_text() == ("THAWED" if controller == "freezer" else "0")


async def test_a_cancelled_freeze_thaws(tmp_path: Path) -> None:
    of = group(tmp_path, UNIFIED)
    task = asyncio.create_task(Freezer(of).freeze())
    await asyncio.sleep(0.01)
    assert (of.folders[UNIFIED] / "cgroup.freeze").read_text() == "1"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (of.folders[UNIFIED] / "cgroup.freeze").read_text() == "0"


async def test_without_a_freezer(tmp_path: Path) -> None:
    freezer = Freezer(group(tmp_path, "memory"))
    assert not freezer.frozen()
    with pytest.raises(FreezeError, match="no cgroup of its own"):
        await freezer.freeze()
    freezer.thaw()


async def test_memory_is_taken_back_and_a_thaw_ends_it(tmp_path: Path) -> None:
    of = group(tmp_path, UNIFIED)
    folder = of.folders[UNIFIED]
    (folder / "memory.current").write_text("4096\n")
    (folder / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    freezer = Freezer(of)
    await freezer.freeze()
    async with asyncio.timeout(60):
        while not (folder / "memory.reclaim").exists() or not (folder / "memory.reclaim").read_text():
            await asyncio.sleep(0.01)
    assert (folder / "memory.reclaim").read_text() == "4096\n"
    freezer.thaw()
    assert (folder / "cgroup.freeze").read_text() == "0"


def test_how_v1_takes_memory_back(tmp_path: Path) -> None:
    of = group(tmp_path, "memory", "freezer")
    assert of.reclaim_all() == [(of.folders["memory"] / "memory.force_empty", "0")]


@pytest.mark.parametrize(
    ("state", "tier", "switch", "events", "expected"),
    [
        (State.SCALED_DOWN, "freeze", "1\n", "frozen 1\n", State.SCALED_DOWN),
        # It died between the freeze and its note of it, or in the middle of a thaw.
        (State.CHECKPOINTING, "freeze", "1\n", "frozen 1\n", State.SCALED_DOWN),
        (State.CHECKPOINTING, "freeze", "1\n", "frozen 0\n", State.RUNNING),
        (State.RESTORING, "freeze", "0\n", "frozen 0\n", State.RUNNING),
        # Somebody thawed it by hand meanwhile.
        (State.SCALED_DOWN, "freeze", "0\n", "frozen 0\n", State.RUNNING),
        # Somebody else has paused it: that isn't ours.
        (State.RUNNING, "checkpoint", "1\n", "frozen 1\n", State.RUNNING),
    ],
)
def test_what_the_next_daemon_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State, tier: str, switch: str, events: str, expected: State
) -> None:
    of = group(tmp_path, UNIFIED)
    (of.folders[UNIFIED] / "cgroup.freeze").write_text(switch)
    (of.folders[UNIFIED] / "cgroup.events").write_text(events)
    monkeypatch.setattr(node.Cgroup, "of", lambda pid: of)
    record = Record("id", "sandbox", "default", "pod", "app", state=state, tier=tier, pid=1)
    assert node._found(record) is expected
    frozen = expected is State.SCALED_DOWN or tier != "freeze"
    assert (of.folders[UNIFIED] / "cgroup.freeze").read_text().strip() == ("1" if frozen else "0")
