"""Pods in the host's network (hostNetwork) whose ports are given. This machine's network is that host's."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from specimen import PATIENCE, QUICK, Connection, Specimen, eventually, never, seen, wait_for

from criproxy.api import cri_pb2 as cri
from criproxy.config import Config
from criproxy.hook.host_network import HostNetwork, of_pod
from criproxy.hook.pod_maps import Park, Visitor
from criproxy.kernel import processes
from criproxy.kernel.bpf import mount_bpffs
from criproxy.kernel.namespaces import in_network_namespace
from criproxy.kernel.sockets import Flow
from criproxy.kubelet.connections import Kubelet as Kubelets
from criproxy.policy import Port
from lab import client
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Container, Kubelet
from lab.prober import Exec, Http, Prober, Tcp

_numbers = itertools.count()
SELF = of_pod(os.getpid())


@pytest.fixture
def new_port(containerd: Containerd) -> Callable[[], int]:
    """Ports of this host that are this lab's alone, and that the kernel hands to nobody."""

    def next_one() -> int:
        while True:
            number = 17000 + 300 * containerd.number + next(_numbers) % 300
            with socket.socket(socket.AF_INET6) as tried, contextlib.suppress(OSError):
                tried.bind(("::", number))
                return number

    return next_one


@pytest.fixture
def port(new_port: Callable[[], int]) -> int:
    return new_port()


def in_the_hosts(config: cri.PodSandboxConfig) -> None:
    config.linux.security_context.namespace_options.network = cri.NamespaceMode.NODE
    config.hostname = ""  # such pods have the host's


@pytest.fixture
def run(kubelet: Kubelet, program: Path, port: int) -> Iterator[Callable[..., Specimen]]:
    """Runs a specimen in the host's network, in a pod of its own."""
    with contextlib.ExitStack() as stack:

        def start(
            given: Mapping[str, str] | None = None, *, ports: str = f"specimen={port}", at: int = port
        ) -> Specimen:
            annotations = {**QUICK, "criproxy.io/ports-map": ports, **(given or {})}
            pod = stack.enter_context(kubelet.run_pod(annotations=annotations, change=in_the_hosts))
            specimen = Specimen.run(pod, program, port=at)
            specimen.address = "127.0.0.1"
            return specimen

        yield start


@pytest.fixture
def redis(kubelet: Kubelet, port: int) -> Iterator[Callable[..., Container]]:
    """Runs redis in the host's network."""
    with contextlib.ExitStack() as stack:

        def start(given: Mapping[str, str] | None = None, *, bind: Sequence[str] = ("*", "-::*")) -> Container:
            annotations = {**QUICK, "criproxy.io/ports-map": f"redis={port}", **(given or {})}
            pod = stack.enter_context(kubelet.run_pod(annotations=annotations, change=in_the_hosts))
            container = pod.run("redis", args=["--port", str(port), "--bind", *bind, "--protected-mode", "no"])
            client.Service("127.0.0.1", port, client.redis("set", "key", "value")).wait()
            return container

        yield start


def asks(address: str, port: int) -> str:
    """The answer of a specimen."""
    with Connection(address, port, PATIENCE) as connection:
        return connection.ask("count")


# --- who wakes it -----------------------------------------------------------------------------------------------------


def test_a_client_on_the_host_wakes_it(
    daemon: Daemon, containerd: Containerd, run: Callable[..., Specimen], port: int
) -> None:
    specimen = run()
    for count, address in enumerate(("127.0.0.1", "::1", containerd.gateway, containerd.gateway6), 1):
        assert wait_for(daemon, specimen.id, "scaled_down").tier == "checkpoint"
        assert asks(address, port) == str(count)


def test_a_pod_wakes_it(
    daemon: Daemon, containerd: Containerd, kubelet: Kubelet, run: Callable[..., Specimen], port: int
) -> None:
    specimen = run()
    with kubelet.run_pod() as other:
        for count, address in enumerate((containerd.gateway, containerd.gateway6), 1):
            wait_for(daemon, specimen.id, "scaled_down")
            assert in_network_namespace(other.netns, lambda to=address: asks(to, port)) == str(count)  # type: ignore[misc]


