"""Every program of features/ through two cycles: it works, or it is refused with the reason that its head gives."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix
import pytest
from box import CAPABILITIES, Box, until
from matrix import Feature

from criproxy.criu.checkpoint import Criu
from criproxy.criu.errors import CheckpointError, GivenUp

ASLEEP_SECONDS = {"clocks": 0.5}
"""How long a feature's container sleeps, where that matters."""


@pytest.mark.parametrize("feature", matrix.features(), ids=lambda feature: feature.name)
async def test_feature(feature: Feature, box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = _box(box, feature)
    _hear(container, "ready")
    for cycle in range(2):
        if feature.refused:
            with pytest.raises(CheckpointError) as refusal:
                await criu.dump(container.pid, images)
            # Where it is the finding of ours, it names the process.
            assert refusal.value.reason.replace(f'"{feature.name}"', "it").startswith(feature.refused)
            assert not images.exists()
        else:
            await criu.dump(container.pid, images)
            await asyncio.sleep(ASLEEP_SECONDS.get(feature.name, 0))
            await criu.restore(container.pid, images)
            assert await criu.verify(container.pid, images) == []
        os.write(container.stdin, b"\n")
        _hear(container, "ready" if cycle == 0 else "done")
    assert container.wait() == 0


def _box(box: Callable[..., Box], feature: Feature) -> Box:
    def add_program(config: dict[str, Any]) -> None:
        matrix.build(feature, Path(next(m["source"] for m in config["mounts"] if m["destination"] == "/data")))

        # Which devices it gets is kubelet's business.
        config["linux"]["resources"] = {"devices": [{"allow": True, "access": "rwm"}]}

    capabilities = [*CAPABILITIES, *feature.capabilities]
    return box(f"/data/{feature.name}", capabilities=capabilities, change=add_program)


def _hear(container: Box, word: str) -> None:
    """Waits until the program says so. One that can't use the feature here skips the test, one that fails fails it."""
    heard = ""

    def spoken() -> bool:
        nonlocal heard
        heard += container.said()
        return heard.endswith("\n") or not container.running()

    until(spoken, complaint=lambda: f"it didn't say {word}, but {heard!r} {container.said(container.stderr)!r}")
    heard += container.said()
    if heard.startswith("skip: "):
        pytest.skip(f"this machine doesn't have it: {heard.removeprefix('skip: ').strip()}")
    assert heard == f"{word}\n", f"{heard} {container.said(container.stderr)}"


async def test_a_dump_that_is_given_up_ends_no_wait(box: Callable[..., Box], criu: Criu, images: Path) -> None:
    container = _box(box, next(feature for feature in matrix.features() if feature.name == "waits"))
    wanted = asyncio.Event()
    wanted.set()
    _hear(container, "ready")
    for word in ("ready", "done"):
        for _ in range(2):
            with pytest.raises(GivenUp):
                await criu.dump(container.pid, images, wanted)
        await criu.dump(container.pid, images)
        await criu.restore(container.pid, images)
        os.write(container.stdin, b"\n")
        _hear(container, word)
    assert container.wait() == 0


def test_the_docs_have_the_same_table() -> None:
    assert matrix.documented() == matrix.table(), "run python tests/integration/matrix.py"
