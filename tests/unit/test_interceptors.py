"""Calls that need the container awake, against a node that has one which sleeps."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from criproxy.api import cri_pb2 as cri
from criproxy.calls import Answer, Call, methods
from criproxy.interceptors import Interceptors


class Sleeper:
    def __init__(self) -> None:
        self.log: list[str] = []

    @contextlib.asynccontextmanager
    async def awake(self, why: str) -> AsyncIterator[None]:
        self.log.append(f"awake for {why}")
        yield
        self.log.append("let go")


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


async def answer(call: str, request: Any, sleeper: Sleeper, workload: Workload | None = None) -> None:
    async def ended() -> None:
        sleeper.log.append("ended")

    record = SimpleNamespace(stop_signal="SIGQUIT")
    member = SimpleNamespace(container=sleeper, workload=workload, record=record, ended=ended)
    node: Any = SimpleNamespace(member=lambda name: member if name == "c1" else None)
    nothing: Any = None
    interceptors = Interceptors(nothing, node, nothing, nothing, nothing)

    async def send(_: bytes) -> Answer:
        sleeper.log.append("containerd")
        return Answer(b"")

    await interceptors.by_method()[methods(call)[0]](Call(methods(call)[0], request.SerializeToString(), send))


@pytest.mark.parametrize("call", ["ExecSync", "CheckpointContainer"])
async def test_who_wants_the_application_finds_it_awake(call: str) -> None:
    sleeper = Sleeper()
    await answer(call, getattr(cri, f"{call}Request")(container_id="c1"), sleeper)
    assert sleeper.log == [f"awake for {call}", "containerd", "let go"]


@pytest.mark.parametrize("application", [7, None])
async def test_the_stop_signal_that_the_init_can_not_deliver_comes_from_us(application: int | None) -> None:
    sleeper, workload = Sleeper(), Workload(application)
    await answer("StopContainer", cri.StopContainerRequest(container_id="c1", timeout=5), sleeper, workload)
    # The application may have ended before: that is no reason not to tell containerd.
    assert sleeper.log == ["awake for StopContainer", "containerd", "ended", "let go"]
    assert workload.signals == ([] if application is None else [(7, "SIGQUIT")])
