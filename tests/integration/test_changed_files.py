"""Files, folders and watches in a volume that somebody else changes while the container sleeps."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from box import Box, until

from criproxy.criu import store
from criproxy.criu.checkpoint import Criu
from criproxy.criu.errors import CheckpointError
from criproxy.kernel.processes import Process
from lab.volumes import mounted, project

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="containers need root")


def program(prepare: str, answer: str) -> list[str]:
    """It answers each line of its input with the value of an expression."""
    loop = f"\nsys.stdout.write('ready\\n')\nfor line in sys.stdin: sys.stdout.write(str(({answer})) + '\\n')"
    return ["/usr/bin/python3", "-u", "-c", "import ctypes, os, sys\n" + textwrap.dedent(prepare) + loop]


def ask(container: Box, says: str) -> None:
    os.write(container.stdin, b"\n")
    assert container.hear("\n") == f"{says}\n"


async def sleeping(
    container: Box, criu: Criu, images: Path, change: Callable[[], object], *, discard: bool = True
) -> None:
    await criu.dump(container.pid, images)
    change()
    await criu.restore(container.pid, images)
    assert await criu.verify(container.pid, images) == []
    if discard:
        discarded(images)


def keeper(images: Path) -> Process:
    return Process.of(json.loads((images / "kept.json").read_text())["pid"])


def discarded(images: Path) -> None:
    """Deletes the checkpoint, and waits for the keeper's end: it is the end of what nobody else has, too."""
    kept = keeper(images)
    store.discard(images)
    until(lambda: not kept.alive())


LOG = program("log = open('/data/log', 'a+')\nlog.write('one ')\nlog.flush()", "log.seek(0) or log.read()")


def written(path: Path, text: str, mode: str = "a") -> None:
    with path.open(mode) as file:
        file.write(text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda log: written(log, "two "), "one two "),
        (lambda log: written(log, "", "w"), ""),
        (lambda log: log.chmod(0o600), "one "),
        (lambda log: log.unlink(), "one "),
        (lambda log: log.rename(log.with_name("log.1")), "one "),
        (lambda log: (log.rename(log.with_name("log.1")), written(log, "new")), "one "),
        (lambda log: (written(log.with_name("new"), "new"), log.with_name("new").rename(log)), "one "),
    ],
    ids=["appended", "truncated", "chmod", "deleted", "renamed", "rotated", "replaced"],
)
async def test_a_log_file(
    change: Callable[[Path], object], says: str, box: Callable[..., Box], criu: Criu, images: Path
) -> None:
    container = box(*LOG)
    container.hear("ready\n")
    log = container.data / "log"
    await sleeping(container, criu, images, lambda: change(log))
    ask(container, says)
    # As it is now, once more.
    await sleeping(container, criu, images, lambda: None)
    ask(container, says)


