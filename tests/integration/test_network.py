"""The hook in a pod's network namespace, with real traffic. An application sleeps here by its packets being parked."""

import asyncio
import hashlib
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from contextlib import closing

import pytest
from topology import PEER4, POD4, POD6, Topology, make_socket, run, segment
from traffic import (
    ADDRESSES,
    HTTP,
    Hook,
    ask,
    becomes,
    connect,
    contextmanaged,
    plain,
    receive,
    send,
    sent_again,
    serving,
)

from criproxy.hook.network import PodNetwork
from criproxy.hook.pod_maps import Park, Talk
from criproxy.hook.slots import NetworkError
from criproxy.kernel.sockets import Flow
from criproxy.policy import Port

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21


# --- attaching -----------------------------------------------------------------------------------------------------


def test_detach_leaves_nothing(net: Topology) -> None:
    before, descriptors = net.inventory(), len(os.listdir("/proc/self/fd"))
    network = PodNetwork.attach(net.netns, net.pins)
    assert net.inventory() != before
    assert network.problem() is None
    network.detach()
    assert net.inventory() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_filters_and_qdiscs_of_others_stay(net: Topology) -> None:
    run(f"tc -n {net.pod} qdisc add dev eth0 clsact")
    try:
        run(f"tc -n {net.pod} filter add dev eth0 ingress pref 1 protocol all bpf bytecode '1,6 0 0 0,'")
        before = net.inventory()
        network = PodNetwork.attach(net.netns, net.pins)
        assert "pref 1 bpf" in run(f"tc -n {net.pod} filter show dev eth0 ingress")
        network.detach()
        assert net.inventory() == before
    finally:
        run(f"tc -n {net.pod} qdisc del dev eth0 clsact")


def test_settings_that_the_packets_need(net: Topology) -> None:
    network = PodNetwork.attach(net.netns, net.pins)
    settings = net.inventory()
    network.detach()
    assert settings["net.ipv4.conf.lo.route_localnet"] == settings["net.ipv4.conf.lo.accept_local"] == "1\n"
    assert settings["net.mptcp.enabled"] in ("0\n", "")


def test_a_missing_namespace_is_named(net: Topology) -> None:
    with pytest.raises(NetworkError, match="/run/netns/nowhere"):
        PodNetwork.attach(net.netns.with_name("nowhere"), net.pins)
    assert not net.pins.exists()


async def test_links_that_come_later_and_hooks_that_go(net: Topology, hook: Hook) -> None:
    run(f"ip -n {net.pod} link add later type bridge")
    try:
        assert hook.network.problem() is None
        assert "criproxy" in run(f"tc -n {net.pod} filter show dev later ingress")
        run(f"tc -n {net.pod} filter del dev eth0 ingress")
        assert hook.network.problem() is None
        assert "criproxy" in run(f"tc -n {net.pod} filter show dev eth0 ingress")
        run(f"tc -n {net.pod} qdisc del dev eth0 clsact")
        assert hook.network.problem() is None
        assert "criproxy" in run(f"tc -n {net.pod} filter show dev eth0 egress")
    finally:
        run(f"ip -n {net.pod} link del later")
    assert hook.network.problem() is None


async def test_what_is_put_back_is_told(net: Topology, hook: Hook) -> None:
    assert (hook.network.problem(), hook.network.repairs) == (None, 0)
    run(f"tc -n {net.pod} filter del dev eth0 ingress")
    assert (hook.network.problem(), hook.network.repairs) == (None, 1)


def test_of_a_hook_that_is_given_up_no_filter_stays(net: Topology) -> None:
    before = net.inventory()
    network = PodNetwork.attach(net.netns, net.pins)
    PodNetwork.strip(net.netns)
    for direction in ("ingress", "egress"):
        assert "criproxy" not in run(f"tc -n {net.pod} filter show dev eth0 {direction}")
    PodNetwork.strip(net.netns)
    network.detach()
    assert net.inventory() == before


async def test_a_link_that_cannot_be_hooked_is_a_problem(net: Topology, hook: Hook) -> None:
    run(f"tc -n {net.pod} qdisc del dev eth0 clsact")
    run(f"tc -n {net.pod} qdisc add dev eth0 ingress")  # takes clsact's place, and has no egress
    try:
        assert "eth0" in (hook.network.problem() or "")
    finally:
        run(f"tc -n {net.pod} qdisc del dev eth0 ingress")
    assert hook.network.problem() is None


