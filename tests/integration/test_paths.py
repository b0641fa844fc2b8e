"""The ways into a pod: through a mesh's proxy in it, and from clients whose address the node rewrites."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from specimen import PATIENCE, PORT, QUICK, Connection, Specimen, build, eventually, never, seen, wait_for

from criproxy.api import cri_pb2 as cri
from criproxy.kernel.namespaces import in_network_namespace
from lab.daemon import Daemon
from lab.kubelet import Kubelet

CHECKPOINT = {**QUICK, "criproxy.io/tier": "checkpoint", "criproxy.io/container-names": "specimen"}
SIDECAR = 15006
REDIRECT = "iptables -w -t nat -A PREROUTING -i eth0 -p tcp --dport {port} -j REDIRECT --to-ports {sidecar}"
TPROXY = (
    "iptables -w -t mangle -A PREROUTING -i eth0 -p tcp --dport {port} -j TPROXY --on-port {sidecar} --tproxy-mark 1",
    "ip rule add fwmark 1 lookup 100",
    "ip route add local 0.0.0.0/0 dev lo table 100",
)


def sh(command: str, pid: int | None = None) -> None:
    """On the node, or in the network namespace of a process."""
    enter = [] if pid is None else ["nsenter", "-t", str(pid), "-n"]
    subprocess.run([*enter, *shlex.split(command)], check=True, capture_output=True)


def impatient(made: socket.socket) -> None:
    """A keep-alive each second, and one without an answer is the connection's end."""
    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 1)):
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def connect_from(client: Specimen | None, address: str, port: int) -> Connection:
    """A connection from another container's network; None: from the node's."""
    if client is None:
        return Connection(address, port, PATIENCE)
    return in_network_namespace(Path(f"/proc/{client.init()}/ns/net"), lambda: Connection(address, port, PATIENCE))


def may_be_transparent(config: cri.ContainerConfig) -> None:
    config.linux.security_context.capabilities.add_capabilities.append("NET_ADMIN")


@pytest.mark.parametrize(
    ("rules", "port"),
    [
        pytest.param((REDIRECT,), 80, id="redirect"),
        pytest.param((REDIRECT,), PORT, id="redirect-of-the-same-port"),
        pytest.param(TPROXY, 80, id="tproxy"),
        pytest.param(TPROXY, PORT, id="tproxy-of-the-same-port"),
    ],
)
def test_behind_a_meshs_sidecar(
    kubelet: Kubelet, program: Path, daemon: Daemon, rules: tuple[str, ...], port: int
) -> None:
    """The port on eth0 is the sidecar's; the application's own socket, which only the sidecar connects to, decides."""
    sidecar = build(program.parent, "sidecar")
    with kubelet.run_pod(annotations=CHECKPOINT) as pod:
        specimen = Specimen.run(pod, program)
        command = [f"/specimen/{sidecar.name}", str(SIDECAR), str(PORT)]
        proxy = pod.run(
            "busybox", "proxy", command=command, mounts={sidecar.parent: "/specimen"}, change=may_be_transparent
        )
        eventually(lambda: proxy.log.exists() and "listening" in proxy.logs(), "the sidecar listens")
        for rule in rules:
            sh(rule.format(port=port, sidecar=SIDECAR), specimen.init())
        outside = Specimen(specimen.container, port)
        with outside.connect() as connection:
            # The application sees the sidecar: the rules do what they should.
            assert connection.ask("peer").startswith("::ffff:127.0.0.1 ")
            impatient(connection._socket)
            # The second time it is one that has been restored.
            for count in range(1, 3):
                assert connection.ask("count") == str(count)
                wait_for(daemon, specimen.id, "scaled_down")
                # The sidecar is awake and answers for its own connection.
                never(lambda: seen(daemon, specimen.id).state != "scaled_down", "it was woken", seconds=1.5)
            assert outside.ask("count") == "3"
            wait_for(daemon, specimen.id, "scaled_down")
            # A new one, through the sidecar.
            assert outside.ask("count") == "4"
            assert connection.ask("count") == "5"


@contextlib.contextmanager
def rule(table: str, chain: str, what: str) -> Iterator[None]:
    sh(f"iptables -w -t {table} -I {chain} {what}")
    try:
        yield
    finally:
        sh(f"iptables -w -t {table} -D {chain} {what}")


def test_clients_whose_address_the_node_rewrites(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    """As kube-proxy does with a NodePort: target and source."""
    with kubelet.run_pod(annotations=CHECKPOINT) as pod, kubelet.run_pod() as elsewhere:
        specimen = Specimen.run(pod, program)
        client = Specimen.run(elsewhere, program, "client")
        gateway = specimen.address.rpartition(".")[0] + ".1"
        node = f"-p tcp -s {client.address} -d {gateway} --dport 30080"
        with (
            rule("nat", "PREROUTING", f"{node} -j DNAT --to-destination {specimen.address}:{PORT}"),
            rule("nat", "POSTROUTING", f"-p tcp -s {client.address} -d {specimen.address} -j MASQUERADE"),
            connect_from(client, gateway, 30080) as connection,
        ):
            for count in range(1, 3):
                assert connection.ask("peer").startswith(f"::ffff:{gateway} ")
                assert connection.ask("count") == str(count)
                impatient(connection._socket)
                wait_for(daemon, specimen.id, "scaled_down")
                never(lambda: seen(daemon, specimen.id).state != "scaled_down", "it was woken", seconds=1.5)


def test_from_the_node_and_from_the_pod_itself(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    """With each address that the pod has."""
    with kubelet.run_pod(annotations=CHECKPOINT) as pod:
        specimen = Specimen.run(pod, program)
        neighbour = Specimen.run(pod, program, "neighbour", port=PORT + 1)
        specimen.tell("set kept")
        for address in (*pod.ips, "127.0.0.1", "::1"):
            for where in (neighbour, None):
                wait_for(daemon, specimen.id, "scaled_down")
                if where is None and address in ("127.0.0.1", "::1"):
                    continue
                with connect_from(where, address, PORT) as connection:
                    assert connection.ask("get") == "kept"
