"""The freezer tier with the real thing: what can't be checkpointed sleeps all the same, and never gets stuck."""

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from specimen import PATIENCE, eventually, never

from criproxy.api import cri_pb2 as cri
from criproxy.api.control_pb2 import ContainerStatus
from criproxy.entanglement import entanglement
from criproxy.freezer import FreezeError, Freezer
from criproxy.kernel import netlink, sockets
from criproxy.kernel.cgroup import UNIFIED, Cgroup
from criproxy.kernel.netlink import Netlink
from lab import cgroups, inventory
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Container, Kubelet, Pod

NAME = f"/criproxy-lab-{2000 + os.getpid()}"
SHORT = {"criproxy.io/scaledown-duration": "300ms"}
FREEZE = {**SHORT, "criproxy.io/tier": "freeze"}
VERSIONS = ["v2", "v1"]

# Listens on port 6379 and answers each connection with "ok", after what makes CRIU refuse it.
SERVER = """
#include <arpa/inet.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void) {
    char parameters[256] = {0};
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(6379)};
    int listener = socket(AF_INET6, SOCK_STREAM, 0);
    if (syscall(SYS_io_uring_setup, 4, parameters) < 0)
        return 3;
    if (bind(listener, (void *)&any, sizeof(any)) || listen(listener, 16))
        return 4;
    for (;;) {
        int client = accept(listener, 0, 0);
        write(client, "ok\\n", 3);
        close(client);
    }
}
"""


# --- The kernel's files ----------------------------------------------------------------------------------------


def only(group: Cgroup, version: str) -> Cgroup:
    """The group as a machine with that version alone has it."""
    folders = {c: f for c, f in group.folders.items() if (c == UNIFIED) == (version == "v2")}
    if version == "v1" and "freezer" not in folders:
        pytest.skip("this machine has no freezer of cgroup v1")
    if version == "v2" and UNIFIED not in folders:
        pytest.skip("this machine has no cgroup v2")
    return Cgroup(folders, group.roots)


@contextlib.contextmanager
def counting(version: str) -> Iterator[tuple[subprocess.Popen[bytes], Freezer, Callable[[], float]]]:
    """A process that uses the processor all the time, in a cgroup of its own; and its processor time in seconds."""
    cgroups.create(f"{NAME}/pod/container")
    try:
        with subprocess.Popen([sys.executable, "-Sc", "while True: pass"]) as process:
            try:
                cgroups.join(f"{NAME}/pod/container", process.pid)
                whole = Cgroup.of(process.pid)
                yield process, Freezer(only(whole, version)), whole.cpu_usage
            finally:
                process.kill()
                # It thaws what is frozen, which can't end before.
                cgroups.remove(NAME)
    finally:
        cgroups.remove(NAME)


async def standing_still(used: Callable[[], float]) -> float:
    """Waits until no processor time is used any more (what was used last is accounted for later), and returns it."""
    while True:
        before = used()
        await asyncio.sleep(0.1)
        if used() == before:
            return before


async def going_on(used: Callable[[], float], before: float) -> None:
    async with asyncio.timeout(PATIENCE):
        while used() <= before:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("version", VERSIONS)
async def test_it_stops_and_goes_on(version: str) -> None:
    with counting(version) as (_, freezer, used):
        assert not freezer.asked()
        for _ in range(3):
            await freezer.freeze()
            assert freezer.frozen()
            async with asyncio.timeout(PATIENCE):
                before = await standing_still(used)
            freezer.thaw()
            assert not freezer.asked()
            await going_on(used, before)


@pytest.mark.parametrize("version", VERSIONS)
async def test_what_somebody_else_has_paused_is_left_alone(version: str) -> None:
    with counting(version) as (_, freezer, _used):
        await freezer.freeze()
        with pytest.raises(FreezeError, match="paused already"):
            await freezer.freeze()
        assert freezer.frozen()
        freezer.thaw()


async def test_v2_lets_a_frozen_process_be_killed() -> None:
    with counting("v2") as (process, freezer, _):
        await freezer.freeze()
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL


