"""What a pod asks for. `annotations.py` reads it from the pod."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

# The runtime handler that zeropod's RuntimeClass names.
HANDLER = "zeropod"
DEFAULT_DURATION = 60.0
DEFAULT_REQUEST_TIMEOUT = 600.0


class Tier(StrEnum):
    """What scaling down does with the processes."""

    # A checkpoint where one is possible, else the freezer.
    AUTO = "auto"
    # Saved and ended; without a checkpoint the container stays up.
    CHECKPOINT = "checkpoint"
    # Ended, and started afresh at the wake.
    RESTART = "restart"
    # Kept, and stopped by the cgroup freezer.
    FREEZE = "freeze"


class Lazy(StrEnum):
    """Whether memory is loaded after a restore, while the application runs already."""

    # Where that pays, by size.
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Init(StrEnum):
    """Whether PID 1 of the container becomes our init."""

    # Unless the image's entrypoint is known to insist on being PID 1 itself.
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Connections(StrEnum):
    """What becomes of established connections when a container is checkpointed."""

    PRESERVE = "preserve"
    CLOSE = "close"


class Answers(StrEnum):
    """What becomes of a probe of kubelet's whose true answer can't be known while the container is scaled down."""

    ANSWER = "answer"
    WAKE = "wake"


class Clock(StrEnum):
    """What the monotonic clock of a container does while it is in a checkpoint."""

    STOP = "stop"
    CONTINUE = "continue"


class OnStop(StrEnum):
    """What becomes of a container that is scaled down when it is to stop."""

    RESTORE = "restore"
    KILL = "kill"


@dataclass(frozen=True, order=True)
class Port:
    proto: Literal["tcp", "udp"]
    number: int

    def __str__(self) -> str:
        return f"{self.number}/{self.proto}"


@dataclass(frozen=True)
class Policy:
    """A pod that opted in. `duration` is in seconds; 0 never scales down.

    `container_names` None means every container. `ports` has only containers whose ports were given: the others' are
    found from the sockets they listen on. `ignored` are zeropod's annotations that were accepted and mean nothing here.
    """

    duration: float = DEFAULT_DURATION
    container_names: frozenset[str] | None = None
    ports: Mapping[str, frozenset[Port]] = field(default_factory=dict)
    tier: Tier = Tier.AUTO
    init: Init = Init.AUTO
    lazy_pages: Lazy = Lazy.AUTO
    # Of whichever container listens there.
    quiet_ports: frozenset[Port] = frozenset()
    # Seconds for which a request without its answer holds its container awake; 0: it doesn't.
    request_timeout: float = DEFAULT_REQUEST_TIMEOUT
    connections: Connections = Connections.PRESERVE
    clock: Clock = Clock.STOP
    probes: Answers = Answers.ANSWER
    on_stop: OnStop = OnStop.RESTORE
    ignored: tuple[str, ...] = ()

    def covers(self, container_name: str) -> bool:
        """Whether the container of that name is to be scaled down."""
        return self.container_names is None or container_name in self.container_names
