"""Checkpoints on disk, and their end."""

import errno
import time
from pathlib import Path

import pytest

from criproxy.criu import store


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("inventory.img", "pages-1.img"):
        (folder / name).write_bytes(b"1")
    store.beside(folder).write_text("{}")
    return folder


def left(images: Path) -> list[Path]:
    """What is there when nothing is being deleted any more."""
    deadline = time.monotonic() + 10
    while (found := list(images.parent.glob("*-discarded-*"))) and time.monotonic() < deadline:
        time.sleep(0.001)
    return found + [path for path in (images, store.beside(images)) if path.exists()]


def test_a_discarded_checkpoint_is_gone_at_once_and_its_blocks_soon(images: Path) -> None:
    assert store.complete(images)
    store.discard(images)
    assert not images.exists()
    assert not store.complete(images)
    images.mkdir()  # as the next dump does
    assert left(images) == [images]


def test_where_it_cannot_be_put_aside_it_is_deleted_at_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    store.discard(images)
    assert not images.exists()


def test_nothing_to_discard(tmp_path: Path) -> None:
    store.discard(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_daemon_was_deleting_is_deleted_with_the_next(images: Path) -> None:
    images.rename(images.with_name("checkpoint-discarded-1"))
    store.discard(images)
    assert left(images) == []
