"""What kubelet does with a container, in whatever state it is: into it, to end it, and while the daemon restarts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from specimen import (
    PATIENCE,
    PORT,
    QUICK,
    Specimen,
    asleep,
    container_pids,
    criu_at_work,
    eventually,
    meet,
    names,
    never,
    seen,
    status,
    wait_for,
)

from criproxy.api import cri_pb2 as cri
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Kubelet, Pod

EXITED = cri.ContainerState.CONTAINER_EXITED
RUNNING = cri.ContainerState.CONTAINER_RUNNING


# --- Into it ---------------------------------------------------


def test_exec_sync_wakes(specimen: Specimen, daemon: Daemon) -> None:
    specimen.tell("set kept")
    asleep(daemon, specimen)
    result = specimen.container.exec_sync("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 7)
    assert seen(daemon, specimen.id).restores == 1
    # And sleeps again; the application never noticed.
    asleep(daemon, specimen)
    assert specimen.ask("get") == "kept"


def test_an_exec_sync_keeps_it_awake_while_it_runs(specimen: Specimen, daemon: Daemon) -> None:
    asleep(daemon, specimen)
    command = ("sh", "-c", "until [ -e /enough ]; do sleep 0.1; done")
    running = threading.Thread(target=specimen.container.exec_sync, args=command)
    running.start()
    try:
        eventually(lambda: "ExecSync is under way" in seen(daemon, specimen.id).reason, "the reason is shown")
        never(lambda: seen(daemon, specimen.id).state == "scaled_down", "scaled down below an exec", seconds=1)
        assert seen(daemon, specimen.id).checkpoints == 1
    finally:
        specimen.container.exec_sync("touch", "/enough")
        running.join()
    asleep(daemon, specimen)


def test_exec_wakes_and_keeps_it_awake_as_long_as_it_runs(specimen: Specimen, daemon: Daemon) -> None:
    asleep(daemon, specimen)
    with specimen.container.exec("sh", stdin=True) as shell:
        shell.write(b"echo here\n")
        shell.read_until(b"here\n")
        assert seen(daemon, specimen.id).restores == 1
        eventually(lambda: seen(daemon, specimen.id).reason == "Exec is under way", "the session is the reason")
        never(lambda: seen(daemon, specimen.id).state == "scaled_down", "scaled down below a session", seconds=1)
        shell.write(b"exit 5\n")
        assert shell.exit_code() == 5
    asleep(daemon, specimen)


def test_attach_wakes_and_brings_what_it_writes(specimen: Specimen, daemon: Daemon) -> None:
    asleep(daemon, specimen)
    with specimen.container.attach() as attached:
        assert seen(daemon, specimen.id).restores == 1
        specimen.tell("say to whom it may concern")
        attached.read_until(b"to whom it may concern\n")


def test_port_forward_wakes(pod: Pod, specimen: Specimen, daemon: Daemon) -> None:
    specimen.tell("set kept")
    asleep(daemon, specimen)
    with pod.port_forward(PORT) as forwarded:
        forwarded.read_until(b"ready\n", 0)
        forwarded.write(b"get\n", 0)
        forwarded.read_until(b"kept\n", 0)
    assert seen(daemon, specimen.id).restores == 1


# --- An end to it, in every state ---------------------------------------------------

STATES = ("running", "checkpointing", "scaled_down", "restoring")
MEMORY = 200
"""MiB that a specimen holds where a checkpoint or a restore is to be met on its way."""


@contextlib.contextmanager
def met_in(state: str, daemon: Daemon, kubelet: Kubelet, program: Path, *commands: str) -> Iterator[Specimen]:
    """A specimen that is in that state as the block begins, after it has been told the commands."""
    pod = kubelet.run_pod(annotations=QUICK)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: pod in kubelet.pods and pod.remove(grace=0))
        specimen = Specimen.run(pod, program, memory=MEMORY if state in ("checkpointing", "restoring") else 0)
        for command in commands:
            specimen.tell(command)

        def knock() -> None:
            knocking = stack.enter_context(socket.socket())
            knocking.setblocking(False)
            knocking.connect_ex((specimen.address, PORT))

        if state == "scaled_down":
            asleep(daemon, specimen)
        else:
            meet(daemon, specimen, state, knock)
        yield specimen


GRACE = 100
"""Seconds. Who waits for their end in vain kills, which the exit code tells; or kubelet's patience is over before."""