async def test_v1_kills_a_frozen_process_at_the_thaw() -> None:
    with counting("v1") as (process, freezer, _):
        await freezer.freeze()
        process.kill()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        freezer.thaw()
        assert process.wait(PATIENCE) == -signal.SIGKILL


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_group_that_is_gone_thaws_without_an_error(version: str) -> None:
    with counting(version) as (process, freezer, _):
        process.kill()
        process.wait()
        cgroups.remove(NAME)
        freezer.thaw()
        assert not freezer.asked()
        with pytest.raises(FreezeError):
            await freezer.freeze()


# --- Who else would hang ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def holding(one: socket.socket) -> Iterator[int]:
    """A process that has that socket, and nobody else has."""
    with subprocess.Popen(["sleep", "1000"], stdin=one.fileno()) as process:
        one.close()
        try:
            yield process.pid
        finally:
            process.kill()


def entangled(pid: int) -> str | None:
    with Netlink(netlink.NETLINK_SOCK_DIAG) as diag:
        return entanglement(pid, [pid], sockets.unix(diag))


def test_a_unix_socket_to_somebody_outside() -> None:
    ours, theirs = socket.socketpair()
    with ours, holding(theirs) as pid:
        assert "connected to a process outside" in (entangled(pid) or "")
        with Netlink(netlink.NETLINK_SOCK_DIAG) as diag:
            assert entanglement(pid, [pid, os.getpid()], sockets.unix(diag)) is None


def test_a_unix_socket_that_somebody_outside_will_accept() -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as one:
        listener.bind(f"\0criproxy-test-{os.getpid()}")
        listener.listen()
        one.connect(listener.getsockname())
        with holding(one) as pid:
            assert "connected to a process outside" in (entangled(pid) or "")


def test_a_unix_socket_whose_other_end_is_gone() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with holding(theirs) as pid:
        assert entangled(pid) is None


def test_a_unix_socket_in_a_volume() -> None:
    name = f"criproxy-test-{os.getpid()}-volume"
    for path, reason in ((f"/dev/shm/{name}", "in a volume (/dev/shm/"), (f"\0{name}", "")):
        one = socket.socket(socket.AF_UNIX)
        try:
            one.bind(path)
            one.listen()
            with holding(one) as pid:
                assert reason in (entangled(pid) or "")
                assert bool(reason) == bool(entangled(pid))
        finally:
            Path(path.lstrip("\0")).unlink(missing_ok=True)


# --- Containers ------------------------------------------------------------------------------------------------


ONLY_V1 = """
import sys
from criproxy import cli
from criproxy.kernel import cgroup
everything = cgroup._mounts
cgroup._mounts = lambda text: {name: place for name, place in everything(text).items() if name != cgroup.UNIFIED}
sys.exit(cli.main())
"""


class OldDaemon(Daemon):
    """Sees cgroup v1 alone, as on a node without v2's tree."""

    def argv(self) -> list[str]:
        return [sys.executable, "-c", ONLY_V1, *super().argv()[1:]]


def listens(address: str) -> bool:
    try:
        connected(address).close()
    except ConnectionRefusedError:
        return False
    return True


def connected(address: str) -> socket.socket:
    return socket.create_connection((address, 6379), timeout=PATIENCE)


@dataclass
class World:
    version: str
    lab: Containerd
    daemon: Daemon
    kubelet: Kubelet

    def run(self, annotations: Mapping[str, str], image: str = "redis", **options: object) -> tuple[Pod, Container]:
        pod = self.kubelet.run_pod(annotations=annotations)
        container = pod.run(image, **options)
        address = pod.ip
        eventually(lambda: listens(address), "it listens")
        return pod, container

    def asleep(self, container: Container, tier: str = "freeze") -> ContainerStatus:
        status = self.daemon.wait_for(container.id, "scaled_down")
        assert status.tier == tier
        return status


@pytest.fixture(scope="module")
def old(containerd: Containerd) -> Iterator[tuple[Containerd, Daemon]]:
    if not Path("/sys/fs/cgroup/unified/cgroup.procs").exists():
        pytest.skip("only a hybrid machine can be made to look like one with cgroup v1 alone")
    with Containerd() as lab, OldDaemon(lab) as daemon:
        yield lab, daemon