@contextlib.contextmanager
def redirected(chain: str, *rule: str) -> Iterator[None]:
    """What kube-proxy does for a NodePort, for one port."""
    command = ["iptables", "-w", "-t", "nat"]
    subprocess.run([*command, "-I", chain, *rule], check=True)
    try:
        yield
    finally:
        subprocess.run([*command, "-D", chain, *rule], check=True)


def test_behind_a_node_port(
    daemon: Daemon,
    containerd: Containerd,
    kubelet: Kubelet,
    run: Callable[..., Specimen],
    port: int,
    new_port: Callable[[], int],
) -> None:
    specimen, node_port = run(), new_port()
    rule = ("-p", "tcp", "-d", containerd.gateway, "--dport", str(node_port))
    target = ("-j", "DNAT", "--to-destination", f"{containerd.gateway}:{port}")
    with kubelet.run_pod() as other, redirected("OUTPUT", *rule, *target), redirected("PREROUTING", *rule, *target):
        wait_for(daemon, specimen.id, "scaled_down")
        assert asks(containerd.gateway, node_port) == "1"
        wait_for(daemon, specimen.id, "scaled_down")
        assert in_network_namespace(other.netns, lambda: asks(containerd.gateway, node_port)) == "2"


def test_many_at_once_wake_it_once(daemon: Daemon, run: Callable[..., Specimen], port: int) -> None:
    specimen = run()
    restores = wait_for(daemon, specimen.id, "scaled_down").restores
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(asks("127.0.0.1", port))) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, answers)) == list(range(1, 31))
    assert wait_for(daemon, specimen.id, "scaled_down").restores == restores + 1


def test_redis_keeps_its_value(daemon: Daemon, redis: Callable[..., Container], port: int) -> None:
    container = redis()
    for _ in range(3):
        wait_for(daemon, container.id, "scaled_down")
        client.Service("127.0.0.1", port, client.redis("get", "key", wanted="value")).first_byte()


def test_new_connections_keep_it_awake(daemon: Daemon, run: Callable[..., Specimen], port: int) -> None:
    specimen = run({"criproxy.io/scaledown-duration": "2s"})
    wait_for(daemon, specimen.id, "scaled_down")
    for count in range(1, 10):
        assert asks("127.0.0.1", port) == str(count)
        time.sleep(0.5)
    assert seen(daemon, specimen.id).restores == 1


def test_other_ports_are_nobodys_business(
    daemon: Daemon, run: Callable[..., Specimen], new_port: Callable[[], int]
) -> None:
    specimen = run()
    wait_for(daemon, specimen.id, "scaled_down")
    with socket.create_server(("127.0.0.1", new_port())) as server:
        for _ in range(20):
            with socket.create_connection(server.getsockname()) as mine:
                other, peer = server.accept()
                with other:
                    assert peer == mine.getsockname()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", new_port()))
    assert seen(daemon, specimen.id).state == "scaled_down"


def test_other_addresses_are_nobodys_business(
    daemon: Daemon, containerd: Containerd, redis: Callable[..., Container], port: int
) -> None:
    """As with a proxy for authentication, which has the application's port at the node's address."""
    container = redis(bind=["127.0.0.1"])
    wait_for(daemon, container.id, "scaled_down")
    with socket.create_server((containerd.gateway, port)) as server:
        for _ in range(3):
            with socket.create_connection(server.getsockname()) as mine:
                other, peer = server.accept()
                with other:
                    assert peer == mine.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("::1", port))
        assert seen(daemon, container.id).state == "scaled_down"
        client.Service("127.0.0.1", port, client.redis("get", "key", wanted="value")).first_byte()


# --- open connections -------------------------------------------------------------------------------------------------