# --- activity ------------------------------------------------------------------------------------------------------


async def test_activity_in_both_directions(net: Topology, hook: Hook) -> None:
    network = hook.network
    assert hook.last_activity() == 0.0
    async with serving(net):
        began = time.monotonic()
        with closing(await connect(net, "peer", POD4)) as client:
            connected = network.activity(0)
            assert began <= connected.received <= time.monotonic()
            await ask(client, b"request")
            answered = network.activity(0)
            assert answered.sent > answered.received > connected.received
            await asyncio.sleep(0.1)  # the delayed ACK
            assert network.activity(0) == answered
            client.close()  # FIN, and its answer
            await asyncio.sleep(0.1)
            assert network.activity(0) == answered
            assert answered.others_received == answered.others_sent == 0.0
    assert hook.last_activity(1) == 0.0


async def test_what_belongs_to_no_port_is_told_by_connection_with_the_same_times(net: Topology, hook: Hook) -> None:
    network = hook.network
    async with serving(net):
        network.assign(0, {Port("tcp", 81)})
        with closing(await connect(net, "peer", POD4)) as client:
            flow = Flow("tcp", (POD4, 80), client.getsockname())
            await ask(client, b"request")
            await asyncio.sleep(0.1)
            talk, seen = network.talk(flow), network.activity(0)
            assert talk is not None
            assert (seen.others_received, seen.others_sent) == (talk.received, talk.sent)
            sent, received = sequence_numbers(client)
            with closing(make_socket(net.peer, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)) as raw:
                raw.sendto(segment(client.getsockname(), (POD4, 80), sent - 7, received, 0x18, b"request"), (POD4, 0))
            assert network.activity(0) == seen  # once more


async def test_what_is_not_activity(net: Topology, hook: Hook) -> None:
    async with serving(net):
        client = await connect(net, "peer", POD4)
        await ask(client, b"x")
        before = hook.network.activity(0)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        await asyncio.sleep(1.5)
        run(f"ip netns exec {net.peer} ping -c 1 -W 1 {POD4}", check=False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()  # RST
        await asyncio.sleep(0.05)
        assert hook.network.activity(0) == before


async def test_a_keepalive_with_a_byte_is_not_activity(net: Topology, hook: Hook) -> None:
    async with serving(net):
        with (
            closing(await connect(net, "peer", POD4)) as client,
            closing(make_socket(net.peer, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)) as raw,
        ):
            await ask(client, b"x")
            await asyncio.sleep(0.1)
            sent, received = sequence_numbers(client)
            before = hook.network.activity(0)
            raw.sendto(segment(client.getsockname(), (POD4, 80), sent - 1, received, 0x10, b"x"), (POD4, 0))
            assert hook.network.activity(0) == before
            raw.sendto(segment(client.getsockname(), (POD4, 80), sent, received, 0x18, b"x"), (POD4, 0))
            await becomes(lambda: hook.network.activity(0).received > before.received, "data is activity")


def sequence_numbers(client: socket.socket) -> tuple[int, int]:
    """The next ones in each direction: to be sent, to be received."""
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    numbers = []
    for queue in (2, 1):
        client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        numbers.append(client.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF)
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, -1)
    return numbers[0], numbers[1]


