"""The same calls to a real containerd, directly and through the proxy: what the client sees is the same.

`proxy` is proxy.py alone, `daemon` all of criproxy; pods of these tests don't opt in.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from specimen import PATIENCE, eventually

from criproxy.api import cri_pb2 as cri
from lab import image_name
from lab.containerd import Containerd
from lab.kubelet import Kubelet
from lab.process import Service

PROXY = """
import asyncio, signal, sys
from criproxy.cri.proxy import Proxy

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with Proxy(sys.argv[1], sys.argv[2]):
        await stop.wait()

asyncio.run(main())
"""
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@pytest.fixture(scope="module")
def proxy_socket(containerd: Containerd) -> Iterator[Path]:
    socket = containerd.state / "bare" / "proxy.sock"
    argv = [sys.executable, "-c", PROXY, f"unix://{socket}", containerd.endpoint]
    service = Service("the proxy", argv, containerd.logs / "proxy.log")
    try:
        service.wait_until(socket.exists, "it listens")
        yield socket
    finally:
        assert service.stop() == 0
        assert not socket.exists()


@pytest.fixture(params=["proxy", "daemon"])
def through(request: pytest.FixtureRequest, containerd: Containerd) -> Iterator[Kubelet]:
    """A kubelet before the proxy."""
    if request.param == "proxy":
        endpoint = f"unix://{request.getfixturevalue('proxy_socket')}"
    else:
        endpoint = request.getfixturevalue("daemon").endpoint
    with Kubelet(endpoint, containerd) as client:
        yield client


def outcome(client: Kubelet, method: str, request: bytes, *, timeout: float = 60.0) -> dict[str, Any]:
    """All that a client can see of a call, by its full name."""
    call = client.channel.unary_stream(method)(request, timeout=timeout)
    messages: list[bytes] = []
    with contextlib.suppress(grpc.RpcError):
        messages += call
    return {
        "messages": messages,
        "code": call.code(),
        "details": call.details(),
        "initial": tuple(call.initial_metadata()),
        "trailing": tuple(call.trailing_metadata()),
    }


def ordered(result: dict[str, Any]) -> dict[str, Any]:
    """Go writes the entries of maps in a random order; so messages count as equal with the same bytes in any."""
    return {**result, "messages": [(len(message), sorted(message)) for message in result["messages"]]}


def assert_same(direct: Kubelet, through: Kubelet, method: str, request: bytes, code: Any) -> None:
    """`code` is what containerd must say for the test to mean something; None: whatever it says."""
    expected = outcome(direct, method, request)
    assert code in (None, expected["code"]), expected
    assert ordered(outcome(through, method, request)) == ordered(expected)


RUNTIME, IMAGES = "RuntimeService", "ImageService"
NO_SUCH = "0123456789abcdef" * 4


@pytest.mark.parametrize("version", ["runtime.v1", "runtime.v1alpha2"])
def test_reading_calls_have_the_same_answer(direct, through, version):
    pod = direct.run_pod("plain")
    container = pod.run("hello")
    image = cri.ImageSpec(image=image_name("hello"))
    of_pod, of_container = cri.ContainerFilter(pod_sandbox_id=pod.id), cri.ContainerFilter(id=container.id)
    for service, name, request in [
        (RUNTIME, "Version", cri.VersionRequest(version="0.1.0")),
        (RUNTIME, "Status", cri.StatusRequest()),
        (RUNTIME, "PodSandboxStatus", cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id)),
        (RUNTIME, "PodSandboxStatus", cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)),
        (RUNTIME, "ListPodSandbox", cri.ListPodSandboxRequest(filter=cri.PodSandboxFilter(id=pod.id))),
        (RUNTIME, "ContainerStatus", cri.ContainerStatusRequest(container_id=container.id)),
        (RUNTIME, "ContainerStatus", cri.ContainerStatusRequest(container_id=container.id, verbose=True)),
        (RUNTIME, "ListContainers", cri.ListContainersRequest(filter=of_pod)),
        (RUNTIME, "ListContainers", cri.ListContainersRequest(filter=of_container)),
        (RUNTIME, "ReopenContainerLog", cri.ReopenContainerLogRequest(container_id=container.id)),
        (IMAGES, "ListImages", cri.ListImagesRequest(filter=cri.ImageFilter(image=image))),
        (IMAGES, "ImageStatus", cri.ImageStatusRequest(image=image)),
        (IMAGES, "ImageStatus", cri.ImageStatusRequest(image=image, verbose=True)),
        (IMAGES, "ImageStatus", cri.ImageStatusRequest(image=cri.ImageSpec(image="no/such:image"))),
    ]:
        method = f"/{version}.{service}/{name}"
        assert_same(direct, through, method, request.SerializeToString(), grpc.StatusCode.OK)


def test_statistics_differ_only_in_time(direct, through):
    pod = direct.run_pod("plain")
    container = pod.run("hello")
    request = cri.ContainerStatsRequest(container_id=container.id)
    answers = [client.call("ContainerStats", request, cri.ContainerStatsResponse).stats for client in (direct, through)]
    for stats in answers:
        assert stats.cpu.timestamp > 0
        assert stats.memory.working_set_bytes.value > 0
    assert answers[0].attributes == answers[1].attributes


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        # A name, service and version that containerd doesn't know.
        ("/runtime.v1.RuntimeService/NoSuchMethod", b"", grpc.StatusCode.UNIMPLEMENTED),
        ("/some.future.Service/Method", b"\x0a\x01x", grpc.StatusCode.UNIMPLEMENTED),
        ("/runtime.v9.RuntimeService/Version", b"", grpc.StatusCode.UNIMPLEMENTED),
        # Bytes that aren't protobuf.
        ("/runtime.v1.RuntimeService/CreateContainer", b"\xff\xff\xff", grpc.StatusCode.INTERNAL),
        ("/runtime.v1.RuntimeService/RunPodSandbox", b"\x0a\x7f", grpc.StatusCode.INTERNAL),
        # Beyond the 16 MiB that containerd takes: its refusal, not ours.
        ("/runtime.v1.RuntimeService/Version", bytes(20 << 20), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_what_containerd_refuses_is_refused_in_its_words(direct, through, method, request_, code):
    assert_same(direct, through, method, request_, code)


def test_errors_about_what_does_not_exist_are_the_same(direct, through):
    missing = {"container_id": NO_SUCH}
    for name, request, code in [
        ("ContainerStatus", cri.ContainerStatusRequest(**missing), grpc.StatusCode.NOT_FOUND),
        ("StartContainer", cri.StartContainerRequest(**missing), grpc.StatusCode.NOT_FOUND),
        ("ExecSync", cri.ExecSyncRequest(**missing, cmd=["true"]), grpc.StatusCode.NOT_FOUND),
        ("Exec", cri.ExecRequest(**missing, cmd=["true"], stdout=True), grpc.StatusCode.NOT_FOUND),
        ("Attach", cri.AttachRequest(**missing, stdout=True), grpc.StatusCode.NOT_FOUND),
        ("ContainerStats", cri.ContainerStatsRequest(**missing), grpc.StatusCode.NOT_FOUND),
        ("UpdateContainerResources", cri.UpdateContainerResourcesRequest(**missing), grpc.StatusCode.NOT_FOUND),
        ("PodSandboxStatus", cri.PodSandboxStatusRequest(pod_sandbox_id=NO_SUCH), grpc.StatusCode.NOT_FOUND),
        ("PortForward", cri.PortForwardRequest(pod_sandbox_id=NO_SUCH, port=[80]), grpc.StatusCode.NOT_FOUND),
        # CRI wants these to be repeatable; releases of containerd differ.
        ("StopContainer", cri.StopContainerRequest(**missing), None),
        ("RemoveContainer", cri.RemoveContainerRequest(**missing), None),
        ("StopPodSandbox", cri.StopPodSandboxRequest(pod_sandbox_id=NO_SUCH), None),
        ("RemovePodSandbox", cri.RemovePodSandboxRequest(pod_sandbox_id=NO_SUCH), None),
    ]:
        assert_same(direct, through, f"/runtime.v1.{RUNTIME}/{name}", request.SerializeToString(), code)


def test_a_streaming_call_that_containerd_ends_at_once_always_ends_the_same(direct, through):
    """As a stream_stream call to containerd, one of eight came back as an INTERNAL error of grpc's own."""
    method = f"/runtime.v1.{RUNTIME}/NoSuchStream"
    expected = outcome(direct, method, b"")
    assert expected["code"] is grpc.StatusCode.UNIMPLEMENTED
    for _ in range(300):
        assert outcome(through, method, b"") == expected


