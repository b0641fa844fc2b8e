"""A pod sandbox that opted in: its policy, its network hook, its containers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from criproxy.config import Config
from criproxy.container import Container
from criproxy.criu.checkpoint import Criu
from criproxy.files import write_whole
from criproxy.hook.gate import Gate, NoGate
from criproxy.hook.kinds import Hook, kind
from criproxy.hook.pod_maps import SLOTS, Park, Parked, Watched
from criproxy.hook.slots import NetworkError
from criproxy.kernel.bpf import BpfError
from criproxy.kernel.sockets import UnixSocket
from criproxy.kubelet.answering import Answering
from criproxy.kubelet.probes import Probes
from criproxy.policy import Answers, Connections, Policy, Port, Tier
from criproxy.record import Record, State
from criproxy.run import CommandError
from criproxy.scaledown import Checkpoint, Freeze, Method, Restart
from criproxy.workload import Processes, Workload

log = logging.getLogger(__name__)

CHECK_SECONDS = 10.0
"""How often it is looked whether the pod's network still has its hook: who has CAP_NET_ADMIN can remove it."""


@dataclass
class SandboxRecord:
    """What is kept on disk of a pod that opted in."""

    id: str
    namespace: str
    name: str
    annotations: dict[str, str]
    runtime_handler: str
    netns: str = ""
    """Path of the pod's network namespace on the host."""
    problem: str = ""
    """Why no container of the pod can be scaled down; empty if they can."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


class Sandbox:
    def __init__(self, record: SandboxRecord, policy: Policy, config: Config, criu: Criu, pins: Path) -> None:
        self.record = record
        self.policy = policy
        self.containers: dict[str, Member] = {}
        self._config = config
        self._criu = criu
        self._pins = pins
        self._network: Hook | None = None
        self._answering: Answering | None = None
        self._checks: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None

    # --- the network hook ----------------------------------------------------------------------------------

    async def attach(self) -> None:
        """Puts the hook into the pod's network namespace, or finds it there (after a restart of the daemon)."""
        if self.record.problem:
            return
        self._network = await asyncio.to_thread(self._hook, Path(self.record.netns))
        self._network.on_parked(self._parked)
        self._network.on_watched(self._watched)
        self._answer(self._network)
        self._checks = asyncio.create_task(self._check_always(), name=f"hook of {self.record.id[:13]}")

    def _answer(self, network: Hook) -> None:
        try:
            listeners = network.listen()
        except (BpfError, OSError, CommandError) as error:
            log.warning("%s/%s: nobody answers in its place: %s", self.record.namespace, self.record.name, error)
            return
        self._answering = Answering(
            listeners,
            self._whose,
            network.accepted,
            network.connect,
            network.relayed,
            network.VISITORS,
        )

    def _whose(self, port: Port) -> Probed | None:
        for member in self.containers.values():
            if member.gate is not None and member.gate.owns(port):
                return member.probed()
        return None

    async def _end_answering(self) -> None:
        if self._answering is not None:
            answering, self._answering = self._answering, None
            await answering.close()

    async def _check_always(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await self.check()

    async def check(self) -> None:
        """Looks whether the hook is where it should be, repairs it, and tells the containers."""
        # In a thread, as it takes the kernel's one lock for all network configuration; by one at a time.
        if self._checking is None:
            self._checking = asyncio.create_task(self._check())
        await asyncio.shield(self._checking)

    async def _check(self) -> None:
        try:
            if (network := self._network) is None:
                return
            repairs = network.repairs
            problem = await asyncio.to_thread(network.problem)
            missed = problem is not None or network.repairs != repairs
        except Exception as error:
            log.exception("%s/%s: its hook could not be checked", self.record.namespace, self.record.name)
            problem, missed = f"the hook in the pod's network can't be checked: {error}", True
        finally:
            self._checking = None
        for member in self.containers.values():
            if member.container is not None:
                member.container.hooked(problem, missed=missed)

    async def _end_checks(self) -> None:
        if self._checks is not None:
            self._checks.cancel()
            await asyncio.gather(self._checks, return_exceptions=True)
            self._checks = None
        if self._checking is not None:
            await self._checking

    def _hook(self, netns: Path) -> Hook:
        network = kind(netns).network
        if self._pins.exists():
            try:
                return network.adopt(netns, self._pins)
            except (NetworkError, BpfError) as error:
                # Half made by a daemon that was killed, or by another version.
                log.warning("%s/%s: hooked anew: %s", self.record.namespace, self.record.name, error)
                network.discard(self._pins)
        try:
            return network.attach(netns, self._pins)
        except (NetworkError, BpfError):
            with contextlib.suppress(OSError):
                network.strip(netns)
            raise

    async def detach(self) -> None:
        """Takes the hook away. The pod's network namespace may be gone already."""
        await self._end_checks()
        await self._end_answering()
        if self._network is not None:
            network, self._network = self._network, None
            network.off_parked()
            await asyncio.to_thread(network.detach)

    async def close(self) -> None:
        """The daemon stops: everything stays as it is, for the next one."""
        await self._end_answering()
        for member in self.containers.values():
            await member.close()
        await self._end_checks()
        if self._network is not None:
            self._network.close()
            self._network = None

    def _parked(self, packet: Parked) -> None:
        if (gate := self._gate(packet.slot)) is not None:
            gate.park(packet)

    def _watched(self, packet: Watched) -> None:
        if (gate := self._gate(packet.slot)) is not None:
            gate.watched(packet)

    def _gate(self, slot: int) -> Gate | None:
        return next((m.gate for m in self.containers.values() if m.gate is not None and m.record.slot == slot), None)

    # --- its containers ------------------------------------------------------------------------------------

    def add(self, record: Record, folder: Path) -> Member:
        member = Member(record, folder)
        self.containers[record.id] = member
        return member

    def start(self, member: Member) -> None:
        """The container runs (its init's pid is in the record): its state machine begins or resumes."""
        record = member.record
        if self._network is None:
            self._refuse(member, self.record.problem or "the pod's network hook is missing")
            return
        if record.slot is None:
            taken = {m.record.slot for m in self.containers.values()}
            record.slot = next((s for s in range(SLOTS) if s not in taken), None)
        if record.slot is None:
            member.disable(f"more than {SLOTS} containers of one pod can't be scaled down")
            return
        declared = self.policy.ports.get(record.name, frozenset())
        if (why := self._network.refusal(declared)) is not None:
            self._refuse(member, why)
            return
        workload = self._workload(member, self._network.unix_sockets)
        member.probes = Probes(member.folder / "probes.json", tls=self.policy.probes is Answers.ANSWER)
        if record.state is State.SCALED_DOWN:
            member.probes.load()
        gate = kind(Path(self.record.netns)).gate(
            self._network,
            record.slot,
            member.probes,
            declared=declared,
            quiet=self.policy.quiet_ports,
            preserve=self.policy.connections is Connections.PRESERVE,
            socket_inodes=workload.socket_inodes,
            request_timeout=self.policy.request_timeout,
            parking_packets=self._config.parking_packets,
            parking_bytes=self._config.parking_bytes,
        )
        container = Container(
            record,
            workload,
            gate,
            member.probes,
            duration=self.policy.duration,
            methods=self._methods(workload, gate),
            cpu_activity=self._config.cpu_activity_percent / 100,
            check=self.check,
            save=lambda _: member.save(),
        )
        gate.on_wanted = container.packet
        gate.on_probing = container.probing
        if record.state is State.SCALED_DOWN and record.tier == Tier.CHECKPOINT and isinstance(workload, Workload):
            gate.stand_in(workload.streams())  # the daemon before may have died between checkpoint and this
        if record.state is State.SCALED_DOWN and self._network.mode(record.slot) is Park.PASS:
            # It fell asleep under another hook (another version's, before an upgrade): this one parks nothing for it.
            container.hooked("the hook in the pod's network was made anew", missed=True)
        member.live(container, workload, gate)

    def _refuse(self, member: Member, why: str) -> None:
        if member.record.state is State.STARTING:
            member.disable(why)
        else:
            self._give_up(member, why)

    def _give_up(self, member: Member, why: str) -> None:
        """An earlier daemon's: it may sleep, or be back but not settled, and no packet would ever wake it."""
        workload, gate = self._workload(member, list), NoGate()
        container = Container(
            member.record,
            workload,
            gate,
            Probes(None),
            duration=0,
            methods=self._methods(workload, gate),
            give_up=why,
            save=lambda _: member.save(),
        )
        member.live(container, workload, None)

    def release(self, member: Member) -> None:
        """The container has ended, or is left alone, and no gate of it is there: its slot is nobody's.

        As the last daemon left it, the slot may still have its ports, and park what is sent to the next container.
        """
        if member.record.slot is not None and self._network is not None:
            self._network.park(member.record.slot, Park.PASS)
            self._network.assign(member.record.slot, ())
        member.record.slot = None
        member.note()

    def _workload(self, member: Member, unix_sockets: Callable[[], list[UnixSocket]]) -> Processes:
        record = member.record
        if not record.bundle:
            return Processes(record.id, record.pid, unix_sockets)
        return Workload(
            record.id,
            record.pid,
            unix_sockets,
            member.folder,
            self._criu,
            stop_signal=record.stop_signal,
            lazy=self.policy.lazy_pages,
            connections=self.policy.connections,
            parked=kind(Path(self.record.netns)).parks_packets,
            clock=self.policy.clock,
        )

    def _methods(self, workload: Processes, gate: Gate | NoGate) -> list[Method]:
        if not isinstance(workload, Workload):
            return [Freeze(workload, gate)]
        if self.policy.tier is Tier.RESTART:
            return [Restart(workload, gate)]
        if self.policy.tier is Tier.CHECKPOINT:
            return [Checkpoint(workload, gate)]
        return [Checkpoint(workload, gate), Freeze(workload, gate)]


class Probed:
    """A container for `answering.Answering`."""

    def __init__(self, container: Container, probes: Probes) -> None:
        self.probes = probes
        self._container = container

    def is_down(self) -> bool:
        return not self._container.up()

    def awake(self, why: str) -> contextlib.AbstractAsyncContextManager[None]:
        return self._container.awake(why)

    async def until_up(self) -> None:
        await self._container.until_up()

    @contextlib.contextmanager
    def probed(self, why: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            with self._container.probed(why):
                yield
        finally:
            self.probes.spent(began, time.monotonic())


class Member:
    """A container of a sandbox: its record on disk and, while it runs, its state machine."""

    def __init__(self, record: Record, folder: Path) -> None:
        self.record = record
        self.folder = folder
        self.container: Container | None = None
        self.workload: Processes | None = None
        self.gate: Gate | None = None
        self.probes: Probes | None = None
        self._pidfd: int | None = None
        self._ending: asyncio.Task[None] | None = None

    def probed(self) -> Probed | None:
        """The container, as far as its probes are concerned; None once it has ended."""
        return None if self.container is None or self.probes is None else Probed(self.container, self.probes)

    def live(self, container: Container, workload: Processes, gate: Gate | None) -> None:
        """It has a state machine from now on. Raises OSError."""
        self._watch()
        self.container, self.workload, self.gate = container, workload, gate
        container.start()

    def disable(self, reason: str) -> None:
        """The container runs without us; `reason` says why, for people. Again for one that was so from the beginning,
        when its process is known."""
        self.record.state, self.record.reason, self.record.tier = State.DISABLED, reason, ""
        if self.record.pid:
            try:
                self._watch()
            except ProcessLookupError:
                self.record.state, self.record.reason = State.EXITED, ""
            except OSError as error:
                log.warning("container %s: its end won't be noticed: %s", self.record.id, error)
        self.note()

    def _watch(self) -> None:
        """The init's end is the container's end, whoever caused it; a pidfd tells it under every runtime version."""
        if self._pidfd is None:
            self._pidfd = os.pidfd_open(self.record.pid)
            asyncio.get_running_loop().add_reader(self._pidfd, self._init_ended)

    def _init_ended(self) -> None:
        self._forget_pidfd()
        self._ending = asyncio.create_task(self._exited())

    async def _exited(self) -> None:
        try:
            if self.container is not None:
                await self.container.exited()
            else:
                self.record.state, self.record.reason = State.EXITED, ""
            if self.gate is not None:
                self.gate.close()
        except Exception:
            # Whoever removes the container waits for this, and must be able to.
            log.exception("container %s: what follows its end failed", self.record.id)
        self.container = self.workload = self.gate = self.probes = self.record.slot = None
        self.note()

    async def ended(self) -> None:
        """Waits until all that follows the container's exit has been done."""
        if self._ending is not None:
            # Whoever waits may be cancelled; what follows the exit goes on.
            await asyncio.shield(self._ending)

    async def close(self) -> None:
        self._forget_pidfd()
        await self.ended()
        if self.container is not None:
            await self.container.close()

    def save(self) -> None:
        """Written before the act that the new state stands for."""
        write_whole(self.folder / "state.json", json.dumps(self.record.to_json(), indent=1))

    def note(self) -> None:
        """Saves where nothing depends on it: what happened has happened, and on a full disk, too."""
        try:
            self.save()
        except OSError as error:
            log.error("container %s: its state can't be written to the disk: %s", self.record.id, error)

    def _forget_pidfd(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
