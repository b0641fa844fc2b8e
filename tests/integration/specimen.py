"""The application of `specimen.c` in a pod, and what a test can ask it and see of it.

    specimen = Specimen.run(pod, folder)
    specimen.tell("set a text")
    daemon.wait_for(specimen.id, "scaled_down")
    assert specimen.ask("get") == "a text"       # wakes it

Every question is a TCP connection of its own from the host, unless it is asked through `connect()`.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from criproxy.api import control_pb2
from criproxy.kernel import processes
from lab.daemon import Daemon
from lab.kubelet import Container, Pod

T = TypeVar("T")

PORT = 7000
INSIDE = "/specimen"
"""Where the folder with the program is mounted in the container; the test may write files there, too."""

PATIENCE = 60.0
"""Seconds for what has to come true: nobody waits for them when all is well, and a busy machine may need many."""
QUICK: Mapping[str, str] = {"criproxy.io/scaledown-duration": "300ms"}
"""Annotations of a pod that is to be scaled down soon."""
AWAKE: Mapping[str, str] = {"criproxy.io/scaledown-duration": "0"}
"""Annotations of a pod that is managed, but never scaled down."""


def build(folder: Path, name: str = "specimen") -> Path:
    """Compiles a program of this folder into another one, for every user."""
    folder.chmod(0o755)
    target = folder / name
    options = ["-static", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *options, "-o", target, Path(__file__).with_name(f"{name}.c")], check=True)
    return target


def eventually(condition: Callable[[], T], what: str, *, timeout: float = PATIENCE) -> T:
    """Waits until the condition gives something true, and returns that. Fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout:g} s: {what} ({result!r})")
        time.sleep(0.01)
    return result


def never(condition: Callable[[], object], what: str, *, seconds: float = 0.5) -> None:
    """Looks for a while: what would happen at once doesn't."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert not condition(), what
        time.sleep(0.02)


class Connection:
    """One TCP connection to a specimen, greeted already. Raises OSError where a client would see an error."""

    def __init__(self, address: str, port: int, timeout: float) -> None:
        self._socket = socket.create_connection((address, port), timeout=timeout)
        self._file = self._socket.makefile("rb")
        try:
            assert self.answer() == "ready"
        except BaseException:
            self.close()
            raise

    @property
    def local(self) -> tuple[str, int]:
        address, port = self._socket.getsockname()[:2]
        return address, port

    def ask(self, question: str) -> str:
        self._socket.sendall(f"{question}\n".encode())
        return self.answer()

    def send(self, question: str) -> None:
        """Without waiting for the answer."""
        self._socket.sendall(f"{question}\n".encode())

    def ended(self) -> bool:
        """Waits for the end of the connection; whether it came without another byte."""
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True

    def answer(self) -> str:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError(f"The connection ended after {line!r}")
        return line.decode().rstrip("\n")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Specimen:
    """`container` is the lab's; `address` the pod's."""

    def __init__(self, container: Container, port: int = PORT) -> None:
        self.container = container
        self.port = port
        self.address = container.pod.ip

    @classmethod
    def run(
        cls, pod: Pod, program: Path, name: str = "specimen", *, port: int = PORT, memory: int = 0, **options: Any
    ) -> Specimen:
        """Creates and starts it, and waits until it listens. `memory`: MiB that it holds from the start on. `options`
        as for `create_container`."""
        mounts = {program.parent: INSIDE, **options.pop("mounts", {})}
        command = [f"{INSIDE}/{program.name}", str(port), str(memory)]
        container = pod.run("busybox", name, command=command, mounts=mounts, **options)
        eventually(lambda: "listening" in _log(container), "the specimen listens")
        return cls(container, port)

    @property
    def id(self) -> str:
        return self.container.id

    def connect(self, *, timeout: float = PATIENCE) -> Connection:
        return Connection(self.address, self.port, timeout)

    def ask(self, question: str, *, timeout: float = PATIENCE) -> str:
        with self.connect(timeout=timeout) as connection:
            return connection.ask(question)

    def tell(self, command: str) -> None:
        answer = self.ask(command)
        assert answer == "ok", f"{command}: {answer}"

    def end(self, command: str) -> None:
        """A command that ends it."""
        with self.connect() as connection:
            connection.send(command)
            assert connection.ended()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Awake for as long as the block takes, held by a stream (`kubectl attach`): what is seen of its processes
        would be gone otherwise once it is idle."""
        with self.container.attach():
            yield

    @property
    def log(self) -> list[str]:
        return _log(self.container).splitlines()

    def has_said(self, *lines: str) -> None:
        """Waits until its log ends with these lines, which may come a moment after the container's end is told."""
        eventually(lambda: self.log[-len(lines) :] == [*lines], f"its log ends with {lines}")

    def init(self) -> int:
        """The host's pid of the container's first process."""
        return init_pid(self.container)

    def pid(self) -> int:
        """The host's pid of the application itself."""
        return application_pid(self.container)


