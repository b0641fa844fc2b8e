"""What traffic does to a container that sleeps and wakes: requests under way, keep-alives, quiet ports, closed ones."""

from __future__ import annotations

import re
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from specimen import PATIENCE, PORT, QUICK, Connection, Specimen, asleep, eventually, never, seen
from traffic import sent_again

from lab.daemon import Daemon
from lab.kubelet import Kubelet

CHECKPOINT = {**QUICK, "criproxy.io/tier": "checkpoint"}


@pytest.fixture
def specimen(kubelet: Kubelet, program: Path) -> Iterator[Specimen]:
    with kubelet.run_pod(annotations=CHECKPOINT) as pod:
        yield Specimen.run(pod, program)


# --- Requests under way -----------------------------------------------------------------------------------------------


def test_a_slow_request_is_answered_by_who_was_never_asleep_meanwhile(specimen: Specimen, daemon: Daemon) -> None:
    with specimen.connect() as connection:
        for _ in range(2):  # the second time on a connection that has been restored
            connection.send("after 1500")
            held_until_its_answer(connection, daemon, specimen)
            asleep(daemon, specimen)


def held_until_its_answer(connection: Connection, daemon: Daemon, specimen: Specimen) -> None:
    """Looks until the answer comes: it is awake because of the request, and was never asleep from then on."""
    local = f"{connection.local[0]}:{connection.local[1]}"
    reason = f"a request from {local} to port {PORT} waits for its answer since"
    deadline = time.monotonic() + PATIENCE
    known = []
    while not select.select([connection._socket], [], [], 0)[0]:
        assert time.monotonic() < deadline, known[-1]
        known.append(seen(daemon, specimen.id))
        time.sleep(0.01)
    assert connection.answer() == "ok"
    # The last look may have been one at what came after the answer.
    held = [number for number, one in enumerate(known[:-1]) if reason in one.reason]
    assert held, known
    assert len({one.checkpoints for one in known[held[0] : -1]}) == 1


def test_a_request_right_behind_an_answer_holds_too(specimen: Specimen, daemon: Daemon) -> None:
    """Within a tick of the kernel's timer, which is all that its clocks tell."""
    with specimen.connect() as connection:
        for _ in range(20):
            assert connection.ask("count")
        connection.send("after 1000")
        held_until_its_answer(connection, daemon, specimen)


def test_paces_around_the_duration(specimen: Specimen, daemon: Daemon) -> None:
    with specimen.connect() as connection:
        for pause in (0.25, 0.28, 0.3, 0.32, 0.35, 0.31, 0.29, 0.33):
            for milliseconds in (0, 100, 350):
                assert connection.ask(f"after {milliseconds}") == "ok"
                time.sleep(pause)


def test_nobody_waits_for_ever(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations={**CHECKPOINT, "criproxy.io/request-timeout": "2s"}) as pod:
        specimen = Specimen.run(pod, program)
        with specimen.connect() as connection:
            began = time.monotonic()
            connection.send("never")
            asleep(daemon, specimen)
            assert time.monotonic() - began > 1.9
            # The restored connection has no request, as far as anybody can tell.
            assert connection.ask("count") == "1"
            asleep(daemon, specimen)


# --- Connections while it sleeps --------------------------------------------------------------------------------------


def impatient(connection: Connection) -> None:
    made = connection._socket
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


@pytest.mark.parametrize("version", [4, 6])
def test_keepalives_are_answered_and_wake_nobody(specimen: Specimen, daemon: Daemon, version: int) -> None:
    if version == 6:
        specimen.address = next(ip for ip in specimen.container.pod.ips if ":" in ip)
    with specimen.connect() as connection:
        # The second time it is one that has been restored.
        for count in range(1, 3):
            assert connection.ask("count") == str(count)
            impatient(connection)
            asleep(daemon, specimen)
            restores = seen(daemon, specimen.id).restores
            time.sleep(2.5)
            known = seen(daemon, specimen.id)
            assert (known.state, known.restores) == ("scaled_down", restores)
        # Both directions at once. If numbers or timestamps were off, something would have to be sent again. (On a busy
        # machine 200 ms may go by: once more.)
        for _ in range(10):
            before = sent_again(connection._socket)
            assert connection.ask(f"echo {'x' * 3000}") == "x" * 3000
            if sent_again(connection._socket) == before and not answered_again(specimen):
                break
            asleep(daemon, specimen)
        else:
            pytest.fail("something had to be sent again each time")


def answered_again(specimen: Specimen) -> int:
    """How many segments the pod's kernel has sent once more on connections to its port, since it was restored."""
    ss = ["nsenter", f"--net={specimen.container.pod.netns}", "ss", "-HOtin", f"sport = :{PORT}"]
    shown = subprocess.run(ss, check=True, capture_output=True, text=True).stdout
    return sum(int(number) for number in re.findall(r"retrans:\d+/(\d+)", shown))