async def test_a_mapped_file_a_program_and_a_current_folder(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    prepare = """
        import mmap, subprocess
        os.makedirs('/data/here')
        os.chdir('/data/here')
        open('/data/mapped', 'w').write('x' * 4096)
        memory = mmap.mmap(os.open('/data/mapped', os.O_RDONLY), 4096, prot=mmap.PROT_READ)
        import shutil
        shutil.copy('/bin/sleep', '/data/sleep')
        child = subprocess.Popen(['/data/sleep', '1000'])
    """
    container = box(*program(prepare, "memory[:3].decode(), os.path.exists('.'), child.poll()"))
    container.hear("ready\n")

    def change() -> None:
        (container.data / "mapped").rename(container.data / "elsewhere")
        written(container.data / "mapped", "other")
        (container.data / "here").rmdir()
        (container.data / "sleep").unlink()

    for now in (change, lambda: None):
        await sleeping(container, criu, images, now)
        ask(container, "('xxx', True, None)")


WATCHING = """
    import select, struct
    libc = ctypes.CDLL(None)
    volume = os.open('/volume', os.O_RDONLY)
    old = open('/volume/token')
    folder = os.open('/volume/..data', os.O_RDONLY)
    watches = libc.inotify_init1(os.O_NONBLOCK)
    of_volume = libc.inotify_add_watch(watches, b'/volume', 0xfff)
    of_file = libc.inotify_add_watch(watches, b'/volume/token', 0xfc6)
    def events():
        seen, data = set(), b''
        while select.select([watches], [], [], 0.1)[0]:
            data = os.read(watches, 65536)
            while data:
                wd, mask, _, length = struct.unpack_from('iIII', data)
                for bit, name in ((0x80, 'moved'), (0x400, 'deleted'), (0x8000, 'ignored')):
                    if mask & bit:
                        seen.add(('volume ' if wd == of_volume else 'file ') + name)
                data = data[16 + length:]
        return ' '.join(sorted(seen))
"""


@pytest.mark.parametrize("kind", ["tmpfs", "disk"])
@pytest.mark.parametrize("opened", [False, True], ids=["watched", "watched and open"])
async def test_a_volume_that_kubelet_replaces(
    kind: str, opened: bool, box: Callable[..., Box], criu: Criu, images: Path, tmp_path: Path
) -> None:
    """While a file in it and its folder are open or watched. Secrets and tokens are on tmpfs, config maps not."""
    volume = tmp_path / "volume"
    volume.mkdir()

    def mount(config: dict[str, Any]) -> None:
        volumes = {"destination": "/volume", "type": "bind", "source": str(volume), "options": ["rbind", "ro"]}
        config["mounts"].append(volumes)

    # What it has open is there for as long; what is watched is gone when nobody has it any more.
    first, then = ("1 ", "") if opened else ("", "file deleted file ignored")
    prepare = WATCHING if opened else WATCHING.replace("old = open('/volume/token')", "old = open('/dev/null')")
    with mounted(volume, "-t", "tmpfs", "tmpfs") if kind == "tmpfs" else contextlib.nullcontext():
        project(volume, "1")
        answer = "' '.join([old.seek(0) or old.read(), open('/volume/token').read(), events()])"
        container = box(*program(prepare, answer), change=mount)
        container.hear("ready\n")
        ask(container, f"{first.strip()} 1 ")
        await sleeping(container, criu, images, lambda: project(volume, "2"))
        ask(container, f"{first.strip()} 2 {then}")
        if kind == "tmpfs" and opened:
            # CRIU finds no path for the watch any more.
            with pytest.raises(CheckpointError, match="watches a file"):
                await criu.dump(container.pid, images)
        else:
            await sleeping(container, criu, images, lambda: project(volume, "3"))
            ask(container, f"{first.strip()} 3 ")
        project(volume, "4")
        ask(container, f"{first.strip()} 4 volume moved")


async def test_a_watched_file_that_is_deleted_meanwhile(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    prepare = WATCHING.replace("'/volume", "'/data").replace("open('/data/token')", "0").replace("/..data", "")
    prepare = prepare.replace("b'/data/token'", "b'/data/file'")
    container = box(*program("    open('/data/file', 'w').close()" + prepare, "events()"))
    container.hear("ready\n")
    ask(container, "")
    await sleeping(container, criu, images, lambda: (container.data / "file").unlink(), discard=False)
    ask(container, "")
    discarded(images)
    ask(container, "file deleted file ignored")
    await sleeping(container, criu, images, lambda: None)
    written(container.data / "other", "text")
    (container.data / "other").rename(container.data / "another")
    ask(container, "volume moved")


async def test_the_keeper_ends_with_the_checkpoint_and_with_the_container(
    box: Callable[..., Box], criu: Criu, images: Path
) -> None:
    container = box(*LOG)
    container.hear("ready\n")
    await criu.dump(container.pid, images)
    await criu.restore(container.pid, images)
    discarded(images)
    await criu.dump(container.pid, images)
    kept = keeper(images)
    os.kill(container.pid, signal.SIGKILL)
    until(lambda: not kept.alive())


async def test_without_the_keeper_a_file_may_still_grow(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = box(*LOG)
    container.hear("ready\n")
    await criu.dump(container.pid, images)
    kept = keeper(images)
    os.kill(kept.pid, signal.SIGKILL)
    written(container.data / "log", "two ")
    until(lambda: not kept.alive())
    await criu.restore(container.pid, images)
    ask(container, "one two ")
