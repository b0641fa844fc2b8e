"""What kubelet's probes of one container have shown: which there are, and how the application answered each last.

Fed with packets that the hook has copied (`watched`) and with the ends of exec probes (`command_done`). While the
container sleeps, `answering.py` and the interceptors give from here what the application would have said.
"""

from __future__ import annotations

import base64
import bisect
import json
import logging
import math
import shlex
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from criproxy.api import cri_pb2 as cri
from criproxy.files import write_whole
from criproxy.hook.pod_maps import Visitor, Watched
from criproxy.kernel.sockets import Flow
from criproxy.kubelet.conversation import Conversation, Kind, Probe, Result, Verdict, shortened
from criproxy.policy import Port

__all__ = ["Probes", "Verdict"]

log = logging.getLogger(__name__)

PROBES: Final = 64
"""Of one container, exec probes included. Kubelet has three at most; an agent of a mesh may ask in other ways."""
CONVERSATIONS: Final = 32
"""Connections that are followed at once."""
BEGINNINGS: Final = 64
BEGINNINGS_PER_SECOND: Final = 16.0
"""Connections that are looked at, at once and in the long run: a container may make some to itself, and our time isn't
its to spend."""
UNDER_WAY_SECONDS: Final = 10.0
"""How long after its last packet a probe without an answer is taken for one that is still under way."""
FAILURE_SECONDS: Final = 600.0
"""How long a failure counts that isn't repeated. Whoever asks the same later is an unknown probe, and wakes."""
AFTERWARDS_SECONDS: Final = 0.1
"""What an application does for the sake of a probe it may end a little later: a connection to a database is closed, or
given back."""
SPANS: Final = 4096
"""Times of probes that are remembered. Kubelet's default is 360 an hour and kind."""
COMMAND_BYTES: Final = 64 << 10
"""The longest command, and the longest answer of one, that is kept. Kubelet reads 10 KiB of what a probe prints."""

_FORMAT: Final = 1


@dataclass(frozen=True)
class Command:
    """An exec probe."""

    argv: tuple[str, ...]

    def __str__(self) -> str:
        return f'the exec probe "{shortened(shlex.join(self.argv))}"'


@dataclass(frozen=True)
class _Known:
    result: Result
    time: float


