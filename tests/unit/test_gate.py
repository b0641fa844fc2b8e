"""A container's share of its pod's network, against a hook and sockets that the test makes up."""

from __future__ import annotations

import collections.abc
import dataclasses
import socket
import struct
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pytest

from criproxy.hook.gate import Gate
from criproxy.hook.pod_maps import Activity, Counters, Park, Parked, Stream, Talk, Visitor, Watched
from criproxy.kernel.sockets import Flow, Proto, Socket
from criproxy.kubelet.probes import Probes
from criproxy.policy import Port

HTTP, METRICS, DNS = Port("tcp", 80), Port("tcp", 9100), Port("udp", 53)
POD, CLIENT, SERVER = "10.0.0.2", "10.0.0.5", "10.0.0.9"
OURS, THEIRS = 1, 2  # inodes


class FakeNetwork:
    def __init__(self) -> None:
        self.all: list[Socket] = []
        self.known: dict[Flow, Talk] = {}
        self.seen = Activity(0.0, 0.0, 0.0, 0.0)
        self.assigned: tuple[set[Port], set[Port]] = (set(), set())
        self.flows: list[Flow] = []
        self.sent: list[Parked] = []
        self.answered: Mapping[Port, Collection[Visitor]] = {}
        self.watching = False
        self.opened: list[Flow] = []
        self.counted: list[Flow] = []
        self.free = 100

    def answer(self, slot: int, ports: Mapping[Port, Collection[Visitor]]) -> None:
        self.answered = ports

    def watch_commands(self, slot: int, on: bool) -> None:
        self.watching = on

    def commands(self, slot: int) -> list[Flow]:
        return self.opened

    def not_a_probe(self, flow: Flow) -> None:
        self.counted.append(flow)

    def sockets(
        self, protos: Sequence[Proto] = ("tcp", "udp"), inodes: collections.abc.Set[int] | None = None
    ) -> list[Socket]:
        return [s for s in self.all if s.proto in protos and (inodes is None or s.inode in inodes)]

    def handshakes(self) -> list[Socket]:
        return [s for s in self.all if s.state == "SYN_RECV"]

    def talk(self, flow: Flow) -> Talk | None:
        return self.known.get(flow)

    def talks(self) -> dict[Flow, Talk]:
        return self.known

    def counters(self, slot: int) -> Counters:
        return Counters(parked=12, parked_bytes=600, overflowed=3, dropped=0, quiet=0, answered=0)

    def activity(self, slot: int) -> Activity:
        return self.seen

    def ports(self, slot: int) -> tuple[frozenset[Port], frozenset[Port]]:
        return frozenset(self.assigned[0]), frozenset(self.assigned[1])

    def all_ports(self) -> frozenset[Port]:
        return frozenset(self.assigned[0] | self.assigned[1])

    def assign(self, slot: int, ports: Collection[Port], quiet: Collection[Port] = ()) -> None:
        self.assigned = set(ports), set(quiet)

    def room(self, slot: int) -> int:
        return self.free

    def park(self, slot: int, mode: Park, flows: Iterable[Flow] = ()) -> None:
        self.flows = list(flows)

    def stand_in(self, slot: int, streams: Mapping[Flow, Stream]) -> None: ...

    def poll(self) -> None: ...

    def send(self, packets: Sequence[Parked]) -> None:
        self.sent += packets


@pytest.fixture
def network() -> FakeNetwork:
    made = FakeNetwork()
    made.all = [listener(80), listener(9100)]
    return made


def gate(network: FakeNetwork, **options: Any) -> Gate:
    settings: dict[str, Any] = {"declared": frozenset(), "request_timeout": 600.0, **options}
    made = Gate(
        network,  # type: ignore[arg-type]
        0,
        Probes(None),
        socket_inodes=lambda: {OURS},
        parking_packets=10,
        parking_bytes=10_000,
        **settings,
    )
    made.silent()
    return made


