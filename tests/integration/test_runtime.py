"""What runtime.py reads from a real containerd."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from specimen import eventually

from criproxy.api import cri_pb2 as cri
from criproxy.cri.runtime import NotFound, Runtime
from lab import image_name
from lab.containerd import Containerd

NO_SUCH = "0123456789abcdef" * 4


@pytest.fixture
async def runtime(containerd: Containerd) -> AsyncIterator[Runtime]:
    async with Runtime(containerd.endpoint) as client:
        yield client


async def test_version(runtime):
    version = await runtime.version()
    assert (version.name, version.api) == ("containerd", "v1")
    assert version.version[0].isdigit()


async def test_a_container_in_each_of_its_states(runtime, direct):
    pod = direct.run_pod("plain")
    container = pod.create_container(
        "busybox", "app", command=["sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"]
    )

    created = await runtime.container_status(container.id)
    assert (created.running, created.exited, created.pid) == (False, False, 0)
    assert created.sandbox_id == pod.id

    container.start()
    # Started is what runc has let go: it may not have become the command yet.
    eventually(lambda: container.log.exists() and container.logs() == "ready\n", "it takes its stop signal")
    running = await runtime.container_status(container.id)
    assert running.running
    assert Path(f"/proc/{running.pid}/cmdline").read_bytes().startswith(b"sh\0-c\0")
    assert running.status.metadata.name == "app"
    assert running.spec["process"]["args"][:2] == ["sh", "-c"]
    assert running.cgroup.endswith(container.id)

    container.stop(60)
    exited = await runtime.container_status(container.id)
    assert (exited.exited, exited.pid) == (True, 0)
    assert exited.status.exit_code == 3
    assert exited.status.finished_at >= exited.status.started_at > 0


async def test_a_sandbox_and_its_network_namespace(runtime, direct):
    pod = direct.run_pod("plain")
    sandbox = await runtime.sandbox_status(pod.id)
    assert sandbox.ready
    assert sandbox.netns is not None
    assert os.stat(sandbox.netns).st_ino == os.stat(f"/proc/{sandbox.pid}/ns/net").st_ino
    assert sandbox.status.network.ip == pod.ip

    pod.stop()
    stopped = await runtime.sandbox_status(pod.id)
    assert (stopped.ready, stopped.pid) == (False, 0)


async def test_a_pod_in_the_hosts_network_has_no_namespace_of_its_own(runtime, direct):
    def host_network(config: cri.PodSandboxConfig) -> None:
        config.linux.security_context.namespace_options.network = cri.NamespaceMode.NODE
        config.hostname = ""  # as kubelet does

    pod = direct.run_pod("plain", change=host_network)
    assert (await runtime.sandbox_status(pod.id)).netns is None


@pytest.mark.parametrize("by_id", [False, True])
async def test_an_image(runtime, direct, by_id):
    reference = direct.image_id("redis") if by_id else image_name("redis")
    image = await runtime.image_status(reference)
    assert image.id == direct.image_id("redis")
    assert "redis-server" in " ".join(image.entrypoint + image.cmd)
    assert any(variable.startswith("PATH=") for variable in image.env)


async def test_pod_sandboxes_are_listed(runtime, direct):
    pods = [direct.run_pod("plain"), direct.run_pod("plain")]
    assert {pod.id for pod in pods} <= {sandbox.id for sandbox in await runtime.list_pod_sandboxes()}


async def test_the_mounts_of_a_container_that_has_not_started(runtime, direct):
    container = direct.run_pod("plain").create_container("busybox", command=["true"])
    mounts = await runtime.mounts(await runtime.container_status(container.id))
    folders = []
    for mount in mounts:
        options = dict(option.partition("=")[::2] for option in mount.options)
        folders += [*options["lowerdir"].split(":"), options["upperdir"]] if mount.type == "overlay" else [mount.source]
    assert any(Path(folder, "bin/sh").exists() for folder in folders), mounts


async def test_what_does_not_exist_is_named(runtime):
    with pytest.raises(NotFound, match=f"^containerd has no container {NO_SUCH}$"):
        await runtime.container_status(NO_SUCH)
    with pytest.raises(NotFound, match=f"^containerd has no pod sandbox {NO_SUCH}$"):
        await runtime.sandbox_status(NO_SUCH)
    with pytest.raises(NotFound, match=r"^containerd has no image criproxy\.local/none:lab$") as raised:
        await runtime.image_status(image_name("none"))
    assert raised.value.code is grpc.StatusCode.NOT_FOUND
