"""The lab cleans up however it ends, and several labs don't disturb each other."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from specimen import PATIENCE, eventually

from lab import cgroups, inventory
from lab.containerd import Containerd
from lab.kubelet import Kubelet

_LAB = """
import time
from lab.containerd import Containerd
from lab.kubelet import Kubelet
with Containerd(usual=("pause", "busybox")) as containerd, Kubelet(containerd.endpoint, containerd) as kubelet:
    kubelet.run_pod().run("busybox", command=["sleep", "1000"])
    # No parent cgroup, as other clients than kubelet ask for it.
    stray = kubelet.run_pod(change=lambda config: config.linux.ClearField("cgroup_parent"))
    print("number", containerd.number, flush=True)
    time.sleep(1000)
"""


@contextlib.contextmanager
def another_lab() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A lab with two pods in a process of its own, and its number."""
    with subprocess.Popen([sys.executable, "-c", _LAB], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            line = process.stdout.readline()
            yield process, int(line.removeprefix("number"))
        finally:
            process.terminate()


def traces(number: int) -> list[str]:
    """What is there of a lab that should be gone."""
    lab = Containerd.running(number)
    found = [str(path) for path in (lab.state, lab.root, Path("/sys/class/net", lab.bridge)) if path.exists()]
    found += sorted(cgroups.subtree(lab.cgroup))
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(lab.state) in line]
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if re.search(rf"{lab.state}/", arguments.read_text()):
                found.append(str(arguments))
    return found


def nobodys(number: int) -> list[str] | None:
    """The traces of a lab that has ended; None if another one on this machine has its number already."""
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            claim.bind(f"\0criproxy-lab-{number}")
        except OSError:
            return None
        return traces(number)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_nothing_is_left(containerd: Containerd, ending: signal.Signals) -> None:
    # Another lab on this machine may come first.
    for _ in range(5):
        with another_lab() as (process, number):
            assert number != containerd.number
            assert traces(number)
            process.send_signal(ending)
            assert process.wait(PATIENCE) == 128 + ending
            left = nobodys(number)
        if left is not None:
            break
    assert left == []


def test_the_next_one_removes_what_a_killed_one_left(containerd: Containerd) -> None:
    # Another lab on this machine may come first.
    for _ in range(5):
        with another_lab() as (process, number):
            process.kill()
            process.wait(PATIENCE)
            assert traces(number)
            with another_lab() as (next_process, next_number):
                next_process.terminate()
                next_process.wait(PATIENCE)
                left = nobodys(number)
        if next_number == number and left is not None:
            break
    assert (next_number, left) == (number, [])


def test_a_removed_pod_leaves_nothing(containerd: Containerd, direct: Kubelet) -> None:
    before = inventory.take(containerd)
    with direct.run_pod() as pod:
        pod.run("redis")
        assert inventory.difference(before, inventory.take(containerd))
    # A shim needs a moment to end after its last container.
    eventually(lambda: not inventory.difference(before, inventory.take(containerd)), "nothing is left")


def test_streams(direct: Kubelet) -> None:
    pod = direct.run_pod()
    container = pod.run("busybox", command=["sleep", "1000"])
    with container.exec("sh", "-c", "read x; echo got $x; echo wrong >&2; exit 7", stdin=True) as stream:
        stream.write(b"it\n")
        assert stream.exit_code() == 7
        assert stream.channels[1] == b"got it\n"
        assert stream.channels[2] == b"wrong\n"
