"""kubelet's forensic checkpoints: CheckpointContainer, in every state of the container."""

from __future__ import annotations

import json
import socket
import tarfile
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from specimen import AWAKE, PATIENCE, QUICK, Specimen, container_pids, eventually, seen, wait_for

from criproxy.api import cri_pb2 as cri
from criproxy.criu import images
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Container, Kubelet, Pod

TEXT = "evidence-that-is-nowhere-but-in-memory"


@pytest.fixture
def location(containerd: Containerd) -> Path:
    """As kubelet names it: in a folder that it has made."""
    folder = containerd.logs / "checkpoints"
    folder.mkdir(exist_ok=True)
    path = folder / "checkpoint-pod_default-specimen-2026-01-01T00:00:00Z.tar"
    path.unlink(missing_ok=True)
    return path


def checkpoint(container: Container, location: Path) -> None:
    request = cri.CheckpointContainerRequest(container_id=container.id, location=str(location))
    container.pod.kubelet.call("CheckpointContainer", request, cri.CheckpointContainerResponse)


def started(specimen: Specimen, location: Path) -> Any:
    """A checkpoint that goes on by itself (grpc.Future)."""
    invoke = specimen.container.pod.kubelet.channel.unary_unary(
        "/runtime.v1.RuntimeService/CheckpointContainer",
        request_serializer=cri.CheckpointContainerRequest.SerializeToString,
        response_deserializer=cri.CheckpointContainerResponse.FromString,
    )
    return invoke.future(cri.CheckpointContainerRequest(container_id=specimen.id, location=str(location)))


def in_the_middle(daemon: Daemon, specimen: Specimen, location: Path) -> Any:
    """One that is under way, of a container that isn't scaled down otherwise. A busy machine may miss it: once more."""
    for _ in range(10):
        call = started(specimen, location)
        while not call.done():
            if seen(daemon, specimen.id).state == "parking":
                return call
            time.sleep(0.003)
        call.result()
        location.unlink()
    pytest.fail("each was over before it was seen")


def unfinished(daemon: Daemon) -> list[Path]:
    """What archives are being made of."""
    folder = daemon.state_dir / "archives"
    return list(folder.iterdir()) if folder.is_dir() else []


def refused(container: Container, location: Path) -> tuple[grpc.StatusCode, str]:
    """The error of a checkpoint that isn't possible, of which nothing is left behind."""
    before = set(location.parent.iterdir())
    with pytest.raises(grpc.RpcError) as caught:
        checkpoint(container, location)
    assert set(location.parent.iterdir()) == before
    return caught.value.code(), caught.value.details()


class Archive:
    def __init__(self, location: Path, folder: Path) -> None:
        assert location.stat().st_mode & 0o777 == 0o600
        with tarfile.open(location) as tar:
            tar.extractall(folder)
        self.folder = folder
        self.images = folder / "checkpoint"

    def json(self, name: str) -> Mapping[str, object]:
        found: Mapping[str, object] = json.loads((self.folder / name).read_text())
        return found

    def check(self, container: Container) -> None:
        """What `checkpointctl show` and `inspect` read is there."""
        config, spec, status = (self.json(f"{name}.dump") for name in ("config", "spec", "status"))
        assert config["id"] == status["id"] == container.id
        assert config["rootfsImageName"] == "criproxy.local/busybox:lab"
        assert config["runtime"] == "io.containerd.runc.v2"
        annotations = spec["annotations"]
        assert isinstance(annotations, dict)
        assert annotations["io.kubernetes.cri.container-name"] == container.name
        assert annotations["io.kubernetes.cri.sandbox-name"] == container.pod.name
        assert status["state"] == cri.ContainerState.CONTAINER_RUNNING
        assert status["created_at"] == container.status().created_at
        assert (self.folder / "stats-dump").stat().st_size
        assert "listening" in (self.folder / "container.log").read_text()
        for name in ("pstree", "files"):
            assert list(images.entries((self.images / f"{name}.img").read_bytes()))
        assert not [path for path in self.images.iterdir() if path.suffix != ".img"]
        # The names of the processes.
        threads = [next(images.entries(path.read_bytes())) for path in self.images.glob("core-*.img")]
        assert [b"specimen" in thread for thread in threads].count(True) == 1

    def holds(self, text: str) -> bool:
        """Whether the memory has a text."""
        return any(text.encode() in path.read_bytes() for path in self.images.glob("pages-*.img"))

    def layer(self) -> dict[str, tarfile.TarInfo]:
        with tarfile.open(self.folder / "rootfs-diff.tar") as tar:
            return {entry.name: entry for entry in tar}


