"""What is learned of kubelet's probes from packets that were copied, and what is answered in their place later."""

from __future__ import annotations

import contextlib
import json
import random
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection

from criproxy.api import cri_pb2 as cri
from criproxy.hook.pod_maps import Visitor, Watched
from criproxy.kernel.sockets import Flow
from criproxy.kubelet import grpc_health, probes
from criproxy.kubelet.conversation import Kind, Probe, Verdict
from criproxy.kubelet.probes import Probes
from criproxy.policy import Port

POD, NODE = "10.0.0.2", "10.0.0.1"
KUBELET, LOOPBACK = Visitor.KUBELET, Visitor.LOOPBACK

# As Go's net/http sends it for kubelet's probe.
GET = (
    b"GET /healthz HTTP/1.1\r\nHost: 10.0.0.2:8080\r\nUser-Agent: kube-probe/1.36\r\nAccept: */*\r\n"
    b"Connection: close\r\n\r\n"
)
OK = b"HTTP/1.1 200 OK\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\nContent-Length: 2\r\n\r\nok"
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


def hello(name: str | None = None) -> bytes:
    """What a TLS client begins with."""
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    sent = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name).do_handshake()
    return sent.read()


HELLO = hello()


class Wire:
    """A connection whose packets are given to the table, as the hook would copy them."""

    numbers = iter(range(40000, 60000))

    def __init__(self, table: Probes, port: int = 8080, visitor: Visitor = KUBELET, syn: bool = True) -> None:
        self.table = table
        self.visitor = visitor
        self.flow = Flow("tcp", (POD, port), (NODE, next(self.numbers)))
        # The numbers wrap around in the middle of what is said.
        self.seq = {True: 0xFFFFFFF0, False: 0xFFFFFFFA}
        self.verdict = Verdict.UNDECIDED
        if syn:
            self.packet(True, syn=True)
            self.packet(False, syn=True)

    def packet(self, incoming: bool, payload: bytes = b"", *, seq: int | None = None, **flags: Any) -> Verdict:
        settings = {"syn": False, "fin": False, "rst": False, "length": len(payload), "time": time.monotonic()} | flags
        seq = self.seq[incoming] if seq is None else seq
        self.seq[incoming] = (seq + settings["length"] + settings["syn"] + settings["fin"]) % (1 << 32)
        kept = payload[:2048]
        self.verdict = self.table.watched(Watched(0, self.flow, self.visitor, incoming, seq, payload=kept, **settings))
        return self.verdict

    def asks(self, payload: bytes, **flags: Any) -> Verdict:
        return self.packet(True, payload, **flags)

    def answers(self, payload: bytes, **flags: Any) -> Verdict:
        return self.packet(False, payload, **flags)

    def closes(self) -> None:
        self.packet(True, fin=True)
        self.packet(False, fin=True)


@pytest.fixture
def table() -> Probes:
    return Probes(None)


def healthz(visitor: Visitor = KUBELET, **headers: str) -> Probe:
    sent = {"accept": "*/*", "connection": "close", "host": "10.0.0.2:8080"} | headers
    return Probe(Port("tcp", 8080), visitor, Kind.HTTP, "GET /healthz", tuple(sorted(sent.items())))


def again(table: Probes, probe: Probe) -> bytes:
    result = table.known(probe)
    assert result is not None
    assert result.again is not None
    return result.again


def probed(table: Probes, answer: bytes = OK, request: bytes = GET, **options: Any) -> Wire:
    wire = Wire(table, **options)
    wire.asks(request)
    wire.answers(answer)
    wire.closes()
    return wire


# --- HTTP ------------------------------------------------------------------------------------------------------


def test_an_http_probe_is_learned(table: Probes) -> None:
    wire = Wire(table)
    assert wire.verdict is Verdict.UNDECIDED
    assert table.ports() == {}
    assert wire.asks(GET) is Verdict.PROBE
    assert table.under_way() == "kubelet's HTTP probe GET :8080/healthz is under way"
    assert wire.answers(OK) is Verdict.PROBE
    assert table.under_way() is None
    wire.closes()
    assert table.failing() is None
    assert table.ports() == {Port("tcp", 8080): frozenset({KUBELET})}
    assert again(table, healthz()) == (
        b"HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"
    )


