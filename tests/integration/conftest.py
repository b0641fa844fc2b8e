"""What the tests with pods share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from specimen import build, eventually

from lab import inventory
from lab.containerd import Containerd
from lab.daemon import Daemon


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled specimen."""
    return build(tmp_path_factory.mktemp("specimen"))


@pytest.fixture
def nothing_left(containerd: Containerd, daemon: Daemon) -> Iterator[None]:
    """Processes, mounts, links, filters, pins, cgroups and files are the same after the test as before."""
    before = inventory.take(containerd)
    yield
    # A shim needs a moment to end after its last container.
    eventually(lambda: not inventory.difference(before, inventory.take(containerd)), "nothing is left", timeout=5)
