"""The end of a container that sleeps: what it has time for, and what it loses where it can't come back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from specimen import QUICK, Specimen, container_pids, criu_at_work, eventually, wait_for

from lab.daemon import Daemon
from lab.kubelet import Kubelet, Pod

KILLED = 128 + signal.SIGKILL


@pytest.fixture
def pod(kubelet: Kubelet, request: pytest.FixtureRequest) -> Iterator[Pod]:
    with kubelet.run_pod(annotations={**QUICK, **getattr(request, "param", {})}) as running:
        yield running


def with_annotations(**annotations: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "pod", [{f"criproxy.io/{key}": value for key, value in annotations.items()}], indirect=True, ids=[""]
    )


class Log:
    """What the daemon has said since this was made."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._begin = len(daemon.service.output())

    def lines(self, *words: str) -> list[str]:
        said = self._daemon.service.output()[self._begin :].splitlines()
        return [line for line in said if all(word in line for word in words)]


@with_annotations(**{"lazy-pages": "never"})
def test_the_grace_period_begins_when_it_is_awake(pod: Pod, program: Path, daemon: Daemon) -> None:
    # Big enough for CRIU to be caught in the middle of the restore.
    specimen = Specimen.run(pod, program, memory=400)
    specimen.tell("on-term 9")
    wait_for(daemon, specimen.id, "scaled_down")
    stopping = threading.Thread(target=specimen.container.stop, args=(1,))
    stopping.start()
    wait_for(daemon, specimen.id, "restoring")
    init = specimen.init()
    (criu,) = eventually(lambda: criu_at_work(init), "CRIU is at work")
    os.kill(criu, signal.SIGSTOP)
    threading.Timer(2.5, os.kill, (criu, signal.SIGCONT)).start()
    stopping.join()
    assert specimen.container.status().exit_code == 9
    specimen.has_said("caught 15")


@with_annotations(**{"on-stop": "kill"})
def test_on_stop_kill_ends_what_sleeps_as_it_is(pod: Pod, program: Path, daemon: Daemon) -> None:
    specimen = Specimen.run(pod, program)
    wait_for(daemon, specimen.id, "scaled_down")
    said = Log(daemon)
    specimen.container.stop(60)
    assert (specimen.container.status().exit_code, specimen.log) == (KILLED, ["listening"])
    assert not said.lines("restoring")
    assert not container_pids(specimen.container)
    folder = Path(daemon.state_dir, "containers", specimen.id)
    eventually(lambda: not list(folder.glob("checkpoint*")), "its checkpoint is deleted")


@with_annotations(**{"on-stop": "kill", "scaledown-duration": "0"})
def test_on_stop_kill_is_nothing_to_what_is_awake(pod: Pod, program: Path) -> None:
    specimen = Specimen.run(pod, program)
    specimen.tell("on-term 9")
    specimen.container.stop(60)
    assert specimen.container.status().exit_code == 9
    specimen.has_said("caught 15")


def incomplete(checkpoint: Path) -> None:
    (checkpoint / "inventory.img").unlink()


def damaged(checkpoint: Path) -> None:
    for image in checkpoint.glob("core-*.img"):
        image.write_bytes(b"?")


@pytest.mark.parametrize("spoil", [incomplete, damaged])
def test_what_can_not_be_restored_is_killed_and_its_loss_is_told(
    spoil: Callable[[Path], None], pod: Pod, program: Path, daemon: Daemon
) -> None:
    specimen = Specimen.run(pod, program)
    wait_for(daemon, specimen.id, "scaled_down")
    spoil(daemon.state_dir / "containers" / specimen.id / "checkpoint")
    said = Log(daemon)
    specimen.container.stop(60)
    assert specimen.container.status().exit_code == KILLED
    # Not started afresh: it would have said that it listens once more.
    assert specimen.log == ["listening"]
    (line,) = eventually(lambda: said.lines("ERROR", "unsaved state was lost"), "its loss is told")
    assert f"default/{pod.name}/specimen" in line