@pytest.fixture(params=VERSIONS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "v1":
        lab, daemon = request.getfixturevalue("old")
        before = daemon.leftovers()
        with Kubelet(daemon.endpoint, lab) as kubelet:
            yield World("v1", lab, daemon, kubelet)
        assert daemon.leftovers() == before
    else:
        kubelet = request.getfixturevalue("kubelet")
        yield World("v2", kubelet.lab, request.getfixturevalue("daemon"), kubelet)


def ask(address: str, command: bytes) -> bytes:
    with connected(address) as client:
        client.sendall(command)
        return client.recv(1000)


def frozen(container: Container) -> set[str]:
    """Which freezers hold it ("v1", "v2"), as the kernel says."""
    group = Cgroup.of(json.loads(container.status_response().info["info"])["pid"])
    held = set()
    if "frozen 1" in (group.folders[UNIFIED] / "cgroup.events").read_text():
        held.add("v2")
    # A machine with cgroup v2 alone has no other.
    if "freezer" in group.folders and (group.folders["freezer"] / "freezer.state").read_text() == "FROZEN\n":
        held.add("v1")
    return held


def test_cycles_with_the_state_kept(world: World) -> None:
    pod, redis = world.run(FREEZE)
    started = redis.status()
    idle = connected(pod.ip)
    assert ask(pod.ip, b"SET k kept\r\n") == b"+OK\r\n"
    for _ in range(3):
        status = world.asleep(redis)
        assert status.reason == ""
        assert status.checkpoint_bytes == 0
        # Kubernetes sees a running container that was never restarted.
        assert redis.status().state == cri.ContainerState.CONTAINER_RUNNING
        assert redis.status().started_at == started.started_at
        assert frozen(redis) == {world.version}
        assert ask(pod.ip, b"GET k\r\n") == b"$4\r\nkept\r\n"
    world.asleep(redis)
    with idle:
        idle.sendall(b"GET k\r\n")
        assert idle.recv(100) == b"$4\r\nkept\r\n"


def test_keep_alives_of_both_sides_are_answered_while_it_is_frozen(kubelet: Kubelet, daemon: Daemon) -> None:
    pod = kubelet.run_pod(annotations=FREEZE)
    # It asks after a second of silence, and gives a client up that hasn't answered for about three more.
    redis = pod.run("redis", args=["--tcp-keepalive", "1", "--protected-mode", "no"])
    daemon.wait_for(redis.id, "scaled_down")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
            client.setsockopt(socket.IPPROTO_TCP, option, 1)
        client.settimeout(PATIENCE)
        client.connect((pod.ip, 6379))
        client.sendall(b"PING\r\n")
        assert client.recv(100) == b"+PONG\r\n"
        before = daemon.wait_for(redis.id, "scaled_down").restores
        time.sleep(7)
        assert daemon.seen(redis.id).restores == before, "a keep-alive doesn't wake it"
        client.sendall(b"PING\r\n")
        assert client.recv(100) == b"+PONG\r\n"


def test_exec_thaws(world: World) -> None:
    _, redis = world.run(FREEZE)
    world.asleep(redis)
    assert redis.exec_sync("redis-cli", "ping").stdout == "PONG\n"
    world.asleep(redis)
    with redis.exec("redis-cli", "ping") as stream:
        assert stream.exit_code() == 0


def test_port_forward_thaws(world: World) -> None:
    pod, redis = world.run(FREEZE)
    world.asleep(redis)
    with pod.port_forward(6379) as stream:
        stream.write(b"PING\r\n")
        assert world.daemon.wait_for(redis.id, "running")


def test_limits_can_be_changed_without_a_wake(world: World) -> None:
    _, redis = world.run(FREEZE, memory_limit=256 << 20)
    world.asleep(redis)
    limits = cri.LinuxContainerResources(memory_limit_in_bytes=128 << 20, cpu_period=100_000, cpu_quota=50_000)
    request = cri.UpdateContainerResourcesRequest(container_id=redis.id, linux=limits)
    world.kubelet.call("UpdateContainerResources", request, cri.UpdateContainerResourcesResponse)
    status = world.daemon.seen(redis.id)
    assert (status.state, status.restores) == ("scaled_down", 0)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda pod, redis: redis.stop(0), 137),
        (lambda pod, redis: redis.stop(10), 0),
        (lambda pod, redis: pod.stop(), 137),
        (lambda pod, redis: redis.remove(), None),
        (lambda pod, redis: remove_sandbox(pod), None),
    ],
    ids=["kill", "stop", "StopPodSandbox", "RemoveContainer", "RemovePodSandbox"],
)
def test_it_can_be_ended(world: World, end: Callable[[Pod, Container], None], code: int | None) -> None:
    before = inventory.take(world.lab)
    pod, redis = world.run(FREEZE)
    world.asleep(redis)
    # Whoever waits for what is frozen does so for ever: the call fails.
    end(pod, redis)
    if code is not None:
        assert redis.wait().exit_code == code
    if pod.id:
        pod.remove()
    cgroups.remove(pod.cgroup)
    # A shim needs a moment to end after its last container.
    eventually(lambda: not inventory.difference(before, inventory.take(world.lab)), "nothing is left")