async def test_a_request_that_is_sent_once_more_is_no_other_request(net: Topology, hook: Hook) -> None:
    async with serving(net):
        with (
            closing(await connect(net, "peer", POD4)) as client,
            closing(make_socket(net.peer, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)) as raw,
        ):
            flow = Flow("tcp", (POD4, 80), client.getsockname())
            await ask(client, b"request")
            await asyncio.sleep(0.1)
            sent, received = sequence_numbers(client)
            answered = hook.network.talk(flow)
            assert answered is not None
            assert answered.sent > answered.received
            for data in (b"request", b"quest"):
                again = segment(client.getsockname(), (POD4, 80), sent - len(data), received, 0x18, data)
                raw.sendto(again, (POD4, 0))
                assert hook.network.talk(flow) == answered
            # A client's kernel may repeat together with what is new. (By its checksum the server won't see it.)
            longer = segment(client.getsockname(), (POD4, 80), sent - 5, received, 0x18, b"quest, another")
            raw.sendto(longer[:-1] + b"!", (POD4, 0))

            def asked_again() -> bool:
                talk = hook.network.talk(flow)
                return talk is not None and talk.received > answered.sent

            await becomes(asked_again, "it is another request")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    """Of HTTP/2: RFC 9113, 4.1."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + bytes(4) + payload


async def test_what_http2_says_for_itself_is_neither_request_nor_answer(net: Topology, hook: Hook) -> None:
    settings, acknowledged = frame(4, 0, bytes(6)), frame(4, 1)
    ping, window, request = frame(6, 1, bytes(8)), frame(8, 0, b"\0\0\1\0"), frame(1, 4, b"hpack")
    async with serving(net):
        with closing(await connect(net, "peer", POD4)) as client:
            flow = Flow("tcp", (POD4, 80), client.getsockname())

            async def talk(payload: bytes) -> Talk:
                await ask(client, payload)  # it comes back as the answer
                await asyncio.sleep(0.05)
                found = hook.network.talk(flow)
                assert found is not None
                return found

            opened = await talk(PREFACE + settings)
            assert opened.http2
            assert await talk(ping + window + acknowledged) == opened
            asked = await talk(window + request)
            assert asked.received > opened.received
            assert asked.sent > opened.sent
            assert await talk(ping[:-1] + b"x") == asked
            assert (await talk(ping[:-1])).received > asked.received


async def test_outgoing_connections_count_for_every_slot(net: Topology, hook: Hook) -> None:
    with closing(make_socket(net.peer, socket.AF_INET)) as listener:
        listener.bind((PEER4, 5432))
        listener.listen()
        began = time.monotonic()
        with closing(await connect(net, "pod", PEER4, 5432)):
            assert hook.last_activity(0) >= began
            assert hook.last_activity(5) >= began
            assert hook.network.activity(0).sent == 0.0


async def test_udp_counts_on_listed_ports(net: Topology, hook: Hook) -> None:
    with (
        closing(make_socket(net.pod, socket.AF_INET, socket.SOCK_DGRAM)) as server,
        closing(make_socket(net.peer, socket.AF_INET, socket.SOCK_DGRAM)) as client,
    ):
        server.bind((POD4, 53))
        client.sendto(b"q", (POD4, 53))
        assert hook.last_activity(0) == 0.0
        hook.network.assign(0, {HTTP, Port("udp", 53)})
        client.sendto(b"q", (POD4, 53))
        await becomes(lambda: hook.last_activity(0), "it counts")


async def test_sockets_tell_what_waits(net: Topology, hook: Hook) -> None:
    with closing(make_socket(net.pod, socket.AF_INET6)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::", 80))
        listener.listen(7)
        with closing(await connect(net, "peer", POD4)) as client:
            await send(client, b"four")
            in_queue = lambda: any(s.connected and s.receive_queue for s in hook.network.sockets())  # noqa: E731
            await becomes(in_queue, "it has come")
            found = {s.state: s for s in hook.network.sockets() if s.port == HTTP}
            assert found["LISTEN"].listening
            assert (found["LISTEN"].receive_queue, found["LISTEN"].send_queue) == (1, 7)
            assert found["LISTEN"].inode == os.fstat(listener.fileno()).st_ino
            waiting = found["ESTABLISHED"]
            assert (waiting.inode, waiting.receive_queue) == (0, 4)
            assert waiting.flow == Flow("tcp", (POD4, 80), client.getsockname())
            with closing((await asyncio.get_running_loop().sock_accept(listener))[0]) as server:
                await asyncio.sleep(0.1)
                await send(server, b"answer")
                (accepted,) = [s for s in hook.network.sockets(["tcp"]) if s.connected]
                assert accepted.inode == os.fstat(server.fileno()).st_ino
                assert accepted.last_received is not None
                assert accepted.last_sent is not None
                # Milliseconds ago, in ticks of some.
                assert accepted.last_received - accepted.last_sent >= 80


# --- parking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "address"), ADDRESSES)
@pytest.mark.parametrize("mode", [Park.NEW, Park.ALL])
async def test_a_new_connection_waits_and_is_served(
    net: Topology, hook: Hook, where: str, address: str, mode: Park
) -> None:
    # The server speaks first: nothing but the SYN can wake it, and a lost ACK would have to be made up for.
    async with serving(net, greeting=b"hello") as clients:
        for _ in range(10):
            hook.network.park(0, mode)
            connecting = asyncio.create_task(connect(net, where, address))
            await hook.wakes()
            await asyncio.sleep(0.02)  # the restore
            assert not connecting.done()
            hook.wake()
            with closing(await connecting) as client:
                assert await receive(client, 5) == b"hello"
                (peer,) = clients
                assert (plain(peer.address), peer.port) == client.getsockname()[:2]
                assert await ask(client, b"more") == b"more"
                # On a busy machine that may be because a second has gone by; what gets lost does so each time.
                if not peer.sent_again and not sent_again(client):
                    break
            clients.clear()
        else:
            pytest.fail("each time something had to be sent again")


@pytest.mark.parametrize(("where", "address"), ADDRESSES)
async def test_an_established_connection_waits_and_goes_on(net: Topology, hook: Hook, where: str, address: str) -> None:
    async with serving(net), contextmanaged(await connect(net, where, address)) as client:
        for cycle in range(5):
            assert await ask(client, b"before") == b"before"
            await asyncio.sleep(0.05)
            hook.sleep()
            message = f"cycle {cycle}".encode()
            await send(client, message)
            await hook.wakes()
            with pytest.raises(TimeoutError):
                await receive(client, len(message), timeout=0.02)
            hook.wake()
            assert await receive(client, len(message)) == message


@pytest.mark.parametrize("address", [POD4, POD6])
@pytest.mark.parametrize("where", ["peer", "pod"])
async def test_large_sends_arrive_whole(net: Topology, hook: Hook, where: str, address: str) -> None:
    data = os.urandom(8 << 20)
    async with serving(net), contextmanaged(await connect(net, where, address)) as client:
        await ask(client, os.urandom(1 << 20))  # the congestion window grows
        answer = asyncio.create_task(receive(client, len(data)))
        sending = asyncio.create_task(send(client, data))
        while not sending.done():
            hook.sleep()
            await asyncio.sleep(0.01)
            hook.wake()
            await asyncio.sleep(0.005)
        await sending
        assert hashlib.sha256(await answer).digest() == hashlib.sha256(data).digest()
        print(f"largest frame {hook.largest}, {hook.network.counters(0)}")
        assert hook.largest > 9000
        assert hook.network.corrupt == 0


async def test_end_of_a_connection_waits_and_does_not_wake(net: Topology, hook: Hook) -> None:
    async with serving(net):
        closed, aborted = await connect(net, "peer", POD4), await connect(net, "peer", POD4)
        await ask(closed, b"x")
        await asyncio.sleep(0.05)
        hook.sleep()
        closed.close()
        aborted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        aborted.close()
        # The FIN once more after 200 ms.
        ends = {(True, False), (False, True)}
        await becomes(lambda: {(packet.fin, packet.rst) for packet in hook.packets} == ends, "both are parked")
        assert not hook.wanted.is_set()
        assert sum(s.state == "ESTABLISHED" for s in hook.network.sockets()) == 2
        hook.wake()
        await becomes(lambda: not open_connections(hook), "both have ended")


def open_connections(hook: Hook) -> bool:
    return any(s.state in ("ESTABLISHED", "CLOSE_WAIT") for s in hook.network.sockets())


async def test_keepalives_are_not_parked(net: Topology, hook: Hook) -> None:
    async with serving(net), contextmanaged(await connect(net, "peer", POD4)) as client:
        hook.sleep()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        await becomes(lambda: hook.network.counters(0).dropped, "a keep-alive has come")
        await asyncio.sleep(0.05)
        assert hook.packets == []
        hook.network.park(0, Park.PASS)
        assert await ask(client, b"alive") == b"alive"


async def test_mode_new_lets_existing_connections_go_on(net: Topology, hook: Hook) -> None:
    async with serving(net), contextmanaged(await connect(net, "peer", POD4)) as client:
        hook.network.park(0, Park.NEW)
        assert await ask(client, b"x") == b"x"
        assert hook.packets == []


async def test_outgoing_connections_are_parked_by_their_flow(net: Topology, hook: Hook) -> None:
    with closing(make_socket(net.peer, socket.AF_INET)) as listener:
        listener.bind((PEER4, 5432))
        listener.listen()
        with (
            closing(await connect(net, "pod", PEER4, 5432)) as client,
            closing(await connect(net, "pod", PEER4, 5432)) as bystander,
        ):
            loop = asyncio.get_running_loop()
            accepted = [(await loop.sock_accept(listener))[0] for _ in range(2)]
            flow = Flow("tcp", client.getsockname(), (PEER4, 5432))
            assert flow in [s.flow for s in hook.network.sockets() if s.connected]
            hook.network.park(0, Park.ALL, [flow])
            for connection in accepted:
                await send(connection, b"row")
            assert await receive(bystander, 3) == b"row"
            with pytest.raises(TimeoutError):
                await receive(client, 3, timeout=0.05)
            hook.wake()
            assert await receive(client, 3) == b"row"
            for connection in accepted:
                connection.close()


async def test_connections_of_others_pass(net: Topology, hook: Hook) -> None:
    """A sidecar has them on the application's own port (TPROXY), or the kernel ends them without an owner."""
    async with serving(net), contextmanaged(await connect(net, "peer", POD4)) as client:
        hook.network.park(0, Park.ALL)
        assert await ask(client, b"x") == b"x"
        client.close()
        await becomes(lambda: not any(s.connected for s in hook.network.sockets()), "its end passes")
        assert hook.packets == []


