"""What kubelet is told of a container in every state: statistics, status and ends. And what it changes: resources."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from charges import charged, forget
from specimen import (
    AWAKE,
    QUICK,
    Specimen,
    application_pid,
    container_pids,
    eventually,
    init_pid,
    meet,
    seen,
    status,
    wait_for,
)

from criproxy.api import cri_pb2 as cri
from lab.client import Service, redis
from lab.daemon import Daemon
from lab.kubelet import Container, Kubelet, Pod

MIB = 1 << 20
RUNNING = cri.ContainerState.CONTAINER_RUNNING
FREEZE = {**QUICK, "criproxy.io/tier": "freeze"}


# --- Statistics ----------------------------------------------------------------------------------------------


def statistics(container: Container) -> list[cri.ContainerStats]:
    """Of one container, as each of the four calls has them."""
    call, pod = container.pod.kubelet.call, container.pod.id
    one: Any = cri.ContainerStatsRequest(container_id=container.id)
    found = [call("ContainerStats", one, cri.ContainerStatsResponse).stats]
    one = cri.ListContainerStatsRequest(filter=cri.ContainerStatsFilter(id=container.id))
    found += call("ListContainerStats", one, cri.ListContainerStatsResponse).stats
    one = cri.PodSandboxStatsRequest(pod_sandbox_id=pod)
    pods = [call("PodSandboxStats", one, cri.PodSandboxStatsResponse).stats]
    one = cri.ListPodSandboxStatsRequest(filter=cri.PodSandboxStatsFilter(id=pod))
    pods += call("ListPodSandboxStats", one, cri.ListPodSandboxStatsResponse).stats
    assert [p.attributes.id for p in pods] == [pod, pod]
    found += [one for p in pods for one in p.linux.containers]
    assert [one.attributes.id for one in found] == [container.id] * 4
    assert {(one.attributes.metadata.name, one.attributes.metadata.attempt) for one in found} == {(container.name, 0)}
    return found


def cadvisor(container: Container) -> tuple[int, int]:
    """What cAdvisor reads in the container's cgroup (v1 or v2): processor time in ns, working set in bytes."""
    cpu, memory = 0, -1
    for folder in container.cgroups():
        if (folder / "cpuacct.usage").exists():
            cpu = int((folder / "cpuacct.usage").read_text())
        for usage, inactive in (("memory.usage_in_bytes", "total_inactive_file"), ("memory.current", "inactive_file")):
            if (folder / usage).exists():
                lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                memory = max(0, int((folder / usage).read_text()) - int(lines[inactive]))
        if (folder / "cpu.stat").exists() and not cpu:
            lines = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
            cpu = int(lines.get("usage_usec", 0)) * 1000
    assert cpu
    assert memory >= 0
    return cpu, memory


