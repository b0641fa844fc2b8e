"""Kubelet's connections: known by its cgroup, watched while a container runs, answered by a listener while it sleeps.

Kubelet is a process in a cgroup of the test's own that makes sockets; the test connects and closes them. An application
sleeps here by its packets being parked, as in test_network.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from box import until
from specimen import PATIENCE
from topology import NODE4, POD4, POD6, Topology, family_of, make_socket, path, run
from traffic import HTTP, Hook, ask, becomes, connect, connected, receive, send, serving

from criproxy.config import Config
from criproxy.hook import pod_maps, pod_namespace
from criproxy.hook.network import PodNetwork
from criproxy.hook.pod_maps import Park, Visitor, Watched
from criproxy.kernel import netlink, sockets
from criproxy.kernel.bpf import CgroupLink, Map
from criproxy.kernel.namespaces import in_network_namespace
from criproxy.kernel.netlink import Netlink
from criproxy.kernel.sockets import Flow, Socket
from criproxy.kubelet.connections import FOLDER, MAPS, Kubelet
from criproxy.policy import Port

GET = b"GET /healthz HTTP/1.1\r\nHost: 10.0.0.1:80\r\nUser-Agent: kube-probe/1.31\r\nConnection: close\r\n\r\n"
KUBELET = frozenset({Visitor.KUBELET})
LOOPBACK = frozenset({Visitor.LOOPBACK})

# Joins the cgroup by itself and sends a socket for each line: a namespace's path and an address family.
HELPER = """
import os, socket, sys
from pathlib import Path
from criproxy.kernel.namespaces import in_network_namespace
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
Path("/proc/self/comm").write_text(sys.argv[2])
wire = socket.socket(fileno=0)
wire.send(b"here")
while words := wire.recv(200).decode().split():
    made = in_network_namespace(Path(words[0]), lambda: socket.socket(int(words[1]), socket.SOCK_STREAM))
    socket.send_fds(wire, [b"x"], [made.fileno()])
    made.close()