def call(pod: Pod, method: str, request: Any, response: type[Any]) -> None:
    """As kubelet, which gives up after `PATIENCE` here: a call that waits for nothing fails."""
    pod.kubelet.call(method, request, response, timeout=PATIENCE)


def stop(specimen: Specimen, grace: int = GRACE) -> None:
    request = cri.StopContainerRequest(container_id=specimen.id, timeout=grace)
    call(specimen.container.pod, "StopContainer", request, cri.StopContainerResponse)


def stop_sandbox(pod: Pod) -> None:
    call(pod, "StopPodSandbox", cri.StopPodSandboxRequest(pod_sandbox_id=pod.id), cri.StopPodSandboxResponse)


def remove_sandbox(pod: Pod) -> None:
    call(pod, "RemovePodSandbox", cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id), cri.RemovePodSandboxResponse)
    pod.id = ""


def remove_container(pod: Pod) -> None:
    request = cri.RemoveContainerRequest(container_id=pod.containers[0].id)
    call(pod, "RemoveContainer", request, cri.RemoveContainerResponse)
    pod.containers.clear()


KILLS = {"RemoveContainer": remove_container, "StopPodSandbox": stop_sandbox, "RemovePodSandbox": remove_sandbox}


@pytest.mark.parametrize("state", STATES)
def test_stop_container_delivers_the_stop_signal(
    state: str, daemon: Daemon, kubelet: Kubelet, program: Path, nothing_left: None
) -> None:
    with met_in(state, daemon, kubelet, program, "on-term 9") as specimen:
        stop(specimen)
        found = specimen.container.status()
        assert (found.state, found.exit_code) == (EXITED, 9)
        specimen.has_said("caught 15")
        assert not container_pids(specimen.container)
        # It is over: no longer shown, no memory of it on the disk.
        assert specimen.id not in daemon.known()
        folder = Path(daemon.state_dir, "containers", specimen.id)
        eventually(lambda: not list(folder.glob("checkpoint*")), "its checkpoint is deleted")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("call", KILLS)
def test_what_kills_works_in_every_state(
    call: str, state: str, daemon: Daemon, kubelet: Kubelet, program: Path, nothing_left: None
) -> None:
    with met_in(state, daemon, kubelet, program) as specimen:
        pod = specimen.container.pod
        sandbox = pod.id
        said = len(daemon.service.output())
        KILLS[call](pod)
        # What CRIU then says of its container isn't anybody's business.
        assert not re.search(" (WARNING|ERROR) .*", daemon.service.output()[said:])
        assert specimen.id not in daemon.known()
        assert not list(daemon.state_dir.glob(f"containers/{specimen.id}/checkpoint*"))
        if call == "StopPodSandbox":
            # kubelet may well name the dead container again.
            stop(specimen)
            with pytest.raises(grpc.RpcError):
                specimen.container.exec_sync("true")
        if call == "RemovePodSandbox":
            assert not [entry for entry in daemon.leftovers() if sandbox in entry or specimen.id in entry]


def test_a_stop_at_any_moment_of_the_way_down(pod: Pod, program: Path, daemon: Daemon) -> None:
    for step in range(12):
        specimen = Specimen.run(pod, program)
        # From just before it is idle for its duration to when it is down.
        time.sleep(0.27 + step * 0.007)
        stop(specimen)
        assert specimen.container.status().exit_code == 0
        specimen.has_said("caught 15")
        specimen.container.remove()


def test_all_at_once(daemon: Daemon, kubelet: Kubelet, program: Path, nothing_left: None) -> None:
    """Execs, clients and ends that meet: each call is answered, whoever comes first."""
    for _ in range(3):
        pod = kubelet.run_pod(annotations=QUICK)
        specimen = Specimen.run(pod, program)
        asleep(daemon, specimen)
        container = specimen.container
        acts: list[Callable[[], object]] = [
            *[lambda c=container: c.exec_sync("true")] * 3,  # type: ignore[misc]
            *[lambda s=specimen: s.ask("count")] * 3,  # type: ignore[misc]
            lambda c=container: c.stop(5),  # type: ignore[misc]
            lambda c=container: c.stop(0),  # type: ignore[misc]
            lambda p=pod: stop_sandbox(p),  # type: ignore[misc]
        ]
        with concurrent.futures.ThreadPoolExecutor(len(acts)) as pool:
            futures = [pool.submit(act) for act in acts]
            done, hanging = concurrent.futures.wait(futures, timeout=PATIENCE)
            assert not hanging
        # What ends it works; what wants something of it may come too late.
        for future in futures[6:]:
            future.result()
        assert all(isinstance(f.exception(), (grpc.RpcError, OSError, type(None))) for f in done)
        # Twice is as good as once.
        stop_sandbox(pod)
        container.stop(5)
        container.remove()
        container.remove()
        pod.remove()
        assert not daemon.leftovers()