@pytest.mark.parametrize("wishes", [QUICK, FREEZE], ids=["checkpoint", "freeze"])
def test_statistics_are_true_in_every_state(
    wishes: dict[str, str], kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    with kubelet.run_pod(annotations=wishes) as pod:
        specimen = Specimen.run(pod, program, memory=12)
        used = seen_by_cadvisor = 0
        restores = []
        for cycle in range(3):
            for state in ("running", "scaled_down"):
                with specimen.awake() if state == "running" else contextlib.nullcontext():
                    wait_for(daemon, specimen.id, state)
                    if state == "scaled_down" and wishes is not FREEZE:
                        eventually(lambda: specimen.container.memory() < 8 * MIB, "its memory is free")
                    told, (nanoseconds, bytes_) = statistics(specimen.container), cadvisor(specimen.container)
                    known = seen(daemon, specimen.id)
                    assert known.state == state
                restores.append(known.restores)
                # Processor time goes on where it was; it is never less than it was.
                assert min(one.cpu.usage_core_nano_seconds.value for one in told) >= used > -1
                used = max(one.cpu.usage_core_nano_seconds.value for one in told)
                assert nanoseconds >= max(used, seen_by_cadvisor)
                seen_by_cadvisor = nanoseconds
                if state == "running" or wishes is FREEZE:
                    assert min(bytes_, *(one.memory.working_set_bytes.value for one in told)) > 12 * MIB, cycle
                else:
                    assert max(bytes_, *(one.memory.working_set_bytes.value for one in told)) < 8 * MIB, cycle
        # Asking woke nobody.
        assert [count - restores[0] for count in restores] == [0, 0, 1, 1, 2, 2]


def test_what_a_container_sleeps_with_is_little_and_its_own(kubelet: Kubelet, daemon: Daemon) -> None:
    """Whoever touches a file's page first is charged for it: CRIU and the checkpoint are the daemon's. Its own program
    stays in memory, but as what the kernel takes first, which nobody counts as used."""
    with kubelet.run_pod(annotations=QUICK) as pod:
        container = pod.run("redis")
        service = Service(pod.ip, 6379, redis("PING", wanted="PONG"))
        with container.attach():  # it stays awake meanwhile
            service.wait()
            root, files = Path(f"/proc/{init_pid(container)}/root"), programs(application_pid(container))
        bundle = [path for path in (daemon.state_dir / "bundles").rglob("*") if path.is_file()]
        for cycle in range(4):
            wait_for(daemon, container.id, "scaled_down")
            if cycle == 0:
                # As after a boot, whoever is woken first finds nothing in memory. What was unpacked a moment ago has to
                # be on the disk for that, and nobody may have it mapped any more.
                os.sync()
                for path in bundle:
                    forget(path)
                for file in files:
                    eventually(functools.partial(dropped, root / file), f"{file} isn't in memory")
            service.first_byte()
        wait_for(daemon, container.id, "scaled_down")
        number = next(folder for folder in container.cgroups() if (folder / "memory.stat").exists()).stat().st_ino
        assert sum(charged(path)[number] for path in bundle) == 0
        assert sum(sum(charged(path).values()) for path in bundle) > 2 * MIB
        images = [charged(path) for path in (daemon.state_dir / "containers" / container.id / "checkpoint").iterdir()]
        assert sum(image[number] for image in images) == 0
        assert sum(sum(image.values()) for image in images) > MIB
        own = sum(charged(root / file)[number] for file in files)
        assert own > 4 * MIB
        eventually(lambda: container.memory() < own / 8, "what it doesn't use is inactive")


def dropped(path: Path) -> bool:
    forget(path)
    return not charged(path)


def programs(pid: int) -> set[str]:
    """What a process has mapped of files, by the paths in its container, without the slash."""
    lines = (line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return {words[5].lstrip("/") for words in lines if len(words) == 6 and words[5].startswith("/")}


def test_status_is_that_of_a_running_container_in_every_state(pod: Pod, program: Path, daemon: Daemon) -> None:
    specimen = Specimen.run(pod, program, attempt=3)
    container, call = specimen.container, pod.kubelet.call
    first = container.status()
    assert (first.state, first.metadata.attempt, first.finished_at) == (RUNNING, 3, 0)
    listed = cri.ListContainersRequest(filter=cri.ContainerFilter(id=specimen.id))
    entry = call("ListContainers", listed, cri.ListContainersResponse).containers[0]
    states: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            states.add(seen(daemon, specimen.id).state)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(5):
            wait_for(daemon, specimen.id, "scaled_down")
            deadline = time.monotonic() + 0.3
            asking = threading.Thread(target=specimen.ask, args=("count",))
            asking.start()
            while time.monotonic() < deadline:
                assert container.status() == first
                assert call("ListContainers", listed, cri.ListContainersResponse).containers == [entry]
            asking.join()
    finally:
        over.set()
        looking.join()
    assert states >= {"running", "scaled_down"}


# --- Ends ------------------------------------------------------------------------------------------------------


def end(container: Container) -> tuple[int, str, str]:
    found = container.wait()
    now = time.time_ns()
    assert found.created_at <= found.started_at <= found.finished_at <= now
    assert now - found.finished_at < 3600e9
    return found.exit_code, found.reason, found.message


@pytest.mark.parametrize("cycles", [0, 2])
def test_running_out_of_memory(cycles: int, kubelet: Kubelet, direct: Kubelet, program: Path, daemon: Daemon) -> None:
    ends = []
    for one, wishes in ((direct, AWAKE), (kubelet, QUICK)):
        with one.run_pod(annotations=wishes) as pod:
            specimen = Specimen.run(pod, program, memory_limit=32 * MIB)
            for _ in range(cycles if one is kubelet else 0):
                wait_for(daemon, specimen.id, "scaled_down")
                specimen.tell("say still here")
            if one is kubelet:
                wait_for(daemon, specimen.id, "scaled_down")
            specimen.end("fill 64")
            ends.append(end(specimen.container))
            said = ["listening", *(["still here"] * (cycles if one is kubelet else 0))]
            eventually(lambda s=specimen, w=said: s.log == w, f"it has said {said}")
    assert ends == [(137, "OOMKilled", "")] * 2


def test_a_crash_right_after_a_restore_is_like_any(pod: Pod, program: Path, daemon: Daemon) -> None:
    specimen = Specimen.run(pod, program)
    wait_for(daemon, specimen.id, "scaled_down")
    with specimen.connect() as connection:
        connection.send("say last words")
        assert connection.answer() == "ok"
        connection.send("die 11")
        assert connection.ended()
    assert end(specimen.container) == (139, "Error", "")
    specimen.has_said("listening", "last words")


# --- Resources ---------------------------------------------------------------------------------------------------


def update(container: Container, **resources: Any) -> None:
    request = cri.UpdateContainerResourcesRequest(
        container_id=container.id, linux=cri.LinuxContainerResources(**resources)
    )
    container.pod.kubelet.call("UpdateContainerResources", request, cri.UpdateContainerResourcesResponse)


def limit(container: Container, *files: str) -> str:
    for folder in container.cgroups():
        for file in files:
            if (folder / file).exists():
                return (folder / file).read_text().split()[0]
    raise AssertionError(files)


def memory_limit(container: Container) -> int:
    return int(limit(container, "memory.limit_in_bytes", "memory.max"))


def quota(container: Container) -> int:
    """-1 without one, as cgroup v1 says it."""
    return int(limit(container, "cpu.cfs_quota_us", "cpu.max").replace("max", "-1"))


def processors(container: Container) -> set[str]:
    """Those that its processes may use, as the kernel says."""
    found = set()
    for pid in container_pids(container):
        # Ended meanwhile.
        with contextlib.suppress(OSError):
            found.add(status(pid)["Cpus_allowed_list"])
    return found


@pytest.mark.parametrize("memory", [8, 40], ids=["at once", "lazily"])
def test_a_restore_that_does_not_fit_ends_like_any_that_runs_out_of_memory(
    memory: int, pod: Pod, program: Path, daemon: Daemon
) -> None:
    specimen = Specimen.run(pod, program, memory_limit=128 * MIB)
    specimen.tell(f"fill {memory}")
    wait_for(daemon, specimen.id, "scaled_down")
    update(specimen.container, memory_limit_in_bytes=memory * MIB // 2)
    assert memory_limit(specimen.container) == memory * MIB // 2
    with contextlib.suppress(OSError, AssertionError):
        specimen.ask("count")
    assert end(specimen.container) == (137, "OOMKilled", "")


def test_limits_are_changed_while_it_sleeps(pod: Pod, program: Path, daemon: Daemon) -> None:
    specimen = Specimen.run(pod, program, memory=20, memory_limit=128 * MIB, cpu_limit=0.5)
    container = specimen.container
    for round_ in range(1, 4):
        wait_for(daemon, specimen.id, "scaled_down")
        update(
            container, memory_limit_in_bytes=(64 + round_) * MIB, cpu_quota=30_000 + round_ * 1000, cpu_period=100_000
        )
        assert seen(daemon, specimen.id).state == "scaled_down"
        for _ in range(2):
            assert memory_limit(container) == (64 + round_) * MIB
            assert quota(container) == 30_000 + round_ * 1000
            specimen.ask("count")


def test_processors_are_changed_in_every_state(pod: Pod, program: Path, daemon: Daemon) -> None:
    def pinned(config: cri.ContainerConfig) -> None:
        config.linux.resources.cpuset_cpus = "0"

    specimen = Specimen.run(pod, program, change=pinned)
    container = specimen.container
    assert processors(container) == {"0"}
    for cpus in ("1", "0-1", "0", "0-1"):
        wait_for(daemon, specimen.id, "scaled_down")
        update(container, cpuset_cpus=cpus)
        assert seen(daemon, specimen.id).state == "scaled_down"
        specimen.ask("count")
        eventually(lambda c=cpus: processors(container) == {c}, f"it has {cpus}")
    for cpus in ("1", "0-1"):
        specimen.ask("count")
        update(container, cpuset_cpus=cpus)
        assert processors(container) == {cpus}


def test_limits_that_are_changed_in_the_middle_of_a_restore_stay(
    kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    """Also one that is taken away: it reads as ours does while it is lifted."""
    with kubelet.run_pod(annotations={**QUICK, "criproxy.io/lazy-pages": "never"}) as pod:
        specimen = Specimen.run(pod, program, memory=250, memory_limit=500 * MIB, cpu_limit=0.5)
        for wanted in (40_000, -1, 30_000):
            asking: list[threading.Thread] = []

            def ask(asking: list[threading.Thread] = asking) -> None:
                asking.append(threading.Thread(target=specimen.ask, args=("count",)))
                asking[-1].start()

            wait_for(daemon, specimen.id, "scaled_down")
            meet(daemon, specimen, "restoring", ask)
            update(specimen.container, cpu_quota=wanted, cpu_period=100_000)
            for one in asking:
                one.join()
            wait_for(daemon, specimen.id, "running", "parking", "checkpointing", "scaled_down")
            assert quota(specimen.container) == wanted
        assert not list((daemon.state_dir / "containers" / specimen.id).glob("limits.json*"))


def test_what_could_not_be_restored_below_its_limit_is_frozen(pod: Pod, program: Path, daemon: Daemon) -> None:
    """Of cgroup v1; v2's are lifted meanwhile."""
    specimen = Specimen.run(pod, program, memory_limit=24 * MIB)
    specimen.tell("fill 21")
    down = wait_for(daemon, specimen.id, "scaled_down")
    v1 = any((folder / "memory.limit_in_bytes").exists() for folder in specimen.container.cgroups())
    assert down.tier == ("freeze" if v1 else "checkpoint")
    assert not v1 or "its limit of memory leaves" in down.reason
    assert specimen.ask("count") == "1"
    update(specimen.container, memory_limit_in_bytes=64 * MIB)
    assert specimen.ask("count") == "2"