def listener(port: int, inode: int = OURS, queue: int = 0) -> Socket:
    return Socket("tcp", "LISTEN", ("::", port), ("::", 0), inode, queue, 16, None, None)


def connection(
    port: int,
    *,
    received: int,
    sent: int,
    inode: int = OURS,
    unread: int = 0,
    state: str = "ESTABLISHED",
    remote: tuple[str, int] = (CLIENT, 4711),
) -> Socket:
    """`received`, `sent`: milliseconds ago."""
    return Socket("tcp", state, (POD, port), remote, inode, unread, 0, received, sent)


def ago(received: float, sent: float) -> Talk:
    now = time.monotonic()
    return Talk(now - received, now - sent)


# --- requests ------------------------------------------------------------------------------------------------------


def test_a_request_without_its_answer_holds_awake(network: FakeNetwork) -> None:
    network.all.append(connection(80, received=3000, sent=9000))
    expected = "a request from 10.0.0.5:4711 to port 80 waits for its answer since 3.0 s"
    assert gate(network).unsettled() == expected


def test_an_answered_request_does_not(network: FakeNetwork) -> None:
    network.all.append(connection(80, received=3000, sent=2996))
    assert gate(network).unsettled() is None


def test_a_connection_without_a_request_does_not(network: FakeNetwork) -> None:
    """Just made, or just restored: the kernel's clocks begin together."""
    network.all.append(connection(80, received=3000, sent=3000))
    assert gate(network).unsettled() is None


@pytest.mark.parametrize(("talk", "busy"), [(ago(3.0, 3.0001), True), (ago(3.0001, 3.0), False)])
def test_within_a_tick_the_hook_tells_what_came_last(network: FakeNetwork, talk: Talk, busy: bool) -> None:
    one = connection(80, received=3000, sent=3000)
    network.all.append(one)
    network.known[one.flow] = talk
    assert (gate(network).unsettled() is not None) == busy


def test_what_was_sent_twice_is_not_a_new_request(network: FakeNetwork) -> None:
    one = connection(80, received=3000, sent=2996)
    network.all.append(one)
    network.known[one.flow] = ago(1.0, 2.996)
    assert gate(network).unsettled() is None


def test_it_ends_with_the_timeout(network: FakeNetwork) -> None:
    network.all.append(connection(80, received=3000, sent=9000))
    assert gate(network, request_timeout=4.0).unsettled() is not None
    assert gate(network, request_timeout=2.0).unsettled() is None
    assert gate(network, request_timeout=0.0).unsettled() is None


def test_a_client_that_has_ended_its_side_still_waits(network: FakeNetwork) -> None:
    network.all.append(connection(80, received=3000, sent=9000, state="CLOSE_WAIT", unread=1))
    assert "waits for its answer" in (gate(network).unsettled() or "")


def test_what_a_server_has_answered_the_container_asks_for_nothing(network: FakeNetwork) -> None:
    network.all.append(connection(40000, received=3000, sent=9000, remote=(SERVER, 5432)))
    assert gate(network).unsettled() is None


def test_unread_data_holds_awake(network: FakeNetwork) -> None:
    network.all.append(connection(40000, received=3000, sent=9000, remote=(SERVER, 5432), unread=7))
    assert gate(network).unsettled() == "data from 10.0.0.9:5432 waits to be read since 3.0 s"
    network.all[-1] = connection(40000, received=3000, sent=9000, unread=1, state="CLOSE_WAIT")
    assert gate(network).unsettled() is None  # the end of the connection


def test_more_connections_than_the_hook_has_room_for_hold(network: FakeNetwork) -> None:
    network.all += [connection(80, received=3000, sent=2996, remote=(CLIENT, port)) for port in range(5000, 5101)]
    assert (gate(network).unsettled() or "").startswith("101 connections are open")
    network.free = 101
    assert gate(network).unsettled() is None


def test_sockets_of_others_do_not_hold(network: FakeNetwork) -> None:
    network.all.append(connection(80, received=3000, sent=9000, inode=THEIRS))
    assert gate(network).unsettled() is None


