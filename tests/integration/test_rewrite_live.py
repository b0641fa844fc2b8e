"""Rewritten requests, as the real containerd and runc take them (without the daemon: only what `rewrite` makes)."""

import contextlib
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from specimen import PATIENCE, eventually

from criproxy import LIBEXEC
from criproxy.api import containerd_pb2
from criproxy.api import cri_pb2 as cri
from criproxy.cri import executable, rewrite, seccomp
from criproxy.cri.containerd import Configuration
from criproxy.cri.executable import Answer
from criproxy.policy import Policy
from lab.kubelet import Kubelet

# Prints the errno of io_uring_setup, then what the 32-bit getpid answers (through the i386 entry of an x86_64 kernel).
CALLS = """
#include <errno.h>
#include <stdio.h>
#include <unistd.h>
#include <sys/syscall.h>
int main(void) {
    long result = syscall(425, 1, 0);
    printf("io_uring=%d\\n", result < 0 ? errno : 0);
    fflush(stdout);
#ifdef __x86_64__
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(20) : "memory");
    printf("getpid32=%d\\n", result == getpid());
#endif
    return 0;
}
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the static program above."""
    folder = tmp_path_factory.mktemp("calls")
    (folder / "calls.c").write_text(CALLS)
    subprocess.run(["gcc", "-static", "-o", folder / "calls", folder / "calls.c"], check=True)
    return folder


@pytest.fixture
def rewriting(direct: Kubelet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubelet]:
    """A kubelet whose CreateContainer requests are rewritten on their way to containerd."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    shutil.copy(LIBEXEC / "init", bundle)
    profiles = seccomp.Profiles(tmp_path / "seccomp")
    info = direct.call("Status", cri.StatusRequest(verbose=True), cri.StatusResponse).info
    plain = direct.call

    def call(method: str, request: Any, response: type[Any], **options: Any) -> Any:
        if method == "CreateContainer":
            image = plain(
                "ImageStatus", cri.ImageStatusRequest(image=request.config.image, verbose=True), cri.ImageStatusResponse
            )
            config = json.loads(image.info["info"])["imageSpec"]["config"]
            data = rewrite.container(
                request.SerializeToString(),
                policy=Policy(),
                entrypoint=config.get("Entrypoint") or [],
                cmd=config.get("Cmd") or [],
                bundle=bundle,
                profiles=profiles,
                runtime=Configuration.from_info(info),
            )
            request = cri.CreateContainerRequest.FromString(data)
        return plain(method, request, response, **options)

    monkeypatch.setattr(direct, "call", call)
    yield direct
    # Before the bundle is gone.
    for pod in list(direct.pods):
        pod.remove()


def test_containerds_configuration_is_read(direct: Kubelet) -> None:
    info = direct.call("Status", cri.StatusRequest(verbose=True), cri.StatusResponse).info
    configuration = Configuration.from_info(info)
    assert configuration is not None
    default = configuration.runtime("")
    assert default is not None
    assert default.is_runc


def test_io_uring_is_refused_and_32_bit_programs_run(rewriting: Kubelet, calls: Path) -> None:
    with rewriting.run_pod() as pod:
        container = pod.run("busybox", command=["/calls/calls"], mounts={calls: "/calls"})
        assert container.wait().exit_code == 0
        eventually(lambda: "getpid32=" in container.logs() or platform.machine() != "x86_64", "it has said all")
        lines = container.logs().split()
    assert "io_uring=38" in lines
    if platform.machine() == "x86_64":
        assert "getpid32=1" in lines


@pytest.mark.parametrize("form", ["message", "path"])
def test_a_profile_of_the_pods_keeps_its_other_rules(
    form: str, rewriting: Kubelet, calls: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "pod.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}
    allow = {"names": ["io_uring_setup"], "action": "SCMP_ACT_ALLOW"}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule, allow]}))

    def change(config: cri.ContainerConfig) -> None:
        context = config.linux.security_context
        context.ClearField("seccomp")
        if form == "path":
            context.seccomp_profile_path = f"localhost/{profile}"
        else:
            context.seccomp.profile_type = cri.SecurityProfile.Localhost
            context.seccomp.localhost_ref = str(profile)

    with rewriting.run_pod() as pod:
        container = pod.run(
            "busybox", command=["sh", "-c", "mkdir /x; /calls/calls"], mounts={calls: "/calls"}, change=change
        )
        container.wait()
        eventually(lambda: "io_uring=" in container.logs(), "it has said all")
        text = container.logs()
    assert "not supported" in text  # EOPNOTSUPP, 95, of the other rule
    assert "io_uring=38" in text


@pytest.mark.parametrize(
    ("command", "expected"),
    [("sh", Answer.FOUND), ("/bin/sh", Answer.FOUND), ("no-such", Answer.MISSING), ("/etc/hosts", Answer.MISSING)],
)
def test_the_search_agrees_with_runc(command: str, expected: Answer, direct: Kubelet) -> None:
    with direct.run_pod() as pod:
        container = pod.create_container("busybox", command=[command], args=["-c", "true"])
        mounts = snapshot_mounts(direct, container.id)

        def mounted() -> list[str]:
            # Others on this machine may mount something meanwhile.
            root = str(direct.lab.root)
            return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if root in line]

        before = mounted()
        with executable.rootfs(mounts) as descriptor:
            binds = executable.binds(container.config)
            assert executable.find(command, rewrite.DEFAULT_PATH, binds, descriptor) is expected
        assert mounted() == before
        raised: Callable[[], Any] = (
            contextlib.nullcontext if expected is Answer.FOUND else lambda: pytest.raises(grpc.RpcError, match="exec")
        )
        with raised():
            container.start()


@pytest.mark.parametrize("read_only", [False, True])
def test_volumes_at_run_have_nothing_of_ours(read_only: bool, rewriting: Kubelet, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    with rewriting.run_pod() as pod:
        container = pod.run("busybox", command=["sleep", "60"], mounts={volume: "/run"}, read_only=read_only)
        process = Path("/proc", str(json.loads(container.status_response().info["info"])["pid"]))
        assert list((process / "root/run").iterdir()) == []
        mounts = [line.split()[3:5] for line in (process / "mountinfo").read_text().splitlines()]
        assert [point for source, point in mounts if tmp_path.name in source] == ["/run", "/.criproxy"]
    assert list(volume.iterdir()) == []


def snapshot_mounts(kubelet: Kubelet, container_id: str) -> list[containerd_pb2.Mount]:
    invoke = kubelet.channel.unary_unary(
        "/containerd.services.snapshots.v1.Snapshots/Mounts",
        request_serializer=containerd_pb2.MountsRequest.SerializeToString,
        response_deserializer=containerd_pb2.MountsResponse.FromString,
    )
    info = kubelet.call(
        "ContainerStatus",
        cri.ContainerStatusRequest(container_id=container_id, verbose=True),
        cri.ContainerStatusResponse,
    ).info
    snapshotter = json.loads(info["info"])["snapshotter"]
    request = containerd_pb2.MountsRequest(snapshotter=snapshotter, key=container_id)
    response = invoke(request, metadata=(("containerd-namespace", "k8s.io"),), timeout=PATIENCE)
    return list(response.mounts)
