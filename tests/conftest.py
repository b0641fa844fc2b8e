"""Fixtures of the integration tests: one containerd and one criproxy for all, pods of their own for each.

A test asks for `kubelet` (through criproxy) or `direct` (containerd itself). Both remove their pods afterwards, and a
test fails that leaves anything of criproxy's behind. What the daemons logged meanwhile is shown with a failed test.
"""

import signal
from collections.abc import Generator, Iterator

import pytest

from lab import LabError, requirements
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Kubelet

_SHOWN_LINES = 80
_lab_key = pytest.StashKey[Containerd]()
_offsets_key = pytest.StashKey[dict[str, int]]()


@pytest.fixture(scope="session")
def containerd(request: pytest.FixtureRequest) -> Iterator[Containerd]:
    """A private containerd with the usual images."""
    try:
        requirements.check()
    except LabError as error:
        pytest.exit(str(error), returncode=1)
    with Containerd() as lab:
        request.config.stash[_lab_key] = lab
        yield lab


@pytest.fixture(scope="session")
def criproxy(containerd: Containerd) -> Iterator[Daemon]:
    with Daemon(containerd) as running:
        yield running


@pytest.fixture
def daemon(criproxy: Daemon) -> Iterator[Daemon]:
    """criproxy in front of it, running; a test may kill or restart it."""
    if criproxy.service.returncode is not None:
        criproxy.start()
    yield criproxy
    if criproxy.service.returncode is not None:
        criproxy.start()


@pytest.fixture
def kubelet(daemon: Daemon, containerd: Containerd) -> Iterator[Kubelet]:
    """A kubelet that talks to criproxy."""
    before = daemon.leftovers()
    with Kubelet(daemon.endpoint, containerd) as client:
        yield client
        # A test that fails may leave none, and pods that are to be removed.
        if daemon.service.returncode is not None:
            daemon.start()
    left = set(daemon.leftovers()) - set(before)
    assert not left, f"criproxy left behind: {sorted(left)}"


@pytest.fixture
def direct(containerd: Containerd) -> Iterator[Kubelet]:
    """A kubelet that talks to containerd itself. It lets go of its pods at once: their end is nothing of ours."""
    with Kubelet(containerd.endpoint, containerd, grace=0) as client:
        yield client


def pytest_configure() -> None:
    # As Ctrl-C: all is cleaned up. SystemExit would be one failed test, and the next would begin.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    lab = item.config.stash.get(_lab_key, None)
    logs = lab.logs.glob("*.log") if lab else ()
    item.stash[_offsets_key] = {log.name: log.stat().st_size for log in logs}
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    lab = item.config.stash.get(_lab_key, None)
    if report.failed and lab:
        for log in sorted(lab.logs.glob("*.log")):
            with log.open(errors="replace") as file:
                file.seek(item.stash[_offsets_key].get(log.name, 0))
                lines = file.readlines()
            report.sections.append((f"{log.name} meanwhile ({log})", "".join(lines[-_SHOWN_LINES:])))
    return report