def test_an_open_connection_keeps_it_awake_and_is_the_reason(
    daemon: Daemon, run: Callable[..., Specimen], new_port: Callable[[], int]
) -> None:
    specimen = run()
    with specimen.connect() as connection:
        known = eventually(
            lambda: (s := seen(daemon, specimen.id)).reason.startswith("a connection ") and s, "says why"
        )
        assert "is open, which can't be kept in the host's network" in known.reason
        assert "criproxy.io/connections: close" in known.reason
        # It may have been made while it slept, and come from criproxy then.
        assert f" to port {specimen.port} " in known.reason
        never(lambda: seen(daemon, specimen.id).state == "scaled_down", "it sleeps", seconds=1)
        assert connection.ask("count") == "1"
    wait_for(daemon, specimen.id, "scaled_down")
    with socket.create_server(("127.0.0.1", new_port())) as server:
        specimen.tell(f"dial 127.0.0.1 {server.getsockname()[1]}")
        outgoing, _ = server.accept()
        with outgoing:
            reason = f"a connection to 127.0.0.1:{server.getsockname()[1]} is open"
            eventually(lambda: seen(daemon, specimen.id).reason.startswith(reason), "says why")
        wait_for(daemon, specimen.id, "scaled_down")


def test_it_may_end_them_when_they_are_idle(daemon: Daemon, run: Callable[..., Specimen]) -> None:
    specimen = run({"criproxy.io/connections": "close", "criproxy.io/scaledown-duration": "2s"})
    wait_for(daemon, specimen.id, "scaled_down")
    assert specimen.ask("count") == "1"  # awake now
    with specimen.connect() as connection:
        for count in range(2, 8):
            assert connection.ask("count") == str(count)
            time.sleep(0.5)
        assert connection.ask("after 3000") == "ok"  # a request that takes longer than its duration
        assert connection.ended()
    wait_for(daemon, specimen.id, "scaled_down")
    assert specimen.ask("count") == "8"


def test_it_may_be_ended_and_started_afresh(daemon: Daemon, run: Callable[..., Specimen]) -> None:
    specimen = run({"zeropod.ctrox.dev/disable-checkpointing": "true"})
    for _ in range(2):
        assert wait_for(daemon, specimen.id, "scaled_down").tier == "restart"
        assert specimen.ask("count") == "1"


def test_what_is_frozen_has_no_open_connection_either(daemon: Daemon, run: Callable[..., Specimen]) -> None:
    specimen = run({"criproxy.io/tier": "freeze", "criproxy.io/connections": "close"})
    with specimen.connect() as connection:
        eventually(lambda: "is open, which can't be kept" in seen(daemon, specimen.id).reason, "says why")
        assert connection.ask("count") == "1"
    eventually(lambda: seen(daemon, specimen.id).state == "scaled_down", "it is frozen once that is closed")
    assert seen(daemon, specimen.id).tier == "freeze"
    assert specimen.ask("count") == "2"


# --- probes -----------------------------------------------------------------------------------------------------------


