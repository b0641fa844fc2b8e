"""criproxy itself, between the lab's containerd and whoever acts as kubelet.

    with Containerd() as containerd, Daemon(containerd) as daemon, Kubelet(daemon.endpoint, containerd) as kubelet:
        ...
        daemon.wait_for(container.id, "scaled_down")

Left in this order everything goes through criproxy to the end, and leaving Daemon fails if criproxy left anything of a
removed pod behind.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from criproxy import status
from criproxy.api import cri_pb2 as cri
from criproxy.api.control_pb2 import ContainerStatus
from lab import BUILD, CHECKOUT, LabError, cgroups
from lab.containerd import Containerd, mounts_below, unmount_below
from lab.process import Service, run

COMMAND = CHECKOUT / ".venv" / "bin" / "criproxy"
# CRIU from another Debian release, which the set-up puts there where this machine's own doesn't do.
CRIU_ROOT = BUILD / "criu"
# Folders of the state directory in which each entry belongs to one living pod or container.
_PER_POD = ("containers", "sandboxes")


class Daemon:
    """`settings` are flags of `criproxy serve` without their dashes: {"scaledown-duration": "2s"}."""

    def __init__(self, lab: Containerd, settings: Mapping[str, str] | None = None) -> None:
        self.lab = lab
        self._settings = settings or {}
        self._service: Service | None = None

    @property
    def run_dir(self) -> Path:
        return self.lab.state / "criproxy"

    @property
    def state_dir(self) -> Path:
        return self.lab.root / "criproxy"

    @property
    def endpoint(self) -> str:
        """What kubelet is told instead of containerd's endpoint."""
        return f"unix://{self.run_dir}/criproxy.sock"

    @property
    def control(self) -> str:
        return f"unix://{self.run_dir}/control.sock"

    @property
    def service(self) -> Service:
        if self._service is None:
            raise LabError("This criproxy isn't running")
        return self._service

    def argv(self) -> list[str]:
        settings = {
            "listen": self.endpoint,
            "runtime-endpoint": self.lab.endpoint,
            "control": self.control,
            "state-dir": str(self.state_dir),
            # The machine's own file must not matter.
            "config": str(self.run_dir / "config.toml"),
            "log-level": "debug",
            "kubelet-cgroup": self.lab.kubelet_cgroup,
            **({"criu-root": str(CRIU_ROOT)} if CRIU_ROOT.is_dir() else {}),
            **self._settings,
        }
        return [str(COMMAND), "serve", *(word for key, value in settings.items() for word in (f"--{key}", value))]

    def start(self) -> None:
        """Start it and wait until calls come through. Raises LabError with the end of its log."""
        cgroups.create(f"{self.lab.cgroup}/criproxy")
        self.run_dir.mkdir(mode=0o700, exist_ok=True)
        (self.run_dir / "config.toml").touch()
        # What a unit's processes get: nothing of the caller's environment.
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        self._service = Service("criproxy", self.argv(), self.lab.logs / "criproxy.log", env=environment)
        cgroups.join(f"{self.lab.cgroup}/criproxy", self._service.pid)
        self._service.wait_until(self._answers, "calls come through")

    def stop(self) -> None:
        """SIGTERM, as `systemctl stop`; raises LabError if it then ends with an error or has to be killed."""
        code = self.service.stop(grace=30)
        if code not in (0, -signal.SIGTERM):
            raise LabError(f"criproxy ended with {code} after SIGTERM:\n{self.service.tail()}")

    def kill(self) -> None:
        """SIGKILL, which it can't prepare for."""
        self.service.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def status(self) -> list[dict[str, Any]]:
        """What `criproxy status --json` prints."""
        answer: list[dict[str, Any]] = json.loads(run([COMMAND, "status", "--json", "--control", self.control]))
        return answer

    def known(self) -> dict[str, ContainerStatus]:
        """What criproxy knows of its containers, by their ids; asked without the command, whose start would take longer
        than what is looked for. Raises LabError."""
        try:
            return {found.container_id: found for found in status.ask(self.run_dir / "control.sock")}
        except status.NoAnswer as error:
            raise LabError(str(error)) from error

    def seen(self, container_id: str) -> ContainerStatus:
        """One of them. Raises LabError."""
        if (found := self.known().get(container_id)) is None:
            raise LabError(f"criproxy knows no container {container_id}")
        return found

    def wait_for(self, container_id: str, state: str, *, timeout: float = 60.0) -> ContainerStatus:
        """Waits until the container is in the state; what criproxy knows of it then. Raises LabError after `timeout`
        seconds."""
        deadline = time.monotonic() + timeout
        while (found := self.seen(container_id)).state != state:
            if time.monotonic() > deadline:
                raise LabError(f"Not {state} within {timeout:g} s: {found}\n{self.service.tail()}")
            time.sleep(0.05)
        return found

    def leftovers(self) -> list[str]:
        """What is there that belongs to a pod: state files, checkpoints and pins. Empty once all pods are removed."""
        places = [self.state_dir / name for name in _PER_POD] + [self.run_dir / "bpf"]
        entries = (entry for place in places if place.is_dir() for entry in place.iterdir())
        # The kernel itself puts two iterators into a bpf file system (CONFIG_BPF_PRELOAD).
        return sorted(str(entry) for entry in entries if entry.name not in ("maps.debug", "progs.debug", "kubelet"))

    def _answers(self) -> bool:
        with grpc.insecure_channel(self.endpoint) as channel:
            version = channel.unary_unary(
                "/runtime.v1.RuntimeService/Version",
                request_serializer=cri.VersionRequest.SerializeToString,
                response_deserializer=cri.VersionResponse.FromString,
            )
            with contextlib.suppress(grpc.RpcError):
                version(cri.VersionRequest(), timeout=1)
                return True
        return False

    def __enter__(self) -> "Daemon":
        if not os.access(COMMAND, os.X_OK):
            raise LabError(f"{COMMAND} isn't there", "`make setup` makes it")
        try:
            self.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception) and self._service:
                print(f"criproxy's log:\n{self._service.tail()}", file=sys.stderr, flush=True)
            left = self.leftovers() if error is None else []
        finally:
            self._close()
        if left:
            raise LabError(f"criproxy left behind: {', '.join(left)}", f"its log: {self.lab.logs / 'criproxy.log'}")

    def _close(self) -> None:
        if self._service:
            self._service.stop()
        unmount_below(self.run_dir)
        if points := mounts_below(self.state_dir):
            raise LabError(f"criproxy left mounts behind: {points}")
