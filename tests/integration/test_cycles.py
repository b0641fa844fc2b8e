"""Containers that go to sleep and are woken: their state, their connections, and what keeps them awake."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import pg8000.native
from specimen import (
    AWAKE,
    PATIENCE,
    PORT,
    QUICK,
    Specimen,
    comm,
    eventually,
    names,
    never,
    seen,
    status,
    wait_for,
)

from lab import client, dialogues
from lab.containerd import Containerd
from lab.daemon import Daemon
from lab.kubelet import Container, Kubelet, Pod


def asleep(daemon: Daemon, container: Container | Specimen) -> None:
    """It is scaled down, and really so: nothing of the application is there."""
    assert wait_for(daemon, container.id, "scaled_down").tier == "checkpoint"
    lab_container = container.container if isinstance(container, Specimen) else container
    assert [*names(lab_container).values()] == ["init"]


# --- The three applications of the issue ---------------------------------------------------


def test_redis_keeps_its_value_over_five_cycles(pod: Pod, daemon: Daemon) -> None:
    container = pod.run("redis")
    redis = client.Service(pod.ip, 6379, client.redis("APPEND", "word", "x", wanted="1"))
    redis.wait()
    for cycle in range(1, 6):
        asleep(daemon, container)
        client.Service(pod.ip, 6379, client.redis("GET", "word", wanted="x" * cycle)).first_byte()
        client.Service(pod.ip, 6379, client.redis("APPEND", "word", "x", wanted=f"{cycle + 1}")).first_byte()
        known = seen(daemon, container.id)
        assert known.restores >= cycle
        # It may sleep again, where the machine is busy.
        assert known.checkpoints - known.restores in (0, 1)


def test_nginx_comes_back_with_all_its_workers(pod: Pod, daemon: Daemon) -> None:
    container = pod.run("nginx")
    page = client.Service(pod.ip, 80, client.http(wanted="nginx in the lab\n"))
    page.wait()

    def workers() -> list[tuple[str, list[str], list[str]]]:
        found = []
        for pid, name in names(container).items():
            # It may have ended, before it got as far as to be nginx.
            with contextlib.suppress(OSError):
                if name == "nginx":
                    s = status(pid)
                    found.append((s["NSpid"].split()[-1], s["Uid"].split(), s["Groups"].split()))
        return sorted(found)

    # The first of them may have answered before the last has changed its user.
    with container.attach():
        eventually(lambda: [uid[0] for _, uid, _ in workers()].count("33") == 3, "three of them are www-data's")
        before = workers()
    assert [uid[0] for _, uid, _ in before].count("33") == 3
    assert len(before) == 4
    for _ in range(3):
        asleep(daemon, container)
        page.first_byte()
        with container.attach():
            assert workers() == before


def test_a_go_server_goes_on_counting(pod: Pod, daemon: Daemon) -> None:
    container = pod.run("hello")
    client.Service(pod.ip, 8080, client.http(wanted="hello 1\n")).wait()
    for request in range(2, 5):
        asleep(daemon, container)
        client.Service(pod.ip, 8080, client.http(wanted=f"hello {request}\n")).first_byte()


def test_postgresql_with_its_shared_memory(pod: Pod, daemon: Daemon, containerd: Containerd) -> None:
    """One session that is as old as the server, and a new one, with a process of its own, after each wake."""
    containerd.load("postgresql")
    container = pod.run("postgresql")
    application = dialogues.APPLICATIONS["postgresql"]
    eventually(lambda: _prepared(application, pod.ip), "it answers")
    with application.open(_connected(pod.ip, application.port), "old") as old:
        for cycle in range(1, 4):
            asleep(daemon, container)
            old.ask(cycle)
            asleep(daemon, container)
            with application.open(_connected(pod.ip, application.port), f"new {cycle}") as new:
                new.ask(1)
    asleep(daemon, container)
    with _connected(pod.ip, application.port) as sock:
        assert application.counts(sock, container) == {"old": 3, "new 1": 1, "new 2": 1, "new 3": 1}


def _prepared(application: dialogues.Application, address: str) -> bool:
    try:
        with _connected(address, application.port) as sock:
            application.prepare(sock)
    except (OSError, pg8000.native.Error):
        return False  # it isn't there yet
    return True


def _connected(address: str, port: int) -> socket.socket:
    return socket.create_connection((address, port), timeout=dialogues.PATIENCE)


# --- What wakes ---------------------------------------------------


def test_the_first_packet_wakes_where_the_server_speaks_first(specimen: Specimen, daemon: Daemon) -> None:
    for _ in range(3):
        asleep(daemon, specimen)
        # Greets before anything is asked: this client only reads.
        with specimen.connect():
            pass


def test_a_client_sees_its_address_and_is_seen_by_it(
    specimen: Specimen, daemon: Daemon, kubelet: Kubelet, containerd: object
) -> None:
    asleep(daemon, specimen)
    with specimen.connect() as connection:
        assert connection.ask("peer") == f"::ffff:{connection.local[0]} {connection.local[1]}"
    with kubelet.run_pod() as other:
        shell = other.run("busybox", command=["sleep", "600"])
        asleep(daemon, specimen)
        answer = shell.exec_sync("sh", "-c", f"echo peer | nc -w 60 {specimen.address} {PORT}")
        assert answer.stdout.splitlines()[0] == "ready"
        assert answer.stdout.splitlines()[1].split()[0] == f"::ffff:{other.ip}"


def test_ipv6_wakes(specimen: Specimen, daemon: Daemon, pod: Pod) -> None:
    address = next(ip for ip in pod.ips if ":" in ip)
    specimen.tell("set kept")
    specimen.address = address
    for _ in range(2):
        asleep(daemon, specimen)
        with specimen.connect() as connection:
            assert connection.ask("get") == "kept"
            assert connection.ask("peer") == f"{connection.local[0]} {connection.local[1]}"


def test_a_datagram_wakes_where_its_port_is_named(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    ports = {"criproxy.io/ports-map": f"specimen={PORT},{PORT}/udp"}
    with kubelet.run_pod(annotations={**QUICK, **ports}) as pod, socket.socket(type=socket.SOCK_DGRAM) as udp:
        specimen = Specimen.run(pod, program)
        udp.settimeout(PATIENCE)
        for count in range(1, 4):
            asleep(daemon, specimen)
            udp.sendto(b"?", (specimen.address, PORT))
            assert udp.recv(100) == b"%d\n" % count


def test_a_neighbour_in_the_pod_wakes_it(pod: Pod, specimen: Specimen, daemon: Daemon) -> None:
    shell = pod.run("busybox", "shell", command=["sleep", "600"])
    for address in ("127.0.0.1", "::1", pod.ip):
        asleep(daemon, specimen)
        # Not by exec, which could wake more than its own container: the shell's process is held up by nothing of ours.
        answer = shell.exec_sync("sh", "-c", f"echo count | nc -w 60 {address} {PORT}")
        assert answer.stdout.splitlines()[0] == "ready"
    assert specimen.ask("count") == "4"
    assert seen(daemon, shell.id).checkpoints == 0


# --- Connections that are there already ---------------------------------------------------


def test_a_connection_lives_on_across_cycles(specimen: Specimen, daemon: Daemon) -> None:
    with specimen.connect() as connection:
        for count in range(1, 7):
            # In one, for it might sleep again between the two.
            connection.send("count\npeer")
            assert connection.answer() == str(count)
            assert connection.answer() == f"::ffff:{connection.local[0]} {connection.local[1]}"
            asleep(daemon, specimen)
    known = seen(daemon, specimen.id)
    assert (known.checkpoints, known.restores) == (6, 5)


def test_a_connection_is_the_same_after_a_hundred_checkpoints(kubelet: Kubelet, daemon: Daemon) -> None:
    """One socket of the client from before the first of them, and one of redis', which knows the client's address."""
    redis = dialogues.APPLICATIONS["redis"]
    with kubelet.run_pod(annotations={**QUICK, "criproxy.io/scaledown-duration": "20ms"}) as pod:
        container = pod.run("redis")
        client.Service(pod.ip, redis.port, client.redis("PING", wanted="PONG")).wait()
        with _connected(pod.ip, redis.port) as sock, dialogues.RedisSession(sock, "the one") as session:
            number = session.client_id()
            for cycle in range(1, 101):
                # Counts, and compares the client's address with that of this socket.
                session.ask(cycle)
                wait_for(daemon, container.id, "scaled_down")
            assert session.client_id() == number
        assert seen(daemon, container.id).restores >= 100


def test_an_outgoing_connection_lives_on(specimen: Specimen, daemon: Daemon, containerd: object) -> None:
    gateway = specimen.address.rpartition(".")[0] + ".1"
    with socket.create_server((gateway, 0)) as server:
        server.settimeout(PATIENCE)
        specimen.tell(f"dial {gateway} {server.getsockname()[1]}")
        peer, _ = server.accept()
        with peer:
            peer.settimeout(PATIENCE)
            for word in ("one", "two", "three"):
                asleep(daemon, specimen)
                # What it dialled speaks, and wakes it.
                peer.sendall(f"echo {word}\n".encode())
                assert peer.recv(100) == f"{word}\n".encode()


def test_the_end_of_a_connection_reaches_it_and_does_not_wake(specimen: Specimen, daemon: Daemon) -> None:
    connection = specimen.connect()
    connection.ask("count")
    asleep(daemon, specimen)
    before = seen(daemon, specimen.id)
    connection.close()
    never(lambda: seen(daemon, specimen.id).restores > before.restores, "the end of a connection woke it")
    # It reads the end with what it reads next, and forgets the client.
    eventually(lambda: specimen.ask("clients") == "1", "the connection has ended for the server, too")
    assert specimen.ask("count") == "2"


# --- What keeps it awake ---------------------------------------------------


def test_using_the_processor_counts_as_activity(specimen: Specimen, daemon: Daemon) -> None:
    asleep(daemon, specimen)
    specimen.tell("spin")
    eventually(lambda: "of a core" in seen(daemon, specimen.id).reason, "it is awake because it works")
    never(lambda: seen(daemon, specimen.id).state == "scaled_down", "it was scaled down while it worked", seconds=1)
    assert seen(daemon, specimen.id).checkpoints == 1
    specimen.tell("rest")
    asleep(daemon, specimen)


def test_a_duration_of_zero_is_never(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations=AWAKE) as pod:
        specimen = Specimen.run(pod, program)
        daemon.wait_for(specimen.id, "running")  # it is `starting` at first
        never(lambda: seen(daemon, specimen.id).state != "running", "it was scaled down", seconds=1)
        assert "never" in seen(daemon, specimen.id).reason


def test_what_waits_to_be_accepted_keeps_it_awake_and_does_not_shut_others_out(
    specimen: Specimen, daemon: Daemon
) -> None:
    with specimen.connect() as control:
        assert control.ask("deaf") == "ok"
        with socket.create_connection((specimen.address, PORT), timeout=PATIENCE) as waiting:
            reason = "waits to be accepted"
            eventually(lambda: reason in seen(daemon, specimen.id).reason, "it is awake because a client waits")
            before, began = daemon.service.output().count("-> parking"), time.monotonic()
            never(
                lambda: seen(daemon, specimen.id).state == "scaled_down", "a client in the queue was frozen", seconds=2
            )
            # Each try holds new connections up for a quarter of a second: it must not be the usual state.
            tries = daemon.service.output().count("-> parking") - before
            assert tries <= 1 + time.monotonic() - began
            assert control.ask("hear") == "ok"
            waiting.settimeout(PATIENCE)
            assert waiting.recv(100) == b"ready\n"
    asleep(daemon, specimen)


# --- Several containers in a pod ---------------------------------------------------


def test_only_the_named_container_is_scaled_down(kubelet: Kubelet, program: Path, daemon: Daemon) -> None:
    with kubelet.run_pod(annotations={**QUICK, "criproxy.io/container-names": "one"}) as pod:
        one = Specimen.run(pod, program, "one")
        two = Specimen.run(pod, program, "two", port=PORT + 1)
        before = two.init()
        asleep(daemon, one)
        # No init of ours, no mount of ours, nothing in the status.
        assert comm(two.init()) == "specimen"
        assert not Path(f"/proc/{two.init()}/root/.criproxy").exists()
        assert two.id not in daemon.known()
        # Its traffic wakes nobody, and it goes on all the time.
        for count in range(1, 4):
            assert two.ask("count") == str(count)
        assert seen(daemon, one.id).state == "scaled_down"
        assert two.init() == before
        assert one.ask("count") == "1"


def test_two_containers_of_a_pod_sleep_and_wake_each_for_itself(
    kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    with kubelet.run_pod(annotations=QUICK) as pod:
        one = Specimen.run(pod, program, "one")
        two = Specimen.run(pod, program, "two", port=PORT + 1)
        one.tell("set first")
        two.tell("set second")
        asleep(daemon, one)
        asleep(daemon, two)
        before, pauses = seen(daemon, one.id).restores, 0
        with one.connect() as connection:
            last = time.monotonic()
            for _ in range(20):
                assert connection.ask("get") == "first"
                # As long as it is asked it stays awake, unless this machine lets the next question wait.
                now = time.monotonic()
                pauses += now - last > 0.2
                last = now
            assert 1 <= seen(daemon, one.id).restores - before <= 1 + pauses
            assert seen(daemon, two.id).state == "scaled_down"
        asleep(daemon, one)
        assert two.ask("get") == "second"
        assert seen(daemon, one.id).state == "scaled_down"
        # Both at once.
        asleep(daemon, two)
        with one.connect() as first, two.connect() as second:
            assert (first.ask("get"), second.ask("get")) == ("first", "second")


# --- When CRIU refuses ---------------------------------------------------


def test_a_dump_that_fails_leaves_it_running_and_is_tried_less_and_less_often(
    kubelet: Kubelet, program: Path, daemon: Daemon
) -> None:
    annotations = {**QUICK, "criproxy.io/tier": "checkpoint"}
    outside = program.parent / "outside.sock"
    with kubelet.run_pod(annotations=annotations) as pod, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(outside))
        listener.listen()
        patient = Specimen.run(pod, program, "patient")
        other = Specimen.run(pod, program, "other", port=PORT + 1)
        for specimen in (patient, other):
            specimen.tell("set precious")
            specimen.tell("connect /specimen/outside.sock")
        pids = patient.pid(), other.pid()

        def reason(specimen: Specimen) -> str:
            return seen(daemon, specimen.id).reason

        # CRIU's reason, in words, and when it is tried again.
        for specimen in (patient, other):
            eventually(lambda s=specimen: "checkpoint failed, next try in 5 s" in reason(s), "a first dump fails")
            assert "unix socket" in reason(specimen)
            assert seen(daemon, specimen.id).checkpoint_bytes == 0
        # The state is there, in the same process.
        assert (patient.ask("get"), patient.pid(), other.pid()) == ("precious", *pids)
        other.tell("disconnect")
        eventually(lambda: "next try in 10 s" in reason(patient), "the second pause is longer")
        wait_for(daemon, patient.id, "running")
        assert (patient.ask("get"), patient.pid()) == ("precious", pids[0])
        # Nothing is in the way of the other one any more.
        asleep(daemon, other)
        assert other.ask("get") == "precious"
        eventually(lambda: reason(patient).startswith("checkpoint failed"), "the patient is as before")
    outside.unlink()


def test_what_hangs_on_somebody_outside_is_not_frozen_either(
    pod: Pod, specimen: Specimen, program: Path, daemon: Daemon
) -> None:
    outside = program.parent / "other.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(outside))
        listener.listen()
        specimen.tell("connect /specimen/other.sock")
        peer, _ = listener.accept()
        with peer:

            def failed() -> str:
                reason = seen(daemon, specimen.id).reason
                return reason if "failed" in reason else ""

            reason = eventually(failed, "a failure")
            assert "checkpoint failed" in reason
            assert "freeze failed" in reason
            wait_for(daemon, specimen.id, "running")
    outside.unlink()