def test_who_waits_for_a_container_that_ends_is_told_so(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    ports = {"criproxy.io/ports-map": f"specimen={PORT},{PORT}/udp"}
    with kubelet.run_pod(annotations={**QUICK, **ports}) as pod, socket.socket(type=socket.SOCK_DGRAM) as udp:
        specimen = Specimen.run(pod, program)
        asleep(daemon, specimen)
        # A datagram is sent once: it is parked while the container is killed, and neither lost nor waited for.
        udp.connect((specimen.address, PORT))
        udp.settimeout(PATIENCE)
        init = specimen.init()
        daemon.service.signal(signal.SIGSTOP)
        try:
            udp.send(b"?")
            os.kill(init, signal.SIGKILL)
        finally:
            daemon.service.signal(signal.SIGCONT)
        with pytest.raises(ConnectionRefusedError):
            udp.recv(100)
        assert specimen.container.wait().exit_code == 137
        with pytest.raises(ConnectionRefusedError):
            specimen.ask("count")


def test_an_exec_that_takes_too_long(kubelet: Kubelet, direct: Kubelet, program: Path, daemon: Daemon) -> None:
    errors = []
    for one, wishes in ((direct, {}), (kubelet, QUICK)):
        with one.run_pod(annotations=wishes) as pod:
            specimen = Specimen.run(pod, program)
            if one is kubelet:
                asleep(daemon, specimen)
            with pytest.raises(grpc.RpcError) as caught:
                specimen.container.exec_sync("sleep", "600", timeout=1)
            errors.append((caught.value.code(), re.sub("[0-9a-f]{64}", "ID", caught.value.details())))
            if one is kubelet:
                # With a time limit it is a probe, for all that can be known, and one that has failed.
                def told(container: str = specimen.id) -> bool:
                    return 'exec probe "sleep 600"' in seen(daemon, container).reason

                eventually(told, "why it stays up")
            assert specimen.ask("count") == "1"
    assert errors[0] == errors[1]


def test_a_client_of_the_runtime_that_gives_up(specimen: Specimen, daemon: Daemon, kubelet: Kubelet) -> None:
    """kubelet's own deadline ends a call in the middle: the container comes back to rest, and answers the next."""
    asleep(daemon, specimen)
    for deadline in (0.005, 0.02, 0.05):
        request = cri.ExecSyncRequest(container_id=specimen.id, cmd=["sleep", "1"])
        with pytest.raises(grpc.RpcError):
            kubelet.call("ExecSync", request, cri.ExecSyncResponse, timeout=deadline)
    asleep(daemon, specimen)
    assert specimen.container.exec_sync("echo", "here").stdout == "here\n"
    assert specimen.ask("count") == "1"


@pytest.mark.parametrize("state", ["running", "scaled_down"])
def test_the_grace_period_ends_with_sigkill(state: str, daemon: Daemon, kubelet: Kubelet, program: Path) -> None:
    with met_in(state, daemon, kubelet, program, "ignore-term") as specimen:
        began = time.monotonic()
        stop(specimen, grace=1)
        assert time.monotonic() - began >= 1
        assert specimen.container.status().exit_code == 128 + signal.SIGKILL


@pytest.mark.parametrize("state", ["running", "scaled_down"])
def test_a_grace_of_zero_kills_at_once(state: str, daemon: Daemon, kubelet: Kubelet, program: Path) -> None:
    with met_in(state, daemon, kubelet, program) as specimen:
        stop(specimen, grace=0)
        assert specimen.container.status().exit_code == 128 + signal.SIGKILL
        # It would have caught the stop signal, and ended with 0.
        assert specimen.log == ["listening"]


@pytest.mark.parametrize("state", ["running", "scaled_down"])
def test_the_stop_signal_reaches_who_has_become_another_user(
    state: str, daemon: Daemon, kubelet: Kubelet, program: Path
) -> None:
    def without_kill(config: cri.ContainerConfig) -> None:
        config.linux.security_context.capabilities.drop_capabilities.append("KILL")

    with kubelet.run_pod(annotations=QUICK) as pod:
        specimen = Specimen.run(pod, program, change=without_kill)
        specimen.tell("on-term 4")
        specimen.tell("become 65534")
        init = status(specimen.init())
        with specimen.awake():
            assert (init["Uid"].split()[0], status(specimen.pid())["Uid"].split()[0]) == ("0", "65534")
        assert not int(init["CapEff"], 16) & 1 << 5
        if state == "scaled_down":
            asleep(daemon, specimen)
        stop(specimen)
        assert specimen.container.status().exit_code == 4
        specimen.has_said("caught 15")
        assert specimen.log.count("caught 15") == 1


def test_the_images_own_stop_signal(pod: Pod, daemon: Daemon) -> None:
    container = pod.run("nginx")  # SIGQUIT
    wait_for(daemon, container.id, "scaled_down")
    container.stop(GRACE)
    assert container.status().exit_code == 0
    eventually(lambda: "(SIGQUIT) received" in container.logs(), "it has got it")


def test_the_next_attempt_of_a_container_is_scaled_down_too(pod: Pod, program: Path, daemon: Daemon) -> None:
    for attempt in range(3):
        specimen = Specimen.run(pod, program, attempt=attempt)
        assert specimen.ask("count") == "1"
        asleep(daemon, specimen)
        assert specimen.ask("count") == "2"
        specimen.end("exit 1")
        assert specimen.container.wait().exit_code == 1


def test_nothing_of_the_daemons_own_is_left_either(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    def descriptors() -> dict[str, int]:
        found: dict[str, int] = {}
        for link in Path(f"/proc/{daemon.service.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                kind = re.sub(r"\[?[0-9]+\]?", "", str(link.readlink()))
                found[kind] = found.get(kind, 0) + 1
        # The sockets of gRPC and of clients come and go.
        return {kind: count for kind, count in found.items() if "bpf" in kind or "pidfd" in kind or "net" in kind}

    def one() -> None:
        with kubelet.run_pod(annotations=QUICK) as pod:
            specimen = Specimen.run(pod, program)
            asleep(daemon, specimen)
            specimen.ask("count")

    one()
    before = descriptors()
    for _ in range(3):
        one()
    eventually(lambda: descriptors() == before, f"it has as many as before: {before}")


# --- Its own end ---------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit 0", 0), ("exit 3", 3), ("die 6", 134), ("die 9", 137), ("die 11", 139), ("die 15", 143)],
)
def test_exit_codes_after_a_cycle(command: str, code: int, specimen: Specimen, daemon: Daemon) -> None:
    asleep(daemon, specimen)
    specimen.ask("count")
    asleep(daemon, specimen)
    # Its last command wakes it: it ends right after a restore, and that looks like any end.
    specimen.end(command)
    found = specimen.container.wait()
    assert found.exit_code == code
    assert found.reason == ("Completed" if code == 0 else "Error")
    assert specimen.id not in daemon.known()


def test_orphans_are_reaped(specimen: Specimen, daemon: Daemon) -> None:
    for _ in range(2):
        with specimen.awake():
            specimen.tell("orphans 20")
            eventually(lambda: len(container_pids(specimen.container)) == 3, "init, guard and application are left")
            assert not [pid for pid in container_pids(specimen.container) if status(pid)["State"].startswith("Z")]
        asleep(daemon, specimen)


def test_short_lives(pod: Pod, daemon: Daemon) -> None:
    """A container that has ended before its start is even answered is a container like any other."""
    for code in range(15):
        container = pod.run("busybox", "short", command=["sh", "-c", f"exit {code}"])
        assert container.wait().exit_code == code
        container.remove()
    assert not [c for c in daemon.known().values() if c.container == "short"]


# --- The daemon comes and goes ---------------------------------------------------


def goes(daemon: Daemon, how: str) -> None:
    if how == "SIGTERM":
        daemon.stop()
    else:
        daemon.kill()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_the_next_daemon_wakes_what_sleeps(how: str, specimen: Specimen, daemon: Daemon) -> None:
    specimen.tell("set kept")
    with specimen.connect() as connection:
        assert connection.ask("count") == "1"
        asleep(daemon, specimen)
        before = seen(daemon, specimen.id)
        goes(daemon, how)
        eventually(lambda: [*names(specimen.container).values()] == ["init"], "the init alone is left")
        daemon.start()
        after = seen(daemon, specimen.id)
        assert (after.state, after.checkpoints, after.restores) == ("scaled_down", before.checkpoints, before.restores)
        assert specimen.ask("get") == "kept"
        assert connection.ask("count") == "2"
        asleep(daemon, specimen)
        assert connection.ask("count") == "3"


def test_what_sleeps_in_a_pod_that_can_not_be_hooked_any_more_is_brought_back(
    pod: Pod, specimen: Specimen, daemon: Daemon
) -> None:
    specimen.tell("set kept")
    asleep(daemon, specimen)
    tc = ["nsenter", f"--net={pod.netns}", "tc", "qdisc"]
    daemon.kill()
    subprocess.run([*tc, "del", "dev", "eth0", "clsact"], check=True)
    subprocess.run([*tc, "add", "dev", "eth0", "ingress"], check=True)  # takes its place, and has no egress
    daemon.start()
    assert "hook" in wait_for(daemon, specimen.id, "disabled").reason
    assert specimen.ask("get") == "kept"


def test_what_sleeps_under_the_hook_of_another_version_is_brought_back(
    pod: Pod, specimen: Specimen, daemon: Daemon
) -> None:
    """As after an upgrade: the new daemon can't read the hook, makes another one, and that parks nothing yet."""
    specimen.tell("set kept")
    with specimen.connect() as connection:
        assert connection.ask("count") == "1"
        asleep(daemon, specimen)
        daemon.stop()
        (daemon.run_dir / "bpf" / pod.id / "pod").unlink()
        daemon.start()
        wait_for(daemon, specimen.id, "running")
        assert connection.ask("count") == "2"
        assert specimen.ask("get") == "kept"
        # And from then on it sleeps again as ever.
        asleep(daemon, specimen)
        assert connection.ask("count") == "3"


@pytest.mark.parametrize("doing", ["checkpointing", "restoring"])
def test_the_next_daemon_waits_for_a_criu_that_outlived_the_last(
    doing: str, kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    with kubelet.run_pod(annotations={**QUICK, "criproxy.io/lazy-pages": "never"}) as pod:
        # Big enough for CRIU to be caught in the middle of its work.
        specimen = Specimen.run(pod, program, memory=400)
        specimen.tell("set kept")
        clients: list[threading.Thread] = []

        def wake() -> None:
            clients.append(threading.Thread(target=specimen.ask, args=("get",)))
            clients[-1].start()

        meet(daemon, specimen, doing, wake)
        init = specimen.init()
        # The state is there a moment before CRIU is.
        (criu,) = eventually(lambda: criu_at_work(init), "CRIU is at work")
        os.kill(criu, signal.SIGSTOP)
        daemon.kill()
        slow = threading.Timer(2, os.kill, (criu, signal.SIGCONT))
        slow.start()
        daemon.start()
        assert specimen.ask("get") == "kept"
        slow.join()
        for client in clients:
            client.join()
        assert specimen.container.status().state == RUNNING


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_what_comes_while_no_daemon_is_there_is_delivered(
    how: str, kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    ports = {"criproxy.io/ports-map": f"specimen={PORT},{PORT}/udp"}
    with kubelet.run_pod(annotations={**QUICK, **ports}) as pod, contextlib.ExitStack() as stack:
        specimen = Specimen.run(pod, program)
        connection = stack.enter_context(specimen.connect())
        # A datagram is sent once: who gets an answer to it got it from the parking.
        udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        udp.settimeout(PATIENCE)
        asleep(daemon, specimen)
        goes(daemon, how)
        udp.sendto(b"?", (specimen.address, PORT))
        connection.send("get")
        late: list[str] = []
        newcomer = threading.Thread(target=lambda: late.append(specimen.ask("get")))
        newcomer.start()
        daemon.start()
        assert udp.recv(100) == b"1\n"
        assert connection.answer() == "nothing"
        newcomer.join()
        assert late == ["nothing"]


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_what_ended_while_no_daemon_was_there(
    how: str, kubelet: Kubelet, direct: Kubelet, program: Path, daemon: Daemon
) -> None:
    pod = kubelet.run_pod(annotations=QUICK)
    gone = Specimen.run(pod, program, "gone")
    other = Specimen.run(pod, program, "other", port=PORT + 1)
    asleep(daemon, gone)
    asleep(daemon, other)
    goes(daemon, how)
    # Past criproxy, as the kernel's OOM killer or a person would.
    direct.call("StopContainer", cri.StopContainerRequest(container_id=gone.id, timeout=0), cri.StopContainerResponse)
    daemon.start()
    assert {c.container for c in daemon.known().values()} == {"other"}
    assert other.ask("count") == "1"
    assert gone.container.status().exit_code == 137
    pod.remove()


def test_a_pod_that_was_removed_while_no_daemon_was_there(
    kubelet: Kubelet, direct: Kubelet, program: Path, daemon: Daemon
) -> None:
    pod = kubelet.run_pod(annotations=QUICK)
    specimen = Specimen.run(pod, program)
    asleep(daemon, specimen)
    daemon.stop()
    direct.call("StopPodSandbox", cri.StopPodSandboxRequest(pod_sandbox_id=pod.id), cri.StopPodSandboxResponse)
    direct.call("RemovePodSandbox", cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id), cri.RemovePodSandboxResponse)
    daemon.start()
    assert not [entry for entry in daemon.leftovers() if pod.id in entry or specimen.id in entry]
    pod.id = ""
    pod.remove()


# --- What pods ask for ---------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "value", "hint"),
    [
        ("criproxy.io/scaledown-duration", "soon", "90s"),
        ("criproxy.io/scaledown-duration", "10", '"10s" would be seconds'),
        ("criproxy.io/scaledown-duraton", "10s", "did you mean criproxy.io/scaledown-duration?"),
        ("criproxy.io/ports-map", "web:80", "name=80,81;other=8080"),
        ("zeropod.ctrox.dev/scaledown-duration", "-5s", "negative"),
        ("criproxy.io/disable-checkpointing", "perhaps", "true"),
    ],
)
def test_a_bad_annotation_fails_the_pod_and_says_why(
    annotation: str, value: str, hint: str, kubelet: Kubelet, nothing_left: None
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        kubelet.run_pod(annotations={annotation: value})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert annotation in caught.value.details()
    assert hint in caught.value.details()
    if "duraton" not in annotation:
        assert value in caught.value.details()


def test_zeropods_manifests_work(kubelet: Kubelet, program: Path, daemon: Daemon, containerd: Containerd) -> None:
    annotations = {
        "zeropod.ctrox.dev/scaledown-duration": "300ms",
        "zeropod.ctrox.dev/container-names": "specimen",
        "zeropod.ctrox.dev/ports-map": f"specimen={PORT}",
        "zeropod.ctrox.dev/connect-timeout": "7s",
    }
    with kubelet.run_pod(annotations=annotations, runtime_handler="zeropod") as pod:
        specimen = Specimen.run(pod, program)
        other = Specimen.run(pod, program, "other", port=PORT + 1)
        asleep(daemon, specimen)
        assert specimen.ask("count") == "1"
        assert other.id not in daemon.known()
    assert "zeropod.ctrox.dev/connect-timeout has no meaning here" in daemon.service.output()


def test_the_runtime_class_alone_opts_in(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(runtime_handler="zeropod") as pod:
        specimen = Specimen.run(pod, program)
        eventually(lambda: "scales down after 60 s" in seen(daemon, specimen.id).reason, "the default duration is 1 m")


def test_without_a_checkpoint_zeropods_way_is_a_fresh_start(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    annotations = {
        "zeropod.ctrox.dev/scaledown-duration": "300ms",
        "zeropod.ctrox.dev/disable-checkpointing": "true",
    }
    with kubelet.run_pod(annotations=annotations) as pod:
        specimen = Specimen.run(pod, program)
        init = specimen.init()
        for cycle in range(1, 3):
            with specimen.awake():
                assert specimen.ask("get") == "nothing"
                specimen.tell("set state")
            wait_for(daemon, specimen.id, "scaled_down")
            # It got its stop signal and ended; the container didn't.
            eventually(lambda: [*names(specimen.container).values()] == ["init"], "it has ended")
            specimen.has_said("caught 15")
            turns = len(specimen.log) // 2
            assert turns >= cycle
            assert specimen.log == ["listening", "caught 15"] * turns
            assert specimen.container.status().state == RUNNING
            assert specimen.init() == init
        # Ended already: a stop has nothing to wait for.
        stop(specimen)


def test_without_a_checkpoint_our_way_is_the_freezer(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations={**QUICK, "criproxy.io/disable-checkpointing": "true"}) as pod:
        specimen = Specimen.run(pod, program)
        specimen.tell("set state")
        pid = specimen.pid()
        assert wait_for(daemon, specimen.id, "scaled_down").tier == "freeze"
        assert (specimen.ask("get"), specimen.pid()) == ("state", pid)


def unsupported(name: str) -> Callable[[cri.PodSandboxConfig], None]:
    def change(config: cri.PodSandboxConfig) -> None:
        namespaces = config.linux.security_context.namespace_options
        if name == "pid":
            namespaces.pid = cri.NamespaceMode.POD
        elif name == "network":
            namespaces.network = cri.NamespaceMode.NODE
            config.hostname = ""  # such pods have the host's

    return change


@pytest.mark.parametrize(
    ("what", "reason"), [("tty", "terminal"), ("pid", "shareProcessNamespace"), ("network", "hostNetwork")]
)
def test_what_cannot_be_supported_runs_untouched_and_says_why(
    what: str, reason: str, kubelet: Kubelet, daemon: Daemon
) -> None:
    annotations = {**QUICK, "criproxy.io/tier": "checkpoint"}
    with kubelet.run_pod(annotations=annotations, change=unsupported(what)) as pod:
        container = pod.run("busybox", command=["sleep", "600"], tty=what == "tty")
        known = seen(daemon, container.id)
        assert known.state == "disabled"
        assert reason in known.reason
        result = container.exec_sync("sh", "-c", "cat /proc/mounts; ls -a /")
        assert ".criproxy" not in result.stdout
        assert "criu.kdat" not in result.stdout
        pod.remove(grace=0)


def test_status_has_the_documented_keys(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    # It is awake when a stream takes hold of it.
    with kubelet.run_pod(annotations={"criproxy.io/scaledown-duration": "3s"}) as pod:
        shown(Specimen.run(pod, program, memory=12), daemon)


def told(daemon: Daemon, specimen: Specimen) -> dict[str, Any]:
    """As the command shows it."""
    return next(c for c in daemon.status() if c["container_id"] == specimen.id)


def shown(specimen: Specimen, daemon: Daemon) -> None:
    keys = {
        *("namespace", "pod", "container", "container_id", "state", "since", "last_activity", "memory_bytes"),
        *("checkpoint_bytes", "checkpoints", "restores", "last_checkpoint_seconds", "last_restore_seconds", "reason"),
        *("tier", "parking", "freed_bytes"),
    }
    with specimen.awake():
        first = told(daemon, specimen)
    assert set(first) == keys
    assert (first["namespace"], first["container"]) == ("default", "specimen")
    assert first["last_checkpoint_seconds"] is None
    asleep(daemon, specimen)
    down = told(daemon, specimen)
    assert set(down) == keys
    assert down["state"] == "scaled_down"
    assert down["checkpoint_bytes"] > 0
    assert down["memory_bytes"] < first["memory_bytes"]
    assert down["freed_bytes"] > 0
    assert first["freed_bytes"] is None
    assert down["last_checkpoint_seconds"] > 0
    # The unit, and where it counts from.
    assert abs(down["since"] - time.time()) < 3600
    assert abs(down["last_activity"] - time.time()) < 3600
    assert down["reason"] == ""
    specimen.ask("count")
    with specimen.awake():
        up = told(daemon, specimen)
    assert (up["restores"], up["checkpoint_bytes"]) == (1, 0)
    assert up["freed_bytes"] is None
    assert up["last_restore_seconds"] > 0
    assert up["reason"]
    parking = up["parking"]
    assert set(parking) == {"packets", "bytes", "overflowed", "dropped", "quiet", "answered", "corrupt"}
    assert parking["packets"] > 0
    assert parking["overflowed"] == parking["corrupt"] == 0