def test_a_failure_is_told_until_the_same_probe_succeeds(table: Probes) -> None:
    probed(table, UNAVAILABLE)
    assert table.failing() == "kubelet's HTTP probe GET :8080/healthz was last answered 503"
    assert table.ports() == {}
    assert table.known(healthz()) is None
    probed(table, OK, GET.replace(b"healthz", b"ready"))
    assert table.failing() == "kubelet's HTTP probe GET :8080/healthz was last answered 503"
    probed(table)
    assert table.failing() is None


def test_packets_may_be_doubled_cut_short_or_out_of_order(table: Probes) -> None:
    wire = Wire(table)
    begin = wire.seq[True]
    assert wire.asks(GET[60:], seq=begin + 60) is Verdict.UNDECIDED
    assert wire.asks(GET[:40], seq=begin) is Verdict.UNDECIDED
    assert wire.asks(GET[:40], seq=begin) is Verdict.UNDECIDED
    assert wire.asks(GET[20:70], seq=begin + 20) is Verdict.PROBE
    begin = wire.seq[False]
    wire.answers(OK[30:], seq=begin + 30)
    wire.answers(OK[:30], seq=begin)
    assert again(table, healthz()).endswith(b"ok")


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\n\r\n",
            b"3;a=b\r\nabc\r\n0\r\n\r\n",
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: b\r\n\r\n", b"0\r\nA: b\r\n\r\n"),
        (b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", b""),
    ],
)
def test_the_whole_answer_is_kept(table: Probes, answer: bytes, body: bytes) -> None:
    wire = Wire(table)
    wire.asks(GET)
    for i in range(len(answer)):
        wire.answers(answer[i : i + 1])
    wire.closes()
    head, _, kept = again(table, healthz()).partition(b"\r\n\r\n")
    assert kept == body
    assert b"connection: close" in head
    assert table.failing() is None


