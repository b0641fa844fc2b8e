"""What `kubectl logs` shows of a container that comes and goes: kubelet reads the files that containerd writes."""

from __future__ import annotations

import datetime
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from specimen import QUICK, Specimen, asleep, eventually, seen

from lab.daemon import Daemon
from lab.kubelet import Container, Kubelet

LONGEST = 16 << 10
"""What containerd writes as one line of a log; a longer one is cut into parts."""


@dataclass(frozen=True)
class Line:
    at: float
    """Seconds since the epoch."""
    stream: str
    partial: bool
    text: str


class Log:
    """The container's log with the files that rotation has left, which it does as kubelet."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._old: list[Path] = []

    def rotate(self) -> None:
        self._old.append(self._container.log.rename(self._container.log.with_suffix(f".{len(self._old)}")))
        self._container.reopen_log()

    def lines(self, stream: str) -> list[Line]:
        return [line for file in (*self._old, self._container.log) for line in _read(file) if line.stream == stream]

    def texts(self, stream: str) -> list[str]:
        """With the parts of long lines put together again."""
        text = "".join(line.text + ("" if line.partial else "\n") for line in self.lines(stream))
        return text.splitlines()


def _read(file: Path) -> Iterator[Line]:
    # The last line may be half there.
    for line in file.read_text().rpartition("\n")[0].splitlines():
        at, stream, tag, *text = line.split(" ", 3)
        assert tag in ("P", "F"), line
        yield Line(datetime.datetime.fromisoformat(at).timestamp(), stream, tag == "P", "".join(text))


@pytest.fixture
def specimen(kubelet: Kubelet, program: Path) -> Iterator[Specimen]:
    with kubelet.run_pod(annotations=QUICK) as pod:
        yield Specimen.run(pod, program)


def test_no_line_is_lost_and_none_is_doubled_whatever_happens_between(specimen: Specimen, daemon: Daemon) -> None:
    log = Log(specimen.container)
    out, err = ["listening"], []
    began = time.time()
    for cycle in range(4):
        # A line that is begun before a checkpoint and ended after it is one line, also over a rotation.
        specimen.tell(f"begin-line begun in {cycle}, ")
        asleep(daemon, specimen)
        if cycle % 2:
            log.rotate()
            assert seen(daemon, specimen.id).state == "scaled_down"
        specimen.tell("say and ended")
        specimen.tell(f"complain about {cycle}")
        flood = threading.Thread(target=specimen.tell, args=("flood 2000",))
        flood.start()
        log.rotate()
        flood.join()
        out += [f"begun in {cycle}, and ended", *(f"line {number}" for number in range(2000))]
        err += [f"about {cycle}"]
    asleep(daemon, specimen)
    assert seen(daemon, specimen.id).restores >= 4
    for stream, wanted in (("stdout", out), ("stderr", err)):
        eventually(lambda s=stream, w=wanted: log.texts(s)[-1:] == w[-1:], "the last line is there")  # type: ignore[misc]
    assert log.texts("stdout") == out
    assert log.texts("stderr") == err
    for stream in ("stdout", "stderr"):
        times = [line.at for line in log.lines(stream)]
        # The machine's clock may be put right meanwhile.
        assert all(earlier < later + 1 for earlier, later in itertools.pairwise(times))
        assert began - 5 < times[0] <= times[-1] <= time.time() + 5


def test_a_long_line_over_a_checkpoint(specimen: Specimen, daemon: Daemon) -> None:
    log = Log(specimen.container)
    for cycle in range(6):
        specimen.tell(f"begin-line {cycle:04000d}")
        if cycle % 2:
            asleep(daemon, specimen)
    specimen.tell("say .")
    eventually(lambda: log.texts("stdout")[-1].endswith("."), "the line has its end")
    parts = log.lines("stdout")[1:]
    assert [(line.partial, len(line.text)) for line in parts] == [(True, LONGEST), (False, 6 * 4000 + 1 - LONGEST)]
    assert log.texts("stdout")[1] == "".join(f"{cycle:04000d}" for cycle in range(6)) + "."


def test_a_line_s_time_is_when_it_was_written(specimen: Specimen, daemon: Daemon) -> None:
    log = Log(specimen.container)
    for word in ("one", "two", "three"):
        asleep(daemon, specimen)
        time.sleep(0.5)
        before = time.time() - 0.25
        specimen.tell(f"say {word}")
        eventually(lambda word=word: log.texts("stdout")[-1] == word, "it is in the log")  # type: ignore[misc]
        assert before <= log.lines("stdout")[-1].at <= time.time() + 0.25
