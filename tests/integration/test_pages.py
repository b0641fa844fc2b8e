"""Memory that is loaded after the restore: always the right pages, and what happens without its loader."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from box import Box
from specimen import PATIENCE, QUICK, Specimen, eventually, seen, wait_for

from criproxy.criu import init, pages
from criproxy.criu.checkpoint import Criu
from criproxy.criu.errors import RestoreError
from criproxy.criu.pages import Loader
from criproxy.kernel import processes
from criproxy.kernel.cgroup import Cgroup
from lab.daemon import Daemon
from lab.kubelet import Kubelet

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="containers need root")

MIB = 1 << 20


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled application."""
    target = tmp_path_factory.mktemp("memory") / "memory"
    source = Path(__file__).with_name("memory.c")
    subprocess.run(["gcc", "-static", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", target, source], check=True)
    return target


@pytest.fixture
def start(box: Callable[..., Box], memory: Path, tmp_path: Path) -> Iterator[Callable[[int], Box]]:
    def start(mebibytes: int) -> Box:
        def mount(config: dict[str, Any]) -> None:
            config["mounts"].append(
                {"destination": "/memory", "type": "bind", "source": str(memory), "options": ["bind", "ro"]}
            )

        container = box("/memory", str(mebibytes), change=mount)
        container.hear("ready")
        return container

    yield start
    # A test that fails may leave one stopped.
    for pid in loaders(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    eventually(lambda: not loaders(tmp_path), "no loader is left")


def loaders(place: Path) -> list[int]:
    """The processes of native/pages.c that load from a folder below that place."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, IndexError):
            if name.isdigit() and os.path.samefile(f"/proc/{name}/exe", pages.PROGRAM):
                folder = Path(f"/proc/{name}/cmdline").read_text().split("\0")[1]
                if Path(os.readlink(f"/proc/{name}/fd/{folder}")).is_relative_to(place):
                    found.append(int(name))
    return found


async def lazily(criu: Criu, container: Box, images: Path) -> Loader:
    loader = criu.loader(images)
    await criu.restore(container.pid, images, None, loader)
    return loader


async def halfway(criu: Criu, container: Box, images: Path) -> Loader:
    """A restore whose loader is stopped before it has loaded all, for which a busy machine may need several."""
    for _ in range(20):
        loader = await lazily(criu, container, images)
        stop(loader)
        if not loader.loaded():
            return loader
        go_on(loader)
        assert await loader.ended()
        await criu.dump(container.pid, images)
    pytest.fail("it has always loaded all at once")


def stop(loader: Loader) -> None:
    if loader._process.alive():
        os.kill(loader._process.pid, signal.SIGSTOP)


def go_on(loader: Loader) -> None:
    if loader._process.alive():
        os.kill(loader._process.pid, signal.SIGCONT)


async def tell(container: Box, command: str) -> None:
    os.write(container.stdin, f"{command}\n".encode())
    heard = ""
    async with asyncio.timeout(PATIENCE):
        while "good" not in heard:
            heard += container.said()
            assert "bad" not in heard, heard
            assert container.running(), container.said(container.stderr)
            await asyncio.sleep(0.002)


async def test_whatever_it_does_meanwhile_every_page_is_right(
    start: Callable[[int], Box], criu: Criu, images: Path
) -> None:
    """It forks, discards, unmaps and moves what isn't there yet."""
    container = start(192)
    cycle = early = 0
    # Without early looks nothing would be tested.
    while cycle < 8 or early < 4:
        assert cycle < 100
        await criu.dump(container.pid, images)
        loader = await lazily(criu, container, images)
        early += not loader.loaded()
        if cycle % 2:
            await tell(container, "check")
        async with asyncio.timeout(PATIENCE):
            assert await loader.ended(), loader.last_words()
        if cycle == 5:
            await tell(container, "wide")
        await tell(container, "check")
        cycle += 1
    assert await criu.verify(container.pid, images) == []


async def test_more_than_two_gibibytes_at_once(start: Callable[[int], Box], criu: Criu, images: Path) -> None:
    container = start(192)
    await tell(container, "rest")
    await criu.dump(container.pid, images)
    loader = await lazily(criu, container, images)
    await tell(container, "wide")
    await tell(container, "check")
    assert await loader.ended(), loader.last_words()
    await criu.dump(container.pid, images)
    await criu.restore(container.pid, images)
    await tell(container, "check")


async def test_the_memory_is_the_containers(start: Callable[[int], Box], criu: Criu, images: Path) -> None:
    container = start(128)
    await tell(container, "rest")
    group = Cgroup.of(container.pid)
    before = group.anonymous()
    assert before > 60 * MIB
    await criu.dump(container.pid, images)
    # The kernel brings its sums up to date within two seconds.
    eventually(lambda: group.anonymous() < 20 * MIB, "it is free")
    loader = await lazily(criu, container, images)
    assert await loader.ended()
    eventually(lambda: abs(group.anonymous() - before) < 20 * MIB, "it is charged again")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
async def test_without_its_loader_it_waits_and_never_reads_zeros(
    signum: int, start: Callable[[int], Box], criu: Criu, images: Path
) -> None:
    container = start(256)
    await tell(container, "rest")
    await criu.dump(container.pid, images)
    loader = await halfway(criu, container, images)
    os.kill(loader._process.pid, signum)
    go_on(loader)
    assert not await loader.ended()
    os.write(container.stdin, b"check\n")
    await asyncio.sleep(0.5)
    assert container.said() == ""  # neither "good" nor "bad"
    # The keeper holds on to what it waits for, as long as it waits.
    assert len(loaders(images)) == 1
    assert Loader.adopt(images) is not None
    # It can be killed, and the command started afresh.
    init.hold(container.pid)
    # All of it: the guard's own pages are missing, too.
    for pid in processes.tree(container.pid)[1:]:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not processes.children(container.pid), "all have ended")
    init.start(container.pid)
    container.hear("ready")
    loader.close()


# --- In a pod ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def specimen(kubelet: Kubelet, program: Path) -> Iterator[Specimen]:
    """With 300 MiB, which take a while."""
    with kubelet.run_pod(annotations=QUICK) as pod:
        made = Specimen.run(pod, program)
        made.tell("fill 300")
        made.tell("set a text")
        yield made


@contextlib.contextmanager
def woken(specimen: Specimen, daemon: Daemon) -> Iterator[Loader]:
    """It has been restored, and its loader is stopped before it has loaded all, until the block ends. A busy machine
    may need several restores for that."""
    for _ in range(20):
        wait_for(daemon, specimen.id, "scaled_down")
        assert specimen.ask("get") == "a text"
        loader = Loader.adopt(daemon.state_dir / "containers" / specimen.id / "checkpoint")
        if loader is None:
            continue
        stop(loader)
        try:
            if loader._process.alive() and not loader.loaded():
                yield loader
                return
        finally:
            go_on(loader)
    pytest.fail("it has always loaded all at once")


def test_its_checkpoint_is_kept_until_all_is_loaded(specimen: Specimen, daemon: Daemon) -> None:
    checkpoint = daemon.state_dir / "containers" / specimen.id / "checkpoint"
    told = "its memory is still being loaded"
    for _ in range(3):
        with woken(specimen, daemon):
            eventually(lambda: seen(daemon, specimen.id).reason == told, "it says so")
            assert checkpoint.exists()
    eventually(lambda: not checkpoint.exists(), "it is deleted")
    eventually(lambda: not loaders(daemon.state_dir), "no loader is left")


def test_without_its_loader_it_is_started_afresh_and_says_so(specimen: Specimen, daemon: Daemon) -> None:
    with woken(specimen, daemon) as loader:
        os.kill(loader._process.pid, signal.SIGKILL)
    # In its log, as it may be asleep again before anybody looks at its status.
    lost = "its state was lost: what loads its memory after the restore has ended too soon"
    eventually(lambda: lost in daemon.service.output(), "it says so")
    # It serves, and goes on to sleep and wake.
    for _ in range(2):
        assert specimen.ask("get") == "nothing"
        wait_for(daemon, specimen.id, "scaled_down")
    eventually(lambda: not loaders(daemon.state_dir), "no loader is left")


def test_a_killed_daemons_successor_waits_for_the_rest(specimen: Specimen, daemon: Daemon) -> None:
    for _ in range(3):
        with woken(specimen, daemon) as loader:
            daemon.kill()
            daemon.start()
        assert specimen.ask("get") == "a text"
        assert wait_for(daemon, specimen.id, "scaled_down").reason == ""
        assert (
            loader.loaded() or not (daemon.state_dir / "containers" / specimen.id / "checkpoint/loader.json").exists()
        )


def test_a_killed_daemons_successor_sees_that_the_rest_is_lost(specimen: Specimen, daemon: Daemon) -> None:
    with woken(specimen, daemon) as loader:
        daemon.kill()
        os.kill(loader._process.pid, signal.SIGKILL)
    daemon.start()
    # In its log, as it may have gone to sleep again before the daemon answers.
    eventually(lambda: "its state was lost" in daemon.service.output(), "it says so")
    assert specimen.ask("get") == "nothing"


def test_a_pod_is_removed_while_it_loads(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations=QUICK) as pod:
        specimen = Specimen.run(pod, program)
        specimen.tell("fill 300")
        specimen.tell("set a text")
        with woken(specimen, daemon):
            pass
    eventually(lambda: not loaders(daemon.state_dir), "no loader is left")


# --- With runc alone --------------------------------------------------------------------------------------------------


async def test_a_container_that_ends_meanwhile_ends_its_loader(
    start: Callable[[int], Box], criu: Criu, images: Path
) -> None:
    container = start(256)
    await tell(container, "rest")
    await criu.dump(container.pid, images)
    loader = await halfway(criu, container, images)
    os.kill(container.pid, signal.SIGKILL)
    go_on(loader)
    async with asyncio.timeout(PATIENCE):
        assert await loader.ended()
    assert container.wait() == 137


async def test_a_loader_that_is_lost_in_the_middle_of_a_restore(
    start: Callable[[int], Box], criu: Criu, images: Path
) -> None:
    container = start(64)
    await tell(container, "rest")
    await criu.dump(container.pid, images)
    for _ in range(2):
        loader = criu.loader(images)
        os.kill(loader._process.pid, signal.SIGKILL)
        with pytest.raises(RestoreError):
            async with asyncio.timeout(PATIENCE):
                await criu.restore(container.pid, images, None, loader)
        loader.close()
        assert processes.children(container.pid) == []
    await criu.restore(container.pid, images)
    await tell(container, "check")


async def test_another_daemon_finds_it(start: Callable[[int], Box], criu: Criu, images: Path) -> None:
    container = start(256)
    await tell(container, "rest")
    await criu.dump(container.pid, images)
    assert Loader.adopt(images) is None
    loader = await halfway(criu, container, images)
    found = Loader.adopt(images)
    assert found is not None
    go_on(loader)
    assert await found.ended()
    await loader.ended()
    assert await found.ended()
    found.close()
    assert Loader.adopt(images) is None
    await tell(container, "check")


async def test_images_that_arent_what_criu_writes(start: Callable[[int], Box], criu: Criu, images: Path) -> None:
    container = start(16)
    await tell(container, "rest")
    await criu.dump(container.pid, images)
    broken = max(images.glob("pagemap-*.img"), key=lambda path: path.stat().st_size)
    whole = broken.read_bytes()
    for content in (whole[:20], whole[:-2], b"x" * len(whole)):
        broken.write_bytes(content)
        loader = criu.loader(images)
        with pytest.raises(RestoreError):
            await criu.restore(container.pid, images, None, loader)
        assert not await loader.ended()
        loader.close()
    broken.write_bytes(whole)
    await lazily(criu, container, images)
    await tell(container, "check")
