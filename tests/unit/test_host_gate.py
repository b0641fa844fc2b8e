"""A container's share of the host's network: what its sockets tell of its use."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import pytest

from criproxy.hook.host_gate import HostGate
from criproxy.hook.pod_maps import Activity, Visitor
from criproxy.kernel.sockets import Flow
from criproxy.kubelet.probes import Probes
from criproxy.policy import Port

from .test_gate import CLIENT, HTTP, OURS, SERVER, THEIRS, FakeNetwork, connection, listener


class Host(FakeNetwork):
    def __init__(self) -> None:
        super().__init__()
        self.ours: set[Flow] = set()
        self.places: set[tuple[str, Port]] = set()

    def listens(self, slot: int, places: set[tuple[str, Port]]) -> None:
        self.places = places

    def probing(self, slot: int, flows: Collection[Flow]) -> set[Flow]:
        return self.ours & set(flows)


@pytest.fixture
def host() -> Host:
    made = Host()
    made.all = [listener(80), listener(22, THEIRS)]
    return made


def gate(host: Host, **settings: Any) -> HostGate:
    made = HostGate(
        host,  # type: ignore[arg-type]
        0,
        Probes(None),
        socket_inodes=lambda: {OURS},
        parking_packets=0,
        parking_bytes=0,
        **{"declared": frozenset({HTTP}), "request_timeout": 600.0, **settings},
    )
    assert made.silent() is None
    return made


def age(moment: float) -> float:
    return time.monotonic() - moment


def test_kubelet_is_looked_at_where_it_listens(host: Host) -> None:
    gate(host)
    assert host.answered == {HTTP: (Visitor.KUBELET,)}
    assert host.places == {("::", HTTP)}


def test_an_open_connection_is_in_the_way_whoever_has_made_it(host: Host) -> None:
    one = gate(host)
    assert one.unsettled() is None
    host.all.append(connection(80, received=5000, sent=4000))
    assert str(one.unsettled()).startswith(f"a connection from {CLIENT}:4711 to port 80 is open, ")
    host.all[-1] = connection(40000, received=5000, sent=4000, remote=(SERVER, 5432))
    assert str(one.unsettled()).startswith(f"a connection to {SERVER}:5432 is open, ")
    host.all[-1] = connection(22, received=5000, sent=4000, inode=THEIRS)
    assert one.unsettled() is None


def test_where_it_may_be_closed_a_request_is_in_the_way_alone(host: Host) -> None:
    one = gate(host, preserve=False)
    host.all.append(connection(80, received=5000, sent=4000))
    assert one.unsettled() is None
    assert str(one.hanging()).startswith("a connection from "), "it can't be frozen with it"
    host.all[-1] = connection(80, received=4000, sent=5000)
    assert str(one.unsettled()).startswith("a request from ")


def test_ours_in_the_place_of_a_probe_is_nobodys(host: Host) -> None:
    one = gate(host)
    host.all.append(connection(80, received=10, sent=10))
    host.ours = {host.all[-1].flow}
    assert one.unsettled() is None
    assert one.last_activity() == 0.0
    host.all.pop()
    assert one.last_activity() == 0.0


def test_activity_is_what_came_last(host: Host) -> None:
    one = gate(host, preserve=False)
    began = time.monotonic()
    host.seen = Activity(began - 100, 0.0, 0.0, 0.0)
    assert one.last_activity() == began - 100
    host.all.append(connection(80, received=50_000, sent=20_000))
    first = one.last_activity()
    assert 19.9 < age(first) < 21
    # A tick later, by the same clock.
    host.all[-1] = connection(80, received=50_000, sent=19_990)
    assert one.last_activity() == first
    host.all[-1] = connection(80, received=10_000, sent=19_990)
    assert 9.9 < age(one.last_activity()) < 11


def test_a_connection_that_is_gone_was_used_until_now(host: Host) -> None:
    one = gate(host)
    host.all.append(connection(80, received=50_000, sent=20_000))
    one.last_activity()
    host.all.pop()
    assert age(last := one.last_activity()) < 1
    assert one.last_activity() == last


def test_what_ends_with_its_processes_is_nobodys_use(host: Host) -> None:
    one = gate(host, preserve=False)
    host.all.append(connection(80, received=50_000, sent=20_000))
    last = one.last_activity()
    one.park_new()
    one.park_all()
    host.all.clear()
    assert one.last_activity() == last


def test_what_an_exec_probe_says_is_no_use(host: Host) -> None:
    one = gate(host)
    with one.command():
        assert host.watching
        host.all.append(connection(80, received=0, sent=0))
        assert one.last_activity() == 0.0
        host.all.pop()
    assert one.last_activity() == 0.0
    assert not host.watching


def test_other_ports_are_learned_as_in_a_pod(host: Host) -> None:
    host.all.append(listener(8080))
    one = gate(host)
    assert host.assigned[0] == {HTTP, Port("tcp", 8080)}
    one.close()
    assert host.assigned == (set(), set())