async def test_slots_are_apart(net: Topology, hook: Hook) -> None:
    hook.network.assign(3, {Port("tcp", 81)})
    async with serving(net, b"zero"), serving(net, b"three", port=81):
        hook.network.park(3, Park.ALL)
        with closing(await connect(net, "peer", POD4)) as client:
            assert await receive(client, 4) == b"zero"
        assert hook.network.mode(0) is Park.PASS
        waiting = asyncio.create_task(connect(net, "peer", POD4, 81))
        await hook.wakes()
        assert {packet.slot for packet in hook.packets} == {3}
        hook.network.park(0, Park.ALL)
        hook.wake(3)
        with closing(await waiting) as client:
            assert await receive(client, 5) == b"three"
        assert hook.network.mode(0) is Park.ALL


async def test_quiet_ports_neither_count_nor_wake(net: Topology, hook: Hook) -> None:
    hook.network.assign(0, {HTTP}, quiet={Port("tcp", 9100)})
    async with serving(net, port=9100):
        with closing(await connect(net, "peer", POD4, 9100)) as client:
            assert await ask(client, b"x") == b"x"
        await asyncio.sleep(0.05)
        assert hook.last_activity(0) == 0.0
        hook.network.park(0, Park.ALL)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await connect(net, "peer", POD4, 9100)
        assert hook.packets == []
        assert hook.network.counters(0).quiet >= 1