def test_an_unread_datagram_holds_awake(network: FakeNetwork) -> None:
    network.all.append(Socket("udp", "CLOSE", ("::", 53), ("::", 0), OURS, 100, 0, None, None))
    network.seen = Activity(time.monotonic() - 3, 0.0, 0.0, 0.0)
    assert gate(network, declared=frozenset({DNS})).unsettled() == "a datagram on port 53/udp isn't read yet"
    assert gate(network, declared=frozenset({DNS}), request_timeout=2.0).unsettled() is None
    assert gate(network).unsettled() is None  # nobody waits for what isn't declared


def test_handshakes_and_queues(network: FakeNetwork) -> None:
    network.all.append(Socket("tcp", "SYN_RECV", (POD, 80), (CLIENT, 1), 0, 0, 0, None, None))
    assert "handshake" in (gate(network).unsettled() or "")
    network.all[-1] = listener(80, queue=1)
    assert "waits to be accepted" in (gate(network).unsettled() or "")
    network.all[-1] = connection(40000, received=0, sent=0, state="SYN_SENT", remote=(SERVER, 1))
    assert gate(network).unsettled() == "a connection to 10.0.0.9:1 is being opened"


# --- ports ---------------------------------------------------------------------------------------------------------


def test_quiet_ports_are_those_that_it_listens_on(network: FakeNetwork) -> None:
    made = gate(network, quiet=frozenset({METRICS, Port("tcp", 9200)}))
    assert network.assigned == ({HTTP}, {METRICS})
    assert made.silent() is None
    network.all = [listener(9100)]
    assert made.silent() == "listens on no port, so no packet could wake it"


def test_a_request_to_a_quiet_port_is_brought_to_its_end_but_holds_no_longer(network: FakeNetwork) -> None:
    network.all.append(connection(9100, received=500, sent=9000))
    assert gate(network, quiet=frozenset({METRICS})).unsettled() is not None
    network.all[-1] = connection(9100, received=1500, sent=9000)
    assert gate(network, quiet=frozenset({METRICS})).unsettled() is None


def test_while_it_listens_nowhere_its_ports_stay(network: FakeNetwork) -> None:
    gate_ = gate(network, declared=frozenset({Port("tcp", 443)}), quiet=frozenset({METRICS}))
    before = network.assigned
    assert before == ({Port("tcp", 443), HTTP}, {METRICS})
    network.all = []
    assert "doesn't listen on 443/tcp" in (gate_.silent() or "")
    assert network.assigned == before


def test_declared_udp_ports_must_be_bound(network: FakeNetwork) -> None:
    made = gate(network, declared=frozenset({DNS}))
    assert made.silent() == "doesn't listen on 53/udp (yet)"
    network.all.append(Socket("udp", "CLOSE", ("::", 53), ("::", 0), OURS, 0, 0, None, None))
    assert made.silent() is None
    assert network.assigned == ({HTTP, METRICS, DNS}, set())


def test_an_adopted_slot_keeps_its_ports(network: FakeNetwork) -> None:
    network.assigned = ({HTTP}, {METRICS})
    network.all = []  # it sleeps
    Gate(
        network,  # type: ignore[arg-type]
        0,
        Probes(None),
        declared=frozenset({DNS}),
        quiet=frozenset({METRICS}),
        socket_inodes=set,
        request_timeout=1.0,
        parking_packets=1,
        parking_bytes=1,
    )
    assert network.assigned == ({HTTP, DNS}, {METRICS})


def test_an_application_that_is_started_afresh_keeps_its_ports_until_it_listens(network: FakeNetwork) -> None:
    made = gate(network)
    network.all = []
    assert made.silent() is not None
    assert network.assigned == ({HTTP, METRICS}, set())
    network.all = [listener(81)]
    assert made.silent() is None
    assert network.assigned == ({Port("tcp", 81)}, set())


# --- whose traffic -------------------------------------------------------------------------------------------------