def remove_sandbox(pod: Pod) -> None:
    request = cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id)
    pod.kubelet.call("RemovePodSandbox", request, cri.RemovePodSandboxResponse)
    pod.id = ""
    pod.kubelet.pods.remove(pod)


def test_it_can_be_killed_while_no_criproxy_runs(world: World) -> None:
    pod, redis = world.run(FREEZE)
    world.asleep(redis)
    world.daemon.kill()
    try:
        with Kubelet(world.lab.endpoint, world.lab) as direct:
            request = cri.StopContainerRequest(container_id=redis.id, timeout=0)
            direct.call("StopContainer", request, cri.StopContainerResponse)
    finally:
        world.daemon.start()
    assert redis.wait().exit_code == 137
    pod.remove()


def test_a_restarted_containerd_sees_a_running_container(world: World) -> None:
    # With cgroup v1 (and v2 alone) runc calls it paused, which must never get as far as Kubernetes.
    _, redis = world.run(FREEZE)
    world.asleep(redis)
    world.lab.restart()
    assert redis.status().state == cri.ContainerState.CONTAINER_RUNNING
    assert redis.exec_sync("redis-cli", "ping").stdout == "PONG\n"


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_the_next_daemon_takes_it_over(world: World, how: str) -> None:
    pod, redis = world.run(FREEZE)
    address = pod.ip
    assert ask(address, b"SET k kept\r\n") == b"+OK\r\n"
    world.asleep(redis)
    getattr(world.daemon, how)()
    with socket.socket() as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect((address, 6379))
        world.daemon.start()
        # The SYN was parked while nobody was there.
        client.settimeout(PATIENCE)
        assert select.select([], [client], [], PATIENCE)[1]
        client.sendall(b"GET k\r\n")
        assert client.recv(100) == b"$4\r\nkept\r\n"
    # On a busy machine it may sleep once more before it is asked.
    assert world.asleep(redis).restores >= 1
    world.daemon.restart()
    assert world.daemon.seen(redis.id).state == "scaled_down"
    assert ask(address, b"GET k\r\n") == b"$4\r\nkept\r\n"


# --- What can't be checkpointed --------------------------------------------------------------------------------


def test_an_image_that_must_be_pid_1(kubelet: Kubelet, daemon: Daemon, tmp_path: Path) -> None:
    script = tmp_path / "init"
    script.write_text("#!/bin/sh\n[ $$ = 1 ] || exit 99\nexec redis-server --protected-mode no --save ''\n")
    script.chmod(0o755)
    pod = kubelet.run_pod(annotations=SHORT)
    redis = pod.run("redis", command=["/init"], mounts={script: "/init"})
    status = daemon.wait_for(redis.id, "scaled_down")
    assert status.tier == "freeze"
    assert "/init must be PID 1" in status.reason
    assert ask(pod.ip, b"PING\r\n") == b"+PONG\r\n"
    assert redis.status().state == cri.ContainerState.CONTAINER_RUNNING


