"""Datagrams, and links other than a veth: what the hook has to do with them."""

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
from contextlib import closing

import pytest
from specimen import PATIENCE
from topology import POD4, POD6, Topology, family_of, make_socket, run, segment
from traffic import ADDRESSES, Hook, becomes, connect, plain, receive, serving

from criproxy.hook.pod_maps import Park
from criproxy.kernel.namespaces import in_network_namespace
from criproxy.policy import Port

UDP_SEGMENT = 103
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x1, 0x1000


async def arriving(server: socket.socket) -> tuple[bytes, tuple[str, int]]:
    async with asyncio.timeout(PATIENCE):
        return await asyncio.get_running_loop().sock_recvfrom(server, 9000)


# --- UDP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "address"), ADDRESSES)
async def test_datagrams_wait_in_their_order(net: Topology, hook: Hook, where: str, address: str) -> None:
    hook.network.assign(0, {Port("udp", 53)})
    family = family_of(address)
    with (
        closing(make_socket(net.pod, family, socket.SOCK_DGRAM)) as server,
        closing(make_socket(getattr(net, where), family, socket.SOCK_DGRAM)) as client,
    ):
        server.bind(("::" if ":" in address else "0.0.0.0", 53))
        hook.network.park(0, Park.ALL)
        # The largest doesn't fit into one packet: its first fragment waits here, the others in the kernel.
        messages = [str(n).encode() * (n + 1) for n in range(20)] + [os.urandom(5000), b"end"]
        for message in messages:
            client.sendto(message, (address, 53))
        await becomes(lambda: len(hook.packets) == len(messages), "each is parked, of the largest the first part")
        with pytest.raises(BlockingIOError):
            server.recvfrom(9000)
        assert hook.wanted.is_set()
        hook.wake()
        received = [await arriving(server) for _ in messages]
        # The one in fragments is complete when they meet, which is at once.
        assert [data for data, _ in received] == messages
        assert {peer[1] for _, peer in received} == {client.getsockname()[1]}


@pytest.mark.parametrize("address", [POD4, POD6])
async def test_datagrams_that_travel_as_one_arrive_as_many(net: Topology, hook: Hook, address: str) -> None:
    hook.network.assign(0, {Port("udp", 53)})
    family = family_of(address)
    with (
        closing(make_socket(net.pod, family, socket.SOCK_DGRAM)) as server,
        closing(make_socket(net.peer, family, socket.SOCK_DGRAM)) as client,
    ):
        server.bind((address, 53))
        client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        hook.network.park(0, Park.ALL)
        data = os.urandom(8500)
        client.sendto(data, (address, 53))
        await hook.wakes()
        hook.wake()
        parts = [(await arriving(server))[0] for _ in range(9)]
        assert parts == [data[n : n + 1000] for n in range(0, 8500, 1000)]


# --- other links -----------------------------------------------------------------------------------------------------


async def test_through_macvlan(net: Topology, hook: Hook) -> None:
    """A pod's link as the macvlan CNI plugin makes it, on the node's veth to the peer."""
    run(f"ip -n {net.peer} link add link eth0 name mac0 type macvlan mode bridge")
    run(f"ip -n {net.peer} link set mac0 netns {net.pod}")
    try:
        run(f"ip -n {net.pod} addr add 10.98.0.2/24 dev mac0")
        run(f"ip -n {net.pod} link set mac0 up")
        run(f"ip -n {net.node} addr add 10.98.0.1/24 dev br0")
        assert hook.network.problem() is None
        async with serving(net, b"hello") as clients:
            hook.network.park(0, Park.ALL)
            connecting = asyncio.create_task(connect(net, "node", "10.98.0.2"))
            await hook.wakes()
            hook.wake()
            with closing(await connecting) as client:
                assert await receive(client, 5) == b"hello"
                assert plain(clients[0][0]) == "10.98.0.1"
    finally:
        run(f"ip -n {net.pod} link del mac0")
        run(f"ip -n {net.node} addr del 10.98.0.1/24 dev br0")


async def test_a_link_without_link_headers(net: Topology, hook: Hook) -> None:
    """A tunnel (tun, ipip): its packets begin with the IP header, and have to get one to travel over lo."""

    def open_tun() -> int:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI))
        return tun

    if not os.path.exists("/dev/net/tun"):
        pytest.skip("this machine has no /dev/net/tun")
    tun = in_network_namespace(net.netns, open_tun)
    try:
        run(f"ip -n {net.pod} addr add 10.97.0.2/24 dev tun0")
        run(f"ip -n {net.pod} link set tun0 up")
        assert hook.network.problem() is None
        async with serving(net):
            hook.network.park(0, Park.ALL)
            os.write(tun, segment(("10.97.0.1", 4711), ("10.97.0.2", 80), 1, 0, 2, b""))
            await hook.wakes()
            hook.wake()
            answers: list[bytes] = []

            def answered() -> list[bytes]:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        answers.append(os.read(tun, 2000))
                return [answer for answer in answers if answer[0] == 0x45 and answer[9] == 6]

            assert (await becomes(answered, "TCP answers"))[0][20 + 13] == 0x12  # SYN and ACK
    finally:
        os.close(tun)
