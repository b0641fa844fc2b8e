"""Exec, attach and port-forward as kubelet has them: it dials the URL of the answer, and what it dials is relayed."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from specimen import PORT, QUICK, Specimen, eventually, never, seen, wait_for

from lab import LabError
from lab.daemon import Daemon
from lab.kubelet import Kubelet, Pod
from lab.stream import Stream


@pytest.fixture
def specimen(pod: Pod, program: Path) -> Specimen:
    return Specimen.run(pod, program, stdin=True)


def opened(call: str, specimen: Specimen) -> Stream:
    """A stream that has come to the container: containerd answers the client before that."""
    if call == "Exec":
        stream = specimen.container.exec("cat", stdin=True)
        stream.write(b"here\n")
        stream.read_until(b"here\n")
    elif call == "Attach":
        stream = specimen.container.attach(stdin=True)
        heard = specimen.ask("input")
        stream.write(b"here\n")
        eventually(lambda: specimen.ask("input") != heard, "its standard input has brought it")
    else:
        stream = specimen.container.pod.port_forward(PORT)
        stream.read_until(b"ready\n", 0)
    return stream


CALLS = ("Exec", "Attach", "PortForward")


@pytest.mark.parametrize("call", CALLS)
def test_it_is_awake_for_as_long_as_the_stream_lives(call: str, specimen: Specimen, daemon: Daemon) -> None:
    wait_for(daemon, specimen.id, "scaled_down")
    checkpoints = seen(daemon, specimen.id).checkpoints
    with opened(call, specimen):
        eventually(lambda: seen(daemon, specimen.id).reason == f"{call} is under way", "the reason is shown")
        # Longer than it takes to be scaled down, and nothing passes the stream meanwhile.
        never(lambda: seen(daemon, specimen.id).state != "running", "scaled down below a stream", seconds=1.5)
    wait_for(daemon, specimen.id, "scaled_down")
    assert seen(daemon, specimen.id).checkpoints == checkpoints + 1


def test_attach_works_after_many_cycles(specimen: Specimen, daemon: Daemon) -> None:
    wanted: list[str] = []
    for cycle in range(3):
        wait_for(daemon, specimen.id, "scaled_down")
        with specimen.container.attach(stdin=True) as attached:
            attached.write(f"{cycle}\n".encode())
            wanted.append(f"{cycle}/")
            eventually(lambda: specimen.ask("input") == "".join(wanted), "its standard input has brought it")
            specimen.tell(f"say out of {cycle}")
            specimen.tell(f"complain of {cycle}")
            attached.read_until(f"out of {cycle}\n".encode())
            attached.read_until(f"of {cycle}\n".encode(), 2)
        for _ in range(5):
            wait_for(daemon, specimen.id, "scaled_down")
            specimen.ask("count")
    assert seen(daemon, specimen.id).restores == 3 * 6


def test_a_port_forward_holds_every_container_of_the_pod(pod: Pod, program: Path, daemon: Daemon) -> None:
    both = [Specimen.run(pod, program), Specimen.run(pod, program, "other", port=PORT + 1)]
    for specimen in both:
        wait_for(daemon, specimen.id, "scaled_down")
    # Which of them owns the port is said in the stream only.
    with pod.port_forward(PORT + 1) as forwarded:
        forwarded.read_until(b"ready\n", 0)
        for specimen in both:
            reason = "PortForward is under way"
            eventually(lambda s=specimen, r=reason: seen(daemon, s.id).reason == r, "the reason is shown")
    for specimen in both:
        wait_for(daemon, specimen.id, "scaled_down")


def test_all_of_it_arrives(specimen: Specimen, daemon: Daemon) -> None:
    wait_for(daemon, specimen.id, "scaled_down")
    size = 12_000_000
    with specimen.container.exec("sh", "-c", f"head -c {size} /dev/zero; cat >&2", stdin=True) as session:
        session.write(b"x" * 100_000)
        session.read_until(b"x" * 100_000, 2)
        assert session.read_until(bytes(size)) == bytes(size)
    wait_for(daemon, specimen.id, "scaled_down")


def test_the_exit_code_of_a_command(specimen: Specimen, daemon: Daemon) -> None:
    wait_for(daemon, specimen.id, "scaled_down")
    with specimen.container.exec("sh", "-c", "echo out; exit 3") as session:
        assert session.exit_code() == 3
        assert session.channels[1] == b"out\n"


def vanish(stream: Stream, how: str) -> None:
    """A client that is killed, or whose machine resets the connection."""
    connection = stream._connection
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("how", ["killed", "reset"])
@pytest.mark.parametrize("call", CALLS)
def test_a_client_that_is_gone_holds_nothing(call: str, how: str, specimen: Specimen, daemon: Daemon) -> None:
    stream = opened(call, specimen)
    eventually(lambda: seen(daemon, specimen.id).reason == f"{call} is under way", "the reason is shown")
    vanish(stream, how)
    wait_for(daemon, specimen.id, "scaled_down")


def test_who_does_not_come_in_a_second_comes_in_time(specimen: Specimen, daemon: Daemon) -> None:
    wait_for(daemon, specimen.id, "scaled_down")
    url = specimen.container.exec_url("echo", "here")
    never(lambda: seen(daemon, specimen.id).state != "running", "scaled down before the client came", seconds=1.5)
    with Stream.open(url) as session:
        session.read_until(b"here\n")
    # As with containerd alone, a URL is good for one stream.
    with pytest.raises((LabError, OSError)):
        Stream.open(url)


@pytest.mark.parametrize("call", CALLS)
def test_it_ends_while_a_stream_is_open(
    call: str, kubelet: Kubelet, direct: Kubelet, program: Path, daemon: Daemon
) -> None:
    """The client is told what it would be told without us."""
    told = []
    for one, wishes in ((direct, {}), (kubelet, QUICK)):
        with one.run_pod(annotations=wishes) as pod:
            specimen = Specimen.run(pod, program, stdin=True)
            if one is kubelet:
                wait_for(daemon, specimen.id, "scaled_down")
            with opened(call, specimen) as stream:
                specimen.end("exit 5")
                with contextlib.suppress(ConnectionResetError):
                    stream.read_all()
                told.append({channel: data for channel, data in stream.channels.items() if data})
            assert specimen.container.wait().exit_code == 5
    assert told[0] == told[1]


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_they_end_with_the_daemon_and_do_not_delay_it(end: str, specimen: Specimen, daemon: Daemon) -> None:
    specimen.tell("set kept")
    for _ in range(3):
        streams = [opened(call, specimen) for call in CALLS]
        eventually(lambda: "is under way" in seen(daemon, specimen.id).reason, "the reason is shown")
        began = time.monotonic()
        act: Callable[[], None] = getattr(daemon, end)
        act()
        took = time.monotonic() - began
        for stream in streams:
            with contextlib.suppress(ConnectionResetError):
                stream.read_all()
            stream.close()
        daemon.start()
        # It waits 5 s for calls that are under way, and these aren't. (Or the machine was too busy: once more.)
        if took < 5:
            break
    else:
        pytest.fail("they have delayed it each time")
    wait_for(daemon, specimen.id, "scaled_down")
    assert specimen.ask("get") == "kept"
    with opened("Attach", specimen) as attached:
        specimen.tell("say again")
        attached.read_until(b"again\n")
