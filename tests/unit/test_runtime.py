"""What runtime.py makes of answers that a healthy containerd rarely gives."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from criproxy.api import cri_pb2 as cri
from criproxy.cri.runtime import CriError, Incomplete, NotFound, Runtime, Unreachable, stop_signal
from criproxy.workload import signal_number

Answer = Callable[[bytes, Any], Awaitable[bytes]]


class Containerd(grpc.GenericRpcHandler):
    """Answers methods, by their last name, with messages or coroutines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        self.server: aio.Server | None = None

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        answer = self.answers.get(handler_call_details.method.rpartition("/")[2])

        async def respond(request: bytes, context: Any) -> bytes:
            return await answer(request, context) if callable(answer) else answer.SerializeToString()

        return answer and grpc.unary_unary_rpc_method_handler(respond)

    async def start(self) -> None:
        self.server = aio.server(handlers=[self])
        self.server.add_insecure_port(f"unix://{self.path}")
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(None)
            self.server = None


@pytest.fixture
async def containerd(tmp_path: Path) -> AsyncIterator[Containerd]:
    fake = Containerd(tmp_path / "containerd.sock")
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def runtime(containerd: Containerd) -> AsyncIterator[Runtime]:
    async with Runtime(f"unix://{containerd.path}", timeout=0.3, patience=0.5) as client:
        yield client


def info(content: Any) -> dict[str, str]:
    return {"info": json.dumps(content)}


async def test_a_container_whose_information_has_nulls(containerd, runtime):
    containerd.answers["ContainerStatus"] = cri.ContainerStatusResponse(
        status=cri.ContainerStatus(id="c1"), info=info({"pid": None, "sandboxID": "s1", "runtimeSpec": None})
    )
    container = await runtime.container_status("c1")
    assert (container.pid, container.sandbox_id, container.cgroup, dict(container.spec)) == (0, "s1", "", {})
    with pytest.raises(Incomplete, match="doesn't name the snapshot of container c1"):
        await runtime.mounts(container)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({}, "containerd's answer about container c1 has no verbose information"),
        ({"info": "{"}, "containerd's verbose information about container c1 isn't JSON"),
        ({"info": "[]"}, "containerd's verbose information about container c1 isn't a JSON object"),
    ],
)
async def test_an_answer_without_its_information_is_named(containerd, runtime, extra, sentence):
    containerd.answers["ContainerStatus"] = cri.ContainerStatusResponse(info=extra)
    with pytest.raises(Incomplete, match=sentence):
        await runtime.container_status("c1")


@pytest.mark.parametrize("spec", [None, {}, {"linux": {}}, {"linux": {"namespaces": [{"type": "pid"}]}}])
async def test_a_sandbox_in_the_hosts_network(containerd, runtime, spec):
    containerd.answers["PodSandboxStatus"] = cri.PodSandboxStatusResponse(info=info({"pid": 7, "runtimeSpec": spec}))
    sandbox = await runtime.sandbox_status("s1")
    assert (sandbox.pid, sandbox.netns) == (7, None)


async def test_an_image_that_says_nothing_about_its_process(containerd, runtime):
    image = cri.Image(id="sha256:1")
    containerd.answers["ImageStatus"] = cri.ImageStatusResponse(image=image, info=info({"imageSpec": {"config": {}}}))
    config = await runtime.image_status("x")
    assert (config.id, config.entrypoint, config.cmd, config.stop_signal) == ("sha256:1", (), (), "")

    containerd.answers["ImageStatus"] = cri.ImageStatusResponse(image=image, info=info({}))
    with pytest.raises(Incomplete, match=r"image x has no imageSpec\.config"):
        await runtime.image_status("x")

    containerd.answers["ImageStatus"] = cri.ImageStatusResponse()
    with pytest.raises(NotFound, match="containerd has no image x"):
        await runtime.image_status("x")


async def test_the_runtime_handler_goes_along_with_an_image(containerd, runtime):
    asked = []

    async def status(request: bytes, context: Any) -> bytes:
        asked.append(cri.ImageStatusRequest.FromString(request))
        return b""

    containerd.answers["ImageStatus"] = status
    with pytest.raises(NotFound):
        await runtime.image_status("x", "gvisor")
    assert (asked[0].image.runtime_handler, asked[0].verbose) == ("gvisor", True)


async def test_other_errors_say_what_was_asked_and_are_not_repeated(containerd, runtime):
    calls = 0

    async def fail(request: bytes, context: Any) -> bytes:
        nonlocal calls
        calls += 1
        await context.abort(grpc.StatusCode.UNKNOWN, "no space left")
        return b""

    containerd.answers["Version"] = fail
    with pytest.raises(CriError, match=r"^containerd failed Version: no space left \(UNKNOWN\)$") as raised:
        await runtime.version()
    assert raised.value.code is grpc.StatusCode.UNKNOWN
    assert calls == 1


async def test_a_containerd_that_still_recovers_is_waited_for(containerd, runtime):
    """containerd 1.x answers so, as UNKNOWN, when its socket is open and its pods aren't known yet."""
    calls = 0

    async def starting(request: bytes, context: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls < 3:
            await context.abort(grpc.StatusCode.UNKNOWN, "server is not initialized yet")
        return b""

    containerd.answers["ListPodSandbox"] = starting
    assert await runtime.list_pod_sandboxes() == []
    assert calls == 3


async def test_a_containerd_that_hangs_is_named(containerd, runtime):
    async def hang(request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    containerd.answers["Version"] = hang
    with pytest.raises(CriError, match=r"^containerd didn't answer Version within 0\.3 s$"):
        await runtime.version()


async def test_a_containerd_that_is_away_is_tried_again_and_then_named(containerd, runtime, caplog):
    containerd.answers["Version"] = cri.VersionResponse(runtime_name="containerd")
    assert (await runtime.version()).name == "containerd"
    await containerd.stop()

    begin = time.monotonic()
    with pytest.raises(Unreachable, match=r"^containerd doesn't answer at .*containerd\.sock: "):
        await runtime.version()
    assert time.monotonic() - begin > 0.4
    assert "trying again in" in caplog.text

    waiting = asyncio.create_task(runtime.version())
    await asyncio.sleep(0.2)
    await containerd.start()
    assert (await waiting).name == "containerd"


@pytest.mark.parametrize(
    ("number", "name", "kernels"),
    [
        (1, "SIGABRT", signal.SIGABRT),
        (10, "SIGINT", signal.SIGINT),
        (13, "SIGKILL", signal.SIGKILL),
        (18, "SIGQUIT", signal.SIGQUIT),
        (23, "SIGTERM", signal.SIGTERM),
        (29, "SIGUSR1", signal.SIGUSR1),
        (34, "SIGXFSZ", signal.SIGXFSZ),
        (35, "SIGRTMIN", signal.SIGRTMIN),
        (50, "SIGRTMIN+15", signal.SIGRTMIN + 15),
        (51, "SIGRTMAX-14", signal.SIGRTMAX - 14),
        (64, "SIGRTMAX-1", signal.SIGRTMAX - 1),
        (65, "SIGRTMAX", signal.SIGRTMAX),
    ],
)
def test_signals_have_numbers_of_their_own_in_cri(number: int, name: str, kernels: int) -> None:
    assert stop_signal(number) == name
    assert signal_number(name) == kernels


@pytest.mark.parametrize("number", [0, -1, 66])
def test_signals_that_cri_does_not_know_are_left_to_the_image(number: int) -> None:
    assert stop_signal(number) == ""