# --- what may go wrong -----------------------------------------------------------------------------------------------


async def test_an_overflow_is_counted_and_tcp_recovers(net: Topology) -> None:
    network = PodNetwork.attach(net.netns, net.pins, ring_bytes=8192)
    try:
        network.assign(0, {HTTP})
        hook = Hook(network)
        async with serving(net), contextmanaged(await connect(net, "peer", POD4)) as client:
            await ask(client, b"x" * 100_000)
            hook.sleep()
            data = os.urandom(300_000)
            answer = asyncio.create_task(receive(client, len(data)))
            sending = asyncio.create_task(send(client, data))
            await becomes(lambda: network.counters(0).overflowed, "it is full")
            hook.wake()
            await sending
            assert await answer == data
    finally:
        network.detach()


async def test_marks_of_a_container_open_nothing(net: Topology, hook: Hook) -> None:
    async with serving(net):
        hook.network.park(0, Park.ALL)
        for mark in (1, 0xC71, 0xFFFFFFFF, *struct.unpack("8I", os.urandom(32))):
            with closing(make_socket(net.pod, socket.AF_INET)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("I", mark))
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.03):
                        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", 80))
        # By their ports, as SYNs come again.
        await becomes(lambda: len({str(packet) for packet in hook.packets}) == 11, "each is parked")


