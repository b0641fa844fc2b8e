"""The state machine against fakes: what it does when, and what it never does."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from criproxy import container as container_module
from criproxy import scaledown
from criproxy.container import Container
from criproxy.criu.errors import CheckpointError, GivenUp, OutOfMemory, RestoreError
from criproxy.criu.saved import AttributesChanged
from criproxy.freezer import FreezeError
from criproxy.hook.pod_maps import Stream
from criproxy.kernel.sockets import Flow
from criproxy.policy import Tier
from criproxy.record import Record, State
from criproxy.scaledown import Checkpoint, Freeze, Refused, Restart

DURATION = 0.05


class FakeWorkload:
    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.cpu = 0.0
        self.visitor: str | None = None
        self.work: str | None = None
        self.dump_errors: list[Exception] = []
        self.restore_errors: list[Exception] = []
        self.verify_error: Exception | None = None
        self.during_dump: Callable[[], None] = lambda: None
        self.gives_up = True
        self.has_images = True
        self.load = asyncio.Event()
        self.load.set()
        self.pages_are_in = True
        self.gone = False
        self.runs = True
        self.end_errors: list[Exception] = []
        self.entangled_with: str | None = None
        self.snapshot_error: Exception | None = None
        self.snapshot_takes_long = False
        self.freeze_errors: list[Exception] = []
        self.during_freeze: Callable[[], None] = lambda: None

    async def find(self) -> None:
        self.log.append("find")

    def ended(self) -> bool:
        return self.gone

    def visitors(self) -> str | None:
        return self.visitor

    def working(self) -> str | None:
        return self.work

    def cpu_usage(self) -> float:
        return self.cpu

    def memory(self) -> int:
        return 1

    async def dump(self, unless: asyncio.Event) -> int:
        await asyncio.sleep(0)
        self.log.append("dump")
        self.during_dump()
        if self.gives_up and unless.is_set():
            raise GivenUp("wanted")
        if self.dump_errors:
            raise self.dump_errors.pop(0)
        self.runs = False
        self.has_images = True
        return 42

    async def snapshot(self, folder: Path, unless: asyncio.Event) -> None:
        self.log.append(f"snapshot {folder}")
        if self.snapshot_takes_long:
            await unless.wait()
            self.log.append("given up")
            raise GivenUp("not wanted any more")
        if self.snapshot_error:
            raise self.snapshot_error

    def hand_out(self, folder: Path) -> None:
        self.log.append(f"hand out {folder}")

    def streams(self) -> dict[Flow, Stream]:
        return {}

    def kept(self) -> bool:
        return self.has_images

    def spoil(self) -> None:
        self.log.append("spoil")
        self.has_images = False

    def running(self) -> bool:
        return self.runs

    async def kill(self) -> None:
        self.log.append("kill container")
        self.gone = True

    def loading(self) -> bool:
        return not self.load.is_set()

    async def loaded(self) -> bool:
        await self.load.wait()
        return self.pages_are_in

    async def restore(self, *, lazily: bool) -> None:
        await asyncio.sleep(0)
        self.log.append("restore" if lazily else "restore all")
        if self.restore_errors:
            raise self.restore_errors.pop(0)
        self.runs = True

    async def verify(self) -> None:
        self.log.append("verify")
        if self.verify_error:
            raise self.verify_error

    async def end(self, *, at_once: bool = False) -> None:
        self.log.append("kill" if at_once else "end")
        if self.end_errors:
            raise self.end_errors.pop(0)
        self.runs = False

    async def start_afresh(self) -> None:
        self.log.append("start_afresh")
        self.runs = True

    async def rescue(self) -> None:
        self.log.append("rescue")

    def discard(self) -> None:
        self.log.append("discard")

    def entangled(self) -> str | None:
        return self.entangled_with

    async def freeze(self) -> None:
        await asyncio.sleep(0)
        self.log.append("freeze")
        self.during_freeze()
        if self.freeze_errors:
            raise self.freeze_errors.pop(0)

    def thaw(self) -> None:
        self.log.append("thaw")


class FakeGate:
    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.activity = 0.0
        self.handshake: str | None = None
        self.quiet_reason: str | None = None
        self.open_connection: str | None = None
        self.packets = 0
        self.on_park_new: Callable[[], None] = lambda: None
        self.on_park_all: Callable[[], None] = lambda: None

    def last_activity(self) -> float:
        return self.activity

    def park_new(self) -> None:
        self.log.append("park_new")
        self.on_park_new()

    def park_all(self) -> None:
        self.log.append("park_all")
        self.on_park_all()

    def stand_in(self, streams: Mapping[Flow, Stream]) -> None:
        self.log.append("stand_in")

    def sockets_stay(self) -> None:
        self.log.append("sockets_stay")

    def unsettled(self) -> str | None:
        return self.handshake

    def hanging(self) -> str | None:
        return self.open_connection

    def silent(self) -> str | None:
        return self.quiet_reason

    def wanted(self) -> bool:
        return self.packets > 0

    def open(self) -> None:
        self.log.append("open")
        self.packets = 0


class FakeProbes:
    def __init__(self) -> None:
        self.failure: str | None = None
        self.saved = 0

    def failing(self) -> str | None:
        return self.failure

    def save(self) -> None:
        self.saved += 1


class Fixture:
    def __init__(
        self,
        duration: float = DURATION,
        tiers: Sequence[Tier] = (Tier.CHECKPOINT,),
        state: State = State.STARTING,
        tier: str = "",
        untouched: str = "",
        give_up: str = "",
    ) -> None:
        self.log: list[str] = []
        self.states: list[State] = []
        self.workload = FakeWorkload(self.log)
        self.gate = FakeGate(self.log)
        self.probes = FakeProbes()
        self.record = Record("id", "sandbox", "default", "pod", "app", state=state, tier=tier, untouched=untouched)
        methods = {
            Tier.CHECKPOINT: Checkpoint(self.workload, self.gate),
            Tier.RESTART: Restart(self.workload, self.gate),
            Tier.FREEZE: Freeze(self.workload, self.gate),
        }
        self.container = Container(
            self.record,
            self.workload,
            self.gate,
            self.probes,
            duration=duration,
            methods=[methods[tier] for tier in tiers],
            give_up=give_up,
            save=lambda record: self.states.append(record.state),
        )

    def packet(self) -> None:
        self.gate.packets += 1
        self.container.packet()

    async def until(self, *states: State) -> None:
        await eventually(lambda: self.record.state in states)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture
async def make() -> object:
    made: list[Fixture] = []

    def build(**arguments: object) -> Fixture:
        made.append(Fixture(**arguments))  # type: ignore[arg-type]
        made[-1].container.start()
        return made[-1]

    yield build
    for fixture in made:
        await fixture.container.close()


Make = Callable[..., Fixture]


async def test_idle_container_goes_through_the_documented_states(make: Make) -> None:
    f = make()
    await f.until(State.SCALED_DOWN)
    assert f.states == [State.RUNNING, State.PARKING, State.CHECKPOINTING, State.SCALED_DOWN]
    assert f.log == ["find", "park_new", "park_all", "dump", "stand_in"]
    assert f.record.checkpoint_bytes == 42
    assert f.record.awake_bytes == 1
    assert f.record.checkpoints == 1


async def test_a_packet_brings_it_back_and_the_checkpoint_is_deleted_after(make: Make) -> None:
    f = make()
    await f.until(State.SCALED_DOWN)
    f.packet()
    await f.until(State.RUNNING)
    await eventually(lambda: "discard" in f.log)
    assert f.log[5:] == ["restore", "open", "verify", "discard"]
    assert f.record.restores == 1
    assert f.record.checkpoint_bytes == 0


async def test_activity_postpones(make: Make) -> None:
    f = make(duration=0.1)
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        f.gate.activity = time.monotonic()
        await asyncio.sleep(0.01)
        assert f.record.state in (State.STARTING, State.RUNNING)
    assert "dump" not in f.log
    await f.until(State.SCALED_DOWN)


async def test_duration_zero_never_scales_down(make: Make) -> None:
    f = make(duration=0)
    await asyncio.sleep(0.1)
    assert f.record.state is State.RUNNING
    assert "never" in f.container.reason()


async def test_a_holder_keeps_it_up_and_is_named(make: Make) -> None:
    f = make()
    async with f.container.awake("exec"):
        await asyncio.sleep(0.2)
        assert f.record.state is State.RUNNING
        assert "exec" in f.container.reason()
    await f.until(State.SCALED_DOWN)


async def test_awake_waits_for_the_restore(make: Make) -> None:
    f = make()
    await f.until(State.SCALED_DOWN)
    async with f.container.awake("exec"):
        assert f.record.state is State.RUNNING
        assert "restore" in f.log


async def test_a_call_during_the_dump_is_served_after_it(make: Make) -> None:
    f = make()
    entered = asyncio.Event()

    async def call() -> None:
        async with f.container.awake("exec"):
            assert f.record.state is State.RUNNING
            entered.set()

    tasks: list[asyncio.Task[None]] = []
    f.workload.during_dump = lambda: tasks.append(asyncio.create_task(call()))
    await asyncio.wait_for(entered.wait(), 60)
    f.workload.during_dump = lambda: None
    await asyncio.gather(*tasks)


async def test_packets_during_the_dump_end_it_if_they_come_in_time(make: Make) -> None:
    f = make(tiers=(Tier.CHECKPOINT, Tier.FREEZE))

    def once() -> None:
        f.workload.during_dump = lambda: None
        f.packet()

    f.workload.during_dump = once
    await eventually(lambda: f.states[-2:] == [State.CHECKPOINTING, State.RUNNING])
    # No failure: neither is another way tried, nor does it have to wait for another try.
    assert (f.log[-2:], f.record.restores, f.record.checkpoints) == (["dump", "open"], 0, 0)
    await f.until(State.SCALED_DOWN)
    assert f.log.count("dump") == 2
    assert "freeze" not in f.log


async def test_packets_during_the_dump_wake_at_once_if_they_come_late(make: Make) -> None:
    f = make()
    f.workload.gives_up = False

    def once() -> None:
        f.workload.during_dump = lambda: None
        f.packet()

    f.workload.during_dump = once
    await eventually(lambda: f.record.restores == 1)


async def test_a_handshake_keeps_the_gate_open(make: Make) -> None:
    f = make()
    f.gate.handshake = "a connection to port 80 waits to be accepted"
    await eventually(lambda: f.container.reason() == f.gate.handshake)
    await asyncio.sleep(2 * DURATION)
    # To park is to hold up everybody else who connects.
    assert "park_new" not in f.log
    f.gate.handshake = None
    await f.until(State.SCALED_DOWN)


async def test_a_handshake_meanwhile_aborts_the_parking(make: Make) -> None:
    f = make()

    def begin() -> None:
        f.gate.handshake = "a handshake on port 80 is under way"

    f.gate.on_park_new = begin
    await eventually(lambda: "open" in f.log)
    assert "park_all" not in f.log
    assert "dump" not in f.log
    f.gate.on_park_new = lambda: None
    f.gate.handshake = None
    await f.until(State.SCALED_DOWN)


async def test_activity_between_the_two_steps_aborts(make: Make) -> None:
    f = make()

    def once() -> None:
        f.gate.on_park_all = lambda: None
        f.gate.activity = time.monotonic()

    f.gate.on_park_all = once
    await eventually(lambda: "open" in f.log)
    assert "dump" not in f.log
    await f.until(State.SCALED_DOWN)


async def test_cpu_use_counts_as_activity_and_is_told(make: Make) -> None:
    f = make()

    used = f.workload.cpu_usage
    f.workload.cpu_usage = lambda: time.monotonic() / 2  # type: ignore[method-assign]
    await asyncio.sleep(0.3)
    assert "dump" not in f.log
    await eventually(lambda: "of a core" in f.container.reason())
    f.workload.cpu_usage = used  # type: ignore[method-assign]
    await f.until(State.SCALED_DOWN)


async def test_what_a_probe_costs_is_no_activity(make: Make) -> None:
    f = make()
    await f.until(State.RUNNING)
    await asyncio.sleep(DURATION / 5)  # its processor time has been looked at once
    began = f.container.last_activity()
    for _ in range(3):
        with f.container.probed("exec probe"):
            f.workload.cpu += 1.0
            await asyncio.sleep(DURATION)
    await f.until(State.SCALED_DOWN)
    assert f.container.last_activity() == began


async def test_it_stays_up_for_a_probe_s_command_and_no_longer(make: Make) -> None:
    f = make(duration=0.02)
    with f.container.probed("exec probe"):
        await asyncio.sleep(0.2)
        assert f.record.state is State.RUNNING
    await f.until(State.SCALED_DOWN)


async def test_a_probe_that_fails_keeps_it_up_and_is_told(make: Make) -> None:
    f = make()
    f.probes.failure = "kubelet's HTTP probe was last answered 503"
    await eventually(lambda: f.container.reason() == f.probes.failure)
    assert "park_new" not in f.log
    f.probes.failure = None
    await f.until(State.SCALED_DOWN)
    assert f.probes.saved == 1


@pytest.mark.parametrize("where", ["visitor", "silent"])
async def test_what_is_in_the_way_is_told(make: Make, where: str) -> None:
    f = make()
    if where == "visitor":
        f.workload.visitor = '"sh" was started'
    else:
        f.gate.quiet_reason = "listens on no port"
    await eventually(lambda: f.container.reason() in ('"sh" was started', "listens on no port"))
    assert "park_new" not in f.log
    f.workload.visitor = f.gate.quiet_reason = None
    await f.until(State.SCALED_DOWN)


async def test_a_failed_dump_leaves_it_running_and_backs_off(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_module, "BACKOFF_SECONDS", (0.1, 10.0))
    f = make()
    f.workload.dump_errors = [CheckpointError("uses io_uring"), CheckpointError("uses io_uring")]
    dumps: list[float] = []
    f.workload.during_dump = lambda: dumps.append(time.monotonic())
    await eventually(lambda: len(dumps) == 1)
    await f.until(State.RUNNING)
    assert f.log[-1] == "open"
    assert "uses io_uring" in f.container.reason()
    await f.until(State.SCALED_DOWN)
    first, second, third = dumps
    assert second - first >= 0.1
    assert third - second >= 0.2
    assert "end" not in f.log


async def test_a_failed_restore_is_tried_again(make: Make) -> None:
    f = make()
    f.workload.restore_errors = [RestoreError("pid is taken")]
    await f.until(State.SCALED_DOWN)
    f.packet()
    await f.until(State.RUNNING)
    assert [entry for entry in f.log if "restore" in entry] == ["restore", "restore all"]
    assert "start_afresh" not in f.log


async def test_it_isnt_scaled_down_again_before_all_its_memory_is_there(make: Make) -> None:
    f = make()
    f.workload.load.clear()
    await f.until(State.SCALED_DOWN)
    f.packet()
    await f.until(State.RUNNING)
    await asyncio.sleep(3 * DURATION)
    assert f.record.state is State.RUNNING
    assert f.container.reason() == "its memory is still being loaded"
    assert "discard" not in f.log
    f.workload.load.set()
    await f.until(State.SCALED_DOWN)
    assert f.log.index("discard") > f.log.index("verify")


async def test_if_the_rest_of_its_memory_is_lost_it_is_killed_and_started_afresh(make: Make) -> None:
    f = make()
    f.workload.load.clear()
    f.workload.pages_are_in = False
    await f.until(State.SCALED_DOWN)
    f.packet()
    await f.until(State.RUNNING)
    f.workload.load.set()
    await eventually(lambda: "its state was lost" in f.container.reason())
    assert f.log[f.log.index("verify") :] == ["verify", "park_all", "spoil", "kill", "start_afresh", "open", "discard"]


async def test_an_adopted_container_waits_for_what_an_earlier_daemon_has_begun(make: Make) -> None:
    f = make(state=State.RUNNING, tier="checkpoint")
    f.workload.load.clear()
    await eventually(lambda: "verify" in f.log)
    await asyncio.sleep(3 * DURATION)
    assert f.container.reason() == "its memory is still being loaded"
    f.workload.load.set()
    await f.until(State.SCALED_DOWN)
    assert f.log[:3] == ["open", "verify", "discard"]


async def test_a_restore_that_keeps_failing_starts_afresh_and_says_so(make: Make) -> None:
    f = make()
    f.workload.restore_errors = [RestoreError("bad size")] * scaledown.RESTORE_ATTEMPTS
    await f.until(State.SCALED_DOWN)
    f.packet()
    await f.until(State.RUNNING)
    assert "bad size" in f.container.reason()
    assert f.log.index("start_afresh") < f.log.index("open")


async def test_changed_confinement_is_not_kept(make: Make) -> None:
    f = make()
    f.workload.verify_error = AttributesChanged("LSM label was x, is unconfined")
    await f.until(State.SCALED_DOWN)
    f.packet()
    await eventually(lambda: "start_afresh" in f.log)
    assert "end" in f.log


async def test_restart_tier_ends_and_starts_without_a_checkpoint(make: Make) -> None:
    f = make(tiers=[Tier.RESTART])
    await f.until(State.SCALED_DOWN)
    f.packet()
    await f.until(State.RUNNING)
    assert "end" in f.log
    assert "start_afresh" in f.log
    assert "dump" not in f.log
    assert "restore" not in f.log


@pytest.mark.parametrize("state", [State.RUNNING, State.SCALED_DOWN])
async def test_exit_ends_everything_and_deletes_the_checkpoint(make: Make, state: State) -> None:
    f = make(duration=0 if state is State.RUNNING else DURATION)
    await f.until(state)
    await f.container.exited()
    assert f.record.state is State.EXITED
    assert f.log[-1] == "discard"


async def test_exit_releases_whoever_waits(make: Make) -> None:
    f = make()
    await f.until(State.SCALED_DOWN)
    release = asyncio.Event()

    async def never(*, lazily: bool) -> None:
        await release.wait()

    f.workload.restore = never  # type: ignore[method-assign]

    async def call() -> None:
        async with f.container.awake("exec"):
            pass

    task = asyncio.create_task(call())
    await f.until(State.RESTORING)
    await f.container.exited()
    await asyncio.wait_for(task, 60)


async def test_an_internal_error_leaves_it_running_with_an_open_gate(make: Make) -> None:
    f = make()

    def broken() -> str | None:
        raise ValueError("bug")

    f.gate.silent = broken  # type: ignore[method-assign]
    await f.until(State.DISABLED)
    assert f.log[-1] == "open"
    assert "internal error" in f.container.reason()
    async with f.container.awake("exec"):
        pass


@pytest.mark.parametrize("state", [State.CHECKPOINTING, State.RESTORING])
async def test_a_container_that_is_killed_meanwhile_is_no_error(make: Make, state: State) -> None:
    f = make()

    async def killed(*_: object, **__: object) -> int:
        f.workload.gone = True
        raise ProcessLookupError("There is no process 7")

    if state is State.CHECKPOINTING:
        f.workload.dump = killed  # type: ignore[method-assign]
    else:
        f.workload.restore = killed  # type: ignore[method-assign,assignment]
        await f.until(State.SCALED_DOWN)
        f.packet()
    await eventually(lambda: f.workload.gone)
    await f.container.exited()
    assert State.DISABLED not in f.states
    assert "rescue" not in f.log
    assert f.record.state is State.EXITED


@pytest.mark.parametrize("state", [State.CHECKPOINTING, State.RESTORING])
async def test_what_criu_says_of_a_container_that_was_killed_is_not_told(
    make: Make, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    f = make()

    async def killed(*_: object, **__: object) -> int:
        f.log.append("CRIU fails")
        f.workload.gone = True
        raise CheckpointError("killed") if state is State.CHECKPOINTING else RestoreError("killed")

    if state is State.CHECKPOINTING:
        f.workload.dump = killed  # type: ignore[method-assign]
    else:
        f.workload.restore = killed  # type: ignore[method-assign,assignment]
        await f.until(State.SCALED_DOWN)
        f.packet()
    await eventually(lambda: f.workload.gone)
    await f.container.exited()
    assert f.log.count("CRIU fails") == 1
    assert "start_afresh" not in f.log
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("state", [State.CHECKPOINTING, State.RESTORING])
async def test_an_internal_error_while_it_sleeps_rescues_it(make: Make, state: State) -> None:
    f = make()

    async def broken() -> int:
        raise ValueError("bug")

    if state is State.CHECKPOINTING:
        f.workload.dump = broken  # type: ignore[method-assign]
    else:
        f.workload.restore = broken  # type: ignore[method-assign, assignment]
        await f.until(State.SCALED_DOWN)
        f.packet()
    await f.until(State.DISABLED)
    assert f.log[-2:] == ["rescue", "open"]


async def test_an_adopted_sleeping_container_wakes_on_a_packet(make: Make) -> None:
    f = make(state=State.SCALED_DOWN)
    await asyncio.sleep(0.05)
    assert f.log == []
    f.packet()
    await f.until(State.RUNNING)
    assert "restore" in f.log


async def test_an_adopted_running_container_opens_the_gate_first(make: Make) -> None:
    f = make(state=State.RUNNING)
    await eventually(lambda: bool(f.log))
    assert f.log[0] == "open"


async def test_a_frozen_container_is_thawed_by_a_packet(make: Make) -> None:
    f = make(tiers=[Tier.FREEZE])
    await f.until(State.SCALED_DOWN)
    assert f.record.tier == "freeze"
    assert f.container.reason() == ""
    # Parked first, so that nothing is seen half; what carries no news passes only when nobody can act on it.
    assert f.log == ["find", "park_new", "park_all", "freeze", "sockets_stay"]
    f.packet()
    await f.until(State.RUNNING)
    assert f.log[-2:] == ["thaw", "open"]
    assert (f.record.checkpoints, f.record.restores) == (1, 1)


async def test_where_the_checkpoint_is_refused_it_is_frozen_and_the_reason_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_module, "BACKOFF_SECONDS", (0.3, 10.0))
    f = make(tiers=[Tier.CHECKPOINT, Tier.FREEZE])
    f.workload.dump_errors = [CheckpointError("uses io_uring")]
    await f.until(State.SCALED_DOWN)
    assert f.record.tier == "freeze"
    assert "uses io_uring" in f.container.reason()
    # In one go: nothing is let through between the two.
    assert f.log[-3:] == ["dump", "freeze", "sockets_stay"]
    f.packet()
    await f.until(State.RUNNING)
    assert "uses io_uring" not in f.container.reason()
    await f.until(State.SCALED_DOWN)
    assert f.log.count("dump") == 1, "the checkpoint isn't tried again so soon"
    assert "uses io_uring" in f.container.reason()
    await asyncio.sleep(0.3)
    f.packet()
    await f.until(State.RUNNING)
    await f.until(State.SCALED_DOWN)
    assert f.record.tier == "checkpoint"
    assert f.container.reason() == ""


async def test_what_can_only_be_frozen_says_why(make: Make) -> None:
    f = make(tiers=[Tier.FREEZE], untouched="/init must be PID 1 itself")
    await f.until(State.SCALED_DOWN)
    assert f.container.reason() == "/init must be PID 1 itself"


@pytest.mark.parametrize("entangled", [False, True])
async def test_what_can_be_neither_checkpointed_nor_frozen_stays_up(
    make: Make, monkeypatch: pytest.MonkeyPatch, entangled: bool
) -> None:
    monkeypatch.setattr(container_module, "BACKOFF_SECONDS", (0.1, 10.0))
    f = make(tiers=[Tier.CHECKPOINT, Tier.FREEZE])
    f.workload.dump_errors = [CheckpointError("uses io_uring")]
    if entangled:
        f.workload.entangled_with = "it serves a file system"
    else:
        f.workload.freeze_errors = [FreezeError("it serves a file system")]
    await eventually(lambda: "open" in f.log)
    await f.until(State.RUNNING)
    assert "uses io_uring" in f.container.reason()
    assert "it serves a file system" in f.container.reason()
    assert ("freeze" in f.log) != entangled
    assert "sockets_stay" not in f.log
    f.workload.entangled_with = None
    await f.until(State.SCALED_DOWN)


async def test_a_frozen_container_is_thawed_to_be_killed(make: Make) -> None:
    f = make(tiers=[Tier.FREEZE])
    await f.until(State.SCALED_DOWN)
    async with f.container.ending("StopContainer"):
        assert f.record.state is State.RUNNING
        assert "thaw" in f.log
        await asyncio.sleep(3 * DURATION)
        assert f.record.state is State.RUNNING
    await f.until(State.SCALED_DOWN)


async def test_a_checkpointed_container_sleeps_on_to_be_killed(make: Make) -> None:
    f = make(tiers=[Tier.CHECKPOINT, Tier.FREEZE])
    await f.until(State.SCALED_DOWN)
    async with f.container.ending("StopContainer"):
        assert f.record.state is State.SCALED_DOWN


async def test_one_that_is_to_be_killed_is_not_frozen_after_its_checkpoint_failed(make: Make) -> None:
    f = make(tiers=[Tier.CHECKPOINT, Tier.FREEZE])
    f.workload.dump_errors = [CheckpointError("killed")]
    holds: list[asyncio.Task[None]] = []
    done = asyncio.Event()

    async def kill() -> None:
        async with f.container.ending("StopContainer"):
            await done.wait()

    f.workload.during_dump = lambda: holds.append(asyncio.create_task(kill()))
    # The call arrives while CRIU works.
    dump = f.workload.dump

    async def slow() -> int:
        try:
            return await dump()
        finally:
            await asyncio.sleep(0.01)

    f.workload.dump = slow  # type: ignore[method-assign]
    await eventually(lambda: "open" in f.log)
    assert "freeze" not in f.log
    done.set()
    await asyncio.gather(*holds)


async def test_one_that_is_killed_while_it_freezes_is_thawed(make: Make) -> None:
    f = make(tiers=[Tier.FREEZE])
    killed = asyncio.Event()

    async def kill() -> None:
        async with f.container.ending("StopContainer"):
            assert f.log[-1] == "open"
            killed.set()

    tasks: list[asyncio.Task[None]] = []
    f.workload.during_freeze = lambda: tasks.append(asyncio.create_task(kill()))
    await asyncio.wait_for(killed.wait(), 60)
    f.workload.during_freeze = lambda: None
    await asyncio.gather(*tasks)


async def test_an_adopted_frozen_container_is_thawed_whatever_comes_first_in_its_list(make: Make) -> None:
    f = make(tiers=[Tier.CHECKPOINT, Tier.FREEZE], state=State.SCALED_DOWN, tier="freeze")
    f.packet()
    await f.until(State.RUNNING)
    assert "thaw" in f.log
    assert "restore" not in f.log


async def test_an_internal_error_thaws(make: Make) -> None:
    f = make(tiers=[Tier.FREEZE])

    def broken() -> None:
        raise ValueError("bug")

    f.gate.sockets_stay = broken  # type: ignore[method-assign]
    await f.until(State.DISABLED)
    assert f.log[-2:] == ["thaw", "open"]


async def test_a_request_that_comes_while_idleness_is_looked_at_aborts_the_parking(make: Make) -> None:
    f = make()

    def silent() -> str | None:
        # It is answered neither before nor after: to the sockets, all is quiet.
        f.gate.silent = lambda: None  # type: ignore[method-assign]
        f.gate.activity = time.monotonic()
        return None

    f.gate.silent = silent  # type: ignore[method-assign]
    await eventually(lambda: "open" in f.log)
    assert "dump" not in f.log
    await f.until(State.SCALED_DOWN)


async def test_a_call_of_the_past_does_not_shut_the_gate_in_vain(make: Make) -> None:
    f = make()
    await f.until(State.RUNNING)
    async with f.container.awake("exec"):
        pass
    await f.until(State.SCALED_DOWN)
    assert "open" not in f.log


async def test_a_packet_that_found_the_parking_full_wakes_all_the_same(make: Make) -> None:
    f = make()
    await f.until(State.SCALED_DOWN)
    f.container.packet()
    await f.until(State.RUNNING)
    assert not f.gate.packets


@pytest.mark.parametrize("broken", ["rescue", "open"])
async def test_nobody_waits_for_ever_for_what_could_not_be_rescued(make: Make, broken: str) -> None:
    f = make()
    await f.until(State.SCALED_DOWN)

    async def restore(*_: object, **__: object) -> None:
        raise ValueError("bug")

    def fail() -> None:
        raise OSError("another")

    async def rescue() -> None:
        fail()

    f.workload.restore = restore  # type: ignore[method-assign]
    if broken == "rescue":
        f.workload.rescue = rescue  # type: ignore[method-assign]
    else:
        f.gate.open = fail  # type: ignore[method-assign]
    async with asyncio.timeout(60), f.container.awake("exec"):
        assert f.record.state is State.DISABLED
    assert ("open" if broken == "rescue" else "rescue") in f.log


async def test_a_full_disk_keeps_no_container_asleep_and_lets_none_go_to_sleep(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_module, "BACKOFF_SECONDS", (0.05, 0.05))
    f = make()
    full = True

    def save(_: Record) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    f.container._save = save
    await eventually(lambda: "No space left" in f.container.reason())
    assert "dump" not in f.log
    full = False
    await f.until(State.SCALED_DOWN)
    full = True
    async with asyncio.timeout(60), f.container.awake("exec"):
        assert f.record.state is State.RUNNING
    await f.container.exited()
    assert f.record.state is State.EXITED


async def test_an_error_while_a_restored_application_is_replaced_leaves_one_running(make: Make) -> None:
    f = make()
    f.workload.verify_error = AttributesChanged("LSM label was x, is unconfined")

    async def broken() -> None:
        raise ValueError("bug")

    f.workload.start_afresh = broken  # type: ignore[method-assign]
    await f.until(State.SCALED_DOWN)
    f.packet()
    await f.until(State.DISABLED)
    assert f.log[-2:] == ["rescue", "open"]


async def test_without_its_pod_s_hook_it_is_woken_and_stays_up(make: Make) -> None:
    f = make()
    await f.until(State.SCALED_DOWN)
    f.container.hooked("The link eth0 of the pod can't be hooked: no")
    await f.until(State.RUNNING)
    await eventually(lambda: "eth0" in f.container.reason())
    await asyncio.sleep(3 * DURATION)
    assert f.record.state is State.RUNNING
    f.container.hooked(None)
    await f.until(State.SCALED_DOWN)


async def test_the_hook_is_looked_at_before_it_is_parked(make: Make) -> None:
    f = make()
    looks: list[State] = []

    async def check() -> None:
        looks.append(f.record.state)
        f.container.hooked(None, missed=len(looks) == 1)

    f.container._check = check
    await f.until(State.SCALED_DOWN)
    # What may have passed an absent hook counts as activity: the first parking is off.
    assert looks == [State.RUNNING, State.RUNNING]


@pytest.mark.parametrize("state", [State.CHECKPOINTING, State.SCALED_DOWN])
async def test_an_internal_error_does_not_cost_a_checkpoint(make: Make, state: State) -> None:
    f = make()

    def broken(*_: object) -> bool:
        raise ValueError("bug")

    f.gate.stand_in = broken  # type: ignore[method-assign, assignment]
    if state is State.SCALED_DOWN:
        f.gate.stand_in = lambda streams: None  # type: ignore[method-assign]
        f.gate.wanted = broken  # type: ignore[method-assign]
    await f.until(State.DISABLED)
    assert f.log[-4:] == ["restore all", "verify", "discard", "open"]
    assert not {"rescue", "start_afresh"} & set(f.log)


async def test_what_could_not_be_rescued_from_its_checkpoint_is_started_afresh(make: Make) -> None:
    f = make()

    def broken(*_: object) -> bool:
        raise ValueError("bug")

    f.gate.wanted = broken  # type: ignore[method-assign]
    f.workload.restore_errors = [RestoreError("bad images")]
    await f.until(State.DISABLED)
    assert f.log[-3:] == ["restore all", "rescue", "open"]


async def test_what_is_replaced_can_not_be_restored_by_the_next_daemon(make: Make) -> None:
    f = make()
    f.workload.verify_error = AttributesChanged("LSM label was x, is unconfined")
    ending = asyncio.Event()

    async def end(*, at_once: bool = False) -> None:
        f.log.append("kill" if at_once else "end")
        if not at_once:
            ending.set()
            await asyncio.sleep(60)

    f.workload.end = end  # type: ignore[method-assign]
    await f.until(State.SCALED_DOWN)
    f.packet()
    await asyncio.wait_for(ending.wait(), 60)
    await f.container.close()
    assert f.log[-4:] == ["spoil", "end", "kill", "start_afresh"]


@pytest.mark.parametrize("complete", [True, False])
async def test_what_is_to_stop_and_can_not_be_restored_is_killed(
    make: Make, complete: bool, caplog: pytest.LogCaptureFixture
) -> None:
    f = make()
    await f.until(State.SCALED_DOWN)
    f.workload.has_images = complete
    f.workload.restore_errors = [RestoreError("broken image")] * 3
    stopped: list[bool] = []

    async def stop() -> None:
        async with f.container.stopping("StopContainer"):
            stopped.append(f.workload.gone)

    stopping = asyncio.create_task(stop())
    await eventually(lambda: f.workload.gone)
    await f.container.exited()
    await stopping
    assert stopped == [True]
    assert "start_afresh" not in f.log
    (told,) = [r.getMessage() for r in caplog.records if "unsaved state was lost" in r.getMessage()]
    assert str(f.container) in told
    assert ("broken image" if complete else "no complete checkpoint") in told


async def test_without_a_complete_checkpoint_it_is_started_afresh_at_once(make: Make) -> None:
    f = make(state=State.SCALED_DOWN)
    f.workload.has_images = False
    f.packet()
    await eventually(lambda: "no complete checkpoint" in f.record.reason)
    assert "restore" not in f.log


@pytest.mark.parametrize("failures", [2, 3])
async def test_who_has_more_rights_than_before_does_not_stay(
    make: Make, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    monkeypatch.setattr(scaledown, "END_PAUSE", 0.001)
    f = make()
    f.workload.verify_error = AttributesChanged("LSM label was x, is unconfined")
    f.workload.end_errors = [CheckpointError("the container's init doesn't run")] * failures
    await f.until(State.SCALED_DOWN)
    f.packet()
    await eventually(lambda: "discard" in f.log)
    done = f.log[f.log.index("spoil") :]
    if failures == 2:
        assert done[:5] == ["spoil", "end", "end", "end", "start_afresh"]
        assert "kill container" not in f.log
    else:
        assert done[:5] == ["spoil", "end", "end", "end", "kill container"]
        assert "start_afresh" not in f.log


async def test_a_call_does_not_wait_until_a_fresh_application_listens(make: Make) -> None:
    f = make(tiers=(Tier.RESTART,))
    await f.until(State.SCALED_DOWN)
    f.gate.quiet_reason = "doesn't listen on 80 (yet)"
    async with asyncio.timeout(60), f.container.awake("StopContainer"):
        assert f.record.state is State.RESTORING
        assert f.log[-1] == "start_afresh"
        assert "open" not in f.log
        f.gate.quiet_reason = None
        await f.until(State.RUNNING)
        assert "open" in f.log


async def test_one_that_nothing_could_wake_is_brought_back_and_left_alone(make: Make) -> None:
    f = make(state=State.SCALED_DOWN, tier=Tier.CHECKPOINT, give_up="there is no hook")
    await f.until(State.DISABLED)
    assert f.log == ["restore", "open", "verify", "discard"]
    assert (f.container.reason(), f.record.tier) == ("there is no hook", "")
    async with asyncio.timeout(60), f.container.awake("exec"):
        pass
    await f.container.exited()
    assert f.record.state is State.EXITED


async def test_of_one_that_is_brought_back_for_good_it_is_told_what_it_has_lost(make: Make) -> None:
    f = make(state=State.SCALED_DOWN, tier=Tier.CHECKPOINT, give_up="there is no hook")
    f.workload.has_images = False
    await f.until(State.DISABLED)
    assert "started afresh" in f.container.reason()
    assert f.container.reason().endswith("; there is no hook")


async def test_it_is_not_parked_in_the_middle_of_work_that_the_network_does_not_show(make: Make) -> None:
    f = make()
    f.workload.work = "a thread of redis-server is running"
    await eventually(lambda: f.container.reason() == f.workload.work)
    await asyncio.sleep(3 * DURATION)
    assert "park_new" not in f.log
    f.workload.work = None
    await f.until(State.SCALED_DOWN)


async def test_what_does_not_fit_its_limit_of_memory_any_more_is_killed_as_by_the_kernel(make: Make) -> None:
    f = make()
    await f.until(State.SCALED_DOWN)
    f.workload.restore_errors = [OutOfMemory("too low")] * scaledown.RESTORE_ATTEMPTS
    f.packet()
    await eventually(lambda: f.workload.gone)
    assert f.log[-1] == "kill container"
    assert "start_afresh" not in f.log


async def test_what_found_memory_in_the_end_is_back(make: Make) -> None:
    f = make()
    await f.until(State.SCALED_DOWN)
    f.workload.restore_errors = [OutOfMemory("too low")]
    f.packet()
    await f.until(State.RUNNING)
    assert not f.workload.gone


# --- A checkpoint for somebody else ---------------------------------------------------------------------


async def test_what_runs_is_parked_while_it_is_checkpointed_for_somebody_and_goes_on(
    make: Make, tmp_path: Path
) -> None:
    f = make(duration=0)
    await f.container.snapshot(tmp_path / "new")
    assert f.log == ["find", "park_all", f"snapshot {tmp_path / 'new'}", "open"]
    assert f.states[-2:] == [State.PARKING, State.RUNNING]
    assert f.record.checkpoints == 0


async def test_what_sleeps_is_handed_out_without_waking_it(make: Make, tmp_path: Path) -> None:
    f = make()
    await f.until(State.SCALED_DOWN)
    for _ in range(2):
        await f.container.snapshot(tmp_path)
    assert f.log[-2:] == [f"hand out {tmp_path}"] * 2
    assert f.record.state is State.SCALED_DOWN
    f.container.packet()
    await f.until(State.RUNNING)


async def test_what_is_frozen_runs_for_that(make: Make, tmp_path: Path) -> None:
    f = make(tiers=(Tier.CHECKPOINT, Tier.FREEZE))
    f.workload.dump_errors = [CheckpointError("no")]
    await f.until(State.SCALED_DOWN)
    f.workload.snapshot_error = CheckpointError("not even for you")
    with pytest.raises(Refused, match="not even for you"):
        await f.container.snapshot(tmp_path)
    assert "thaw" in f.log
    assert f.log[-1] == "open"


async def test_what_was_ended_has_nothing_to_hand_out(make: Make, tmp_path: Path) -> None:
    f = make(tiers=(Tier.RESTART,))
    await f.until(State.SCALED_DOWN)
    with pytest.raises(Refused, match="there is no checkpoint"):
        await f.container.snapshot(tmp_path)
    assert f.record.state is State.SCALED_DOWN


async def test_who_asks_for_a_checkpoint_and_goes_gives_it_up(make: Make, tmp_path: Path) -> None:
    f = make(duration=0)
    f.workload.snapshot_takes_long = True
    asking = asyncio.create_task(f.container.snapshot(tmp_path))
    waiting = asyncio.create_task(f.container.snapshot(tmp_path))
    await f.until(State.PARKING)
    waiting.cancel()
    asking.cancel()
    await asyncio.wait([asking, waiting])
    assert (asking.cancelled(), waiting.cancelled()) == (True, True)
    assert f.record.state is State.RUNNING
    assert f.log[-2:] == ["given up", "open"]


async def test_who_waits_for_a_checkpoint_of_a_container_that_ends_is_told_so(make: Make, tmp_path: Path) -> None:
    f = make(duration=0)
    f.workload.snapshot_takes_long = True
    asking = [asyncio.create_task(f.container.snapshot(tmp_path)) for _ in range(2)]
    await f.until(State.PARKING)
    await f.container.exited()
    for one in asking:
        with pytest.raises(Refused, match="it has ended"):
            await one
    with pytest.raises(Refused, match="it has ended"):
        await f.container.snapshot(tmp_path)
    assert f.record.state is State.EXITED