def test_keepalives_of_a_neighbour_over_lo(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations={**CHECKPOINT, "criproxy.io/container-names": "specimen"}) as pod:
        specimen = Specimen.run(pod, program)
        neighbour = Specimen.run(pod, program, "neighbour", port=PORT + 1)
        assert neighbour.ask(f"keep-alive 127.0.0.1 {PORT}") == "ok"
        asleep(daemon, specimen)
        never(lambda: seen(daemon, specimen.id).state != "scaled_down", "it was woken", seconds=2.5)
        # The connection is there: one that had been given up would be closed by now.
        assert neighbour.ask("clients") == "2"
        assert specimen.ask("clients") == "2"


def test_reset_while_it_sleeps(specimen: Specimen, daemon: Daemon) -> None:
    connection = specimen.connect()
    assert connection.ask("clients") == "1"
    asleep(daemon, specimen)
    before = seen(daemon, specimen.id).restores
    connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    never(lambda: seen(daemon, specimen.id).restores > before, "a reset woke it")
    eventually(lambda: specimen.ask("clients") == "1", "the connection has ended for the server, too")


def test_connections_that_are_to_be_closed(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations={**CHECKPOINT, "criproxy.io/connections": "close"}) as pod:
        specimen = Specimen.run(pod, program)
        specimen.tell("set kept")
        for _ in range(3):
            with specimen.connect() as connection:
                assert connection.ask("get") == "kept"
                assert connection.ended()  # as if the application had closed it
            asleep(daemon, specimen)
        eventually(lambda: specimen.ask("clients") == "1", "the server finds them closed")


# --- Ports whose traffic doesn't matter -------------------------------------------------------------------------------


def test_quiet_ports(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    annotations = {**CHECKPOINT, "criproxy.io/quiet-ports": f"{PORT + 1}", "criproxy.io/scaledown-duration": "1s"}
    with kubelet.run_pod(annotations=annotations) as pod:
        specimen = Specimen.run(pod, program)
        specimen.tell(f"listen {PORT + 1}")
        scraper = Specimen(specimen.container, PORT + 1)
        # A scrape each 100 ms doesn't keep it awake, and each is answered while it runs.
        deadline = time.monotonic() + PATIENCE
        scrapes = 0
        while seen(daemon, specimen.id).state != "scaled_down":
            assert time.monotonic() < deadline, "the scrapes keep it awake"
            try:
                scraper.ask("count", timeout=0.5)
                scrapes += 1
            except TimeoutError:
                break
            time.sleep(0.1)
        assert scrapes >= 2
        asleep(daemon, specimen)
        restores = seen(daemon, specimen.id).restores
        with pytest.raises(TimeoutError):
            scraper.ask("count", timeout=0.5)
        assert seen(daemon, specimen.id).restores == restores
        assert int(specimen.ask("count")) > scrapes - 1
        assert scraper.ask("count")


# --- Neighbours in the pod --------------------------------------------------------------------------------------------


def test_a_neighbours_traffic_does_not_keep_it_awake(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    """A sidecar that didn't opt in: its own port, and its own connections to somewhere else."""
    with (
        socket.create_server(("0.0.0.0", 0)) as elsewhere,
        kubelet.run_pod(annotations={**CHECKPOINT, "criproxy.io/container-names": "specimen"}) as pod,
    ):
        specimen = Specimen.run(pod, program)
        neighbour = Specimen.run(pod, program, "neighbour", port=PORT + 1)
        gateway = specimen.address.rpartition(".")[0] + ".1"
        neighbour.tell(f"dial {gateway} {elsewhere.getsockname()[1]}")
        elsewhere.settimeout(PATIENCE)
        peer, _ = elsewhere.accept()
        with peer, neighbour.connect() as connection:
            deadline = time.monotonic() + PATIENCE
            while seen(daemon, specimen.id).state != "scaled_down":
                assert time.monotonic() < deadline, "the neighbour's traffic keeps it awake"
                assert connection.ask("count")
                assert neighbour.ask("count")
                peer.sendall(b"count\n")
                assert peer.recv(100)
                time.sleep(0.05)


def test_its_own_connections_do(specimen: Specimen, daemon: Daemon) -> None:
    gateway = specimen.address.rpartition(".")[0] + ".1"
    with socket.create_server((gateway, 0)) as server:
        specimen.tell(f"dial {gateway} {server.getsockname()[1]}")
        server.settimeout(PATIENCE)
        peer, _ = server.accept()
        with peer:
            deadline = time.monotonic() + PATIENCE
            began = last = 0.0
            while not began or time.monotonic() < began + 1.5:
                assert time.monotonic() < deadline, "this machine is too busy"
                now = time.monotonic()
                peer.sendall(b"count\n")
                assert peer.recv(100)
                pause = time.monotonic() - last
                checkpoints = seen(daemon, specimen.id).checkpoints
                # At another pace it may well have slept: from there on once more.
                if pause > 0.25:
                    began, before = now, checkpoints
                assert checkpoints == before
                last = now
                time.sleep(0.1)
            asleep(daemon, specimen)
