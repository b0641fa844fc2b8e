"""Functions in another namespace: they see it, and nobody else does."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from criproxy.kernel import namespaces


@pytest.fixture
def inhabitant() -> Iterator[int]:
    """A process in a network namespace of its own."""
    own = os.readlink("/proc/self/ns/net")
    with subprocess.Popen(["unshare", "--net", "sleep", "1000"]) as process:
        try:
            while os.readlink(f"/proc/{process.pid}/ns/net") == own:
                time.sleep(0.002)
            yield process.pid
        finally:
            process.kill()


def links() -> list[str]:
    return [name for _index, name in socket.if_nameindex()]


def test_a_function_sees_the_other_network(inhabitant: int) -> None:
    before = links()
    assert namespaces.in_network_namespace(inhabitant, links) == ["lo"]
    assert namespaces.in_network_namespace(Path(f"/proc/{inhabitant}/ns/net"), links) == ["lo"]
    assert links() == before


def test_a_socket_made_there_stays_there(inhabitant: int) -> None:
    made = namespaces.in_network_namespace(inhabitant, socket.socket)
    with made, pytest.raises(OSError, match="unreachable"):
        made.connect(("127.0.0.1", 1))  # its loopback isn't up


def test_what_the_function_raises_is_raised(inhabitant: int) -> None:
    with pytest.raises(ZeroDivisionError):
        namespaces.in_network_namespace(inhabitant, lambda: 1 // 0)


def test_a_namespace_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        namespaces.in_network_namespace(tmp_path / "gone", links)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Cannot enter the namespace"):
        namespaces.in_network_namespace(tmp_path / "file", links)


def test_private_mounts_are_private(tmp_path: Path) -> None:
    def look() -> list[Path]:
        namespaces.mount("tmpfs", tmp_path, "tmpfs")
        (tmp_path / "seen").touch()
        return list(tmp_path.iterdir())

    assert namespaces.in_private_mounts(look) == [tmp_path / "seen"]
    assert list(tmp_path.iterdir()) == []


def test_a_mount_that_fails_names_its_place(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"Cannot mount on {tmp_path}/gone"):
        namespaces.mount("tmpfs", tmp_path / "gone", "tmpfs")