"""


class Process:
    """A process in a cgroup, which makes sockets for the test."""

    def __init__(self, cgroup: Path, name: str = "prober") -> None:
        self.cgroup = cgroup
        self._wire, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = [sys.executable, "-c", HELPER, str(cgroup), name]
        self._process = subprocess.Popen(argv, stdin=theirs.fileno())
        theirs.close()
        assert self._wire.recv(10) == b"here"

    def make(self, namespace: str, family: int) -> socket.socket:
        self._wire.send(f"{path(namespace)} {int(family)}".encode())
        _, fds, _, _ = socket.recv_fds(self._wire, 10, 1)
        made = socket.socket(fileno=fds[0])
        made.setblocking(False)
        return made

    def close(self) -> None:
        """Ends it."""
        self._wire.close()
        self._process.wait(PATIENCE)


def cgroup2() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise AssertionError("these tests need cgroup v2, also beside v1")


@contextlib.contextmanager
def made_cgroup(name: str) -> Iterator[Path]:
    cgroup = cgroup2() / name
    cgroup.mkdir(exist_ok=True)
    try:
        yield cgroup
    finally:
        until(lambda: removed(cgroup), complaint=lambda: f"{cgroup} can't be removed")


def removed(cgroup: Path) -> bool:
    """Once its last process is gone for good."""
    with contextlib.suppress(OSError):
        cgroup.rmdir()
    return not cgroup.exists()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    with made_cgroup(f"criproxy-test-{os.getpid()}") as made:
        yield made


@pytest.fixture
def process(cgroup: Path) -> Iterator[Process]:
    with closing(Process(cgroup)) as made:
        yield made


def configured(cgroup: Path | None) -> Config:
    return Config(kubelet_cgroup=None if cgroup is None else str(cgroup.relative_to(cgroup2())))


@pytest.fixture
def kubelet(net: Topology, cgroup: Path) -> Iterator[Kubelet]:
    with closing(Kubelet(configured(cgroup), net.bpffs)) as made:
        made.look()
        assert (made.problem, made.cgroup) == ("", cgroup)
        yield made
    (net.bpffs / FOLDER / "link").unlink(missing_ok=True)


class Stage:
    """The pod, kubelet beside it, and what is seen of it."""

    def __init__(self, net: Topology, hook: Hook, process: Process) -> None:
        self.net, self.hook, self.network, self._process = net, hook, hook.network, process
        self.watched: list[Watched] = []
        self.network.on_watched(self.watched.append)

    def make(self, address: str = POD4, where: str = "node") -> socket.socket:
        return self._process.make(getattr(self.net, where), family_of(address))

    async def connect(self, address: str = POD4, port: int = 80, where: str = "node") -> socket.socket:
        return await connected(self.make(address, where), address, port)

    def said(self) -> list[tuple[str, str, bytes]]:
        """Direction, flags and payload of what was copied."""
        self.network.poll()
        found = []
        for packet in self.watched:
            flags = "".join(
                letter for letter, flag in zip("SFR", (packet.syn, packet.fin, packet.rst), strict=True) if flag
            )
            found.append(("in" if packet.incoming else "out", flags, packet.payload))
        return found

    def active(self, slot: int = 0) -> bool:
        return self.hook.last_activity(slot) > 0.0


@pytest.fixture
async def stage(net: Topology, kubelet: Kubelet, hook: Hook, process: Process) -> Stage:
    return Stage(net, hook, process)


def connections(name: str) -> list[Socket]:
    """All connections of a namespace, but for those in TIME_WAIT."""

    def look() -> list[Socket]:
        with Netlink(netlink.NETLINK_SOCK_DIAG) as diag:
            return [one for one in sockets.sockets(diag, ["tcp"]) if one.connected]

    return in_network_namespace(path(name), look)


async def settled(net: Topology) -> None:
    """Waits until what was closed has ended on both sides: FINs and the last acknowledgements have arrived."""
    everywhere = (net.node, net.pod, net.peer)
    await becomes(lambda: not any(connections(name) for name in everywhere), "no connection is left")


# --- knowing it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [POD4, POD6, f"::ffff:{POD4}"])
async def test_a_probe_reaches_the_application_and_is_no_activity(stage: Stage, address: str) -> None:
    async with serving(stage.net):
        with closing(await stage.connect(address)) as client:
            assert await ask(client, GET) == GET
            here, there = client.getsockname()[:2], client.getpeername()[:2]
        await settled(stage.net)
    assert not stage.active()
    assert stage.said() == [
        ("in", "S", b""),
        ("out", "S", b""),
        ("in", "", GET),
        ("out", "", GET),
        ("in", "F", b""),
        ("out", "F", b""),
    ]
    flows = {(packet.slot, packet.visitor, packet.flow) for packet in stage.watched}
    plain = [(host.removeprefix("::ffff:"), port) for host, port in (there, here)]
    assert flows == {(0, Visitor.KUBELET, Flow("tcp", plain[0], plain[1]))}
    assert stage.watched[2].seq == stage.watched[0].seq + 1
    assert stage.watched[2].length == len(GET)


async def test_others_with_its_address_are_not_kubelet(stage: Stage) -> None:
    async with serving(stage.net):
        with closing(await connect(stage.net, "node", POD4)):
            assert stage.active()
    assert stage.said() == []


async def test_what_is_closed_is_forgotten(stage: Stage, net: Topology) -> None:
    """Addresses and ports of a connection that was kubelet's mean nothing in other hands."""
    async with serving(stage.net):
        client = await stage.connect()
        name = client.getsockname()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        await settled(stage.net)
        assert not stage.active()
        with closing(make_socket(net.node, socket.AF_INET)) as other:
            other.bind(name)
            await asyncio.get_running_loop().sock_connect(other, (POD4, 80))
            assert stage.active()
            seen = len(stage.said())
            await ask(other, GET)
            assert len(stage.said()) == seen


async def test_an_entry_lasts_as_long_as_its_connection(stage: Stage, net: Topology) -> None:
    with closing(Map(net.bpffs / FOLDER / "connections", *MAPS["connections"])) as known:
        async with serving(net):
            for address in (POD4, POD6, f"::ffff:{POD4}"):
                began = time.monotonic_ns()
                with closing(await stage.connect(address)) as client:
                    (found,) = known.items()
                    assert began < struct.unpack("=Q", found[1])[0] < time.monotonic_ns()
                    assert pod_maps.flow(found[0]).remote[1] == client.getsockname()[1]
                await becomes(lambda: known.items() == [], "it is forgotten")