def test_events_arrive(direct, through):
    """Where containerd has them (1.7 and later); before, the call fails as it does there."""
    version = direct.call("Version", cri.VersionRequest(), cri.VersionResponse).runtime_version
    if [int(number) for number in version.lstrip("v").split(".")[:2]] < [1, 7]:
        method = f"/runtime.v1.{RUNTIME}/GetContainerEvents"
        assert_same(direct, through, method, b"", grpc.StatusCode.UNIMPLEMENTED)
        return
    told: set[str] = set()

    def listen() -> None:
        with contextlib.suppress(grpc.RpcError):
            told.update(event.container_id for event in through.events())

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(listen)
        try:
            # Nobody says when containerd has begun to listen; and it tells of earlier pods, too.
            pods: set[str] = set()
            while not pods & told:
                assert len(pods) < 20
                pods.add(direct.run_pod("plain").id)
                time.sleep(0.5)
        finally:
            through.channel.close()


def test_a_container_lives_and_dies_as_without_the_proxy(direct, through):
    seen = []
    for client in (direct, through):
        pod = client.run_pod("plain")
        container = pod.create_container(
            "busybox", "app", command=["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"]
        )
        container.start()
        eventually(lambda c=container: c.log.exists() and c.logs() == "ready\n", "it takes its stop signal")
        spec = json.loads(container.status_response().info["info"])
        echo = container.exec_sync("sh", "-c", "echo out; echo err >&2; exit 3")
        before = container.status().state
        container.stop(60)
        status = container.status()
        seen.append(
            {
                "spec": {key: spec["runtimeSpec"]["process"][key] for key in ("args", "env", "cwd", "capabilities")},
                "mounts": sorted(mount["destination"] for mount in spec["runtimeSpec"]["mounts"]),
                "exec": echo,
                "states": (before, status.state),
                "exit": (status.exit_code, status.reason, status.message),
            }
        )
        pod.remove()
    assert seen[0]["exit"][0] == 7
    assert seen[0] == seen[1]


