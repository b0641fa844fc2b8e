"""Whether a container is idle: when it was used last, and what other than traffic is in the way of a scale-down.

It measures and answers; what follows from it is the state machine's matter (`container.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Protocol


class Workload(Protocol):
    """The container's processes."""

    def visitors(self) -> str | None:
        """Processes in the container that aren't the application's (`kubectl exec`), in words, or None."""

    def working(self) -> str | None:
        """A thread of it that runs, or waits for a disk, at this moment, in words, or None."""

    def cpu_usage(self) -> float:
        """Processor seconds since its start."""


class Gate(Protocol):
    """The container's share of its pod's network."""

    def last_activity(self) -> float:
        """Monotonic seconds (CLOCK_MONOTONIC) of the last packet that counts, 0.0 if there was none."""

    def silent(self) -> str | None:
        """Why no packet could wake the container: it doesn't listen (yet), or None."""

    def unsettled(self) -> str | None:
        """A handshake, an unaccepted connection or unacknowledged data, in words, or None."""


class Probes(Protocol):
    """What kubelet's probes of the container have shown."""

    def failing(self) -> str | None:
        """A probe whose last result is a failure, in words, or None."""


class Idleness:
    def __init__(self, workload: Workload, gate: Gate, probes: Probes, cpu_activity: float) -> None:
        """`cpu_activity`: the share of a core from which on its use of the processor counts as activity."""
        self.unhooked: str | None = None
        """Why packets may pass the pod's network hook, in words, or None."""
        self._holders: list[str] = []
        self.probe_ended = asyncio.Event()
        self._workload = workload
        self._gate = gate
        self._probes = probes
        self._cpu_activity = cpu_activity
        self._used = time.monotonic()
        self._measured = (self._used, 0.0)
        """When the processor's use was measured last, and how many seconds that were."""
        self._probing = 0
        self._probe_began_at = 0.0
        self._spent_on_probes = 0.0
        """Processor seconds, as the one above."""

    @contextlib.contextmanager
    def held(self, why: str) -> Iterator[None]:
        """Somebody needs the container for as long as the context takes."""
        self._holders.append(why)
        try:
            yield
        finally:
            self._holders.remove(why)

    def holder(self) -> str | None:
        """One who needs it at the moment, in words, or None."""
        return f"{self._holders[0]} is under way" if self._holders else None

    def used(self) -> None:
        """Somebody has used the container until now."""
        self._used = time.monotonic()

    def last_activity(self) -> float:
        """Monotonic seconds."""
        return max(self._used, self._gate.last_activity())

    def probing(self, on: bool) -> None:
        """A probe is at work in the container, or no longer: what it costs the processor isn't activity."""
        usage = self._workload.cpu_usage()
        if on:
            if not self._probing:
                self._probe_began_at = usage
            self._probing += 1
            return
        self._probing -= 1
        if not self._probing:
            self._spent_on_probes += usage - self._probe_began_at
            self.probe_ended.set()

    def measure(self) -> None:
        """The use of the processor counts from now on."""
        self._measured = (time.monotonic(), self._own_work())

    def obstacle(self) -> str | None:
        """What other than traffic is in the way of a scale-down, or None."""
        if (known := self.holder() or self.unhooked) is not None:
            return known
        now = time.monotonic()
        since, before = self._measured
        share = (self._own_work() - before) / (now - since) if now > since else 0.0
        if share > self._cpu_activity:
            self._used = now
            return f"uses {share:.0%} of a core (more than {self._cpu_activity:.0%} counts as activity)"
        # What is unsettled may stay so (an accept queue that nobody empties, a client that is gone): it is looked at
        # before the gate is shut for new connections, not by shutting it again and again.
        return self._workload.visitors() or self._gate.silent() or self._probes.failing() or self._gate.unsettled()

    def obstacle_now(self) -> str | None:
        """What is in the way at this very moment, for the last look: what a client waits for may show nowhere else, not
        even in the network (a server that speaks first, a file that is being written)."""
        return self.unhooked or self._workload.working()

    def _own_work(self) -> float:
        """Processor seconds that the container has used, without those of kubelet's probes."""
        usage = self._probe_began_at if self._probing else self._workload.cpu_usage()
        return usage - self._spent_on_probes