async def test_a_refused_connection_is_told(stage: Stage) -> None:
    with pytest.raises(ConnectionRefusedError):
        await stage.connect()
    await settled(stage.net)
    assert stage.said() == [("in", "S", b""), ("out", "R", b"")]
    assert not stage.active()


async def test_what_is_no_probe_counts_from_then_on(stage: Stage) -> None:
    async with serving(stage.net):
        with closing(await stage.connect()) as client:
            await ask(client, b"POST /hook HTTP/1.1\r\nUser-Agent: kube-lifecycle/1.31\r\n\r\n")
            assert not stage.active()
            stage.said()
            stage.network.not_a_probe(stage.watched[0].flow)
            assert not stage.active()
            seen = len(stage.said())
            await ask(client, b"more")
            assert stage.active()
    await settled(stage.net)
    assert len(stage.said()) == seen


async def test_much_is_not_copied_as_a_whole(stage: Stage) -> None:
    data = os.urandom(1 << 20)
    async with serving(stage.net):
        with closing(await stage.connect()) as client:
            answer = asyncio.create_task(receive(client, len(data)))
            for begin in range(0, len(data), 1 << 15):
                await send(client, data[begin : begin + (1 << 15)])
                stage.said()
            await answer
        await settled(stage.net)
    for direction in ("in", "out"):
        said = [(flags, payload) for way, flags, payload in stage.said() if way == direction]
        assert len(said) == 17  # the last is the FIN
        assert max(len(payload) for _, payload in said) == 2048
        assert "F" in said[-1][0]
    assert not stage.active()
    first = next(packet for packet in stage.watched if packet.payload)
    assert first.payload == data[:2048]
    assert first.length > 2048


async def test_without_room_it_counts(net: Topology, kubelet: Kubelet, hook: Hook, process: Process) -> None:
    """Nobody reads the copies: what isn't seen might be anything."""
    stage = Stage(net, hook, process)
    hook.network.off_parked()
    async with serving(net):
        for _ in range(40):
            with closing(await stage.connect()) as client:
                await ask(client, bytes(2000))
            if stage.active():
                break
        else:
            pytest.fail("nothing counted, though the ring buffer must be full")


async def test_a_sidecars_ports_count_as_ever(stage: Stage) -> None:
    async with serving(stage.net, port=9000):
        with closing(await stage.connect(port=9000)):
            pass
    assert stage.said() == []
    assert stage.network.activity(0).own == 0.0
    assert stage.network.activity(0).others > 0.0


# --- over lo -------------------------------------------------------------------------------------------------------

LO = [pytest.param("127.0.0.1", id="v4"), pytest.param("::1", id="v6"), pytest.param(POD4, id="own-address")]


@pytest.mark.parametrize("address", LO)
async def test_a_probe_that_a_mesh_forwards(stage: Stage, address: str) -> None:
    request = GET.replace(b"Host", b"X-Long: " + b"x" * 300 + b"\r\nHost")
    async with serving(stage.net):
        with closing(await connect(stage.net, "pod", address)) as client:
            assert await ask(client, request) == request
        await settled(stage.net)
    assert not stage.active()
    said = stage.said()
    assert said[:4] == [("in", "S", b""), ("out", "S", b""), ("in", "", request), ("out", "", request)]
    assert sorted(said[4:]) == [("in", "F", b""), ("out", "F", b"")]
    assert {(p.slot, p.visitor, p.flow.local) for p in stage.watched} == {(0, Visitor.LOOPBACK, (address, 80))}
    for way in (True, False):
        syn, first = [p for p in stage.watched if p.incoming is way][:2]
        assert first.seq == syn.seq + 1


