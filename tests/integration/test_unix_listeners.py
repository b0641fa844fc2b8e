"""Unix sockets that listen: whom else a container would leave alone while it is in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from box import Box
from specimen import QUICK, eventually, seen, wait_for

from criproxy.entanglement import listens_in_volume
from criproxy.kernel import netlink, processes, sockets
from criproxy.kernel.netlink import Netlink
from lab.daemon import Daemon
from lab.kubelet import Kubelet

LISTEN = """
import socket, time
s = socket.socket(socket.AF_UNIX)
s.bind("{path}")
s.listen()
print("ready")
time.sleep(1000)
"""


def listens(container: Box) -> str | None:
    with container.network(lambda: Netlink(netlink.NETLINK_SOCK_DIAG)) as diag:
        return listens_in_volume(container.pid, lambda: processes.tree(container.pid), sockets.unix(diag))


def run(box: Callable[..., Box], path: str, volume: Path | None = None) -> Box:
    def change(config: dict[str, Any]) -> None:
        if volume is not None:
            mount = {"destination": "/volume", "type": "bind", "source": str(volume), "options": ["rbind"]}
            config["mounts"].append(mount)

    container = box("/usr/bin/python3", "-u", "-c", LISTEN.format(path=path), change=change)
    container.hear("ready")
    return container


@pytest.mark.parametrize("path", ["/root/socket", "/tmp/socket", "/dev/socket", "\\0abstract"])
def test_its_own(path: str, box: Callable[..., Box]) -> None:
    assert listens(run(box, path)) is None


def test_in_a_folder_of_the_node(box: Callable[..., Box], tmp_path: Path) -> None:
    volume = tmp_path / "shared"
    volume.mkdir()
    assert "in a volume (/volume/socket)" in (listens(run(box, "/volume/socket", volume)) or "")


def test_in_a_volume_of_its_pod_that_no_other_container_has(box: Callable[..., Box], tmp_path: Path) -> None:
    """As an emptyDir for /run, which pods with a read-only root have."""
    volume, other = (tmp_path / f"volumes/kubernetes.io~empty-dir/{name}" for name in ("run", "run-too"))
    for folder in (volume / "part", other):
        folder.mkdir(parents=True)
    container = run(box, "/volume/socket", volume)
    run(box, "/volume/socket", other)
    assert listens(container) is None
    run(box, "/volume/another", volume / "part")
    assert "in a volume" in (listens(container) or "")


def test_it_isnt_scaled_down(kubelet: Kubelet, daemon: Daemon, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    args = ["--unixsocket", "/volume/redis", "--save", ""]
    with kubelet.run_pod(annotations={**QUICK, "criproxy.io/tier": "checkpoint"}) as pod:
        container = pod.run("redis", args=args, mounts={tmp_path: "/volume"})
        refused = "listens on a unix socket in a volume (/volume/redis)"

        def told() -> bool:
            reason = seen(daemon, container.id).reason
            return "checkpoint failed" in reason and refused in reason

        eventually(told, "it is refused")
        wait_for(daemon, container.id, "running")
