"""What the tests with pods share, and those with containers of runc alone."""

import contextlib
import fcntl
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from box import Box, until
from specimen import QUICK, Specimen, build, eventually
from topology import Topology, topology
from traffic import HTTP, Hook

from criproxy import LIBEXEC
from criproxy.criu import bundle, init
from criproxy.criu.bundle import Bundle
from criproxy.criu.checkpoint import Criu
from criproxy.hook.network import PodNetwork
from lab import inventory
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Kubelet, Pod


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled specimen."""
    return build(tmp_path_factory.mktemp("specimen"))


@pytest.fixture
def pod(kubelet: Kubelet) -> Iterator[Pod]:
    """One whose containers are scaled down soon."""
    with kubelet.run_pod(annotations=QUICK) as running:
        yield running


@pytest.fixture
def specimen(pod: Pod, program: Path) -> Specimen:
    return Specimen.run(pod, program)


@pytest.fixture
def nothing_left(containerd: Containerd, daemon: Daemon) -> Iterator[None]:
    """Processes, mounts, links, filters, pins, cgroups and files are the same after the test as before."""
    before = inventory.take(containerd)
    yield
    # A shim needs a moment to end after its last container.
    eventually(lambda: not inventory.difference(before, inventory.take(containerd)), "nothing is left")


# --- Containers of runc alone -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def criu_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = LIBEXEC.parents[1] / ".build/criu"
    state = tmp_path_factory.mktemp("state")
    return bundle.build(root, LIBEXEC, state) if root.is_dir() else bundle.prepare(LIBEXEC, state)


@pytest.fixture
def criu(criu_bundle: Bundle) -> Criu:
    return Criu(criu_bundle)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


@pytest.fixture
def box(tmp_path: Path, criu_bundle: Bundle) -> Iterator[Callable[..., Box]]:
    """Makes containers, which end with the test."""
    with contextlib.ExitStack() as stack:

        def make(*argv: str, **options: Any) -> Box:
            folder = tmp_path / f"box{len(list(tmp_path.glob('box*')))}"
            folder.mkdir()
            made = stack.enter_context(Box(folder, criu_bundle, argv, **options))
            if made.running():
                made.network(_loopback_up)
                until(lambda: init.application_pid(made.pid) or not made.running())
            return made

        yield make


def _loopback_up() -> None:
    """SIOCSIFFLAGS; netdevice(7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1))


# --- The hook of a pod that is made of bare network namespaces --------------------------------------------------------


@pytest.fixture(scope="module")
def net() -> Iterator[Topology]:
    with topology() as made:
        yield made


@pytest.fixture
async def hook(net: Topology) -> AsyncIterator[Hook]:
    network = PodNetwork.attach(net.netns, net.pins)
    network.assign(0, {HTTP})
    yield Hook(network)
    network.detach()