@pytest.mark.parametrize("address", LO)
async def test_connect_and_close_over_lo(stage: Stage, address: str) -> None:
    async with serving(stage.net, greeting=b"hello"):
        with closing(await connect(stage.net, "pod", address)) as client:
            await receive(client, 5)
        await settled(stage.net)
    assert not stage.active()
    said = stage.said()
    assert said[:3] == [("in", "S", b""), ("out", "S", b""), ("in", "F", b"")]


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"GET / HTTP/1.1\r\nUser-Agent: curl/8\r\n\r\n", id="curl"),
        pytest.param(b"x" * 505 + b"kube-probe/", id="too-late"),
        pytest.param(b"kube-prob", id="too-short"),
        pytest.param(b"User-Agent: kube-lifecycle/1.31\r\n\r\n", id="hook"),
        pytest.param(b"x", id="byte"),
    ],
)
async def test_others_over_lo_count_from_their_first_payload_on(stage: Stage, request_: bytes) -> None:
    async with serving(stage.net):
        with closing(await connect(stage.net, "pod", "127.0.0.1")) as client:
            assert not stage.active()
            await ask(client, request_)
            assert stage.active()
    await settled(stage.net)
    assert stage.said() == []


async def test_a_server_that_goes_on_talking_counts(stage: Stage) -> None:
    """A greeting alone doesn't: that is how many servers answer a probe's connection."""
    with closing(make_socket(stage.net.pod, socket.AF_INET)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 80))
        listener.listen()
        with closing(await connect(stage.net, "pod", "127.0.0.1")) as client:
            server, _ = await asyncio.get_running_loop().sock_accept(listener)
            with closing(server):
                await send(server, b"hello")
                await receive(client, 5)
                assert not stage.active()
                await send(server, b"news")
                await receive(client, 4)
                assert stage.active()


async def test_kubelets_cgroup_means_nothing_over_lo(stage: Stage) -> None:
    """In k3s the container runtime, which forwards ports from inside the pod, is in the same one."""
    async with serving(stage.net):
        with closing(await stage.connect("127.0.0.1", where="pod")) as client:
            await ask(client, b"hello")
            assert stage.active()
    assert stage.said() == []


# --- exec probes ---------------------------------------------------------------------------------------------------


async def test_connections_of_a_command(stage: Stage) -> None:
    async with serving(stage.net), serving(stage.net, port=9000):
        stage.network.watch_commands(0, on=True)
        flows = []
        for port in (80, 9000):
            with closing(await connect(stage.net, "pod", "127.0.0.1", port)) as client:
                await ask(client, b"PING")
                flows.append(Flow("tcp", ("127.0.0.1", port), client.getsockname()))
        stage.network.watch_commands(0, on=False)
        await settled(stage.net)
        assert sorted(stage.network.commands(0), key=str) == sorted(flows, key=str)
        assert stage.network.commands(1) == []
        assert not stage.active()
        assert stage.said() == []
        with closing(await connect(stage.net, "pod", "127.0.0.1")) as client:
            await ask(client, b"PING")
            assert stage.active()


async def test_what_outlives_the_command_counts(stage: Stage) -> None:
    async with serving(stage.net):
        stage.network.watch_commands(0, on=True)
        with closing(await connect(stage.net, "pod", "127.0.0.1")) as client:
            await ask(client, b"request")
            assert not stage.active()
            stage.network.watch_commands(0, on=False)
            (flow,) = stage.network.commands(0)
            still = {s.flow for s in stage.network.sockets(["tcp"]) if s.connected}
            assert Flow("tcp", flow.remote, flow.local) in still
            stage.network.not_a_probe(flow)
            assert stage.network.commands(0) == []
            await ask(client, b"request")
            assert stage.active()


async def test_a_command_hides_no_other_containers_port(stage: Stage) -> None:
    stage.network.assign(3, {Port("tcp", 81)})
    async with serving(stage.net, port=81):
        stage.network.watch_commands(0, on=True)
        with closing(await connect(stage.net, "pod", "127.0.0.1", 81)) as client:
            await ask(client, b"request")
        assert stage.network.activity(3).own > 0.0
        assert stage.network.activity(0).own == 0.0


