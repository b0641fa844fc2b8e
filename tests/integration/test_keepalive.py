"""Connections whose socket is gone for a while, as CRIU takes it away: their peers' keep-alives are answered.

The socket is taken away and put back here as CRIU does it (TCP_REPAIR), so that sequence numbers, window and timestamps
are the kernel's own. What a container's checkpoint makes of it is the matter of test_cycles.py.
"""

import asyncio
import fcntl
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from specimen import PATIENCE
from topology import POD4, POD6, Topology, family_of, make_socket, path, segment
from traffic import ADDRESSES, HTTP, Hook, becomes, connect, receive, send, sent_again

from criproxy.hook.pod_maps import Park, Stream
from criproxy.kernel.namespaces import in_network_namespace
from criproxy.kernel.sockets import Flow

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS = 19, 20, 21, 22
TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 24, 29
NO_QUEUE, RECEIVED, SENT = 0, 1, 2
OPTION_WINDOW, OPTION_TIMESTAMP = 3, 8


@dataclass
class Sleeping:
    """The server's end of a connection, which is there no more."""

    name: str
    local: tuple[str, int]
    remote: tuple[str, int]
    numbers: dict[int, int]
    timestamp: int
    window: bytes
    options: bytes

    @property
    def flow(self) -> Flow:
        return Flow("tcp", self.local, self.remote)

    @property
    def stream(self) -> Stream:
        rcv_wnd, rcv_wup = struct.unpack("=12xII", self.window)
        return Stream(self.numbers[RECEIVED], self.numbers[SENT], (rcv_wup + rcv_wnd - self.numbers[RECEIVED]) >> 7,
                      self.timestamp)  # fmt: skip

    def wake(self) -> socket.socket:
        made = make_socket(self.name, family_of(self.local[0]))
        made.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        made.bind(self.local)
        for queue, number in self.numbers.items():
            made.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
            made.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, struct.pack("=I", number))
        made.connect(self.remote)
        made.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_OPTIONS, self.options)
        made.setsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP, struct.pack("=I", self.timestamp))
        made.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, self.window)
        made.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)
        made.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the kernel has taken it away with the repair mode
        return made


def take_away(net: Topology, server: socket.socket) -> Sleeping:
    """Its scale factors are those of the peer's side, too: both kernels are this one."""
    server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    numbers = {}
    for queue in (SENT, RECEIVED):
        server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        numbers[queue] = server.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF
    info = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    scales = (info[6] & 0xF) | (info[6] >> 4) << 16
    options = struct.pack("=IIII", OPTION_WINDOW, scales, OPTION_TIMESTAMP, 0)
    found = Sleeping(
        net.pod,
        server.getsockname()[:2],
        server.getpeername()[:2],
        numbers,
        server.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP) & 0xFFFFFFFF,
        server.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, 20),
        options,
    )
    server.close()
    return found


@asynccontextmanager
async def pair(net: Topology, where: str, address: str) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """A client and the server's end of its connection; the client has sent a byte and got one."""
    loop = asyncio.get_running_loop()
    with closing(make_socket(net.pod, family_of(address))) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, 80))
        listener.listen()
        with closing(await connect(net, where, address)) as client:
            server, _ = await loop.sock_accept(listener)
            with closing(server):
                await send(client, b"?")
                assert await receive(server, 1) == b"?"
                await send(server, b"!")
                assert await receive(client, 1) == b"!"
                # The delayed ACK.
                await becomes(lambda: acknowledged(server), "the client's kernel has acknowledged it")
                yield client, server


def acknowledged(server: socket.socket) -> bool:
    """SIOCOUTQ; tcp(7)."""
    return fcntl.ioctl(server, 0x5411, bytes(4)) == bytes(4)


def outdated(*names: str) -> int:
    """How many segments TCP has dropped in these namespaces for a timestamp older than the last one (PAWS)."""

    def count() -> int:
        head, values, *_ = (line.split() for line in Path("/proc/thread-self/net/netstat").read_text().splitlines())
        return int(values[head.index("PAWSEstab")])

    return sum(in_network_namespace(path(name), count) for name in names)