def test_its_own_outgoing_connections_count(network: FakeNetwork) -> None:
    one = connection(40000, received=10, sent=10, remote=(SERVER, 5432))
    network.all.append(one)
    network.known[one.flow] = Talk(5.0, 6.0)
    network.seen = Activity(1.0, 2.0, 5.0, 6.0)
    assert gate(network).last_activity() == 6.0


def test_those_of_another_container_do_not(network: FakeNetwork) -> None:
    out = connection(40000, received=10, sent=10, remote=(SERVER, 5432), inode=THEIRS)
    network.all += [out, listener(15090, THEIRS)]
    network.known[out.flow] = Talk(5.0, 6.0)
    scrape = Flow("tcp", (POD, 15090), (CLIENT, 1))  # over already
    network.known[scrape] = Talk(7.0, 8.0)
    network.seen = Activity(1.0, 2.0, 7.0, 8.0)
    assert gate(network).last_activity() == 2.0


def test_quiet_ports_do_not_count_before_it_is_known_who_listens(network: FakeNetwork) -> None:
    made = gate(network, quiet=frozenset({Port("tcp", 9300)}))
    network.known[Flow("tcp", (POD, 9300), (CLIENT, 1))] = Talk(5.0, 6.0)
    network.seen = Activity(1.0, 2.0, 5.0, 6.0)
    assert made.last_activity() == 2.0


def test_what_may_have_been_its_own_counts(network: FakeNetwork) -> None:
    network.known[Flow("tcp", (POD, 40000), (SERVER, 5432))] = Talk(5.0, 6.0)
    network.seen = Activity(1.0, 2.0, 5.0, 6.0)
    assert gate(network).last_activity() == 6.0
    network.known = {}  # or has fallen out of the map
    assert gate(network).last_activity() == 6.0


def test_a_neighbours_request_counts_once(network: FakeNetwork) -> None:
    """Over lo each connection is seen from both ends."""
    network.known[Flow("tcp", ("127.0.0.1", 80), ("127.0.0.1", 40000))] = Talk(3.0, 4.0)
    network.known[Flow("tcp", ("127.0.0.1", 40000), ("127.0.0.1", 80))] = Talk(4.0, 3.0)
    other = connection(40001, received=10, sent=10, remote=(SERVER, 5432), inode=THEIRS)
    network.all.append(other)
    network.known[other.flow] = Talk(5.0, 5.0)
    network.seen = Activity(3.0, 2.0, 5.0, 5.0)
    assert gate(network).last_activity() == 3.0


# --- what is parked ------------------------------------------------------------------------------------------------


def parked(
    port: int, seq: int, payload: bytes = b"", *, syn: bool = False, fin: bool = False, rst: bool = False
) -> Parked:
    flags = 0x10 | fin | syn << 1 | rst << 2
    tcp = struct.pack("!HHIIBBHHH", port, 80, seq, 0, 0x50, flags, 0, 0, 0) + payload
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0, *map(socket.inet_aton, (CLIENT, POD)))
    return Parked(0, 2, bytes(12) + b"\x08\x00" + ip + tcp, "tcp", syn, fin, rst, len(payload), 0, 0.0)


def test_a_reset_frees_what_is_parked_of_its_connection(network: FakeNetwork) -> None:
    made = gate(network)
    kept, reset = parked(2, 1, b"y"), parked(1, 6, rst=True)
    for packet in (parked(1, 1, b"x"), kept, parked(1, 2, b"xyz"), reset):
        made.park(packet)
    assert made.wanted()
    made.open()
    assert network.sent == [kept, reset]


def test_nobody_is_wanted_for_what_was_reset(network: FakeNetwork) -> None:
    made = gate(network)
    made.park(parked(1, 1, b"x"))
    made.park(parked(1, 2, rst=True))
    assert not made.wanted()