class Probes:
    """Not thread-safe. Times are monotonic seconds."""

    def __init__(self, path: Path | None, *, tls: bool = True) -> None:
        """`path`: where `save` puts what is known, and `load` finds what an earlier daemon has saved; None: nowhere.
        `tls`: whether HTTPS probes, whose answers can't be seen, are answered.
        """
        self._path = path
        self._tls = tls
        self._known: OrderedDict[Probe | Command, _Known] = OrderedDict()
        self._conversations: OrderedDict[Flow, Conversation] = OrderedDict()
        self._spans: list[tuple[float, float]] = []
        """When probes were under way, in their order and apart from each other."""
        self._beginnings = float(BEGINNINGS)
        self._began_at = 0.0

    # --- what is seen --------------------------------------------------------------------------------------

    def watched(self, packet: Watched) -> Verdict:
        """A packet of a connection that may be a probe's, in their order. OTHER: it isn't (any more)."""
        conversation = self._conversations.get(packet.flow)
        if conversation is None or not conversation.has(packet):
            if not self._may_begin(packet.time):
                return Verdict.OTHER
            conversation = self._conversations[packet.flow] = Conversation(packet.flow.port, packet.visitor)
        self._conversations.move_to_end(packet.flow)
        while len(self._conversations) > CONVERSATIONS:
            self._conversations.popitem(last=False)
        asked = conversation.under_way() is not None
        since = max(conversation.last, packet.time - UNDER_WAY_SECONDS) if asked and conversation.last else packet.time
        try:
            for probe, result in conversation.add(packet):
                self.learn(probe, result, packet.time)
        except Exception:
            # The bytes are a container's: whatever they bring about stays here.
            log.exception("a packet of %s can't be understood", packet.flow)
            return Verdict.OTHER
        if asked or conversation.under_way() is not None:
            self.spent(since, packet.time)
        return conversation.verdict

    def spent(self, began: float, ended: float) -> None:
        """Meanwhile a probe was under way."""
        while self._spans and began <= self._spans[-1][1] + AFTERWARDS_SECONDS:
            last = self._spans.pop()
            began, ended = min(began, last[0]), max(ended, last[1])
        self._spans.append((began, ended))
        del self._spans[:-SPANS]

    def command_done(self, argv: Sequence[str], response: bytes | None) -> None:
        """An exec probe has ended. `response`: its serialised ExecSyncResponse; None: it couldn't run, or timed out."""
        command = Command(tuple(argv))
        if sum(map(len, argv)) > COMMAND_BYTES:
            return
        if response is None:
            result = Result(False, "not run to its end")
        elif (code := cri.ExecSyncResponse.FromString(response).exit_code) != 0:
            result = Result(False, f"ended with exit code {code}")
        else:
            result = Result(True, "ended well", response if len(response) <= COMMAND_BYTES else None)
        self.learn(command, result)

    def learn(self, probe: Probe | Command, result: Result, now: float | None = None) -> None:
        """A probe's last result, `now` or at the time that is given."""
        self._known[probe] = _Known(result, time.monotonic() if now is None else now)
        self._known.move_to_end(probe)
        if isinstance(probe, Probe) and result.ok:
            self._known.pop(Probe(probe.port, probe.visitor, Kind.CONNECT), None)
        while len(self._known) > PROBES:
            self._known.popitem(last=False)

    # --- what is known -------------------------------------------------------------------------------------

    def ports(self) -> Mapping[Port, frozenset[Visitor]]:
        """Where probes were seen that can be answered, and whose."""
        found: dict[Port, set[Visitor]] = {}
        for probe in self._known:
            if isinstance(probe, Probe) and self.known(probe) is not None:
                found.setdefault(probe.port, set()).add(probe.visitor)
        return {port: frozenset(visitors) for port, visitors in found.items()}

    def known(self, probe: Probe) -> Result | None:
        """The last result of a probe that may be answered by it."""
        known = self._known.get(probe)
        if known is None or not known.result.ok or (probe.kind is Kind.TLS and not self._tls):
            return None
        return known.result

    def command(self, argv: Sequence[str]) -> bytes | None:
        """The ExecSyncResponse of an exec probe's last run, if that succeeded."""
        known = self._known.get(Command(tuple(argv)))
        return known.result.again if known is not None and known.result.ok else None

    def failing(self) -> str | None:
        """A probe whose last result is a failure, in words. A container isn't scaled down on that."""
        earliest = time.monotonic() - FAILURE_SECONDS
        for probe in [p for p, known in self._known.items() if not known.result.ok and known.time < earliest]:
            del self._known[probe]
        return next(
            (f"{p} was last {known.result.said}" for p, known in self._known.items() if not known.result.ok), None
        )

    def under_way(self) -> str | None:
        """A probe that waits for its answer, in words."""
        return next((f"{probe} is under way" for probe, _ in self._under_way()), None)

    def during(self, moment: float) -> bool:
        """Whether a probe was, or is, under way at that time, so that what the application did then may be for its
        sake."""
        place = bisect.bisect_right(self._spans, (moment, math.inf)) - 1
        if place >= 0 and moment <= self._spans[place][1] + AFTERWARDS_SECONDS:
            return True
        return any(conversation.last <= moment for _, conversation in self._under_way())

    # --- for the next daemon -------------------------------------------------------------------------------

    def save(self) -> None:
        """What can't be written costs a wake at most, after the daemon's next start."""
        if self._path is None:
            return
        entries = [_to_json(probe, known.result) for probe, known in self._known.items() if known.result.ok]
        try:
            write_whole(self._path, json.dumps({"format": _FORMAT, "probes": entries}))
        except OSError as error:
            log.warning("%s can't be written: %s", self._path, error.strerror)

    def load(self) -> None:
        """For a container that has slept ever since: one that has run meanwhile may answer otherwise."""
        if self._path is None:
            return
        try:
            saved = json.loads(self._path.read_text())
            if saved["format"] != _FORMAT:
                raise ValueError(f"its format is {saved['format']}, not {_FORMAT}")
            for entry in saved["probes"]:
                probe, result = _from_json(entry)
                self.learn(probe, result)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._known.clear()
            log.warning("%s can't be read, kubelet's next probes wake its container: %s", self._path, error)

    # --- inside --------------------------------------------------------------------------------------------

    def _under_way(self) -> Iterator[tuple[Probe, Conversation]]:
        earliest = time.monotonic() - UNDER_WAY_SECONDS
        for conversation in self._conversations.values():
            if conversation.last >= earliest and (probe := conversation.under_way()) is not None:
                yield probe, conversation

    def _may_begin(self, now: float) -> bool:
        self._beginnings = min(BEGINNINGS, self._beginnings + max(0.0, now - self._began_at) * BEGINNINGS_PER_SECOND)
        self._began_at = max(self._began_at, now)
        if self._beginnings < 1:
            return False
        self._beginnings -= 1
        return True


def _to_json(probe: Probe | Command, result: Result) -> dict[str, Any]:
    again = None if result.again is None else base64.b64encode(result.again).decode()
    if isinstance(probe, Command):
        return {"command": probe.argv, "again": again}
    return {
        "port": probe.port.number,
        "visitor": probe.visitor.name,
        "kind": probe.kind.value,
        "asks": probe.asks,
        "headers": probe.headers,
        "again": again,
    }


def _from_json(entry: dict[str, Any]) -> tuple[Probe | Command, Result]:
    again = None if entry["again"] is None else base64.b64decode(entry["again"], validate=True)
    result = Result(True, "", again)
    if "command" in entry:
        return Command(tuple(map(str, entry["command"]))), result
    probe = Probe(
        Port("tcp", int(entry["port"])),
        Visitor[entry["visitor"]],
        Kind(entry["kind"]),
        str(entry["asks"]),
        tuple((str(name), str(value)) for name, value in entry["headers"]),
    )
    return probe, result