def _log(container: Container) -> str:
    return container.logs() if container.log.exists() else ""


# --- Processes, as the host sees them: read here once more, for criproxy's own reading is what is tested --------------


def init_pid(container: Container) -> int:
    pid = re.search(r'"pid":\s*(\d+)', container.status_response().info["info"])
    assert pid, "containerd knows no pid"
    return int(pid[1])


def container_pids(container: Container) -> list[int]:
    """Everything in the container's cgroup."""
    found: set[int] = set()
    for folder in container.cgroups():
        # v1's own cgroups of a controller may be gone while the container ends.
        with contextlib.suppress(OSError):
            found.update(int(pid) for pid in (folder / "cgroup.procs").read_text().split())
    return sorted(found)


def names(container: Container) -> dict[int, str]:
    """The processes in the container's cgroup with their names, without those that have ended meanwhile."""
    found = {}
    for pid in container_pids(container):
        with contextlib.suppress(OSError):
            found[pid] = comm(pid)
    return found


def application_pid(container: Container) -> int:
    """The main process of the application, also where there is no init of ours. It has to be awake."""
    known = names(container)
    for name in known.values():
        if name.startswith("guard "):
            inside = name.removeprefix("guard ")
            for pid in known:
                with contextlib.suppress(OSError):
                    if status(pid)["NSpid"].split()[-1] == inside:
                        return pid
    init = init_pid(container)
    assert comm(init) != "init", f"there is no application below the init: {known}"
    return init


def criu_at_work(init: int) -> list[int]:
    """The CRIU in the container with this first process."""
    found = []
    for pid in processes.in_namespace(init):
        with contextlib.suppress(ProcessLookupError):
            if processes.name(processes.parent(pid)) == "enter":
                found.append(pid)
    return found


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """/proc/PID/status, or that of one of its threads."""
    path = Path(f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status")
    return {key: value.strip() for key, _, value in (line.partition(":") for line in path.read_text().splitlines())}


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")


def threads(pid: int) -> Iterator[int]:
    return (int(tid) for tid in os.listdir(f"/proc/{pid}/task"))


# --- criproxy's view, asked for in-process: the command's start would take longer than what is looked for -------------


def seen(daemon: Daemon, container_id: str) -> control_pb2.ContainerStatus:
    """What criproxy knows of a container."""
    return daemon.seen(container_id)


def asleep(daemon: Daemon, specimen: Specimen) -> None:
    wait_for(daemon, specimen.id, "scaled_down")


def wait_for(daemon: Daemon, container_id: str, *states: str, timeout: float = PATIENCE) -> control_pb2.ContainerStatus:
    """Waits until the container is in one of the states."""
    deadline = time.monotonic() + timeout
    while (found := seen(daemon, container_id)).state not in states:
        if time.monotonic() > deadline:
            pytest.fail(f"not {' or '.join(states)} within {timeout:g} s: {found}")
        time.sleep(0.003)
    return found


def meet(daemon: Daemon, specimen: Specimen, state: str, wake: Callable[[], object]) -> None:
    """Waits until it is in a state that passes by itself, which a busy machine may miss: then it sleeps and wakes once
    more. `wake` is called each time it sleeps, and may return before it is awake."""
    woken = -1
    deadline = time.monotonic() + PATIENCE
    while (found := seen(daemon, specimen.id)).state != state:
        if time.monotonic() > deadline:
            pytest.fail(f"not met as {state} within {PATIENCE:g} s: {found}")
        if found.state == "scaled_down" and found.checkpoints != woken:
            woken = found.checkpoints
            wake()
        time.sleep(0.003)
