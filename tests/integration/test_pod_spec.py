"""What a pod spec may ask for, in pods that are scaled down: containers, hooks and namespaces (docs/pod-spec.md)."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from specimen import (
    PATIENCE,
    PORT,
    QUICK,
    Specimen,
    application_pid,
    comm,
    eventually,
    never,
    seen,
    status,
    wait_for,
)

from criproxy.api import cri_pb2 as cri
from lab.daemon import Daemon
from lab.kubelet import Kubelet, Pod

ONE = {**QUICK, "criproxy.io/container-names": "specimen"}
RUNNING = cri.ContainerState.CONTAINER_RUNNING
EXITED = cri.ContainerState.CONTAINER_EXITED


# --- Containers, one after the other ---------------------------------------------------------------------------


@pytest.mark.parametrize("annotations", [QUICK, ONE], ids=["all", "named"])
def test_init_containers_run_in_their_order_to_their_end(
    annotations: dict[str, str], kubelet: Kubelet, program: Path, daemon: Daemon, tmp_path: Path
) -> None:
    with kubelet.run_pod(annotations=annotations) as pod:
        inits = [
            # The second waits for longer than a scale-down would take.
            pod.run_init("busybox", name, command=["sh", "-c", f"sleep {seconds}; echo {name} >>/volume/order"],
                         mounts={tmp_path: "/volume"})
            for name, seconds in (("first", 0), ("second", 1))
        ]  # fmt: skip
        assert (tmp_path / "order").read_text() == "first\nsecond\n"
        specimen = Specimen.run(pod, program)
        for count in ("1", "2"):
            wait_for(daemon, specimen.id, "scaled_down")
            # As kubelet looks for them at each sync, and makes no other ones as long as they are there.
            for init in inits:
                found = init.status()
                assert (found.state, found.exit_code, found.reason) == (EXITED, 0, "Completed")
            assert specimen.ask("count") == count


def test_an_init_container_that_fails_is_told_and_may_be_tried_again(kubelet: Kubelet) -> None:
    with kubelet.run_pod(annotations=QUICK) as pod:
        failed = pod.run("busybox", "init", command=["sh", "-c", "echo no >/dev/termination-log; exit 3"])
        found = failed.wait()
        assert (found.exit_code, found.reason, failed.termination_message()) == (3, "Error", "no\n")
        failed.remove()
        pod.run("busybox", "init", command=["true"], attempt=1).wait()


def test_a_sidecar_sleeps_and_is_there_for_what_starts_later(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    """An init container with `restartPolicy: Always`: started before the others, ended after them."""
    with kubelet.run_pod(annotations=QUICK) as pod:
        sidecar = Specimen.run(pod, program, "sidecar", port=PORT + 1)
        wait_for(daemon, sidecar.id, "scaled_down")
        pod.run_init("busybox", "init", command=["sh", "-c", f"echo count | nc -w 60 127.0.0.1 {PORT + 1} | grep 1"])
        wait_for(daemon, sidecar.id, "scaled_down")
        main = Specimen.run(pod, program)
        for one in (sidecar, main):
            wait_for(daemon, one.id, "scaled_down")
        # As kubelet ends a pod: the sidecar last, while its work may still be needed.
        main.container.stop(60)
        main.has_said("caught 15")
        assert sidecar.container.status().state == RUNNING
        assert sidecar.ask("count") == "2"
        wait_for(daemon, sidecar.id, "scaled_down")
        sidecar.container.stop(60)
        sidecar.has_said("caught 15")


def test_a_sidecar_that_is_not_named_is_not_scaled_down(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations=ONE) as pod:
        sidecar = Specimen.run(pod, program, "sidecar", port=PORT + 1)
        specimen = Specimen.run(pod, program)
        wait_for(daemon, specimen.id, "scaled_down")
        assert comm(sidecar.init()) == "specimen"
        assert sidecar.ask("count") == "1"
        assert seen(daemon, specimen.id).state == "scaled_down"


# --- Hooks -----------------------------------------------------------------------------------------------------


def test_post_start_and_pre_stop_by_exec(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    """kubelet runs both by ExecSync without a time limit; the preStop hook has to find its application awake."""
    with kubelet.run_pod(annotations=QUICK) as pod:
        specimen = Specimen.run(pod, program)
        # It takes longer than a scale-down would.
        hook = ["sh", "-c", "sleep 1; ls /proc/[0-9]*/exe -l | grep -c specimen"]
        for _ in range(2):
            before = seen(daemon, specimen.id).restores
            assert specimen.container.exec_sync(*hook).stdout == "1\n"
            wait_for(daemon, specimen.id, "scaled_down")
        # The same command once more, which has succeeded before: no answer from memory will do.
        assert specimen.container.exec_sync(*hook).stdout == "1\n"
        assert seen(daemon, specimen.id).restores > before
        specimen.container.stop(60)
        specimen.has_said("caught 15")


def test_pre_stop_by_http_wakes(kubelet: Kubelet, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations=QUICK) as pod:
        container = pod.run("nginx")
        for path in ("/post-start", "/", "/pre-stop"):
            if path != "/post-start":
                wait_for(daemon, container.id, "scaled_down")
            eventually(lambda p=path: hook_answered(pod, p), "the hook is answered")
            eventually(lambda p=path: f"GET {p} HTTP" in container.logs(), "nginx has seen it")
        container.stop(60)


def hook_answered(pod: Pod, path: str) -> bool:
    """As kubelet's HTTP hooks: any answer below 400 means that it went well, here none at all is what counts."""
    connection = http.client.HTTPConnection(pod.ip, 80, timeout=PATIENCE)
    try:
        connection.request("GET", path, headers={"User-Agent": "kube-lifecycle/1.36", "Connection": "close"})
        return connection.getresponse().status > 0
    except ConnectionRefusedError:
        return False
    finally:
        connection.close()