def test_what_sleeps_is_archived_without_waking_it(
    pod: Pod, program: Path, daemon: Daemon, location: Path, tmp_path: Path
) -> None:
    specimen = Specimen.run(pod, program)
    began = time.time()
    specimen.tell(f"set {TEXT}")
    before = wait_for(daemon, specimen.id, "scaled_down")
    asked = time.time()
    location.write_text("of another time")
    checkpoint(specimen.container, location)
    after = seen(daemon, specimen.id)
    assert (after.state, after.restores, after.since) == ("scaled_down", before.restores, before.since)
    archive = Archive(location, tmp_path)
    archive.check(specimen.container)
    assert archive.holds(TEXT)
    checkpointed = datetime.fromisoformat(str(archive.json("config.dump")["checkpointedTime"]))
    assert began < checkpointed.timestamp() < asked, "when it was, not when it was asked for"
    assert not unfinished(daemon)
    # It is as good as before.
    assert specimen.ask("get") == TEXT
    assert wait_for(daemon, specimen.id, "scaled_down").reason == ""


@pytest.mark.parametrize("wishes", [QUICK, AWAKE, {**QUICK, "zeropod.ctrox.dev/disable-checkpointing": "true"}])
def test_what_runs_goes_on_running(
    wishes: Mapping[str, str], kubelet: Kubelet, program: Path, daemon: Daemon, location: Path, tmp_path: Path
) -> None:
    with kubelet.run_pod(annotations=wishes) as pod:
        specimen = Specimen.run(pod, program)
        specimen.tell(f"set {TEXT}")
        with specimen.awake(), specimen.connect() as connection:
            pids, before = container_pids(specimen.container), seen(daemon, specimen.id).checkpoints
            for _ in range(2):
                checkpoint(specimen.container, location)
                assert seen(daemon, specimen.id).state == "running"
                assert connection.ask("get") == TEXT
            assert container_pids(specimen.container) == pids
            assert seen(daemon, specimen.id).checkpoints == before
        archive = Archive(location, tmp_path)
        archive.check(specimen.container)
        assert archive.holds(TEXT)
        specimen.container.stop(20)
        assert specimen.container.status().exit_code == 0
        specimen.has_said("caught 15")


def test_requests_meanwhile_are_answered(pod: Pod, program: Path, daemon: Daemon, location: Path) -> None:
    """Whatever comes in the middle: new connections, requests on an open one, commands."""
    specimen = Specimen.run(pod, program, memory=100)
    over = threading.Event()
    wrong: list[BaseException] = []

    def ask() -> None:
        try:
            with specimen.connect() as connection:
                while not over.is_set():
                    assert connection.ask("echo one") == "one"
                    assert specimen.ask("echo two") == "two"
                    assert specimen.container.exec_sync("echo", "three").stdout == "three\n"
        except BaseException as error:
            wrong.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(5):
            checkpoint(specimen.container, location)
    finally:
        over.set()
        asking.join()
    assert not wrong
    wait_for(daemon, specimen.id, "scaled_down")
    assert specimen.ask("echo awake") == "awake"


def test_it_wakes_in_the_middle(pod: Pod, program: Path, daemon: Daemon, location: Path, tmp_path: Path) -> None:
    specimen = Specimen.run(pod, program, memory=60)
    specimen.tell(f"set {TEXT}")
    wait_for(daemon, specimen.id, "scaled_down")
    call = started(specimen, location)
    for _ in range(20):
        assert specimen.ask("get") == TEXT
    call.result(PATIENCE)
    archive = Archive(location, tmp_path)
    archive.check(specimen.container)
    assert archive.holds(TEXT)


def test_what_it_has_changed_of_its_image(pod: Pod, program: Path, location: Path, tmp_path: Path) -> None:
    specimen = Specimen.run(pod, program)
    script = """
        mkdir /made; echo changed >/made/file; chmod 640 /made/file; chown 7:8 /made/file
        ln -s /etc/shadow /made/link; mkfifo /made/pipe; ln /made/file /made/second
        rm /bin/vi; rm -r /var/lib; mkdir /var/lib; touch /var/lib/new
    """
    assert specimen.container.exec_sync("sh", "-ec", script).stderr == ""
    checkpoint(specimen.container, location)
    layer = Archive(location, tmp_path).layer()
    file = layer["made/file"]
    assert (file.size, file.mode, file.uid, file.gid) == (8, 0o640, 7, 8)
    assert (layer["made/link"].issym(), layer["made/link"].linkname) == (True, "/etc/shadow")
    assert layer["made/pipe"].isfifo()
    assert {"bin/.wh.vi", "var/lib/.wh..wh..opq", "var/lib/new"} <= layer.keys()
    assert not {"bin/vi", "bin/sh", "etc/passwd"} & layer.keys()