def test_a_missing_executable_is_the_same_error(direct, through):
    errors = []
    for client in (direct, through):
        container = client.run_pod("plain").create_container("busybox", command=["/no/such/program"])
        with pytest.raises(grpc.RpcError) as raised:
            container.start()
        errors.append((raised.value.code(), raised.value.details().replace(container.id, "ID")))
    assert errors[0] == errors[1]
    assert "/no/such/program" in errors[0][1]


def test_the_deadline_reaches_containerd(direct, through):
    """ExecSync has no other limit here: what it runs ends when the client's deadline passes."""
    pod = direct.run_pod("plain")
    container = pod.run("busybox", command=["sleep", "1000"])
    for client in (direct, through):
        request = cri.ExecSyncRequest(container_id=container.id, cmd=["sleep", "321"])
        result = outcome(client, f"/runtime.v1.{RUNTIME}/ExecSync", request.SerializeToString(), timeout=0.5)
        assert result["code"] is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: "sleep 321" not in container.exec_sync("ps").stdout, "it is ended")


def test_cancellation_reaches_containerd(direct, through):
    pod = direct.run_pod("plain")
    container = pod.run("busybox", command=["sleep", "1000"])
    for client in (direct, through):
        request = cri.ExecSyncRequest(container_id=container.id, cmd=["sleep", "321"])
        call = client.channel.unary_unary(f"/runtime.v1.{RUNTIME}/ExecSync").future(request.SerializeToString())
        eventually(lambda: "sleep 321" in container.exec_sync("ps").stdout, "it runs")
        call.cancel()
        eventually(lambda: "sleep 321" not in container.exec_sync("ps").stdout, "it is ended")


def test_output_of_megabytes_passes(direct, through):
    pod = direct.run_pod("plain")
    container = pod.run("busybox", command=["sleep", "1000"])
    size = 12_000_000  # containerd itself sends up to 16 MiB
    for client in (direct, through):
        request = cri.ExecSyncRequest(container_id=container.id, cmd=["head", "-c", str(size), "/dev/zero"])
        answer = client.call("ExecSync", request, cri.ExecSyncResponse)
        assert answer.stdout == bytes(size)


def test_thirty_at_once(direct, through):
    request = cri.VersionRequest().SerializeToString()
    expected = outcome(direct, f"/runtime.v1.{RUNTIME}/Version", request)
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        futures = [pool.submit(outcome, through, f"/runtime.v1.{RUNTIME}/Version", request) for _ in range(600)]
        for future in futures:
            assert future.result(PATIENCE) == expected


def test_containerd_goes_and_comes_back(containerd, direct, through):
    method = f"/runtime.v1.{RUNTIME}/Version"
    assert outcome(through, method, b"")["code"] is grpc.StatusCode.OK
    containerd.service.stop()
    try:
        for _ in range(3):
            # At once: a call that waited for containerd would have ended with its deadline.
            assert outcome(through, method, b"")["code"] is grpc.StatusCode.UNAVAILABLE
    finally:
        containerd.start()
    expected = outcome(direct, method, b"")
    assert expected["code"] is grpc.StatusCode.OK
    assert outcome(through, method, b"") == expected