@pytest.mark.parametrize("tier", ["auto", "checkpoint"])
def test_no_init(kubelet: Kubelet, daemon: Daemon, tier: str) -> None:
    pod = kubelet.run_pod(annotations={**SHORT, "criproxy.io/init": "never", "criproxy.io/tier": tier})
    redis = pod.run("redis")
    eventually(lambda: listens(pod.ip), "it listens")
    status = daemon.wait_for(redis.id, "scaled_down" if tier == "auto" else "disabled")
    assert "init: never" in status.reason
    assert status.tier == ("freeze" if tier == "auto" else "")
    assert ask(pod.ip, b"PING\r\n") == b"+PONG\r\n"


def test_one_that_is_left_alone_is_shown_until_it_ends(kubelet: Kubelet, daemon: Daemon) -> None:
    pod = kubelet.run_pod(annotations={**SHORT, "criproxy.io/init": "never", "criproxy.io/tier": "checkpoint"})
    busybox = pod.run("busybox", command=["sh", "-c", "while [ ! -e /end ]; do sleep 0.1; done"])
    assert daemon.seen(busybox.id).state == "disabled"
    busybox.exec_sync("touch", "/end")
    busybox.wait()
    eventually(lambda: busybox.id not in daemon.known(), "it isn't shown any more")


def test_a_terminal_and_a_shared_pid_namespace(kubelet: Kubelet, daemon: Daemon) -> None:
    def shared(config: cri.PodSandboxConfig) -> None:
        config.linux.security_context.namespace_options.pid = cri.NamespaceMode.POD

    pod = kubelet.run_pod(annotations=SHORT, change=shared)
    # What is left behind goes to the pod's PID 1, the pause container, and is the container's all the same.
    command = ["sh", "-c", "(sleep 1000 &); exec redis-server --protected-mode no --save ''"]
    redis = pod.run("redis", command=command, tty=True)
    status = daemon.wait_for(redis.id, "scaled_down")
    assert status.tier == "freeze"
    assert ask(pod.ip, b"PING\r\n") == b"+PONG\r\n"
    daemon.wait_for(redis.id, "scaled_down")
    with redis.exec("sleep", "600"):
        daemon.wait_for(redis.id, "running")
        never(lambda: daemon.seen(redis.id).state != "running", "it sleeps while its command runs", seconds=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.c").write_text(SERVER)
    subprocess.run(["gcc", "-static", "-o", folder / "server", folder / "server.c"], check=True)
    return folder


@pytest.mark.parametrize("tier", ["auto", "checkpoint"])
def test_where_criu_refuses(kubelet: Kubelet, daemon: Daemon, server: Path, tier: str) -> None:
    def default_seccomp(config: cri.ContainerConfig) -> None:
        # Unlike all others, this profile can't be extended, and containerd 1.6's lets io_uring pass.
        config.linux.security_context.seccomp.profile_type = cri.SecurityProfile.ProfileType.RuntimeDefault

    pod = kubelet.run_pod(annotations={**SHORT, "criproxy.io/tier": tier})
    container = pod.run(
        "busybox", command=["/server/server"], mounts={server: "/server"}, change=default_seccomp, privileged=False
    )
    address = pod.ip
    ended = cri.ContainerState.CONTAINER_EXITED
    eventually(lambda: listens(address) or container.status().state == ended, "it listens, or has ended")
    if container.status().exit_code == 3:
        pytest.skip("this containerd's default profile refuses io_uring")
    if tier == "checkpoint":

        def refused() -> bool:
            status = daemon.seen(container.id)
            return status.state == "running" and "io_uring" in status.reason

        eventually(refused, "it runs, and says why")
    else:
        status = daemon.wait_for(container.id, "scaled_down")
        assert status.tier == "freeze"
        assert "io_uring" in status.reason
    assert ask(address, b"") == b"ok\n"
