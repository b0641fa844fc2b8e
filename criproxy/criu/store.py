"""A checkpoint on disk: a folder of images (mode 0700: it has the application's memory) and, beside it,
`<folder>.json`, which is needed to restore them, and to see whether what is restored is what it was (`saved.py`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Final

from criproxy.criu.kept import Kept

SAID: Final = ("dump.log", "stats-dump")
"""What CRIU writes about a dump, beside the images."""

# In the names of folders that are being deleted.
_DISCARDED: Final = "-discarded-"


def beside(images: Path) -> Path:
    """The file beside the folder."""
    return images.with_name(f"{images.name}.json")


def complete(images: Path) -> bool:
    """Whether a folder has all images of a dump, also of one that a daemon which was killed has begun.

    CRIU writes the inventory last, before it ends the processes.
    """
    return (images / "inventory.img").exists() and beside(images).exists()


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
    """Deletes a checkpoint, if there is one. Idempotent.

    It is out of the way at once. Giving its blocks back takes tens of ms (a quarter of a second for 500 MiB), in which
    no other container could be woken, so another thread does that, and the end of the program waits for it.
    """
    # The inventory first: what is deleted half must not look complete.
    spoil(images)
    with contextlib.suppress(OSError, ValueError):
        if (kept := Kept.of(images)) is not None:
            kept.close()
    beside(images).unlink(missing_ok=True)
    try:
        images.rename(images.with_name(f"{images.name}{_DISCARDED}{time.monotonic_ns()}"))
    except FileNotFoundError:
        pass
    except OSError:  # a file system may have room for no new name
        shutil.rmtree(images, ignore_errors=True)
    # Also what a daemon that was killed has left.
    for folder in images.parent.glob(f"{images.name}{_DISCARDED}*"):
        threading.Thread(target=shutil.rmtree, args=(folder, True)).start()