async def test_from_outside_all_counts_while_a_command_runs(stage: Stage) -> None:
    async with serving(stage.net):
        stage.network.watch_commands(0, on=True)
        with closing(await connect(stage.net, "peer", POD4)):
            assert stage.active()


# --- the listener --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def answering(stage: Stage) -> AsyncIterator[list[tuple[Flow, Visitor] | None]]:
    """What criproxy.kubelet.answering does, in short: an answer, and the end. Yields what came."""
    seen: list[tuple[Flow, Visitor] | None] = []
    (listener,) = stage.network.listen()

    async def accept() -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            with closing(connection):
                seen.append(stage.network.accepted(connection))
                if await loop.sock_recv(connection, 1000):
                    await loop.sock_sendall(connection, b"answer")

    task = asyncio.create_task(accept())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        listener.close()


@pytest.mark.parametrize("mode", [Park.NEW, Park.ALL, Park.WAKE])
@pytest.mark.parametrize("address", [POD4, POD6, f"::ffff:{POD4}"])
async def test_the_listener_answers_kubelet(stage: Stage, address: str, mode: Park) -> None:
    stage.network.answer(0, {HTTP: KUBELET})
    async with answering(stage) as seen:
        stage.network.park(0, mode)
        with closing(await stage.connect(address)) as client:
            assert client.getpeername()[:2] == (address, 80)
            await send(client, GET)
            assert await receive(client, 6) == b"answer"
            assert await receive(client, 1) == b""
            here = client.getsockname()[0].removeprefix("::ffff:"), client.getsockname()[1]
        await settled(stage.net)
    assert seen == [(Flow("tcp", (address.removeprefix("::ffff:"), 80), here), Visitor.KUBELET)]
    assert stage.hook.packets == []
    assert stage.said() == []
    assert not stage.active()
    assert not any(s.connected for s in stage.network.sockets(["tcp"]))


@pytest.mark.parametrize("address", LO)
async def test_the_listener_answers_over_lo(stage: Stage, address: str) -> None:
    stage.network.answer(0, {HTTP: LOOPBACK})
    async with answering(stage) as seen:
        stage.network.park(0, Park.ALL)
        with closing(await connect(stage.net, "pod", address)) as client:
            await send(client, GET)
            assert await receive(client, 6) == b"answer"
            here = client.getsockname()[:2]
    assert seen == [(Flow("tcp", (address, 80), here), Visitor.LOOPBACK)]
    assert stage.hook.packets == []
    assert not stage.active()