def test_a_caller_that_does_not_wait(kubelet: Kubelet, program: Path, daemon: Daemon, location: Path) -> None:
    with kubelet.run_pod(annotations=AWAKE) as pod:
        specimen = Specimen.run(pod, program, memory=300)
        specimen.tell(f"set {TEXT}")
        before = set(location.parent.iterdir())
        assert in_the_middle(daemon, specimen, location).cancel()
        eventually(lambda: not unfinished(daemon), "nothing is left of it")
        eventually(lambda: set(location.parent.iterdir()) == before, "nothing is left where it was to be")
        wait_for(daemon, specimen.id, "running")
        assert specimen.ask("get") == TEXT


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("checkpoint.tar", "is not an absolute path"),
        ("/nowhere/checkpoint.tar", "/nowhere is not a folder"),
        ("/tmp", "/tmp is a folder"),
    ],
)
def test_a_bad_location(where: str, why: str, pod: Pod, program: Path) -> None:
    specimen = Specimen.run(pod, program)
    with pytest.raises(grpc.RpcError) as caught:
        checkpoint(specimen.container, Path(where))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("location: ")
    assert why in caught.value.details()


def test_what_criu_refuses_goes_on_and_the_reason_is_told(
    pod: Pod, program: Path, location: Path, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as outside:
        outside.bind(str(tmp_path / "outside"))
        outside.listen()
        specimen = Specimen.run(pod, program, mounts={tmp_path: "/outside"})
        specimen.tell("connect /outside/outside")
        code, text = refused(specimen.container, location)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "a unix socket of it is connected to a process outside" in text
        assert specimen.ask("count") == "1"


def test_what_is_frozen_instead_is_thawed_for_the_attempt(
    pod: Pod, program: Path, daemon: Daemon, location: Path
) -> None:
    def traces(config: cri.ContainerConfig) -> None:
        config.linux.security_context.capabilities.add_capabilities.append("SYS_PTRACE")

    specimen = Specimen.run(pod, program, change=traces)
    assert wait_for(daemon, specimen.id, "scaled_down").tier == "freeze"
    code, text = refused(specimen.container, location)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "CAP_SYS_PTRACE" in text
    assert specimen.ask("count") == "1"
    assert wait_for(daemon, specimen.id, "scaled_down").tier == "freeze"


def test_what_can_only_be_frozen(kubelet: Kubelet, program: Path, daemon: Daemon, location: Path) -> None:
    with kubelet.run_pod(annotations={**QUICK, "criproxy.io/tier": "freeze"}) as pod:
        specimen = Specimen.run(pod, program)
        wait_for(daemon, specimen.id, "scaled_down")
        code, text = refused(specimen.container, location)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "can only be frozen" in text
        assert specimen.ask("count") == "1"


def test_what_was_ended_while_idle_has_no_checkpoint(
    kubelet: Kubelet, program: Path, daemon: Daemon, location: Path
) -> None:
    with kubelet.run_pod(annotations={**QUICK, "zeropod.ctrox.dev/disable-checkpointing": "true"}) as pod:
        specimen = Specimen.run(pod, program)
        wait_for(daemon, specimen.id, "scaled_down")
        code, text = refused(specimen.container, location)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "there is no checkpoint" in text
        assert seen(daemon, specimen.id).state == "scaled_down"


def test_what_has_ended(pod: Pod, program: Path, location: Path) -> None:
    specimen = Specimen.run(pod, program)
    specimen.end("exit 3")
    specimen.container.wait()
    code, text = refused(specimen.container, location)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "it is exited" in text


def test_who_did_not_opt_in_gets_the_runtimes_own_answer(
    kubelet: Kubelet, direct: Kubelet, program: Path, location: Path
) -> None:
    answers = []
    for one in (kubelet, direct):
        with one.run_pod() as pod:
            answers.append(refused(Specimen.run(pod, program).container, location))
    assert answers[0] == answers[1]


def test_it_ends_in_the_middle(kubelet: Kubelet, program: Path, daemon: Daemon, location: Path) -> None:
    with kubelet.run_pod(annotations=AWAKE) as pod:
        # On a busy machine the checkpoint may be faster than the end.
        for number in range(5):
            specimen = Specimen.run(pod, program, f"specimen-{number}", memory=300)
            call = in_the_middle(daemon, specimen, location)
            specimen.container.stop(0)
            assert specimen.container.status().exit_code == 137
            if error := call.exception(PATIENCE):
                break
            location.unlink()
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert not location.exists()
        assert not unfinished(daemon)


def test_a_daemon_that_is_killed_leaves_nothing_half(
    kubelet: Kubelet, program: Path, daemon: Daemon, location: Path
) -> None:
    with kubelet.run_pod(annotations=AWAKE) as pod:
        specimen = Specimen.run(pod, program, memory=300)
        specimen.tell(f"set {TEXT}")
        before = set(location.parent.iterdir())
        # On a busy machine the checkpoint may be faster than we are.
        for _ in range(5):
            call = in_the_middle(daemon, specimen, location)
            daemon.kill()
            daemon.start()
            if error := call.exception(PATIENCE):
                break
            location.unlink()
        assert error
        assert set(location.parent.iterdir()) == before
        assert not (daemon.state_dir / "archives").exists()
        wait_for(daemon, specimen.id, "running")
        assert specimen.ask("get") == TEXT