def test_probes_find_it_healthy_and_let_it_sleep(
    daemon: Daemon, containerd: Containerd, kubelet: Kubelet, new_port: Callable[[], int], tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    web, database = new_port(), new_port()
    conf = (
        "pid /run/nginx.pid; error_log /dev/stderr; events {} http { server { listen %d; location / { return 200; } } }"
    )
    (tmp_path / "nginx.conf").write_text(conf % web)
    ports = {"criproxy.io/ports-map": f"nginx={web};redis={database}", "criproxy.io/scaledown-duration": "2s"}
    with kubelet.run_pod(annotations=ports, change=in_the_hosts) as pod:
        nginx = pod.run("nginx", args=["-g", "daemon off;", "-c", "/conf/nginx.conf"], mounts={tmp_path: "/conf"})
        redis = pod.run("redis", args=["--port", str(database)])
        probes = [
            Http("nginx, HTTP", containerd.gateway, web),
            Tcp("nginx, TCP", containerd.gateway, web),
            Tcp("redis, TCP", "127.0.0.1", database),
            Exec.of("redis, exec", redis, "redis-cli", "-p", str(database), "ping"),
        ]
        with Prober(containerd, probes) as prober:
            prober.wait_for_success()
            for container in (nginx, redis):
                wait_for(daemon, container.id, "scaled_down")
            # A probe may have come before its first answer was known.
            time.sleep(3)
            restores = [wait_for(daemon, container.id, "scaled_down").restores for container in (nginx, redis)]
            began = time.monotonic()
            time.sleep(4)
            assert prober.failures(since=began) == []
            states = [seen(daemon, container.id) for container in (nginx, redis)]
            assert [s.state for s in states] == ["scaled_down"] * 2
            assert [s.restores for s in states] == restores
            # Somebody else, with kubelet's address, wakes it; its probes then don't keep it awake.
            client.Service(containerd.gateway, web, client.http(wanted="")).first_byte()
            assert seen(daemon, nginx.id).restores == restores[0] + 1
            wait_for(daemon, nginx.id, "scaled_down")
            assert prober.failures(since=began) == []


def test_probes_of_a_quiet_port_find_it_healthy(
    daemon: Daemon,
    containerd: Containerd,
    kubelet: Kubelet,
    port: int,
    new_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    tmp_path.chmod(0o755)
    quiet = new_port()
    server = f"server {{ listen {port}; listen {quiet}; return 200; }}"
    (tmp_path / "nginx.conf").write_text(f"pid /run/nginx.pid; error_log /dev/stderr; events {{}} http {{ {server} }}")
    annotations = {
        "criproxy.io/ports-map": f"nginx={port}",
        "criproxy.io/quiet-ports": str(quiet),
        "criproxy.io/scaledown-duration": "2s",
    }
    with kubelet.run_pod(annotations=annotations, change=in_the_hosts) as pod:
        nginx = pod.run("nginx", args=["-g", "daemon off;", "-c", "/conf/nginx.conf"], mounts={tmp_path: "/conf"})
        with Prober(containerd, [Http("HTTP", containerd.gateway, quiet)]) as prober:
            prober.wait_for_success()
            began = time.monotonic()
            wait_for(daemon, nginx.id, "scaled_down")
            eventually(lambda: len(prober.results(since=began)) > 4, "it is probed")
            assert prober.failures(since=began) == []


def keepers(inodes: set[int]) -> list[int]:
    """The processes that keep these sockets open."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if processes.name(pid) == "keep" and processes.socket_inodes([pid]) & inodes]


async def test_the_hook_itself(port: int, tmp_path: Path) -> None:
    """kubelet is refused where the application isn't there (any more), once that is seen; what others take away is put
    back; connections wait for the next daemon."""
    bpffs = tmp_path / "bpf"
    mount_bpffs(bpffs)
    try:
        pins = bpffs / "pod"
        settings = Config(kubelet_addresses=("127.0.0.7",))
        with (
            contextlib.closing(Kubelets(settings, bpffs)),
            contextlib.closing(HostNetwork.attach(SELF, pins)) as network,
        ):
            where = Port("tcp", port)
            network.assign(0, {where})
            network.answer(0, {where: (Visitor.KUBELET,)})
            listeners = network.listen()
            probed = listeners[2]
            inodes = {os.fstat(one.fileno()).st_ino for one in listeners[:2]}
            kubelet = socket.create_connection(("127.0.0.1", port), 5, ("127.0.0.7", 0))
            accepted, _ = probed.accept()
            flow = Flow("tcp", ("127.0.0.1", port), kubelet.getsockname())
            assert network.accepted(accepted) == (flow, Visitor.KUBELET)
            with pytest.raises(ConnectionRefusedError):
                await network.connect(flow, Visitor.KUBELET)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), 5, ("127.0.0.7", 0))
            # Somebody has detached the program, and ended what keeps the listener.
            (pins / "link").unlink()
            assert network.problem() is None
            assert network.repairs == 1
            network.park(0, Park.ALL)
            os.kill(keepers(inodes)[0], signal.SIGKILL)
            eventually(lambda: not keepers(inodes), "it ends")
            assert network.problem() is None
            for one in listeners:
                one.close()
            network.close()
            socket.create_connection(("127.0.0.1", port), 5).close()
            with contextlib.closing(HostNetwork.adopt(SELF, pins)) as next_one:
                parked, *_ = next_one.listen()
                assert next_one.accepted(parked.accept()[0])[0].port == where
                next_one.detach()
            eventually(lambda: not keepers(inodes), "it ends")
            assert not pins.exists()
    finally:
        subprocess.run(["umount", bpffs], check=True)


# --- criproxy comes and goes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_connections_wait_for_the_next_daemon(
    daemon: Daemon, run: Callable[..., Specimen], port: int, end: str
) -> None:
    specimen = run()
    wait_for(daemon, specimen.id, "scaled_down")
    daemon.stop() if end == "stop" else daemon.kill()
    answers: list[str] = []
    waiting = [threading.Thread(target=lambda to=to: answers.append(asks(to, port))) for to in ("127.0.0.1", "::1")]
    for thread in waiting:
        thread.start()
    time.sleep(0.5)
    assert answers == []
    daemon.start()
    for thread in waiting:
        thread.join()
    assert sorted(answers) == ["1", "2"]
    wait_for(daemon, specimen.id, "scaled_down")
    assert specimen.ask("count") == "3"


def test_without_a_daemon_what_runs_is_reached(
    daemon: Daemon, containerd: Containerd, run: Callable[..., Specimen], port: int
) -> None:
    specimen = run({"criproxy.io/scaledown-duration": "1s"})
    with Prober(containerd, [Tcp("specimen, TCP", "127.0.0.1", port)]) as prober:
        prober.wait_for_success()
        wait_for(daemon, specimen.id, "scaled_down")
        with specimen.connect():
            daemon.kill()
            began = time.monotonic()
            assert asks("127.0.0.1", port) == "1"
            eventually(lambda: len(prober.results(since=began)) > 2, "it is probed")
            assert prober.failures(since=began) == []
    daemon.start()
    wait_for(daemon, specimen.id, "scaled_down")


# --- containers come and go -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
def test_nothing_is_left_and_its_port_is_free(daemon: Daemon, run: Callable[..., Specimen], port: int) -> None:
    specimen = run()
    wait_for(daemon, specimen.id, "scaled_down")
    specimen.container.pod.remove()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with socket.create_server(("", port)):
        pass


def test_a_container_that_is_started_again_has_its_port(
    daemon: Daemon, run: Callable[..., Specimen], program: Path, port: int
) -> None:
    first = run()
    wait_for(daemon, first.id, "scaled_down")
    first.end("exit 3")
    assert first.container.wait().exit_code == 3
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    again = Specimen.run(first.container.pod, program, port=port, attempt=1)
    wait_for(daemon, again.id, "scaled_down")
    assert asks("127.0.0.1", port) == "1"


def test_a_port_is_one_containers(
    daemon: Daemon, run: Callable[..., Specimen], port: int, new_port: Callable[[], int]
) -> None:
    first = run()
    wait_for(daemon, first.id, "scaled_down")
    second = run(at=new_port())
    known = seen(daemon, second.id)
    assert known.state == "disabled"
    assert known.reason.startswith(f"port {port}/tcp of the host's network is another pod's already (sandbox ")
    assert first.ask("count") == "1"
    wait_for(daemon, first.id, "scaled_down")
    assert asks("127.0.0.1", second.port) == "1"
    first.container.pod.remove()
    second.container.pod.remove()
    third = run()
    wait_for(daemon, third.id, "scaled_down")
    assert third.ask("count") == "1"


def test_two_pods_sleep_side_by_side(daemon: Daemon, run: Callable[..., Specimen], new_port: Callable[[], int]) -> None:
    both = [run(ports=f"specimen={number}", at=number) for number in (new_port(), new_port())]
    for count in ("1", "2"):
        for one in both:
            wait_for(daemon, one.id, "scaled_down")
        for one in both:
            assert one.ask("count") == count


# --- what it isn't done for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ports", "reason"),
    [
        ("other=80", "and that gives it none"),
        (
            "specimen=17,18/udp",
            "where no datagram can wake it: criproxy.io/ports-map gives it 18/udp, TCP alone is right",
        ),
    ],
    ids=["none", "udp"],
)
def test_other_ports_leave_it_untouched(
    daemon: Daemon, run: Callable[..., Specimen], port: int, ports: str, reason: str
) -> None:
    specimen = run(ports=ports)
    known = seen(daemon, specimen.id)
    assert (known.state, known.tier) == ("disabled", "")
    assert known.reason.startswith("it uses the host's network (hostNetwork), ")
    assert known.reason.endswith(reason)
    assert asks("127.0.0.1", port) == "1"
