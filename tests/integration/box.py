"""A container for tests, by runc alone: the host's programs, read-only, below our init, its streams in pipes.

It is what containerd's shim would make of a rewritten CreateContainer, without containerd, in 60 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from specimen import PATIENCE

from criproxy.criu.bundle import INSIDE, Bundle
from criproxy.kernel import namespaces

T = TypeVar("T")

# What containerd gives a container by default.
CAPABILITIES = [
    *(
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
    ),
    *("CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE"),
]


class Box:
    """A context manager. `pid` is the container's init, as the host numbers it."""

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        argv: Sequence[str],
        *,
        user: tuple[int, int] = (0, 0),
        capabilities: Sequence[str] = CAPABILITIES,
        change: Callable[[dict[str, Any]], None] | None = None,
        env: Mapping[str, str] | None = None,
        no_new_privs: bool = False,
    ) -> None:
        """`change` gets the OCI configuration before it is used."""
        self.folder = folder
        self.id = f"criproxy-test-{uuid.uuid4().hex[:12]}"
        self.data = folder / "data"
        """`/data` in the container, writable for everyone."""
        self.data.mkdir()
        self.data.chmod(0o777)
        self._runc = ["runc", "--root", str(folder / "runc")]
        self._config = _configuration(bundle, argv, user, capabilities, self.data, env or {}, no_new_privs)
        self._config["linux"]["cgroupsPath"] = f"/{self.id}"
        if change is not None:
            change(self._config)
        self.pid = 0

    def __enter__(self) -> Box:
        root = self.folder / "root"
        for name in ("usr", "etc", "proc", "sys", "dev", "run", "tmp", "data", "var", "root", INSIDE.lstrip("/")):
            (root / name).mkdir(parents=True, exist_ok=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            if (Path("/") / name).is_symlink() and not (root / name).is_symlink():
                (root / name).symlink_to(f"usr/{name}")
        for name in ("passwd", "group", "nsswitch.conf"):
            shutil.copy(Path("/etc") / name, root / "etc" / name)
        (self.folder / "config.json").write_text(json.dumps(self._config))
        stdin, self.stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self.stderr, stderr = os.pipe()
        pid_file = self.folder / "pid"
        # In the background: `runc run` waits for the container, and so knows its exit code.
        self._process = subprocess.Popen(
            [*self._runc, "run", "--bundle", str(self.folder), "--pid-file", str(pid_file), "--keep", self.id],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            # Otherwise Go sends itself SIGURG, and runc passes on what it gets. What that has interrupted can't begin
            # again after a dump (see native/preload.c).
            env={**os.environ, "GODEBUG": "asyncpreemptoff=1"},
        )
        for end in (stdin, stdout, stderr):
            os.close(end)
        for stream in (self.stdout, self.stderr):
            os.set_blocking(stream, False)
        try:
            until(lambda: pid_file.exists() or self._process.poll() is not None)
            assert pid_file.exists(), f"runc: {self.said(self.stderr)}"
            self.pid = int(pid_file.read_text())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        # `runc run` ends with its container, and reaps it. Before there is one, nobody else knows what has to be ended.
        if self.pid and self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        else:
            self._process.kill()
        try:
            self._process.wait(PATIENCE)
        finally:
            subprocess.run([*self._runc, "delete", "--force", self.id], check=False, capture_output=True)
            for stream in (self.stdin, self.stdout, self.stderr):
                with contextlib.suppress(OSError):
                    os.close(stream)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The container's exit code."""
        return self._process.wait(timeout)

    def running(self) -> bool:
        return self._process.poll() is None

    def said(self, stream: int | None = None) -> str:
        """What it has written to stdout (or `stderr`) since the last call."""
        chunks = []
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.stdout if stream is None else stream, 65536):
                chunks.append(chunk)
        return b"".join(chunks).decode()

    def hear(self, text: str, timeout: float = PATIENCE) -> str:
        """Waits until stdout has said `text`, and returns all since the last call."""
        heard = ""

        def listening() -> bool:
            nonlocal heard
            heard += self.said()
            return text in heard

        until(listening, timeout, lambda: f'"{text}" wasn\'t said, but: {heard!r} {self.said(self.stderr)!r}')
        return heard

    def network(self, function: Callable[[], T]) -> T:
        """Calls a function in the container's network namespace."""
        return namespaces.in_network_namespace(self.pid, function)

    def connect(self, port: int) -> socket.socket:
        def dial() -> socket.socket:
            return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)

        return self.network(dial)

    def exec(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self._runc, "exec", self.id, *argv], capture_output=True, text=True, check=False)


def until(
    condition: Callable[[], object], timeout: float = PATIENCE, complaint: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, complaint() or "it didn't come true in time"
        time.sleep(0.005)


@contextlib.contextmanager
def redis(box: Box) -> Iterator[socket.socket]:
    """A connection to the redis on port 6379, once it is there."""
    until(lambda: _listens(box, 6379))
    with box.connect(6379) as connection:
        yield connection


def ask(connection: socket.socket, command: str) -> str:
    connection.sendall(command.encode() + b"\r\n")
    return connection.recv(65536).decode().strip()


def _listens(box: Box, port: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        table = Path(f"/proc/{box.pid}/net/tcp").read_text()
        return f":{port:04X} 00000000:0000 0A" in table
    return False


def _configuration(
    bundle: Bundle,
    argv: Sequence[str],
    user: tuple[int, int],
    capabilities: Sequence[str],
    data: Path,
    env: Mapping[str, str],
    no_new_privs: bool,
) -> dict[str, Any]:
    def bind(source: str | Path, target: str, *options: str) -> dict[str, Any]:
        return {"destination": target, "type": "bind", "source": str(source), "options": ["rbind", *options]}

    def fresh(kind: str, target: str, *options: str) -> dict[str, Any]:
        return {"destination": target, "type": kind, "source": kind, "options": list(options)}

    variables = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **env}
    bounding = list(capabilities)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": user[0], "gid": user[1]},
            "args": [f"{INSIDE}/init", "--", *argv],
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": "/",
            "capabilities": {
                "bounding": bounding,
                "effective": bounding if user[0] == 0 else [],
                "permitted": bounding if user[0] == 0 else [],
            },
            "noNewPrivileges": no_new_privs,
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        },
        "root": {"path": "root", "readonly": False},
        "hostname": "box",
        "mounts": [
            fresh("proc", "/proc", "nosuid", "noexec", "nodev"),
            fresh("tmpfs", "/dev", "nosuid", "mode=755"),
            fresh("tmpfs", "/run", "nosuid", "mode=755"),
            fresh("tmpfs", "/tmp", "nosuid", "mode=1777"),
            fresh("tmpfs", "/var", "nosuid", "mode=755"),
            fresh("tmpfs", "/dev/shm", "nosuid", "noexec", "nodev", "mode=1777"),
            fresh("devpts", "/dev/pts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
            fresh("mqueue", "/dev/mqueue", "nosuid", "noexec", "nodev"),
            fresh("sysfs", "/sys", "nosuid", "noexec", "nodev", "ro"),
            bind("/usr", "/usr", "ro"),
            bind(data, "/data"),
            bind(bundle.path, INSIDE, "ro"),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    }
