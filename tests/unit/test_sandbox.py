"""A pod's hook and its containers, without a network."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from criproxy import sandbox as sandbox_module
from criproxy.annotations import policy_of
from criproxy.config import Config
from criproxy.criu.checkpoint import Criu
from criproxy.record import Record, State
from criproxy.sandbox import Member, Sandbox, SandboxRecord


class Hook:
    def __init__(self) -> None:
        self.repairs = 0
        self.trouble: str | None = None
        self.removed = False
        self.closed = False

    def on_parked(self, callback: object) -> None: ...

    def on_watched(self, callback: object) -> None: ...

    def listen(self) -> None:
        raise OSError("no network to listen in")

    def problem(self) -> str | None:
        if self.removed:
            self.removed = False
            self.repairs += 1
        return self.trouble

    def close(self) -> None:
        self.closed = True


@pytest.fixture
async def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    record = SandboxRecord("pod", "default", "web", {"criproxy.io/scaledown-duration": "1s"}, "", "/netns")
    parsed = policy_of(record.annotations, "")
    assert parsed is not None
    made = Sandbox(record, parsed, Config(state_dir=tmp_path), cast(Criu, None), tmp_path / "pins")
    hook = Hook()
    monkeypatch.setattr(made, "_hook", lambda netns: hook)
    yield made, hook
    await made.close()


async def test_the_hook_is_looked_at_again_and_again(pod: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox_module, "CHECK_SECONDS", 0.01)
    sandbox, hook = pod
    told: list[tuple[str | None, bool]] = []
    member = sandbox.add(Record("c1", "pod", "default", "web", "app"), tmp_path)
    member.container = SimpleNamespace(
        hooked=lambda problem, missed: told.append((problem, missed)), close=lambda: asyncio.sleep(0)
    )
    await sandbox.attach()
    for trouble, removed, expected in [
        (None, False, (None, False)),
        (None, True, (None, True)),
        ("no link", False, ("no link", True)),
    ]:
        hook.trouble, hook.removed = trouble, removed
        async with asyncio.timeout(60):
            while expected not in told:
                await asyncio.sleep(0.005)
    await sandbox.close()
    count = len(told)
    await asyncio.sleep(0.05)
    assert hook.closed
    assert len(told) == count


@pytest.mark.parametrize("state", [State.STARTING, State.SCALED_DOWN])
async def test_what_sleeps_in_a_pod_without_a_hook_is_brought_back(
    pod: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: State
) -> None:
    sandbox, _ = pod
    sandbox.record.problem = "there is no hook"
    lived: list[tuple[str, object]] = []
    monkeypatch.setattr(Member, "live", lambda self, made, _, gate: lived.append((made._give_up, gate)))
    member = sandbox.add(Record("c1", "pod", "default", "web", "app", pid=os.getpid(), state=state), tmp_path)
    sandbox.start(member)
    if state is State.STARTING:
        assert (member.record.state, member.record.reason) == (State.DISABLED, "there is no hook")
    else:
        assert lived == [("there is no hook", None)]