# --- Ephemeral containers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("annotations", [QUICK, ONE], ids=["all", "named"])
@pytest.mark.parametrize("tier", ["checkpoint", "freeze"])
def test_kubectl_debug_finds_its_target_awake_and_keeps_it_so(
    tier: str, annotations: dict[str, str], kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    """`kubectl debug --target`: in the PID namespace of the application, which sleeps when it is made."""
    with kubelet.run_pod(annotations={**annotations, "criproxy.io/tier": tier}) as pod:
        specimen = Specimen.run(pod, program)
        specimen.tell("set precious")
        wait_for(daemon, specimen.id, "scaled_down")
        command = ["sh", "-c", "ps; while [ ! -e /enough ]; do sleep 0.1; done"]
        debugger = pod.debug("busybox", "debugger", target=specimen.container, command=command)
        eventually(lambda: debugger.log.exists() and "/specimen/specimen" in debugger.logs(), "it sees the application")
        eventually(lambda: "kubectl debug" in seen(daemon, specimen.id).reason, "it is said what keeps it awake")
        never(lambda: seen(daemon, specimen.id).state != "running", "it was scaled down", seconds=1)
        daemon.restart()
        never(lambda: seen(daemon, specimen.id).state != "running", "the next daemon has scaled it down", seconds=1)
        # The first process of another container in there isn't scaled down itself.
        states = {c.container: c for c in daemon.known().values()}
        if annotations == QUICK:
            assert "another container's PID namespace" in states["debugger"].reason
        else:
            assert "debugger" not in states
        assert debugger.exec_sync("touch", "/enough").exit_code == 0
        assert debugger.wait().exit_code == 0
        wait_for(daemon, specimen.id, "scaled_down")
        assert specimen.ask("get") == "precious"


def test_a_debugger_that_never_starts_does_not_keep_its_target_awake_for_ever(
    kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    with kubelet.run_pod(annotations=QUICK) as pod:
        specimen = Specimen.run(pod, program)
        wait_for(daemon, specimen.id, "scaled_down")

        def target(config: cri.ContainerConfig) -> None:
            namespaces = config.linux.security_context.namespace_options
            namespaces.pid, namespaces.target_id = cri.NamespaceMode.TARGET, specimen.id

        debugger = pod.create_container("busybox", "debugger", command=["true"], change=target)
        never(lambda: seen(daemon, specimen.id).state != "running", "it was scaled down", seconds=1)
        assert "kubectl debug (debugger)" in seen(daemon, specimen.id).reason
        debugger.remove()
        wait_for(daemon, specimen.id, "scaled_down")


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
def test_an_ephemeral_container_without_a_target_is_never_scaled_down(
    tty: bool, kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    """CRI doesn't tell that it is one. It listens nowhere, so no packet could wake it."""
    with kubelet.run_pod(annotations=QUICK) as pod:
        specimen = Specimen.run(pod, program)
        debugger = pod.debug("busybox", "debugger", command=["sh"], stdin=True, tty=tty)
        wait_for(daemon, specimen.id, "scaled_down")
        never(lambda: seen(daemon, debugger.id).state != "running", "it was scaled down", seconds=1)
        eventually(lambda: "listens on no port" in seen(daemon, debugger.id).reason, "it is said why")
        with debugger.attach(stdin=True) as attached:
            attached.write(f"echo count | nc -w 60 127.0.0.1 {PORT}\n".encode())
            eventually(lambda: "1" in debugger.logs(), "it reaches the application")


# --- Namespaces ------------------------------------------------------------------------------------------------


def in_(**modes: int) -> Callable[[cri.PodSandboxConfig], None]:
    def change(config: cri.PodSandboxConfig) -> None:
        options = config.linux.security_context.namespace_options
        for name, mode in modes.items():
            setattr(options, name, mode)
        if options.network == cri.NamespaceMode.NODE:
            config.hostname = ""  # such pods have the host's

    return change


def test_a_shared_pid_namespace_is_frozen_container_by_container(
    kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    """`shareProcessNamespace`: PID 1 is the pause container, and the others see each other."""
    with kubelet.run_pod(annotations=QUICK, change=in_(pid=cri.NamespaceMode.POD)) as pod:
        one = Specimen.run(pod, program, "one")
        two = Specimen.run(pod, program, "two", port=PORT + 1)
        assert wait_for(daemon, one.id, "scaled_down").tier == "freeze"
        wait_for(daemon, two.id, "scaled_down")
        assert "shareProcessNamespace" in seen(daemon, one.id).reason
        assert one.ask("count") == "1"
        # A signal of a neighbour reaches a frozen one when it goes on, as the kernel has it.
        wait_for(daemon, one.id, "scaled_down")
        number = status(application_pid(one.container))["NSpid"].split()[-1]
        assert two.container.exec_sync("kill", "-TERM", number).exit_code == 0
        assert one.container.status().state == RUNNING
        with contextlib.suppress(OSError), one.connect():
            pass
        assert one.container.wait().exit_code == 0
        assert two.ask("count") == "1"


@pytest.mark.parametrize(
    ("modes", "reason"),
    [({"network": cri.NamespaceMode.NODE}, "hostNetwork"), ({"pid": cri.NamespaceMode.NODE}, "hostPID")],
    ids=["network", "pid"],
)
def test_the_hosts_namespaces_are_left_alone(
    modes: dict[str, int], reason: str, kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    port = 7932
    before = hosts_network()
    with kubelet.run_pod(annotations=QUICK, change=in_(**modes)) as pod:
        specimen = Specimen.run(pod, program, port=port)
        known = seen(daemon, specimen.id)
        assert (known.state, known.tier) == ("disabled", "")
        assert reason in known.reason
        assert comm(specimen.init()) == "specimen"
        specimen.address = specimen.address or "127.0.0.1"
        assert specimen.ask("count") == "1"
        if "network" in modes:
            assert hosts_network() == before


def hosts_network() -> list[str]:
    """What a pod's network gets of us, and the host's must not: a hook, and settings."""
    hook = subprocess.run(["tc", "qdisc", "show", "dev", "lo"], check=True, capture_output=True, text=True).stdout
    names = ("net/mptcp/enabled", "net/ipv4/conf/lo/route_localnet", "net/ipv4/conf/lo/accept_local")
    return [hook, *(path.read_text() for name in names if (path := Path("/proc/sys", name)).exists())]


def test_the_hosts_ipc_namespace(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations=QUICK, change=in_(ipc=cri.NamespaceMode.NODE)) as pod:
        specimen = Specimen.run(pod, program)
        for count in ("1", "2"):
            assert wait_for(daemon, specimen.id, "scaled_down").tier == "checkpoint"
            assert specimen.ask("count") == count
        assert Path(f"/proc/{specimen.pid()}/ns/ipc").samefile("/proc/self/ns/ipc")


def test_a_user_namespace_is_left_as_it_is(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    """`hostUsers: false`. containerd 1.6 knows nothing of it, and runs the pod without one."""

    def mapped(config: cri.PodSandboxConfig) -> None:
        options = config.linux.security_context.namespace_options.userns_options
        options.mode = cri.NamespaceMode.POD
        for ids in (options.uids, options.gids):
            ids.add(host_id=65536, container_id=0, length=65536)

    with kubelet.run_pod(annotations=QUICK, change=mapped) as pod:
        specimen = Specimen.run(pod, program)
        assert comm(specimen.init()) == "specimen"
        assert wait_for(daemon, specimen.id, "scaled_down").tier == "freeze"
        assert "hostUsers: false" in seen(daemon, specimen.id).reason
        assert specimen.ask("count") == "1"
