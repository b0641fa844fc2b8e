"""Calls that need the container awake, against a node that has one which sleeps."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from criproxy import policy
from criproxy.annotations import policy_of
from criproxy.api import cri_pb2 as cri
from criproxy.cri import interceptors as interceptors_module
from criproxy.cri import rewrite
from criproxy.cri.calls import Abort, Answer, Call, methods
from criproxy.cri.interceptors import Interceptors
from criproxy.cri.runtime import CriError, ImageConfig
from criproxy.record import Record, State


class Sleeper:
    def __init__(self) -> None:
        self.log: list[str] = []

    @contextlib.asynccontextmanager
    async def awake(self, why: str) -> AsyncIterator[None]:
        self.log.append(f"awake for {why}")
        try:
            yield
        finally:
            self.log.append("let go")

    @contextlib.asynccontextmanager
    async def stopping(self, why: str) -> AsyncIterator[None]:
        self.log.append(f"awake to be stopped by {why}")
        try:
            yield
        finally:
            self.log.append("let go")

    @contextlib.asynccontextmanager
    async def ending(self, why: str) -> AsyncIterator[None]:
        self.log.append(f"killed by {why}")
        yield


class Workload:
    def __init__(self, application: int | None) -> None:
        self.application = application
        self.signals: list[tuple[int, str]] = []

    def out_of_reach(self) -> int | None:
        if self.application is None:
            raise ProcessLookupError
        return self.application

    def signal(self, pid: int, name: str) -> None:
        self.signals.append((pid, name))


async def answer(
    call: str,
    request: Any,
    sleeper: Sleeper,
    workload: Workload | None = None,
    *,
    state: State = State.SCALED_DOWN,
    response: bytes = b"",
    **annotations: str,
) -> tuple[bytes, bytes]:
    """What containerd is asked, and what the caller is answered, in a pod with these annotations."""

    async def ended() -> None:
        sleeper.log.append("ended")

    record = SimpleNamespace(sandbox_id="pod", stop_signal="SIGQUIT", state=state)
    member = SimpleNamespace(container=sleeper, workload=workload, record=record, ended=ended)
    parsed = policy_of({f"criproxy.io/{key.replace('_', '-')}": value for key, value in annotations.items()}, "")
    pod = SimpleNamespace(policy=parsed or policy.Policy(), containers={"c1": member})
    node: Any = SimpleNamespace(member=lambda name: member if name == "c1" else None, sandboxes={"pod": pod})
    nothing: Any = None
    interceptors = Interceptors(nothing, node, nothing, nothing, nothing, nothing)
    asked = b""

    async def send(what: bytes) -> Answer:
        nonlocal asked
        asked = what
        sleeper.log.append("containerd")
        return Answer(response)

    method = methods(call)[0]
    try:
        answered = await interceptors.by_method()[method](Call(method, request.SerializeToString(), send))
        await asyncio.sleep(0)
        return asked, answered
    finally:
        sleeper.log.append("the daemon ends")
        await interceptors.close()


async def test_who_wants_the_application_finds_it_awake() -> None:
    sleeper = Sleeper()
    await answer("ExecSync", cri.ExecSyncRequest(container_id="c1"), sleeper)
    assert sleeper.log == ["awake for ExecSync", "containerd", "let go", "the daemon ends"]


@pytest.mark.parametrize("call", ["Exec", "Attach", "PortForward"])
async def test_who_streams_holds_it_awake_after_the_answer(call: str) -> None:
    sleeper = Sleeper()
    url = cri.AttachResponse(url="http://127.0.0.1:1/token").SerializeToString()
    request: Any = cri.PortForwardRequest(pod_sandbox_id="pod")
    if call != "PortForward":
        request = getattr(cri, f"{call}Request")(container_id="c1")
    _, answered = await answer(call, request, sleeper, response=url)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d{2,5}/token", cri.AttachResponse.FromString(answered).url)
    assert sleeper.log == [f"awake for {call}", "containerd", "the daemon ends", "let go"]


@pytest.mark.parametrize("call", ["Exec", "Attach", "PortForward"])
async def test_streams_of_others_are_containerd_s_own(call: str) -> None:
    sleeper = Sleeper()
    url = cri.AttachResponse(url="http://127.0.0.1:1/token").SerializeToString()
    request: Any = cri.PortForwardRequest(pod_sandbox_id="other")
    if call != "PortForward":
        request = getattr(cri, f"{call}Request")(container_id="other")
    assert (await answer(call, request, sleeper, response=url))[1] == url
    assert sleeper.log == ["containerd", "the daemon ends"]


@pytest.mark.parametrize("application", [7, None])
async def test_the_stop_signal_that_the_init_can_not_deliver_comes_from_us(application: int | None) -> None:
    sleeper, workload = Sleeper(), Workload(application)
    await answer("StopContainer", cri.StopContainerRequest(container_id="c1", timeout=5), sleeper, workload)
    # The application may have ended before: that is no reason not to tell containerd.
    assert sleeper.log[:-1] == ["awake to be stopped by StopContainer", "containerd", "ended", "let go"]
    assert workload.signals == ([] if application is None else [(7, "SIGQUIT")])


@pytest.mark.parametrize("state", [State.RUNNING, State.CHECKPOINTING, State.SCALED_DOWN, State.RESTORING])
async def test_only_one_that_sleeps_is_killed_instead_of_stopped_and_only_if_its_pod_says_so(state: State) -> None:
    request = cri.StopContainerRequest(container_id="c1", timeout=5)
    for on_stop in ("kill", "restore"):
        sleeper = Sleeper()
        asked, _ = await answer("StopContainer", request, sleeper, Workload(None), state=state, on_stop=on_stop)
        killed = on_stop == "kill" and state is State.SCALED_DOWN
        assert sleeper.log[0] == ("killed by StopContainer" if killed else "awake to be stopped by StopContainer")
        assert cri.StopContainerRequest.FromString(asked).timeout == (0 if killed else 5)


async def create(
    monkeypatch: pytest.MonkeyPatch, *, stop_signal: int = 0, missing: bool = False, removable: bool = True
) -> tuple[list[bytes], Record]:
    """A container in a pod that opted in, with an image whose stop signal is SIGQUIT: what containerd was asked for."""
    asked: list[bytes] = []
    added: list[Record] = []

    async def send(request: bytes) -> Answer:
        asked.append(request)
        return Answer(cri.CreateContainerResponse(container_id=f"c{len(asked)}").SerializeToString())

    async def info() -> None: ...

    async def image_status(_: str) -> ImageConfig:
        return ImageConfig("sha256:1", cmd=("app",), stop_signal="SIGQUIT")

    async def remove_container(_: str) -> None:
        if not removable:
            raise CriError("containerd is busy")

    async def look(*_: object) -> bool:
        return missing

    monkeypatch.setattr(Interceptors, "_missing", look)
    monkeypatch.setattr(interceptors_module.Configuration, "from_info", lambda _: None)
    monkeypatch.setattr(rewrite, "container", lambda request, **_: b"with init")
    monkeypatch.setattr(rewrite, "container_handler", lambda request: b"untouched")
    parsed = policy_of({"criproxy.io/scaledown-duration": "1s"}, "")
    pod = SimpleNamespace(
        policy=parsed,
        record=SimpleNamespace(id="pod", namespace="default", name="web", problem="", runtime_handler=""),
    )
    node: Any = SimpleNamespace(sandboxes={"pod": pod}, add_container=lambda _, record: added.append(record))
    runtime: Any = SimpleNamespace(info=info, image_status=image_status, remove_container=remove_container)
    bundle: Any = SimpleNamespace(path="/bundle")
    nothing: Any = None
    interceptors = Interceptors(nothing, node, runtime, bundle, nothing, nothing)
    request = cri.CreateContainerRequest(pod_sandbox_id="pod")
    request.config.metadata.name = "app"
    request.config.stop_signal = stop_signal
    method = methods("CreateContainer")[0]
    await interceptors.by_method()[method](Call(method, request.SerializeToString(), send))
    return asked, added[0]


@pytest.mark.parametrize(("number", "name"), [(0, "SIGQUIT"), (29, "SIGUSR1"), (99, "SIGQUIT")])
async def test_the_pod_s_own_stop_signal_comes_before_the_image_s(
    monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    assert (await create(monkeypatch, stop_signal=number))[1].stop_signal == name


async def test_without_its_command_it_is_made_anew_as_kubelet_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, record = await create(monkeypatch, missing=True)
    assert asked == [b"with init", b"untouched"]
    assert (record.id, record.bundle) == ("c2", "")


async def test_what_containerd_does_not_remove_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, record = await create(monkeypatch, missing=True, removable=False)
    assert asked == [b"with init"]
    assert (record.id, record.bundle) == ("c1", "/bundle")


@pytest.mark.parametrize(
    ("timeout", "code", "text"),
    [
        (-1, grpc.StatusCode.INVALID_ARGUMENT, "timeout: -1 s; 0 (none) or more would be right"),
        (1, grpc.StatusCode.DEADLINE_EXCEEDED, "default/web/app was not checkpointed within 1 s; it goes on as before"),
    ],
)
async def test_the_time_limit_of_a_checkpoint(timeout: int, code: grpc.StatusCode, text: str, tmp_path: Path) -> None:
    given_up = asyncio.Event()

    async def snapshot(_: Path) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    async def told(_: object) -> Any:
        return None

    record = SimpleNamespace(namespace="default", pod="web", name="app", id="c1", bundle="/bundle")
    member = SimpleNamespace(container=SimpleNamespace(snapshot=snapshot), record=record)
    node: Any = SimpleNamespace(member=lambda _: member)
    runtime: Any = SimpleNamespace(container_status=told, mounts=told)
    config: Any = SimpleNamespace(state_dir=tmp_path)
    nothing: Any = None
    interceptors = Interceptors(config, node, runtime, nothing, nothing, nothing)
    request = cri.CheckpointContainerRequest(container_id="c1", location=str(tmp_path / "c1.tar"), timeout=timeout)
    method = methods("CheckpointContainer")[0]
    with pytest.raises(Abort) as caught:
        await interceptors.by_method()[method](Call(method, request.SerializeToString(), nothing))
    assert (caught.value.code, caught.value.message) == (code, text)
    assert given_up.is_set() == (timeout > 0)
    assert not list(tmp_path.glob("archives/*"))
    await interceptors.close()