def impatient(client: socket.socket) -> None:
    """A keep-alive each second, and one without an answer is the connection's end."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


@pytest.mark.parametrize(("where", "address"), ADDRESSES)
async def test_the_hook_answers_and_the_connection_goes_on(net: Topology, hook: Hook, where: str, address: str) -> None:
    async with pair(net, where, address) as (client, server):
        before, old = hook.network.activity(0), outdated(net.pod, getattr(net, where))
        hook.network.park(0, Park.ALL, [Flow("tcp", server.getsockname()[:2], server.getpeername()[:2])])
        asleep = take_away(net, server)
        hook.network.stand_in(0, {asleep.flow: asleep.stream})
        impatient(client)
        await becomes(lambda: hook.network.counters(0).answered >= 2, "two keep-alives are answered")
        assert hook.network.counters(0).dropped == 0
        assert hook.packets == []
        assert hook.network.activity(0) == before
        with closing(asleep.wake()) as server:
            hook.wake()
            # With a sequence number that is off it never arrives; with a timestamp that is too old, at a later try.
            await send(server, b"from the server")
            assert await receive(client, 15) == b"from the server"
            await send(client, b"from the client" * 1000)
            assert await receive(server, 15000) == b"from the client" * 1000
        assert outdated(net.pod, getattr(net, where)) == old


async def test_without_an_answer_the_client_gives_up(net: Topology, hook: Hook) -> None:
    """What the answers are for."""
    async with pair(net, "peer", POD4) as (client, server):
        hook.network.park(0, Park.ALL, [Flow("tcp", server.getsockname(), server.getpeername())])
        take_away(net, server)
        impatient(client)
        with pytest.raises(TimeoutError, match="timed out"):
            await receive(client, 1)


async def test_what_wakes_comes_through_while_the_hook_answers(net: Topology, hook: Hook) -> None:
    for _ in range(5):
        async with pair(net, "peer", POD6) as (client, server):
            hook.network.park(0, Park.ALL, [Flow("tcp", server.getsockname()[:2], server.getpeername()[:2])])
            asleep = take_away(net, server)
            hook.network.stand_in(0, {asleep.flow: asleep.stream})
            await send(client, b"data")
            await hook.wakes()
            with closing(asleep.wake()) as server:
                hook.wake()
                assert await receive(server, 4) == b"data"
            # On a busy machine that may be because of the time that has gone by; what gets lost does so each time.
            if not sent_again(client):
                break
    else:
        pytest.fail("each time it had to be sent again")


async def test_a_keepalive_with_a_byte_and_without_timestamps_is_answered(net: Topology, hook: Hook) -> None:
    """As old BSDs send it; also checks each field of the answer."""
    with (
        closing(make_socket(net.peer, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)) as raw,
        closing(make_socket(net.peer, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)) as answers,
        closing(make_socket(net.peer, socket.AF_INET)) as placeholder,
    ):
        placeholder.bind(("10.99.0.3", 0))
        local, port = placeholder.getsockname()
        flow = Flow("tcp", (POD4, 80), (local, port))
        hook.network.park(0, Park.ALL, [flow])
        hook.network.stand_in(0, {flow: Stream(rcv_nxt=5, snd_nxt=0xFFFFFFFF, window=512, tsval=None)})
        for payload in (b"x", b""):
            raw.sendto(segment((local, port), (POD4, 80), 4, 17, 0x10, payload), (POD4, 0))
            async with asyncio.timeout(PATIENCE):
                while True:
                    answer = await asyncio.get_running_loop().sock_recv(answers, 100)
                    if answer[20:22] == struct.pack("!H", 80):
                        break
            # Source and target, numbers, length and flags, window, checksum as the test computes it.
            assert answer == segment((POD4, 80), (local, port), 0xFFFFFFFF, 5, 0x10, b"", window=512)
        assert hook.network.counters(0).answered == 2
        raw.sendto(segment((local, port), (POD4, 80), 5, 17, 0x10, b""), (POD4, 0))
        await becomes(lambda: hook.network.counters(0).dropped == 1, "what has no news is dropped")
        assert hook.network.counters(0).answered == 2


async def test_adopted_with_its_answers(net: Topology, hook: Hook) -> None:
    flow = Flow("tcp", (POD4, 80), ("10.99.0.3", 4711))
    hook.network.park(0, Park.ALL, [flow])
    hook.network.stand_in(0, {flow: Stream(1, 2, 3, 4), Flow("tcp", (POD4, 80), ("10.99.0.3", 1)): Stream(1, 2, 3, 4)})
    assert len(hook.network._maps["flows"].items()) == 1
    assert hook.network.ports(0) == (frozenset({HTTP}), frozenset())