async def test_the_private_mark_does_not_reach_the_pod(net: Topology, hook: Hook) -> None:
    """A rule by mark would send our packets elsewhere: `fwmark_reflect` shows which one they came in with."""
    run(f"ip netns exec {net.pod} sysctl -qw net.ipv4.tcp_fwmark_accept=1")
    with closing(make_socket(net.pod, socket.AF_INET)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((POD4, 80))
        listener.listen()
        hook.network.park(0, Park.ALL)
        connecting = asyncio.create_task(connect(net, "peer", POD4))
        await hook.wakes()
        hook.wake()
        with closing(await connecting), closing((await asyncio.get_running_loop().sock_accept(listener))[0]) as server:
            assert server.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0


async def test_a_damaged_packet_is_not_delivered(net: Topology, hook: Hook) -> None:
    async with serving(net):
        hook.network.park(0, Park.ALL)
        with closing(make_socket(net.peer, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)) as raw:
            good = bytearray(segment((PEER4, 4711), (POD4, 80), 1, 0, 2, b""))
            good[36] ^= 0x55
            raw.sendto(good, (POD4, 0))
        await hook.wakes()
        (packet,) = hook.packets
        assert hook.network.send([packet]) == 0
        assert hook.network.corrupt == 1
        assert not any(s.state == "SYN_RECV" for s in hook.network.sockets())


async def test_many_connections_at_random_paces(net: Topology, hook: Hook) -> None:
    """No answer is lost, doubled or out of order while the slot is parked and woken again and again."""
    until = time.monotonic() + 3
    cycles = 0

    def go_on() -> bool:
        return time.monotonic() < until or cycles <= 10

    async def keep_alive(address: str, where: str) -> int:
        with closing(await connect(net, where, address)) as client:
            asked = 0
            while go_on():
                message = struct.pack("!I", asked) * (1 + asked % 900)
                assert await ask(client, message) == message
                asked += 1
                await asyncio.sleep(0.001 * (asked % 7))
        return asked

    async def afresh(address: str, where: str) -> int:
        asked = 0
        while go_on():
            with closing(await connect(net, where, address)) as client:
                assert await ask(client, b"new") == b"new"
            asked += 1
        return asked

    async def sleeper() -> None:
        nonlocal cycles
        while True:
            hook.network.park(0, Park.NEW)
            await asyncio.sleep(0.001)
            hook.sleep()
            await hook.wanted.wait()
            await asyncio.sleep(0.002)
            hook.wake()
            cycles += 1
            await asyncio.sleep(0.003)

    async with serving(net):
        clients: list[Callable[[str, str], Awaitable[int]]] = [keep_alive, afresh]
        paths = [(POD4, "peer"), (POD6, "peer"), (POD4, "node"), ("127.0.0.1", "pod"), ("::1", "pod"), (POD4, "pod")]
        # After the last client nobody wakes it: it would wait for ever.
        sleeping = asyncio.create_task(sleeper())
        asked = await asyncio.gather(*(c(*p) for c in clients for p in paths))
        sleeping.cancel()
        print(f"{sum(asked)} requests, {cycles} cycles, {hook.network.counters(0)}")


# --- after a restart of the daemon -----------------------------------------------------------------------------------


async def test_adopt_finds_everything(net: Topology, hook: Hook) -> None:
    network = hook.network
    network.assign(2, {HTTP, Port("tcp", 81)}, quiet={Port("tcp", 82)})
    async with serving(net, b"hello"):
        flow = Flow("tcp", (POD4, 1234), (PEER4, 5678))
        network.park(2, Park.ALL, [flow])
        network.close()
        waiting = asyncio.create_task(connect(net, "peer", POD6))
        await asyncio.sleep(0.05)  # parked while nobody is there
        with closing(PodNetwork.adopt(net.netns, net.pins)) as adopted:
            assert adopted.mode(2) is Park.ALL
            assert adopted.mode(0) is Park.PASS
            await becomes(lambda: adopted.counters(2).parked, "it is parked")
            assert adopted.activity(2).own > 0
            assert adopted.problem() is None
            again = Hook(adopted)
            await again.wakes()
            again.wake(2)
            with closing(await waiting) as client:
                assert await receive(client, 5) == b"hello"
            adopted.assign(2, set())
            assert adopted._maps["ports"].items() == []
            assert adopted._maps["flows"].items() == []
    hook.network = PodNetwork.adopt(net.netns, net.pins)
    hook.network.detach()
    assert not net.pins.exists()


async def test_adopt_without_a_hook(net: Topology) -> None:
    with pytest.raises(Exception, match="pinned"):
        PodNetwork.adopt(net.netns, net.pins)