def test_an_answer_that_was_not_caught_wholly_is_kept_without_its_body(table: Probes) -> None:
    probed(table, b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\nContent-Encoding: gzip\r\nA: b\r\n\r\n" + bytes(3000))
    assert again(table, healthz()) == b"HTTP/1.1 200 OK\r\na: b\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def test_an_answer_whose_head_is_cut_still_has_its_status(table: Probes) -> None:
    probed(table, b"HTTP/1.1 500 No\r\nContent-Length: 1\r\nA: " + b"a" * 3000 + b"\r\n\r\nx")
    assert table.failing() == "kubelet's HTTP probe GET :8080/healthz was last answered 500"
    probed(table, b"HTTP/1.1 200 OK\r\nB: c\r\nA: " + b"a" * 3000 + b"\r\n\r\nx")
    assert again(table, healthz()) == b"HTTP/1.1 200 OK\r\nb: c\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def test_one_connection_may_carry_probe_after_probe(table: Probes) -> None:
    wire = Wire(table)
    request = GET.replace(b"Connection: close\r\n", b"")
    wire.asks(request)
    # Longer than what is copied of a packet, so that the next answer stands behind a gap.
    wire.answers(b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + bytes(3000))
    assert wire.asks(request.replace(b"healthz", b"ready")) is Verdict.PROBE
    wire.answers(UNAVAILABLE)
    assert table.failing() == "kubelet's HTTP probe GET :8080/ready was last answered 503"
    # And then something else.
    assert wire.asks(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") is Verdict.OTHER
    assert wire.asks(request) is Verdict.OTHER


@pytest.mark.parametrize(
    "payload",
    [
        GET.replace(b"kube-probe", b"kube-lifecycle"),
        GET.replace(b"kube-probe/1.36", b"curl/8.0"),
        b"POST /validate HTTP/1.1\r\nUser-Agent: kube-probe/1\r\nContent-Length: 5\r\n\r\nhello",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\x1b[31m HTTP/1.1\r\nUser-Agent: kube-probe/1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno header\r\n\r\n",
        b"GET /" + b"a" * 3000,
        b"\x16\x03\x01\x00\x05\x02\x00\x00\x00\x00",
        b"\x16\x04",
        b"PING\r\n",
        b"\x00\x00",
        hello("node.example.com"),
    ],
)
def test_what_is_no_probe_is_told_at_once(table: Probes, payload: bytes) -> None:
    assert Wire(table).asks(payload) is Verdict.OTHER
    assert table.failing() is None
    assert table.ports() == {}


def test_a_probe_without_an_answer_has_failed(table: Probes) -> None:
    wire = Wire(table)
    wire.asks(GET)
    wire.packet(True, rst=True)
    assert table.failing() == "kubelet's HTTP probe GET :8080/healthz was last given up without an answer"
    wire = Wire(table)
    wire.asks(GET)
    wire.packet(False, fin=True)
    assert table.failing() == "kubelet's HTTP probe GET :8080/healthz was last closed without an answer"
    wire = Wire(table)
    wire.asks(GET)
    wire.answers(b"220 smtp.example.com\r\n")
    assert table.failing() == "kubelet's HTTP probe GET :8080/healthz was last answered with something that isn't HTTP"


def test_a_probe_is_under_way_for_some_seconds_only(table: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(table)
    assert table.under_way() == "kubelet's connection to :8080 is under way"
    wire.asks(GET)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + probes.UNDER_WAY_SECONDS + 1)
    assert table.under_way() is None


def test_it_is_known_when_probes_were_under_way(table: Probes) -> None:
    slow, quick = Wire(table, syn=False), Wire(table, syn=False)
    slow.asks(GET, time=100.0)
    quick.asks(GET, time=101.0)
    quick.answers(OK, time=101.2)
    slow.answers(OK, time=103.0)
    slow.closes()
    probed(table)
    for moment, meanwhile in (
        (99.9, False),
        (100.0, True),
        (102.0, True),
        # What is done for it may end a little later.
        (103.05, True),
        (103.5, False),
        (time.monotonic(), True),
    ):
        assert table.during(moment) is meanwhile, moment


def test_a_silent_connection_is_none_for_long(table: Probes) -> None:
    wire = Wire(table, syn=False)
    wire.packet(True, syn=True, time=100.0)
    wire.asks(GET, time=200.0)
    assert not table.during(150.0)
    assert table.during(199.0)


def test_times_of_probes_are_bounded(table: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SPANS", 2)
    for began in (1.0, 2.0, 3.0):
        table.spent(began, began + 0.1)
    assert [table.during(moment) for moment in (1.0, 2.0, 3.0)] == [False, True, True]


def test_an_old_failure_is_forgotten(table: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    probed(table, UNAVAILABLE)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + probes.FAILURE_SECONDS + 1)
    assert table.failing() is None
    assert table.known(healthz()) is None


def test_what_a_mesh_adds_does_not_tell_probes_apart(table: Probes) -> None:
    for number in (b"1", b"2"):
        request = GET.replace(b"Accept", b"X-Request-Id: " + number + b"\r\nX-B3-TraceId: " + number + b"\r\nAccept")
        probed(table, request=request, visitor=LOOPBACK, syn=False)
    assert table.ports() == {Port("tcp", 8080): frozenset({LOOPBACK})}
    assert table.known(healthz(LOOPBACK)) is not None
    assert table.known(healthz(KUBELET)) is None
    assert table.known(healthz(LOOPBACK, authorization="x")) is None


# --- TCP -------------------------------------------------------------------------------------------------------


def tcp(visitor: Visitor = KUBELET) -> Probe:
    return Probe(Port("tcp", 8080), visitor, Kind.TCP)


def test_connect_and_close_is_a_probe(table: Probes) -> None:
    wire = Wire(table)
    assert wire.verdict is Verdict.UNDECIDED
    wire.packet(True, fin=True)
    assert wire.verdict is Verdict.PROBE
    assert table.known(tcp()) is not None
    assert table.under_way() is None
    # What comes late begins nothing.
    assert wire.packet(False, fin=True) is Verdict.PROBE
    assert wire.packet(True, fin=True) is Verdict.PROBE


def test_a_server_may_greet_the_probe(table: Probes) -> None:
    wire = Wire(table)
    wire.answers(b"SSH-2.0-x\r\n")
    assert wire.packet(True, rst=True) is Verdict.PROBE
    assert table.known(tcp()) is not None


def test_a_client_that_a_server_greets_is_not_one(table: Probes) -> None:
    wire = Wire(table)
    wire.answers(b"\x4a\x00\x00\x00\x0a8.0")
    assert wire.asks(b"\x20\x00\x00\x01login") is Verdict.OTHER


def test_a_mesh_may_forward_it(table: Probes) -> None:
    wire = Wire(table, visitor=LOOPBACK)
    assert wire.packet(True, fin=True) is Verdict.PROBE
    assert table.known(tcp(LOOPBACK)) is not None


def test_an_end_without_a_beginning_is_none(table: Probes) -> None:
    assert Wire(table, syn=False).packet(True, fin=True) is Verdict.UNDECIDED
    assert table.ports() == {}


def test_a_refused_connection_is_a_failure_until_a_probe_succeeds(table: Probes) -> None:
    wire = Wire(table, syn=False)
    wire.packet(True, syn=True)
    assert wire.packet(False, rst=True) is Verdict.PROBE
    assert table.failing() == "kubelet's connection to :8080 was last refused"
    assert table.known(tcp()) is None
    probed(table)
    assert table.failing() is None


def test_a_port_that_is_used_again_is_another_connection(table: Probes) -> None:
    wire = Wire(table)
    wire.asks(b"PING\r\n")
    assert wire.verdict is Verdict.OTHER
    wire.seq = {True: 77, False: 99}
    wire.packet(True, syn=True)
    wire.packet(False, syn=True)
    assert wire.asks(GET) is Verdict.PROBE


# --- TLS -------------------------------------------------------------------------------------------------------


def test_tls_without_a_server_name_is_a_probe(table: Probes) -> None:
    wire = Wire(table, port=8443)
    assert wire.asks(HELLO[:30]) is Verdict.UNDECIDED
    assert wire.asks(HELLO[30:]) is Verdict.PROBE
    wire.answers(b"\x16\x03\x03\x00\x02\x02\x00" + b"\x17\x03\x03\x10\x00" + bytes(4096))
    assert table.under_way() == "kubelet's HTTPS probe of :8443 is under way"
    wire.asks(b"\x14\x03\x03\x00\x01\x01" + b"\x17\x03\x03\x00\x03abc")
    assert table.ports() == {}
    wire.answers(b"\x17\x03\x03\x00\x03abc")
    wire.closes()
    assert table.ports() == {Port("tcp", 8443): frozenset({KUBELET})}
    assert table.failing() is None


def test_a_failed_handshake_is_a_failure(table: Probes) -> None:
    wire = Wire(table, port=8443)
    wire.asks(HELLO)
    wire.answers(b"\x15\x03\x01\x00\x02\x02\x28")
    assert table.failing() == "kubelet's HTTPS probe of :8443 was last answered without a TLS handshake"
    wire = Wire(table, port=8443)
    wire.asks(HELLO)
    wire.answers(b"\x16\x03\x03\x00\x02\x02\x00")
    wire.closes()
    assert table.failing() == "kubelet's HTTPS probe of :8443 was last given up without an answer"


def test_https_is_not_answered_where_the_policy_says_so() -> None:
    table = Probes(None, tls=False)
    wire = Wire(table)
    wire.asks(HELLO)
    wire.answers(b"\x16\x03\x03\x00\x02\x02\x00")
    wire.asks(b"\x17\x03\x03\x00\x03abc")
    wire.answers(b"\x17\x03\x03\x00\x03abc")
    assert table.failing() is None
    assert table.ports() == {}


# --- gRPC ------------------------------------------------------------------------------------------------------


class Grpc:
    """A call over a wire, with both ends played by h2."""

    def __init__(self, table: Probes, path: str = grpc_health.PATH, service: str = "") -> None:
        self.wire = Wire(table, 5000)
        self.sent: dict[bool, list[bytes]] = {True: [], False: []}
        self.client, self.server = H2Connection(), H2Connection(H2Configuration(client_side=False))
        self.client.initiate_connection()
        self.server.initiate_connection()
        self.exchange()
        assert self.wire.verdict is Verdict.UNDECIDED
        headers = [
            (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "10.0.0.2:5000"),
            ("content-type", "application/grpc"), ("user-agent", "kube-probe/1.36 grpc-go/1.72.0"), ("te", "trailers"),
        ]  # fmt: skip
        self.client.send_headers(1, headers)
        name = b"\x0a" + bytes([len(service)]) + service.encode() if service else b""
        self.client.send_data(1, b"\0" + len(name).to_bytes(4, "big") + name, end_stream=True)
        self.exchange()

    def exchange(self) -> None:
        for sender, receiver, way in ((self.client, self.server, True), (self.server, self.client, False)):
            if data := sender.data_to_send():
                self.sent[way].append(data)
                # In pieces that don't keep to frames.
                for i in range(0, len(data), 20):
                    self.wire.packet(way, data[i : i + 20])
                receiver.receive_data(data)

    def answer(self, status: int) -> None:
        self.server.send_headers(1, [(":status", "200"), ("content-type", "application/grpc")])
        self.server.send_data(1, b"\0\0\0\0\2\x08" + bytes([status]))
        self.server.send_headers(1, [("grpc-status", "0"), ("grpc-message", "")], end_stream=True)
        self.exchange()
        self.wire.closes()

    def refuse(self, code: int) -> None:
        self.server.send_headers(1, [(":status", "200"), ("grpc-status", str(code))], end_stream=True)
        self.exchange()
        self.wire.closes()


def grpc_probe(service: str) -> Probe:
    return Probe(Port("tcp", 5000), KUBELET, Kind.GRPC, service)


@pytest.mark.parametrize("service", ["", "readiness"])
def test_a_grpc_probe_is_learned(table: Probes, service: str) -> None:
    call = Grpc(table, service=service)
    assert call.wire.verdict is Verdict.PROBE
    assert table.under_way()
    call.answer(1)
    assert table.under_way() is None
    assert table.known(grpc_probe(service)) is not None
    assert table.known(grpc_probe("another")) is None
    assert table.ports() == {Port("tcp", 5000): frozenset({KUBELET})}


def test_what_does_not_serve_has_failed(table: Probes) -> None:
    Grpc(table, service="x").answer(2)
    assert table.failing() == 'kubelet\'s gRPC probe of :5000 (service "x") was last answered NOT_SERVING'
    Grpc(table, service="x").refuse(12)
    assert table.failing() == "kubelet's gRPC probe of :5000 (service \"x\") was last answered with gRPC's status 12"
    Grpc(table, service="x").answer(1)
    assert table.failing() is None
    Grpc(table).wire.closes()
    assert table.failing() == "kubelet's gRPC probe of :5000 was last given up without an answer"


def test_other_calls_are_no_probes(table: Probes) -> None:
    assert Grpc(table, path="/shop.Orders/List").wire.verdict is Verdict.OTHER


def test_damaged_frames_end_in_nothing_worse_than_a_verdict(table: Probes) -> None:
    for begin in (b"\x00\x00\x05\x01\x04\x00\x00\x00\x01", b"\x00\x00\x00\x09\x04\x00\x00\x00\x01", b"\xff" * 9):
        wire = Wire(table, 5000)
        wire.asks(grpc_health.PREFACE)
        assert wire.asks(begin + b"\xff" * 40) is Verdict.OTHER


# --- exec ------------------------------------------------------------------------------------------------------


def test_an_exec_probe_is_answered_if_it_succeeded_last(table: Probes) -> None:
    argv = ["pg_isready", "-U", "postgres"]
    good = cri.ExecSyncResponse(stdout=b"accepting").SerializeToString()
    assert table.command(argv) is None
    table.command_done(argv, good)
    assert table.command(argv) == good
    assert table.command([*argv, "-q"]) is None
    assert table.command([" ".join(argv)]) is None
    table.command_done(argv, cri.ExecSyncResponse(exit_code=2).SerializeToString())
    assert table.command(argv) is None
    assert table.failing() == 'the exec probe "pg_isready -U postgres" was last ended with exit code 2'
    table.command_done(argv, None)
    assert table.failing() == 'the exec probe "pg_isready -U postgres" was last not run to its end'
    table.command_done(argv, good)
    assert table.failing() is None
    assert table.ports() == {}


def test_a_command_is_told_safely(table: Probes) -> None:
    table.command_done(["sh", "-c", "\x1b[2J" + "x" * 1000], None)
    failing = table.failing()
    assert failing is not None
    assert failing.isprintable()
    assert len(failing) < 150


# --- bounds ----------------------------------------------------------------------------------------------------


def test_no_more_probes_are_kept_than_that(table: Probes) -> None:
    begin = time.monotonic()
    for number in range(200):
        wire = Wire(table, syn=False)
        request = GET.replace(b"healthz", str(number).encode())
        wire.asks(request, time=begin + number)
        wire.answers(OK, time=begin + number)
        table.command_done([str(number)], b"")
    assert sum(table.command([str(number)]) is not None for number in range(200)) == probes.PROBES / 2


def test_too_many_connections_at_once_count_as_activity(table: Probes) -> None:
    now = time.monotonic()
    verdicts = [Wire(table, syn=False, visitor=LOOPBACK).asks(GET, time=now) for _ in range(2 * probes.BEGINNINGS)]
    assert verdicts.count(Verdict.PROBE) == probes.BEGINNINGS
    assert verdicts[-1] is Verdict.OTHER
    assert Wire(table, syn=False).asks(GET, time=now + 1) is Verdict.PROBE


def test_a_flood_on_one_connection_is_bounded(table: Probes) -> None:
    wire = Wire(table)
    for number in range(1000):
        wire.asks(bytes(2048), seq=5000 * number)
    wire = Wire(table)
    wire.asks(GET)
    for number in range(1000):
        wire.answers(b"HTTP/1.1 100 Continue\r\n\r\n" * 80, seq=wire.seq[False] + 1 + number * 7)
    assert table.under_way()


def test_no_bytes_bring_about_an_error(
    table: Probes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "BEGINNINGS_PER_SECOND", 1e9)
    chance = random.Random(5)
    call = Grpc(table)
    requests = [GET, HELLO, grpc_health.PREFACE + bytes(9), b"".join(call.sent[True])]
    answers = [OK, UNAVAILABLE, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", HELLO]
    answers.append(b"".join(call.sent[False]))
    for _ in range(300):
        wire = Wire(table, visitor=chance.choice([KUBELET, LOOPBACK]), syn=chance.random() < 0.8)
        for incoming, choices in ((True, requests), (False, answers)) * 2:
            data = bytearray(chance.choice(choices))
            for _ in range(chance.choice([0, 1, 10])):
                data[chance.randrange(len(data))] = chance.randrange(256)
            middle = chance.randrange(len(data))
            for part in (data[:middle], data[middle:]):
                ends = {"fin": chance.random() < 0.1, "rst": chance.random() < 0.1}
                wire.packet(incoming, bytes(part), length=len(part) + chance.choice([0, 0, 0, 9]), **ends)
        table.failing()
        table.under_way()
        table.ports()
    assert "can't be understood" not in caplog.text


def test_no_more_requests_on_a_connection_than_that(table: Probes) -> None:
    wire = Wire(table)
    verdicts = []
    for _ in range(20):
        verdicts.append(wire.asks(GET))
        wire.answers(OK)
    assert verdicts == [Verdict.PROBE] * 16 + [Verdict.OTHER] * 4


# --- the next daemon -------------------------------------------------------------------------------------------


def test_what_succeeded_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    table = Probes(path)
    probed(table, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\x00")
    Wire(table, 3306).packet(True, fin=True)
    Grpc(table, service="x").answer(1)
    response = cri.ExecSyncResponse(stdout=b"\xff\x00").SerializeToString()
    table.command_done(["ping", "a b"], response)
    table.command_done(["fails"], None)
    table.save()
    later = Probes(path)
    assert later.ports() == {}
    later.load()
    assert later.ports() == table.ports() == {Port("tcp", p): frozenset({KUBELET}) for p in (8080, 3306, 5000)}
    assert again(later, healthz()) == again(table, healthz())
    assert later.command(["ping", "a b"]) == response
    assert later.failing() is None
    assert [file.name for file in tmp_path.iterdir()] == ["probes.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 9}', '{"format": 1, "probes": [{}]}', "\udcff"])
def test_a_damaged_file_is_as_if_empty(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "probes.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    table = Probes(path)
    table.load()
    assert table.ports() == {}
    assert "can't be read" in caplog.text


def test_the_file_has_no_more_than_the_successes(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    table = Probes(path)
    probed(table, UNAVAILABLE)
    table.save()
    assert json.loads(path.read_text())["probes"] == []


def test_a_full_disk_is_no_more_than_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = Probes(tmp_path / "missing" / "probes.json")
    probed(table)
    table.save()
    assert "can't be written" in caplog.text