def test_an_end_does_not_wake_and_comes_in_order(network: FakeNetwork) -> None:
    made = gate(network)
    woken: list[None] = []
    made.on_wanted = lambda: woken.append(None)
    end, syn = parked(1, 1, fin=True), parked(2, 9, syn=True)
    made.park(end)
    assert not woken
    assert not made.wanted()
    made.park(syn)
    assert woken
    made.open()
    assert network.sent == [end, syn]


def test_what_is_sent_again_is_parked_once(network: FakeNetwork) -> None:
    made = gate(network)
    for _ in range(20):
        made.park(parked(1, 1, fin=True))
    made.park(parked(1, 1, b"x", fin=True))
    assert made.overflowed == 0
    made.open()
    assert [packet.payload for packet in network.sent] == [0, 1]
    made.park_all()
    made.park(parked(1, 1, fin=True))
    made.open()
    assert len(network.sent) == 3


def test_connections_that_are_not_preserved_are_left_to_the_kernel(network: FakeNetwork) -> None:
    tcp = connection(80, received=10, sent=5)
    udp = Socket("udp", "ESTABLISHED", (POD, 40000), (SERVER, 53), OURS, 0, 0, None, None)
    network.all += [tcp, udp]
    made = gate(network, preserve=False)
    made.park_all()
    assert network.flows == [tcp.flow, udp.flow]
    made.stand_in({})
    assert network.flows == [udp.flow]


def test_the_limit(network: FakeNetwork) -> None:
    made = gate(network)
    for seq in range(12):
        made.park(parked(1, seq, b"x"))
    assert made.overflowed == 2
    # With what didn't fit into the hook's ring.
    assert made.counters().overflowed == 5
    made.open()
    assert len(network.sent) == 10