async def test_ports_that_were_used_a_moment_ago_are_answered(stage: Stage) -> None:
    """The pod's end of the earlier connection is in TIME_WAIT: the first SYN ends it, and is sent once more."""
    stage.network.answer(0, {HTTP: KUBELET})
    name = ("", 0)
    async with answering(stage) as seen:
        stage.network.park(0, Park.ALL)
        for _ in range(3):
            with closing(stage.make()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                client.bind(name)
                async with asyncio.timeout(PATIENCE):
                    await asyncio.get_running_loop().sock_connect(client, (POD4, 80))
                await send(client, GET)
                assert await receive(client, 7) == b"answer"
                name = client.getsockname()
            await settled(stage.net)
    assert len(seen) == 3


async def test_a_listener_for_ipv4_alone(stage: Stage, net: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes over IPv6 all the same is parked, and wakes as ever."""
    listening = pod_namespace.listening

    def refuse(family: socket.AddressFamily, address: str) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "no IPv6")
        return listening(family, address)

    monkeypatch.setattr(pod_namespace, "listening", refuse)
    stage.network.answer(0, {HTTP: KUBELET})
    async with answering(stage), serving(net):
        stage.network.park(0, Park.ALL)
        with closing(await stage.connect(POD4)) as client:
            await send(client, GET)
            assert await receive(client, 6) == b"answer"
        connecting = asyncio.create_task(stage.connect(POD6))
        await stage.hook.wakes()
        stage.hook.wake()
        with closing(await connecting) as client:
            assert await ask(client, GET) == GET


async def test_everybody_else_wakes(stage: Stage) -> None:
    """A plain client with kubelet's address, kubelet where it is not to be answered, lo where only kubelet is."""
    stage.network.assign(0, {HTTP, Port("tcp", 81)})
    stage.network.answer(0, {HTTP: KUBELET})
    async with answering(stage) as seen, serving(stage.net), serving(stage.net, port=81):
        for connecting in (
            connect(stage.net, "node", POD4),
            connect(stage.net, "peer", POD6),
            connect(stage.net, "pod", "127.0.0.1"),
            stage.connect(port=81),
        ):
            stage.network.park(0, Park.ALL)
            waiting = asyncio.create_task(connecting)
            await stage.hook.wakes()
            assert [packet.probe for packet in stage.hook.packets] == [False]
            stage.hook.wake()
            with closing(await waiting) as client:
                assert await ask(client, b"x") == b"x"
    assert seen == []


async def test_nobody_speaks_to_the_listener_itself(stage: Stage) -> None:
    async with answering(stage) as seen:
        (listening,) = [s for s in stage.network.sockets(["tcp"]) if s.listening]
        with closing(await connect(stage.net, "pod", listening.local[0], listening.local[1])) as client:
            await send(client, GET)
            await receive(client, 6)
    assert seen == [None]


async def test_while_it_runs_the_application_is_asked(stage: Stage) -> None:
    stage.network.answer(0, {HTTP: KUBELET | LOOPBACK})
    async with answering(stage) as seen, serving(stage.net):
        with closing(await stage.connect()) as client:
            assert await ask(client, GET) == GET
        with closing(await connect(stage.net, "pod", "127.0.0.1")) as client:
            assert await ask(client, GET) == GET
    assert seen == []


@pytest.mark.parametrize("where", ["node", "pod"])
async def test_without_a_daemon_probes_wait_for_the_next_one(stage: Stage, net: Topology, where: str) -> None:
    address = POD4 if where == "node" else "127.0.0.1"
    stage.network.answer(0, {HTTP: KUBELET | LOOPBACK})
    stage.network.listen()[0].close()
    stage.network.park(0, Park.ALL)
    connecting = asyncio.create_task(stage.connect(address, where=where))
    (packet,) = await becomes(lambda: stage.hook.packets, "its SYN is parked")
    assert packet.probe
    assert not packet.wakes
    assert not stage.hook.wanted.is_set()
    # Too early: the kernel would refuse it.
    stage.network.send([packet])
    await becomes(lambda: stage.network.counters(0).dropped == 1, "it is dropped")
    assert not connecting.done()
    stage.network.close()
    with closing(PodNetwork.adopt(net.netns, net.pins)) as adopted:
        stage.network = adopted
        async with answering(stage) as seen:
            adopted.send([packet])
            assert adopted.mode(0) is Park.ALL
            with closing(await connecting) as client:
                await send(client, GET)
                assert await receive(client, 6) == b"answer"
            assert [visitor for _, visitor in filter(None, seen)] == [
                Visitor.KUBELET if where == "node" else Visitor.LOOPBACK
            ]
    stage.hook.network = PodNetwork.adopt(net.netns, net.pins)


async def test_who_waits_for_the_listener_gets_the_application_once_it_is_awake(stage: Stage) -> None:
    stage.network.answer(0, {HTTP: KUBELET})
    async with serving(stage.net):
        stage.network.park(0, Park.ALL)
        connecting = asyncio.create_task(stage.connect())
        packets = await becomes(lambda: stage.hook.packets, "its SYN is parked")
        assert [packet.probe for packet in packets] == [True]
        stage.hook.wake()
        with closing(await connecting) as client:
            assert await ask(client, GET) == GET
    await settled(stage.net)
    assert stage.said()[:4] == [("in", "S", b""), ("out", "S", b""), ("in", "", GET), ("out", "", GET)]
    assert not stage.active()


async def test_what_is_parked_is_shown_when_it_is_sent_again(stage: Stage) -> None:
    """Kubelet's first connection to a port where nothing was seen before wakes, and is learnt from."""
    async with serving(stage.net):
        stage.network.park(0, Park.ALL)
        connecting = asyncio.create_task(stage.connect())
        await stage.hook.wakes()
        assert stage.said() == []
        stage.hook.wake()
        with closing(await connecting) as client:
            assert await ask(client, GET) == GET
    assert [payload for _, _, payload in stage.said() if payload] == [GET, GET]


async def test_the_ports_of_a_sleeping_connection_wake(stage: Stage, net: Topology) -> None:
    """Kubelet has come round to ports that it used for a connection which the application still has."""
    stage.network.answer(0, {HTTP: KUBELET})
    async with answering(stage) as seen, serving(net):
        old = await stage.connect()
        name = old.getsockname()
        stage.hook.sleep()
        old.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        old.close()
        await asyncio.sleep(0.1)
        assert not stage.hook.wanted.is_set()
        with closing(stage.make()) as fresh:
            fresh.bind(name)
            connecting = asyncio.create_task(asyncio.get_running_loop().sock_connect(fresh, (POD4, 80)))
            await stage.hook.wakes()
            stage.hook.wake()
            await connecting
            assert await ask(fresh, GET) == GET
    assert seen == []


@pytest.mark.parametrize("address", [POD4, POD6])
async def test_behind_a_meshs_redirect(stage: Stage, net: Topology, address: str) -> None:
    """The rule gives the socket another port; the visitor's own one is known all the same."""
    tables = "iptables" if address == POD4 else "ip6tables"
    rule = "PREROUTING -t nat -i eth0 -p tcp --dport 80 -j REDIRECT --to-ports 15006"
    stage.network.answer(0, {HTTP: KUBELET})
    run(f"ip netns exec {net.pod} {tables} -A {rule}")
    try:
        async with answering(stage) as seen:
            stage.network.park(0, Park.ALL)
            with closing(await stage.connect(address)) as client:
                await send(client, GET)
                assert await receive(client, 6) == b"answer"
                assert seen == [(Flow("tcp", (address, 80), client.getsockname()[:2]), Visitor.KUBELET)]
    finally:
        run(f"ip netns exec {net.pod} {tables} -D {rule}")


async def test_quiet_ports_are_answered(stage: Stage) -> None:
    stage.network.assign(0, {HTTP}, quiet={Port("tcp", 9100)})
    stage.network.answer(0, {Port("tcp", 9100): KUBELET})
    async with answering(stage):
        stage.network.park(0, Park.ALL)
        with closing(await stage.connect(port=9100)) as client:
            await send(client, GET)
            assert await receive(client, 6) == b"answer"


async def test_the_application_listens_again_while_its_visitor_is_answered(stage: Stage) -> None:
    """The connection has the application's port."""
    stage.network.answer(0, {HTTP: KUBELET})
    async with answering(stage):
        stage.network.park(0, Park.ALL)
        with closing(await stage.connect()) as client:
            async with serving(stage.net):
                stage.network.park(0, Park.PASS)
                with closing(await connect(stage.net, "peer", POD4)) as other:
                    assert await ask(other, b"x") == b"x"
                await send(client, GET)
                assert await receive(client, 6) == b"answer"


async def test_answers_outlive_the_assignment_of_ports(stage: Stage) -> None:
    stage.network.answer(0, {HTTP: KUBELET, Port("tcp", 81): LOOPBACK})
    stage.network.assign(0, {Port("tcp", 81)})
    stage.network.assign(0, {HTTP, Port("tcp", 81)})
    async with answering(stage):
        stage.network.park(0, Park.ALL)
        with closing(await stage.connect()):
            pass
        stage.network.answer(0, {})
        waiting = asyncio.create_task(stage.connect())
        await stage.hook.wakes()
        waiting.cancel()


async def test_many_probes_while_it_sleeps_and_wakes(stage: Stage) -> None:
    """None is refused, reset or left hanging, whoever answers it."""
    stage.network.answer(0, {HTTP: KUBELET})
    asked = cycles = 0
    least = time.monotonic() + 2

    async with answering(stage) as seen, serving(stage.net):

        def enough() -> bool:
            """Each of the two has answered some, however slow the machine is."""
            return time.monotonic() > least and 0 < len(seen) < asked

        async def probe() -> None:
            nonlocal asked
            while not enough():
                with closing(await stage.connect(POD6 if asked % 2 else POD4)) as client:
                    await send(client, GET)
                    assert await receive(client, 6) in (b"answer", GET[:6])
                asked += 1

        async def sleeper() -> None:
            nonlocal cycles
            while not enough():
                stage.network.park(0, Park.NEW)
                await asyncio.sleep(0.002)
                stage.hook.sleep()
                await asyncio.sleep(0.01)
                stage.hook.wake()
                cycles += 1
                await asyncio.sleep(0.005)

        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(probe(), sleeper())
    print(f"{asked} probes, {len(seen)} answered by the listener, {cycles} cycles, {stage.network.counters(0)}")
    assert not stage.hook.wanted.is_set()


# --- finding it ----------------------------------------------------------------------------------------------------


async def test_the_next_daemon_carries_on(stage: Stage, net: Topology, cgroup: Path, kubelet: Kubelet) -> None:
    kubelet.close()
    async with serving(net):
        with closing(await stage.connect()):
            pass
        assert not stage.active()
        with closing(Kubelet(configured(cgroup), net.bpffs)) as again:
            again.look()
            assert (again.problem, again.cgroup) == ("", cgroup)
            with closing(await stage.connect()) as client:
                await ask(client, GET)
    assert not stage.active()


async def test_another_cgroup_of_the_same_name(net: Topology, hook: Hook) -> None:
    """Kubelet was restarted."""
    name = f"criproxy-test-{os.getpid()}"
    with closing(Kubelet(Config(kubelet_cgroup=name), net.bpffs)) as kubelet:
        kubelet.look(called=False)
        assert not kubelet.problem  # it may be about to start
        kubelet._failed = 0.0
        kubelet.look()
        assert f"there is no cgroup {cgroup2() / name}" in kubelet.problem
        for _ in range(2):
            kubelet._failed = 0.0
            with made_cgroup(name) as cgroup:
                kubelet.look()
                assert (kubelet.problem, kubelet.cgroup) == ("", cgroup)
                async with serving(net):
                    with closing(Process(cgroup)) as process, closing(await Stage(net, hook, process).connect()):
                        pass
        assert hook.last_activity() == 0.0
        kubelet.look()
        assert kubelet.cgroup is None
        assert kubelet.problem


async def test_found_by_the_name_of_the_process(net: Topology, hook: Hook, cgroup: Path) -> None:
    name = f"crikubel{os.getpid()}"[:15]
    with closing(Kubelet(Config(kubelet_process=name), net.bpffs)) as kubelet:
        with closing(Process(cgroup, name)) as process:
            kubelet.look()
            assert (kubelet.problem, kubelet.cgroup) == ("", cgroup)
            async with serving(net):
                with closing(await Stage(net, hook, process).connect()):
                    pass
        assert hook.last_activity() == 0.0
        kubelet.look()
        assert f"nor a process {name}" in kubelet.problem


async def test_addresses_as_a_last_resort(net: Topology, hook: Hook) -> None:
    with closing(Kubelet(Config(kubelet_process="nothing-at-all", kubelet_addresses=(NODE4,)), net.bpffs)) as kubelet:
        kubelet.look()
        assert f"Connections from {NODE4} are taken for kubelet's" in kubelet.problem
        async with serving(net):
            with closing(await connect(net, "node", POD4)):
                assert hook.last_activity() == 0.0
            with closing(await connect(net, "node", POD6)):
                assert hook.last_activity() > 0.0
    Kubelet(Config(kubelet_process="nothing-at-all"), net.bpffs).close()
    began = time.monotonic()
    async with serving(net):
        with closing(await connect(net, "node", POD4)):
            assert hook.last_activity() > began


def test_one_program_however_many_daemons(net: Topology, kubelet: Kubelet, cgroup: Path) -> None:
    for _ in range(3):
        with closing(Kubelet(configured(cgroup), net.bpffs)) as again:
            again.look()
    with closing(CgroupLink(net.bpffs / FOLDER / "link")) as link:
        assert link.cgroup() == cgroup.stat().st_ino
    assert sorted(pin.name for pin in (net.bpffs / FOLDER).iterdir()) == ["addresses", "connections", "link", "program"]
