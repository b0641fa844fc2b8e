"""The states of a container, and what is known of it and kept on disk. Its state machine is in `container.py`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    PARKING = "parking"
    CHECKPOINTING = "checkpointing"
    SCALED_DOWN = "scaled_down"
    RESTORING = "restoring"
    DISABLED = "disabled"
    EXITED = "exited"


AWAKE = (State.STARTING, State.RUNNING, State.DISABLED, State.EXITED)
"""The states in which nothing of ours is in the way of whoever wants the container."""


@dataclass
class Record:
    """What is known of a container and kept on disk, so that a restarted daemon carries on from it.

    Times are seconds: `since` since the epoch, the others durations.
    """

    id: str
    sandbox_id: str
    namespace: str
    pod: str
    name: str
    state: State = State.STARTING
    since: float = field(default_factory=time.time)
    reason: str = ""
    """Why it isn't scaled down, when something other than activity is in the way; or why it isn't in a better way."""
    tier: str = ""
    """A policy.Tier: how it is, or was last, scaled down; before that, how it would be. Empty if it can't be."""
    pid: int = 0
    """Of the container's init, on the host."""
    start_time: int = 0
    """Of that process (/proc/PID/stat, field 22), so that a recycled pid isn't taken for it."""
    untouched: str = ""
    """Why it can only be frozen, if that isn't what its pod asks for."""
    bundle: str = ""
    """The bundle's folder that is mounted into it; empty if it runs untouched."""
    slot: int | None = None
    """Which slot of its pod's network hook is this container's."""
    stop_signal: str = "SIGTERM"
    checkpoints: int = 0
    restores: int = 0
    last_checkpoint_seconds: float | None = None
    last_restore_seconds: float | None = None
    checkpoint_bytes: int = 0
    awake_bytes: int = 0
    """Of memory, right before it was scaled down last."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __post_init__(self) -> None:
        self.state = State(self.state)