def test_who_sends_without_a_pause_does_not_hold_up_everybody(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = gate(network)
    modes: list[Park] = []
    polls = 0

    def flood() -> None:
        nonlocal polls
        polls += 1
        assert polls < 1000
        made.park(parked(1, polls, syn=True))

    monkeypatch.setattr(network, "poll", flood)
    monkeypatch.setattr(network, "park", lambda slot, mode, flows=(): modes.append(mode))
    made.park(parked(1, 0, syn=True))
    made.open()
    assert modes == [Park.PASS]
    assert len(network.sent) == polls + 1


def test_a_straggler_is_delivered_at_once(network: FakeNetwork) -> None:
    made = gate(network)
    made.park_all()
    made.open()
    straggler = parked(1, 1, syn=True)
    made.park(straggler)
    assert network.sent == [straggler]
    made.park_new()
    made.park(parked(2, 1, syn=True))
    assert network.sent == [straggler]


def test_the_ports_of_one_that_is_gone_are_nobody_s(network: FakeNetwork) -> None:
    made = gate(network, declared=frozenset({HTTP}))
    made._assign(frozenset(), frozenset())
    network.assigned = {METRICS}, {DNS}
    made.close()
    assert network.assigned == (set(), set())


def test_http2_s_housekeeping_is_no_answer(network: FakeNetwork) -> None:
    made = gate(network)
    asked = connection(80, received=5000, sent=100)  # the kernel can't tell what was sent
    network.all.append(asked)
    network.known[asked.flow] = ago(5.0, 9.0)
    assert made.unsettled() is None
    network.known[asked.flow] = dataclasses.replace(ago(5.0, 9.0), http2=True)
    assert "waits for its answer since 5.0 s" in (made.unsettled() or "")


def test_a_port_is_known_as_its_own_before_it_was_ever_idle(network: FakeNetwork) -> None:
    made = Gate(
        network,  # type: ignore[arg-type]
        0,
        Probes(None),
        declared=frozenset(),
        socket_inodes=lambda: {OURS},
        request_timeout=1.0,
        parking_packets=1,
        parking_bytes=1,
    )
    network.seen = Activity(0.0, 0.0, 5.0, 5.0)
    made.last_activity()
    assert network.assigned == ({HTTP, METRICS}, set())


def test_what_it_says_to_itself_waits_for_no_answer(network: FakeNetwork) -> None:
    made = gate(network)
    ends = ((POD, 80), (POD, 4711))
    for local, remote in (ends, ends[::-1]):
        network.all.append(Socket("tcp", "ESTABLISHED", local, remote, OURS, 0, 0, 1000, 5000))
        network.known[Flow("tcp", local, remote)] = ago(1.0, 5.0)
    assert made.unsettled() is None
    network.all.pop()  # its peer is somebody else
    assert "waits for its answer" in (made.unsettled() or "")


# --- kubelet's probes ----------------------------------------------------------------------------------------------

KUBELETS = Flow("tcp", (POD, 80), (CLIENT, 50000))
PROBE = b"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: kube-probe/1.36\r\n\r\n"


def copied(payload: bytes = b"", *, incoming: bool = True, seq: int = 1, syn: bool = False) -> Watched:
    return Watched(
        0, KUBELETS, Visitor.KUBELET, incoming, seq, syn, False, False, payload, len(payload), time.monotonic()
    )


def test_a_probe_is_no_activity_and_holds_it_up_until_it_is_answered(network: FakeNetwork) -> None:
    made = gate(network)
    probing: list[bool] = []
    made.on_probing = probing.append
    made.watched(copied(syn=True, seq=0))
    made.watched(copied(PROBE))
    assert "probe" in (made.unsettled() or "")
    made.watched(copied(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", incoming=False))
    assert made.unsettled() is None
    assert made.last_activity() == 0.0
    assert network.counted == []
    assert probing == [True, False]
    made.park_new()
    assert network.answered == {HTTP: {Visitor.KUBELET}}


def test_what_it_says_to_others_for_a_probe_is_none_either(network: FakeNetwork) -> None:
    made = gate(network)
    made.watched(copied(syn=True, seq=0))
    made.watched(copied(PROBE))
    now = time.monotonic()
    network.known[Flow("tcp", (POD, 40000), (SERVER, 3306))] = Talk(now, now)
    network.known[Flow("tcp", (POD, 40001), (SERVER, 3306))] = Talk(now - 5, now - 6)
    network.seen = Activity(0.0, 0.0, now, now)
    assert made.last_activity() == now - 5
    made.watched(copied(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", incoming=False))
    assert made.last_activity() == now - 5


def test_nor_what_an_exec_probe_says_to_others(network: FakeNetwork) -> None:
    made = gate(network)
    with made.command():
        now = time.monotonic()
        network.known[Flow("tcp", (POD, 40000), (SERVER, 3306))] = Talk(now, now)
        network.seen = Activity(0.0, 0.0, now, now)
        assert made.last_activity() == 0.0
    assert made.last_activity() == 0.0


def test_what_only_might_have_been_a_probe_is_activity(network: FakeNetwork) -> None:
    made = gate(network)
    made.watched(copied(syn=True, seq=0))
    assert made.last_activity() == 0.0
    packet = copied(b"POST /quit HTTP/1.1\r\nHost: x\r\nUser-Agent: kube-lifecycle/1.36\r\n\r\n")
    made.watched(packet)
    assert network.counted == [KUBELETS]
    assert made.last_activity() == packet.time


def test_connections_that_outlive_an_exec_probe_are_not_its_command_s(network: FakeNetwork) -> None:
    made = gate(network)
    with made.command():
        with made.command():
            assert network.watching
        assert network.watching
        network.opened = [
            Flow("tcp", ("127.0.0.1", 80), ("127.0.0.1", 4711)),
            Flow("tcp", ("127.0.0.1", 80), ("127.0.0.1", 4712)),
        ]
        network.all.append(
            Socket("tcp", "ESTABLISHED", ("127.0.0.1", 4712), ("127.0.0.1", 80), THEIRS, 0, 0, 1, 1),
        )
    assert not network.watching
    assert network.counted == [Flow("tcp", ("127.0.0.1", 80), ("127.0.0.1", 4712))]
    assert made.last_activity() > 0.0
