"""Volumes, as kubelet makes them on the node and changes them while a pod runs. Needs root."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def mounted(target: Path, *arguments: str | Path) -> Iterator[Path]:
    """Mount something, in mount(8)'s words, and yield the target; it is unmounted whoever still has it open."""
    subprocess.run(["mount", *arguments, target], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)


@contextlib.contextmanager
def sub_path(source: Path, target: Path) -> Iterator[Path]:
    """What a container gets for a subPath: a volume's file or folder is mounted to a place of its own, and from there
    into the container (pkg/volume/util/subpath). `target` must not exist, and is that place."""
    target.mkdir() if source.is_dir() else target.touch()
    with mounted(target, "--bind", source):
        yield target


def project(volume: Path, text: str) -> None:
    """Write the file `token` of a projected volume, once more or for the first time: into a new folder with a new link
    to it, which is renamed; then the old folder is removed (pkg/volume/util/atomic_writer.go). `text` must be another
    each time, as the folder's name is made of it."""
    old = volume / os.readlink(volume / "..data") if (volume / "..data").is_symlink() else None
    folder = volume / f"..{text}"
    folder.mkdir(mode=0o755)
    (folder / "token").write_text(text)
    (volume / "..data_tmp").symlink_to(folder.name)
    (volume / "..data_tmp").rename(volume / "..data")
    if old is None:
        (volume / "token").symlink_to("..data/token")
    else:
        (old / "token").unlink()
        old.rmdir()
